"""evaluate.py from run files, BM25 and embeddings. Run: python -m pytest tests/test_evaluate.py"""

import json

import numpy as np
import pytest

from lib import files
from lib.embeddings import finish_embeddings, write_shard


@pytest.fixture
def evaluate(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *flags: script("evaluate", *flags)


@pytest.fixture
def runs(tmp_path):
    files.write_qrels(
        tmp_path / "dev.tsv", {"q1": {"a": 1}, "q2": {"b": 2, "c": 1}, "q3": {"d": 1}}
    )
    files.write_qrels(tmp_path / "test.tsv", {"q4": {"a": 1}})
    rows = [
        ("q1", ["b", "a"], [2, 1]),
        ("q2", ["c", "b"], [1, 1]),
        ("q4", ["q4", "a"], [3, 2]),
        ("q9", ["a"], [1]),
    ]
    files.write_run(tmp_path / "run", rows)
    files.write_run(tmp_path / "other", [(q, p[::-1], s) for q, p, s in rows])
    return tmp_path


def metrics(folder, split="dev"):
    return json.loads((folder / "metrics.json").read_text())["splits"][split]


def test_a_run_on_two_splits_and_its_policy(runs, evaluate):
    flags = [
        "--run",
        "run",
        "--qrels",
        "dev.tsv",
        "test.tsv",
        "--metrics",
        "MRR@10",
        "R@1",
        "nDCG@10",
        "--output_dir",
        "out",
    ]
    status, shown, _ = evaluate(*flags)
    assert status == 0
    assert metrics(runs / "out")["metrics"] == {
        "RR@10": pytest.approx((0.5 + 1 + 0) / 3),
        "R@1": pytest.approx((0 + 0.5 + 0) / 3),
        "nDCG@10": pytest.approx(
            (1 / np.log2(3) + (1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3)) + 0) / 3
        ),
    }
    assert metrics(runs / "out", "test")["metrics"]["RR@10"] == 0.5
    for fact in (
        "trec_eval",
        "queries without a result: 1, count 0",
        "kept (--ignore_identical_ids",
        "queries not judged",
    ):
        assert fact in shown
    rows = [line.split("\t") for line in (runs / "out" / "per_query.tsv").read_text().splitlines()]
    assert rows[0] == ["qid", "split", "RR@10", "R@1", "nDCG@10"] and rows[3] == [
        "q3",
        "dev",
        "0",
        "0",
        "0",
    ]
    assert files.read_run(runs / "out" / "run.trec")["q2"].pids == ["c", "b"], (
        "a tie: trec_eval takes the greater id first"
    )
    assert "out is complete" in evaluate(*flags)[1]
    for name in ("run", "dev.tsv"):
        before = (runs / name).read_text()
        (runs / name).write_text(before.replace("q1", "q7"))
        assert "it was made with" in evaluate(*flags)[2], name
        (runs / name).write_text(before)


def test_ranks_of_ms_marco_identical_ids_and_levels(runs, evaluate):
    (runs / "marco").write_text("q1\ta\t1\nq2\tc\t2\nq2\tb\t1\n")
    evaluate("--run", "marco", "--qrels", "dev.tsv", "--metrics", "R@1", "--output_dir", "rank")
    assert files.read_run(runs / "rank" / "run.trec")["q2"].pids == ["b", "c"]
    evaluate(
        "--run",
        "run",
        "--qrels",
        "test.tsv",
        "--ignore_identical_ids",
        "--metrics",
        "RR@10",
        "--output_dir",
        "same",
    )
    assert metrics(runs / "same", "test")["metrics"]["RR@10"] == 1
    evaluate(
        "--run",
        "run",
        "--qrels",
        "dev.tsv",
        "--relevance_level",
        2,
        "--metrics",
        "RR@10",
        "--output_dir",
        "level",
    )
    assert metrics(runs / "level")["metrics"]["RR@10"] == pytest.approx((0 + 0.5 + 0) / 3)


def test_fusion_and_comparison(runs, evaluate):
    evaluate(
        "--run", "run", "other", "--qrels", "dev.tsv", "--metrics", "RR@10", "--output_dir", "fused"
    )
    assert files.read_run(runs / "fused" / "run.trec")["q1"].scores == pytest.approx(
        [1 / 61 + 1 / 62] * 2
    )
    evaluate(
        "--run",
        "run",
        "--qrels",
        "dev.tsv",
        "--compare",
        "other",
        "--metrics",
        "RR@10",
        "--output_dir",
        "compared",
    )
    other = metrics(runs / "compared")["compare"]["RR@10"]
    assert (
        other["difference"] == pytest.approx(-0.5 / 3)
        and other["p"] == 1
        and other["interval"][0] < 0
    )


@pytest.fixture
def embedded(tmp_path):
    """3 queries and 12 passages on a circle; q0's own id is a passage too."""
    angles = np.linspace(0, 3, 12)
    passages = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    ids = ["q0", *(f"d{i}" for i in range(1, 12))]
    meta = {"model": "m", "model_hash": "1", "dim": 2}
    for start in (0, 5, 10):
        write_shard(tmp_path / "p", start // 5, passages[start : start + 5], ids[start : start + 5])
    finish_embeddings(tmp_path / "p", {**meta, "kind": "passage", "count": 12})
    write_shard(tmp_path / "q", 0, passages[[0, 4, 8]], ["q0", "q1", "q2"])
    finish_embeddings(tmp_path / "q", {**meta, "kind": "query", "count": 3})
    files.write_qrels(tmp_path / "test.tsv", {"q0": {"d1": 1}, "q1": {"d4": 1}, "q2": {"d10": 1}})
    return tmp_path


def test_search_rerank_and_self_retrieval(embedded, evaluate, two_processes):
    flags = [
        "--queries_embeddings",
        embedded / "q",
        "--corpus_embeddings",
        embedded / "p",
        "--qrels",
        embedded / "test.tsv",
    ]
    evaluate(*flags, "--depth", 4, "--metrics", "RR@10", "--output_dir", "out")
    run = files.read_run(embedded / "out" / "run.trec")
    assert (
        run["q0"].pids == ["q0", "d1", "d2", "d3"]
        and metrics(embedded / "out", "test")["metrics"]["RR@10"] == 0.5
    )
    evaluate(
        *flags,
        "--depth",
        4,
        "--ignore_identical_ids",
        "--metrics",
        "RR@10",
        "--output_dir",
        "other",
    )
    assert files.read_run(embedded / "other" / "run.trec")["q0"].pids == ["d1", "d2", "d3", "d4"], (
        "the depth stays full"
    )
    two_processes("evaluate.py", *flags, "--depth", 4, "--metrics", "RR@10", "--output_dir", "pair")
    assert (embedded / "pair" / "run.trec").read_text() == (
        embedded / "out" / "run.trec"
    ).read_text()
    (embedded / "top").write_text("q0\td9\tx\ty\nq0\td1\tx\ty\nq1\tgone\tx\ty\nq1\td3\tx\ty\n")
    shown = evaluate(
        *flags, "--candidates", embedded / "top", "--metrics", "RR@10", "--output_dir", "again"
    )[1]
    assert "1 not in the corpus, 1 queries without any" in shown
    run = files.read_run(embedded / "again" / "run.trec")
    assert run["q0"].pids == ["d1", "d9"] and run["q1"].pids == ["d3"] and "q2" not in run
    for name, spoil in (("kind", "passage"), ("model_hash", "2")):
        finish_embeddings(
            embedded / "q", {**files.read_json(embedded / "q" / "meta.json"), name: spoil}
        )
        status, _, error = evaluate(*flags, "--output_dir", "bad")
        assert (
            status == 1
            and error.count("\n") == 1
            and not (embedded / "bad" / "metrics.json").exists()
        ), error


def test_bm25_and_mistakes(tmp_path, tiny_collection, evaluate):
    data = ["--bm25", "--queries", tiny_collection.queries, "--corpus", tiny_collection.corpus]
    assert (
        evaluate(
            *data, "--qrels", tiny_collection.qrels, "--metrics", "R@10", "--output_dir", "out"
        )[0]
        == 0
    )
    assert metrics(tmp_path / "out", "qrels")["metrics"]["R@10"] > 0.5
    files.write_qrels(tmp_path / "a.qrels", {"q1": {"p1": 1}, "q2": {"gone": 1}})
    files.write_qrels(tmp_path / "b.qrels", {"q1": {"p1": 1}, "qx": {"p2": 1}})
    cases = [
        ([*data, "--qrels", "a.qrels"], "a.qrels:2: passage gone is not in"),
        ([*data, "--qrels", "b.qrels"], "b.qrels:2: query qx is not in"),
        ([*data, "--qrels", "a.qrels", "--metrics", "bleu@4"], "--metrics bleu@4: unknown"),
        ([*data, "--qrels", "a.qrels", "--run", "x"], "nothing to search, or several sources"),
        (["--run", "a.qrels", "--qrels", "a.qrels"], "a.qrels:1: 4 columns"),
    ]
    for flags, message in cases:
        status, _, error = evaluate(*flags, "--output_dir", "bad")
        assert status == 1 and message in error and error.count("\n") == 1, error
        assert not (tmp_path / "bad" / "metrics.json").exists()
