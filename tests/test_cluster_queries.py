"""Clusters of queries: blobs are found, nearest centroids, the same bytes, refusals.

pytest tests/test_cluster_queries.py"""

import json
import shutil
import sys

import faiss
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from scipy.sparse import csr_matrix

from lib.embeddings import Embeddings, finish_embeddings, write_shard
from lib.files import TrainingRow, UserError, read_training_file, write_training_file
from lib.texts import open_texts
from recipes import cluster_queries
from recipes.cluster_queries import kmeans

SIZES = [40, 25, 12, 3]


def blobs(sizes=SIZES, dim=8, seed=0):
    """(vectors, blob of each): blob i around 30 e_i, blob 0 the largest, in mixed order."""
    draw = np.random.default_rng(seed)
    of = draw.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return (30 * np.eye(dim)[of] + draw.standard_normal((len(of), dim))).astype(np.float32), of


def store(folder, vectors, shard_rows=17, **meta):
    """An embedding folder of queries q0, q1, ..., in several shards."""
    for number, start in enumerate(range(0, vectors.shape[0], shard_rows)):
        part = vectors[start : start + shard_rows]
        write_shard(folder, number, part, [f"q{start + i}" for i in range(part.shape[0])])
    meta = {
        "kind": "query",
        "head": "dense",
        "model": "m",
        "model_hash": "h",
        "input_fingerprint": "f",
    } | meta
    finish_embeddings(folder, {"count": vectors.shape[0], "dim": vectors.shape[1], **meta})
    return folder


def training_file(path, count, **more):
    """Rows of q0, q1, ..., the last one first; q0 has `more`."""
    rows = [TrainingRow(f"q{row}", [f"p{row}", "a,b"], [f"n{row}"]) for row in range(count)]
    rows[0] = rows[0]._replace(**more)
    write_training_file(path, rows[::-1])
    return path


def call(monkeypatch, **flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    words = [str(w) for name, value in flags.items() for w in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["cluster_queries.py", *words])
    cluster_queries.main()


def test_blobs_are_found_and_numbered_by_size():
    vectors, of = blobs()
    for seed in range(5):
        clusters, distances = kmeans(vectors, len(SIZES), 50, 10, 0, seed)
        assert (clusters == of).all() and distances.dtype == np.float32
        means = np.stack([vectors[of == blob].mean(0) for blob in range(len(SIZES))])
        assert np.allclose(distances, np.linalg.norm(vectors - means[of], axis=1), atol=0.02)
    # of equal size: by their first query
    vectors, of = blobs([10, 10, 10], seed=3)
    rank = {blob: number for number, blob in enumerate(dict.fromkeys(of.tolist()))}
    assert kmeans(vectors, 3, 50, 10, 0, 1)[0].tolist() == [rank[blob] for blob in of.tolist()]


def test_every_query_goes_to_the_nearest_of_the_best_centroids(monkeypatch):
    """The centroids are faiss'; distances and the choice among them are computed here in pairs."""
    seen = []
    monkeypatch.setattr(
        faiss, "Kmeans", lambda *a, _new=faiss.Kmeans, **k: seen.append(_new(*a, **k)) or seen[-1]
    )
    vectors = np.random.default_rng(4).standard_normal((400, 6)).astype(np.float32)
    for sample in (0, 150):
        clusters, distances = kmeans(vectors, 9, 20, 3, sample, 7)
        pairs = np.linalg.norm(
            vectors[:, None].astype(np.float64) - seen[-1].centroids[None], axis=2
        )
        assert np.allclose(distances, pairs.min(1), atol=1e-3)
        numbers = dict(
            zip(pairs.argmin(1).tolist(), clusters.tolist(), strict=True)
        )  # ours of faiss' clusters
        assert [numbers[c] for c in pairs.argmin(1).tolist()] == clusters.tolist()
        assert sorted(numbers.values()) == list(range(9))
        assert (np.diff(np.bincount(clusters)) <= 0).all()
    one_run = kmeans(vectors, 9, 20, 1, 0, 7)[1]
    best = kmeans(vectors, 9, 20, 10, 0, 7)[1]
    assert (best**2).sum() <= (one_run**2).sum()


def test_all_queries_train_the_centroids(monkeypatch, capfd):
    """More than faiss' 256 per centroid, and fewer than its 39, both without its warnings."""
    seen = []

    class Spy(faiss.Kmeans):
        def train(self, x):
            super().train(x)
            seen.append((len(x), self.obj.min()))

    monkeypatch.setattr(faiss, "Kmeans", Spy)
    vectors = np.random.default_rng(5).standard_normal((1500, 4)).astype(np.float32)
    distances = kmeans(vectors, 3, 60, 1, 0, 0)[1]
    assert seen[0][0] == 1500 and np.isclose(
        seen[0][1], (distances**2).sum(), rtol=1e-3
    )  # converged, on all of them
    kmeans(vectors, 3, 60, 1, 100, 0)
    assert seen[1][0] == 100
    kmeans(vectors, 3, 60, 1, 9999, 0)
    assert seen[2] == seen[0]
    kmeans(vectors[:6], 5, 5, 1, 0, 0)
    assert sorted(kmeans(vectors[:5], 5, 5, 1, 0, 0)[0]) == [0, 1, 2, 3, 4]
    assert "WARNING" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_end_to_end(tmp_path, monkeypatch, capfd, dtype):
    vectors, of = blobs()
    texts = tmp_path / "queries.tsv"
    texts.write_text("".join(f"q{row}\twhat about   number {row}?\n" for row in range(len(of))))
    folder = store(
        tmp_path / "q", vectors.astype(dtype), input_fingerprint=open_texts(texts).fingerprint
    )
    scores = {"pos_scores": [2.5, 1], "neg_scores": [0.5], "cluster": 9}
    train = training_file(tmp_path / "t.jsonl", len(of), **scores)
    flags = {
        "train": train,
        "queries_embeddings": folder,
        "queries": texts,
        "clusters": len(SIZES),
        "nearest": 2,
        "nredo": 10,
    }
    call(monkeypatch, **flags, output_dir=tmp_path / "a")
    out, err = capfd.readouterr()
    assert "4 clusters of 40 to 3 queries" in out and "trained on" in out and not err
    before = [row for _, row in read_training_file(train)]
    after = [row for _, row in read_training_file(tmp_path / "a" / "train.jsonl")]
    assert after == [
        row._replace(cluster=of[number])
        for row, number in zip(before, range(79, -1, -1), strict=True)
    ]
    lines = (tmp_path / "a" / "summary.txt").read_text().splitlines()
    assert len(lines) == 4 * 3 and lines[0].startswith(
        "cluster 0: 40 queries, 50.00%, mean distance "
    )
    stored = Embeddings(folder).take(range(len(of)))
    for cluster in range(4):
        members = np.flatnonzero(of == cluster)
        distances = np.linalg.norm(stored[members] - stored[members].mean(0), axis=1)
        assert float(lines[3 * cluster].split()[-1]) == pytest.approx(distances.mean(), abs=0.02)
        for line, at in zip(lines[3 * cluster + 1 :], np.argsort(distances)[:2], strict=False):
            distance, _, shown = line.strip().partition(" ")
            assert float(distance) == pytest.approx(distances[at], abs=0.02)
            assert shown.strip() == f"q{members[at]}  what about number {members[at]}?"
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert (
        meta["sizes"] == SIZES and meta["trained_on"] == 80 and meta["source"]["model_hash"] == "h"
    )

    # the same bytes; complete; other arguments; begun anew where meta.json is missing
    call(monkeypatch, **flags, output_dir=tmp_path / "b")
    names = ["train.jsonl", "summary.txt", "meta.json"]
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names
    )
    call(monkeypatch, **flags, output_dir=tmp_path / "a")
    assert "is complete" in capfd.readouterr().out
    with pytest.raises(UserError, match="made with --seed 42, now 43"):
        call(monkeypatch, **flags, seed=43, output_dir=tmp_path / "a")
    (tmp_path / "b" / "meta.json").unlink()
    (tmp_path / "b" / "train.jsonl").unlink()
    call(monkeypatch, **flags, output_dir=tmp_path / "b")
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names
    )
    store(
        folder,
        vectors.astype(dtype),
        input_fingerprint=open_texts(texts).fingerprint,
        model_hash="other",
    )
    with pytest.raises(UserError, match="it was made with embeddings .* or remove the folder"):
        call(monkeypatch, **flags, output_dir=tmp_path / "a")


def test_without_texts_the_summary_has_ids(tmp_path, monkeypatch):
    vectors, of = blobs()
    call(
        monkeypatch,
        train=training_file(tmp_path / "t.jsonl", len(of)),
        queries_embeddings=store(tmp_path / "q", vectors),
        clusters=4,
        output_dir=tmp_path / "out",
    )
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert len(lines) == 4 + 5 + 5 + 5 + 3 and set(lines[-1].split()[1]) <= set("q0123456789")


def test_refusals(tmp_path, monkeypatch, tiny_collection):
    vectors, _ = blobs()
    broken, same = vectors.copy(), np.ones_like(vectors)
    train = training_file(tmp_path / "t.jsonl", len(vectors))
    more = training_file(tmp_path / "more.jsonl", len(vectors) + 1)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    broken[5, 2] = np.nan
    for name, what, meta in (
        ("dense", vectors, {}),
        ("passages", vectors, {"kind": "passage"}),
        ("sparse", csr_matrix(np.maximum(vectors, 0)), {"head": "sparse"}),
        ("broken", broken, {}),
        ("same", same, {}),
    ):
        store(tmp_path / name, what, **meta)
    for name, flags, message in (
        ("dense", {"clusters": 81}, "--clusters 81: more than the 80 queries .* give fewer"),
        (
            "dense",
            {"clusters": 9, "sample": 8},
            "--clusters 9: more than the 8 queries .* give fewer",
        ),
        ("dense", {"clusters": 1}, "--clusters 1 — give .* at least 2"),
        ("dense", {"niter": 0}, "--niter 0 — give .* at least 1"),
        ("dense", {"queries": tiny_collection.queries}, "not the embeddings of .*queries.tsv"),
        ("passages", {}, "embeddings of kind passage — give those of queries"),
        ("sparse", {}, "sparse vectors, k-means needs dense ones"),
        ("broken", {}, "broken: the vector of q5 is not finite"),
        ("same", {}, "--clusters 3: 2 of them are empty, too few vectors differ"),
        ("none", {}, "no such folder"),
        ("dense", {"train": more}, "more.jsonl:1: query q80 is not in .*dense .* give files"),
        ("dense", {"train": tmp_path / "none.jsonl"}, "none.jsonl: no such file"),
        ("dense", {"train": empty}, "empty.jsonl: no query in it"),
    ):
        flags = {
            "train": train,
            "queries_embeddings": tmp_path / name,
            "clusters": 3,
            "output_dir": tmp_path / "out",
        } | flags
        with pytest.raises(UserError, match=message):
            call(monkeypatch, **flags)
        assert (
            not (tmp_path / "out" / "meta.json").exists()
            and not (tmp_path / "out" / "train.jsonl").exists()
        )
        made = (tmp_path / "out").exists()
        assert made == (name in ("broken", "same") or "more" in str(flags["train"])), name
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_embeddings_that_encode_wrote(
    tmp_path, monkeypatch, script, tiny_model_dir, tiny_collection
):
    where = ["--input", tiny_collection.queries, "--kind", "query", "--output_dir", tmp_path / "q"]
    done = script(
        "encode", "--model", tiny_model_dir, "--pooling", "cls", *where, "--num_workers", 0
    )
    assert done[0] == 0, done[2]
    flags = {
        "train": training_file(tmp_path / "t.jsonl", 20),
        "queries_embeddings": tmp_path / "q",
        "queries": tiny_collection.queries,
        "clusters": 4,
    }
    call(monkeypatch, **flags, output_dir=tmp_path / "out")
    found = [row for _, row in read_training_file(tmp_path / "out" / "train.jsonl")]
    assert [row.qid for row in found] == [f"q{n}" for n in range(19, -1, -1)]
    assert {row.cluster for row in found} == {0, 1, 2, 3}
    assert "what about" in (tmp_path / "out" / "summary.txt").read_text()
