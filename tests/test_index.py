"""Search is exact, also for ties at the cut; BM25 is Lucene's formula. Run: python -m pytest
tests/test_index.py"""

import math

import numpy as np
import pytest
import torch

from lib import search
from lib.bm25 import open_bm25
from lib.bm25 import terms as index_terms
from lib.embeddings import Embeddings, finish_embeddings, write_shard
from lib.files import UserError
from lib.search import EMPTY, DenseIndex, scan_device, unpack
from lib.texts import open_texts, write_texts


def store(folder, vectors, shard_rows=7):
    for number, start in enumerate(range(0, len(vectors), shard_rows)):
        part = vectors[start : start + shard_rows]
        write_shard(folder, number, part, [f"d{start + i}" for i in range(len(part))])
    finish_embeddings(folder, {"count": len(vectors), "dim": vectors.shape[1]})
    return Embeddings(folder)


def naive(queries, vectors, k):
    """Every pair, sorted in Python: score descending, then row."""
    scores = queries.astype(np.float32) @ vectors.astype(np.float32).T
    rows = np.array([sorted(range(len(vectors)), key=lambda r: (-s[r], r))[:k] for s in scores])
    pad = max(k - len(vectors), 0)
    scores = np.pad(
        np.take_along_axis(scores, rows, 1), ((0, 0), (0, pad)), constant_values=-np.inf
    )
    return scores, np.pad(rows, ((0, 0), (0, pad)), constant_values=-1)


@pytest.fixture
def tied():
    """Small whole numbers: many equal scores, and each vector several times."""
    draw = np.random.default_rng(0)
    return draw.integers(-2, 3, (9, 4)).astype(np.float32), draw.integers(-2, 3, (60, 4)).astype(
        np.float32
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("k", [1, 5, 23, 60, 75])
def test_exact_with_ties_at_the_cut(tmp_path, monkeypatch, tied, dtype, k):
    queries, vectors = tied
    monkeypatch.setattr(search, "ROW_TILE", 4)  # less than a shard
    monkeypatch.setattr(search, "QUERY_TILE", 2)
    monkeypatch.setattr(search, "QUERIES_AT_A_TIME", (4, 4))
    scores, rows = DenseIndex(store(tmp_path, vectors.astype(dtype))).search(queries, k)
    expected = naive(queries, vectors, k)
    assert (scores == expected[0]).all() and (rows == expected[1]).all()


@pytest.mark.parametrize("k", [1, 5, 23, 75])
def test_the_path_for_gpus_gives_the_same_order(tied, k):
    queries, vectors = tied
    best = torch.full((9, k), EMPTY)
    for row in range(0, 60, 11):
        best = scan_device(torch.from_numpy(queries @ vectors[row : row + 11].T), row, best, k)
    scores, rows = unpack(best)
    expected = naive(queries, vectors, k)
    assert (scores == expected[0]).all() and (rows == expected[1]).all()


def test_random_vectors(tmp_path):
    draw = np.random.default_rng(1)
    queries = draw.standard_normal((20, 16), np.float32)
    vectors = draw.standard_normal((500, 16), np.float32)
    corpus = store(tmp_path, vectors, 64)
    scores, rows = DenseIndex(corpus).search(queries, 30)
    assert (rows == naive(queries, vectors, 30)[1]).all()
    given = DenseIndex(corpus).score(queries, rows)
    assert all(np.allclose(a, b, rtol=1e-5) for a, b in zip(given, scores, strict=True))


TEXTS = [
    ("a", (), "the cats sat on a mat"),
    ("b", ("Mats",), "mat mat dogs"),
    ("c", (), "dogs run"),
    ("d", (), "the of"),
]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    write_texts(tmp_path / "c.jsonl", TEXTS)
    return open_texts(tmp_path / "c.jsonl")


def test_bm25_is_the_formula_of_lucene(tmp_path, texts):
    terms = [["cat", "sat", "mat"], ["mat", "mat", "mat", "dog"], ["dog", "run"], []]
    found = open_bm25(texts, tmp_path / "index", k1=0.9, b=0.4)
    assert [index_terms(" ".join([*t, x])) for _, t, x in TEXTS] == terms
    average = sum(map(len, terms)) / 4

    def score(query, document):
        total = 0.0
        for term in query:
            df, tf = sum(term in d for d in terms), document.count(term)
            norm = 0.9 * (1 - 0.4 + 0.4 * len(document) / average)
            total += math.log(1 + (4 - df + 0.5) / (df + 0.5)) * tf / (tf + norm)
        return total

    scores, rows = found.search(["The dog's mat", "dogs dogs", "unknown of", ""], 4)
    for query, got, places in zip(
        (["dog", "mat"], ["dog", "dog"], [], []), scores, rows, strict=True
    ):
        expected = sorted(
            ((-score(query, d), r) for r, d in enumerate(terms) if score(query, d) > 0)
        )
        assert [r for _, r in expected] == places[places >= 0].tolist()
        assert np.allclose([-s for s, _ in expected], got[places >= 0], rtol=1e-5)
    assert np.allclose(
        found.score(["dog mat"], [np.array([3, 1, 0])])[0],
        [0, *(score(["dog", "mat"], terms[r]) for r in (1, 0))],
    )


def test_bm25_is_saved_without_pickles_and_not_mixed_up(tmp_path, texts):
    first = open_bm25(texts, tmp_path / "index").search(["dogs on mats"], 3)
    again = open_bm25(texts, tmp_path / "index")
    assert all(isinstance(part, np.memmap) for part in again.lists) and all(
        (a == b).all() for a, b in zip(first, again.search(["dogs on mats"], 3), strict=True)
    )
    assert {p.suffix for p in (tmp_path / "index").iterdir()} == {".bin", ".json"}
    with pytest.raises(UserError, match="an index with k1 0.9, not 1.2"):
        open_bm25(texts, tmp_path / "index", k1=1.2)
    write_texts(tmp_path / "other.jsonl", TEXTS[:2])
    with pytest.raises(UserError, match="an index with fingerprint"):
        open_bm25(open_texts(tmp_path / "other.jsonl"), tmp_path / "index")


def spoilt(folder, problem):
    """Damage the dense embeddings of a folder (3 shards of 7, 7 and 6 vectors)."""
    path, meta = folder / "shard-00001.npy", folder / "meta.json"
    vectors = np.load(path)
    ids = folder / "shard-00001.ids.txt"
    if problem == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif problem == "empty":
        path.write_bytes(b"")
    elif problem == "header":
        path.write_bytes(path.read_bytes().replace(b"(7, 4)", b"(9, 9)"))
    elif problem == "no array":
        path.write_bytes(b"what is this?" * 9)
    elif problem == "flat":
        np.save(path, vectors.ravel())
    elif problem == "narrow":
        np.save(path, vectors[:, :2])
    elif problem == "whole numbers":
        np.save(path, vectors.astype(np.int64))
    elif problem == "objects":
        np.save(path, vectors.astype(object), allow_pickle=True)
    elif problem == "ids":
        ids.write_text(ids.read_text().replace("d9\n", ""))
    elif problem == "meta":
        meta.write_text('{"count": 20}')
    elif problem == "list":
        meta.write_text("[1, 2]")
    elif problem == "count":
        meta.write_text('{"count": 21, "dim": 4}')
    elif problem == "gone":
        path.unlink()


PROBLEMS = "truncated empty header narrow flat ids meta list count gone objects".split()


@pytest.mark.parametrize("problem", [*PROBLEMS, "no array", "whole numbers"])
def test_damaged_embeddings_end_in_one_line(tmp_path, tied, problem):
    store(tmp_path, tied[1][:20])
    spoilt(tmp_path, problem)
    with pytest.raises(UserError, match="remove the folder and encode again") as error:
        Embeddings(tmp_path).rows(["d1"])
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite_are_refused_with_their_id(tmp_path, tied, bad):
    """A NaN would never be found, on a GPU always; encode.py writes none, but others may."""
    queries, vectors = tied
    asked = store(tmp_path / "good", vectors)
    vectors = vectors.copy()
    vectors[33, 2] = bad
    corpus = store(tmp_path / "p", vectors)
    finite = "p: the vector of d33 is not finite — remove the folder and encode again"
    for find in (
        lambda: DenseIndex(corpus).search(queries, 5),
        lambda: DenseIndex(corpus).score(queries[:1], [np.array([1, 33])]),
        lambda: corpus.take([2, 33]),
        lambda: DenseIndex(corpus)._search_device(torch.from_numpy(queries), 5),
    ):
        with pytest.raises(UserError, match=finite):
            find()
    assert DenseIndex(corpus).score(queries[:1], [np.array([1, 34])])[0].shape == (2,)
    large = vectors.copy()
    large[33, 2], large[:9] = 0, 3e38  # finite, though their sum is not
    DenseIndex(store(tmp_path / "large", large)).search(asked.take([0]) / 1e9, 5)


def test_a_fingerprint_is_of_what_is_stored(tmp_path, tied):
    _, vectors = tied
    first = store(tmp_path / "a", vectors).fingerprint
    assert store(tmp_path / "b", vectors).fingerprint == first
    finish_embeddings(tmp_path / "b", {**Embeddings(tmp_path / "b").meta, "model": "other name"})
    finish_embeddings(tmp_path / "a", {**Embeddings(tmp_path / "a").meta, "model": "one"})
    assert Embeddings(tmp_path / "b").fingerprint == Embeddings(tmp_path / "a").fingerprint
    others = {"vectors": vectors * 2, "precision": vectors.astype(np.float16), "fewer": vectors[:9]}
    found = {store(tmp_path / name, array).fingerprint for name, array in others.items()}
    assert len(found | {first}) == 4


@pytest.mark.parametrize("name", ["documents", "weights", "offsets", "terms", "tiles"])
@pytest.mark.parametrize("problem", ["short", "long", "other", "gone"])
def test_a_damaged_index_is_refused_when_it_is_opened(tmp_path, texts, name, problem):
    """Numbers out of range would make the search read and write where it must not."""
    open_bm25(texts, tmp_path / "index")
    path = tmp_path / "index" / f"{name}.bin"
    content = path.read_bytes()
    middle = len(content) // 2
    changed = {
        "short": content[:-1],
        "long": content + b"x",
        "other": content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :],
    }
    path.write_bytes(changed.get(problem, b""))
    if problem == "gone":
        path.unlink()
    with pytest.raises(UserError, match="index: the index is damaged — remove it; it is then"):
        open_bm25(texts, tmp_path / "index")
