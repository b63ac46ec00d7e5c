"""Search is exact, also for ties at the cut; BM25 is Lucene's formula. Run: python -m pytest
tests/test_index.py"""

import math

import numpy as np
import pytest
import torch

from lib import search
from lib.bm25 import Weighting, open_bm25
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


def test_random_vectors_and_faiss(tmp_path):
    draw = np.random.default_rng(1)
    queries, vectors = (
        draw.standard_normal((20, 16), np.float32),
        draw.standard_normal((500, 16), np.float32),
    )
    corpus = store(tmp_path, vectors, 64)
    scores, rows = DenseIndex(corpus).search(queries, 30)
    assert (rows == naive(queries, vectors, 30)[1]).all()
    assert (DenseIndex(corpus, factory="Flat").search(queries, 30)[1] == rows).all()
    beyond = DenseIndex(corpus, factory="Flat").search(queries, 600)
    assert (
        (beyond[1][:, 500:] == -1).all()
        and np.isneginf(beyond[0][:, 500:]).all()
        and (beyond[1][:, :500] >= 0).all()
    )
    near = DenseIndex(corpus, factory="IVF4,Flat").search(queries, 30)[1]
    assert np.mean([len(set(a) & set(b)) / 30 for a, b in zip(near, rows, strict=True)]) > 0.3
    given = DenseIndex(corpus).score(queries, rows)
    assert all(np.allclose(a, b, rtol=1e-5) for a, b in zip(given, scores, strict=True))
    with pytest.raises(UserError, match="--index Tree: faiss cannot make this index"):
        DenseIndex(corpus, factory="Tree")


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
    found = open_bm25(texts, tmp_path / "index", Weighting(k1=0.9, b=0.4))
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
        open_bm25(texts, tmp_path / "index", Weighting(k1=1.2))
    write_texts(tmp_path / "other.jsonl", TEXTS[:2])
    with pytest.raises(UserError, match="an index with fingerprint"):
        open_bm25(open_texts(tmp_path / "other.jsonl"), tmp_path / "index")
