"""pytest tests/test_inverted.py — sparse search is scipy's product, in one order, on any number of
processes."""

import os
import signal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from gloo import spawn_two
from scipy.sparse import csr_matrix, vstack

from lib import inverted, search
from lib.embeddings import Embeddings, finish_embeddings, write_shard
from lib.files import UserError
from lib.inverted import Inverted, open_sparse

N, V, Q = 331, 50, 12


def store(folder, matrix, shard_rows=100, **meta):
    for number, start in enumerate(range(0, matrix.shape[0], shard_rows)):
        part = matrix[start : start + shard_rows]
        write_shard(folder, number, part, [f"d{start + i}" for i in range(part.shape[0])])
    facts = {
        "head": "sparse",
        "count": matrix.shape[0],
        "dim": matrix.shape[1],
        "model_hash": "m",
        "model": str(folder),
    }
    finish_embeddings(folder, {**facts, **meta})
    return Embeddings(folder)


def naive(queries, passages, k):
    """Every pair, sorted in Python: score descending, then row; passages without a common term left
    out."""
    products = (queries.astype(np.float64) @ passages.astype(np.float64).T).toarray()
    scores = np.full((len(products), k), -np.inf, dtype=np.float32)
    rows = np.full((len(products), k), -1)
    for q, line in enumerate(products):
        best = sorted(((-score, row) for row, score in enumerate(line) if score > 0))[:k]
        rows[q, : len(best)] = [row for _, row in best]
        scores[q, : len(best)] = [-score for score, _ in best]
    return scores, rows


def draw(rows, terms, seed, whole=False):
    """Few terms are frequent and many rare; whole numbers give ties everywhere and exact sums."""
    generator = np.random.default_rng(seed)
    has = generator.random((rows, terms)) < 0.7 / (1 + np.arange(terms)) ** 0.6
    weights = (
        generator.integers(1, 4, (rows, terms))
        if whole
        else generator.lognormal(0, 0.8, (rows, terms))
    )
    return csr_matrix(np.where(has, weights, 0).astype(np.float32))


@pytest.fixture
def tiles(monkeypatch):
    """Tiles of fewer rows than a shard, which end within shards; threads that get several parts of
    the queries."""
    monkeypatch.setattr(inverted, "TILE", 64)
    monkeypatch.setattr(inverted, "QUERIES", 5)


@pytest.fixture
def tied():
    """Each passage several times, some empty, one term in all, one in none; a query without a term,
    one with an unused term alone, one with one frequent term."""
    passages = draw(N // 3, V, 0, whole=True).tolil()
    passages[:, 7], passages[:, 8], passages[::10] = 1, 0, 0
    queries = draw(Q, V, 1, whole=True).tolil()
    queries[3], queries[4], queries[5] = 0, 0, 0
    queries[4, 8], queries[5, 7] = 1, 1
    return queries.tocsr(), vstack(
        [passages.tocsr()] * 3 + [draw(N - N // 3 * 3, V, 2, whole=True)], "csr"
    )


@pytest.mark.parametrize("k", [1, 5, 60, N, N + 9])
def test_order_with_ties_at_the_cut(tmp_path, tiles, tied, k):
    queries, passages = tied
    found = open_sparse(store(tmp_path / "p", passages), tmp_path / "index")
    scores, rows = found.search(queries, k)
    expected = naive(queries, passages, k)
    assert (rows == expected[1]).all() and (scores == expected[0]).all()
    assert scores.dtype == np.float32 and rows.dtype == np.int64 and scores.shape == (Q, k)
    assert (rows[3:5] == -1).all() and np.isneginf(scores[3:5]).all()


def test_scores_are_the_products(tmp_path, tiles):
    queries, passages = draw(Q, V, 3), draw(N, V, 4)
    found = open_sparse(store(tmp_path / "p", passages), tmp_path / "index")
    scores, rows = found.search(queries, N)
    exact = (queries @ passages.T).toarray()
    listed = rows >= 0
    true = np.take_along_axis(exact, np.maximum(rows, 0), 1)
    np.testing.assert_allclose(scores[listed], true[listed], rtol=1e-5)
    assert (listed.sum(1) == (exact > 0).sum(1)).all()
    given = found.score(queries, [*rows[:-1, :40], rows[-1, 5:25][::-1]])  # in any order
    assert (
        all((given[q] == scores[q, :40]).all() for q in range(Q - 1))
        and (given[-1] == scores[-1, 5:25][::-1]).all()
    )
    absent = [np.flatnonzero(line == 0) for line in exact]
    assert all((part == 0).all() for part in found.score(queries, absent)) and sum(map(len, absent))
    assert found.search(queries[:0], 3)[0].shape == (0, 3)


def test_bytes_per_posting(tmp_path):
    generator = np.random.default_rng(0)
    has = generator.random((3000, 2000)) < np.minimum(0.7, 6 / (1 + np.arange(2000)) ** 0.9)
    passages = csr_matrix(has * generator.random(has.shape, np.float32))
    open_sparse(store(tmp_path / "p", passages), tmp_path / "index")
    bytes_of = {path.stem: path.stat().st_size for path in (tmp_path / "index").glob("*.bin")}
    assert bytes_of["documents"] + bytes_of["weights"] == 6 * passages.nnz
    assert sum(bytes_of.values()) == 6 * passages.nnz + 12 * 2000 + 24


def test_order_of_shards_tiles_and_pieces_of_queries_changes_nothing(tmp_path, monkeypatch):
    queries, passages = draw(Q, V, 5), draw(N, V, 6)
    found = []
    for number, (tile, shard_rows) in enumerate([(1 << 15, 1000), (64, 100), (50, 7), (1, 331)]):
        monkeypatch.setattr(inverted, "TILE", tile)
        monkeypatch.setattr(search, "QUERIES_AT_A_TIME", (1 + number, 1 + number))
        corpus = store(tmp_path / f"p{number}", passages, shard_rows)
        found.append(open_sparse(corpus, tmp_path / f"index{number}").search(queries, 30))
    assert all((a == b).all() for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("world", [2, 3, 9])
def test_ranges_of_rows_are_merged_to_the_same_bits(tmp_path, tiles, monkeypatch, world):
    queries, passages = draw(Q, V, 5), draw(N, V, 6)
    whole = open_sparse(store(tmp_path / "p", passages), tmp_path / "index")
    parts = []
    for rank in range(world):
        monkeypatch.setattr(search, "world", lambda rank=rank: (rank, world))
        part = Inverted(tmp_path / "index", whole.as_matrix)
        parts.append(part._best(queries, 40))
    monkeypatch.setattr(search, "all_gather", lambda keys: torch.cat(parts))
    monkeypatch.setattr(search.dist, "get_backend", lambda: "gloo")
    merged = search.unpack(search.merge(parts[0], 40))
    monkeypatch.undo()
    assert all((a == b).all() for a, b in zip(merged, whole.search(queries, 40), strict=True))
    assert (
        parts[0].unique().numel() < parts[0].numel() or world < 9
    )  # 9 processes, 6 tiles: some have none


def one_of_two(rank, folder):
    inverted.TILE = 64
    Accelerator(cpu=True)
    found = open_sparse(Embeddings(f"{folder}/p"), f"{folder}/index")
    scores, rows = found.search(draw(Q, V, 5), 40)
    np.savez(f"{folder}/{rank}.npz", scores=scores, rows=rows)
    with pytest.raises(UserError, match="bad: a weight is negative or not finite"):
        open_sparse(Embeddings(f"{folder}/bad"), f"{folder}/other")


def test_two_processes_find_what_one_finds(tmp_path, tiles):
    corpus = store(tmp_path / "p", draw(N, V, 6))
    store(tmp_path / "bad", -draw(N, V, 6))  # both say why, and neither waits for the other
    spawn_two(one_of_two, str(tmp_path))
    assert not (tmp_path / "other").exists()
    scores, rows = open_sparse(corpus, tmp_path / "alone").search(draw(Q, V, 5), 40)
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        assert (found["scores"] == scores).all() and (found["rows"] == rows).all()


def test_an_index_is_kept_and_not_mixed_up(tmp_path, tiles):
    queries, passages = draw(Q, V, 5), draw(N, V, 6)
    first = open_sparse(store(tmp_path / "p", passages), tmp_path / "index").search(queries, 9)
    stamp = (tmp_path / "index" / "manifest.json").stat().st_mtime_ns
    moved = store(tmp_path / "moved", passages)  # the same vectors at another place
    again = open_sparse(moved, tmp_path / "index")
    assert (tmp_path / "index" / "manifest.json").stat().st_mtime_ns == stamp
    assert all(isinstance(part, np.memmap) for part in again.lists)
    assert all((a == b).all() for a, b in zip(first, again.search(queries, 9), strict=True))
    assert {path.suffix for path in (tmp_path / "index").iterdir()} == {".bin", ".json"}
    with pytest.raises(UserError, match="an index with model_hash m, not other"):
        open_sparse(store(tmp_path / "o", passages, model_hash="other"), tmp_path / "index")
    (tmp_path / "index" / "manifest.json").write_text("[1]")
    with pytest.raises(UserError, match="an index with head None, not sparse — remove it"):
        open_sparse(moved, tmp_path / "index")
    (tmp_path / "index" / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json: no such file — check the path"):
        open_sparse(moved, tmp_path / "index")


def test_a_killed_build_leaves_no_index(tmp_path, tiles):
    corpus = store(tmp_path / "p", draw(N, V, 6))
    child = os.fork()
    if child == 0:
        tiles = list(inverted._tiles(corpus))
        inverted._tiles = lambda corpus: (
            os.kill(os.getpid(), signal.SIGKILL) if n else t for n, t in enumerate(tiles)
        )
        open_sparse(corpus, tmp_path / "index")
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (
        len(list(tmp_path.glob(".tmp-*-index/weights.bin"))) == 1
        and not (tmp_path / "index").exists()
    )
    scores, _ = open_sparse(corpus, tmp_path / "index").search(draw(Q, V, 5), 9)
    assert np.isfinite(scores).all()


def test_bad_input_is_named(tmp_path, tiles):
    passages = draw(N, V, 6)
    found = open_sparse(store(tmp_path / "p", passages), tmp_path / "index")
    with pytest.raises(AssertionError, match="of different checkpoints"):
        found.search(csr_matrix((1, V + 1), dtype=np.float32), 3)
    for bad in (np.nan, np.inf, -1):
        queries = draw(Q, V, 5)
        queries.data[queries.indptr[9]] = bad
        wrong = "the queries: a weight is negative or not finite"
        with pytest.raises(UserError, match=wrong):
            found.search(queries, 3)
        with pytest.raises(UserError, match=wrong):
            found.score(queries, [[0]] * Q)
        vectors = passages.copy()
        vectors.data[vectors.indptr[205]] = bad
        with pytest.raises(UserError, match=f"p{bad}: a weight is negative or not finite"):
            open_sparse(store(tmp_path / f"p{bad}", vectors), tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_passages_without_any_term_and_entries_given_twice(tmp_path):
    empty = open_sparse(
        store(tmp_path / "p", csr_matrix((5, V), dtype=np.float32)), tmp_path / "index"
    )
    scores, rows = empty.search(draw(Q, V, 5), 3)
    assert (
        (rows == -1).all()
        and np.isneginf(scores).all()
        and (empty.score(draw(1, V, 5), [[0, 4]])[0] == 0).all()
    )
    twice = csr_matrix((np.float32([1, 2, 0]), [4, 4, 5], [0, 3]), shape=(1, V))
    found = open_sparse(store(tmp_path / "q", twice), tmp_path / "other")
    assert found.search(twice, 1)[0] == 9 and found.score(twice, [[0]])[0] == 9 and twice.nnz == 3


def test_memory_of_the_build_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    """Tiles are made from blocks as they come: never more than one tile and one block are held."""
    monkeypatch.setattr(inverted, "TILE", 64)
    corpus = store(tmp_path / "p", draw(N, V, 6))
    sizes = [tile.shape[0] for tile in inverted._tiles(corpus)]
    assert sizes == [64, 64, 64, 64, 64, 11]
    whole = vstack(list(inverted._tiles(corpus)), "csr")
    assert (whole != corpus.take(np.arange(N))).nnz == 0


@pytest.mark.parametrize("problem", ["indices", "negative", "indptr", "shape", "data", "text"])
def test_damaged_sparse_shards_end_in_one_line(tmp_path, problem):
    corpus = store(tmp_path / "p", draw(N, V, 6))
    path = tmp_path / "p" / "shard-00002.npz"
    parts = dict(np.load(path))
    spoil = {
        "indices": lambda: parts["indices"].__setitem__(5, V),
        "negative": lambda: parts["indices"].__setitem__(5, -1),
        "indptr": lambda: parts["indptr"].__setitem__(5, 3),
        "shape": lambda: parts.update(shape=np.array([100, V, 1])),
        "data": lambda: parts.update(data=parts["data"][:-1]),
        "text": lambda: parts.update(data=np.array(["x"] * len(parts["data"]))),
    }
    spoil[problem]()
    np.savez(path, **parts)
    with pytest.raises(UserError, match="shard-00002.npz: damaged .* — remove the folder") as error:
        open_sparse(Embeddings(tmp_path / "p"), tmp_path / "index")
    assert "\n" not in str(error.value) and not (tmp_path / "index").exists()
    assert len(corpus) == N


def test_an_index_of_other_vectors_with_the_same_facts_is_refused(tmp_path):
    passages = draw(N, V, 6)
    open_sparse(store(tmp_path / "p", passages), tmp_path / "index")
    passages.data[7] += 1
    with pytest.raises(UserError, match="index: an index with content .*, not .* — remove it"):
        open_sparse(store(tmp_path / "p", passages), tmp_path / "index")


def test_sparse_vectors_that_are_not_finite_are_refused_with_their_id(tmp_path):
    passages = draw(N, V, 6)
    passages.data[passages.indptr[205]] = np.nan
    corpus = store(tmp_path / "p", passages)
    assert corpus.take([3, 7, 3]).shape == (3, V)
    with pytest.raises(UserError, match="p: the vector of d205 is not finite — remove the folder"):
        corpus.take([3, 205, 7])
