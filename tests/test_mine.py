"""Mined negatives: what may not be among them, and the numbers of the audit.

Run: python -m pytest tests/test_mine.py
"""

import json

import numpy as np
import pytest

from lib import files
from lib.embeddings import finish_embeddings, write_shard
from lib.texts import open_texts, write_texts
from mine_negatives import score_limit


@pytest.fixture
def mine(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *flags: script("mine_negatives", *flags)


@pytest.fixture
def planted(tmp_path):
    """Embeddings of 12 passages on a line: query q scores passage d{i} with 1 - i/10, so the last two are negative. d2
    is q's positive, d5 an exact copy of it, d1 a positive too; d3 is judged 0. r has the single positive d11."""
    texts = [(f"d{i}", "", "the same text" if i in (2, 5) else f"text {i}") for i in range(12)]
    write_texts(tmp_path / "corpus.jsonl", texts)
    write_texts(tmp_path / "queries.jsonl", [("q", "", "a query"), ("r", "", "another")])
    files.write_qrels(tmp_path / "qrels", {"q": {"d2": 1, "d1": 2, "d3": 0}, "r": {"d11": 1}})
    fingerprint = open_texts(tmp_path / "corpus.jsonl").fingerprint
    meta = {"model": "m", "model_hash": "1", "dim": 1, "input_fingerprint": fingerprint}
    write_shard(
        tmp_path / "p", 0, np.float32([[1 - i / 10] for i in range(12)]), [t[0] for t in texts]
    )
    finish_embeddings(tmp_path / "p", {**meta, "kind": "passage", "count": 12})
    write_shard(tmp_path / "q", 0, np.float32([[1.0], [1.0]]), ["q", "r"])
    finish_embeddings(tmp_path / "q", {**meta, "kind": "query", "count": 2})
    flags = [
        "--queries_embeddings",
        "q",
        "--corpus_embeddings",
        "p",
        "--corpus",
        "corpus.jsonl",
        "--qrels",
        "qrels",
    ]
    return tmp_path, flags


def negatives(folder):
    return dict(files.read_negatives(folder / "negatives.tsv"))


def test_positives_and_their_copies_are_removed_and_counted(planted, mine):
    folder, flags = planted
    status, shown, _ = mine(*flags, "--depth", 8, "--output_dir", "out")
    assert status == 0
    assert negatives(folder / "out") == {
        "q": ["d0", "d3", "d4", "d6", "d7"],
        "r": [f"d{i}" for i in range(8)],
    }
    audit = json.loads((folder / "out" / "audit.json").read_text())
    assert (
        audit["positives removed"],
        audit["copies of positives removed"],
        audit["queries left without"],
    ) == (2, 1, 0)
    assert audit["negatives per query"] == "min 5, median 6, max 8" and "positives removed" in shown
    assert "is complete" in mine(*flags, "--depth", 8, "--output_dir", "out")[1]
    assert "made with --depth 8, now 9" in mine(*flags, "--depth", 9, "--output_dir", "out")[2]


def test_a_teacher_says_what_is_a_false_negative(planted, mine):
    folder, flags = planted
    scores = {0: 3.0, 1: 4.0, 2: 2.0, 3: 1.4, 4: 1.6, 5: 9.0, 6: -3.0, 7: 1.5}
    pairs = [("q", f"d{i}", score) for i, score in scores.items()] + [
        ("r", f"d{i}", -i) for i in range(12)
    ]
    files.write_scores(folder / "teacher.tsv", pairs)
    how = "--depth", 8, "--max_score_margin", 0.5, "--teacher_scores", "teacher.tsv"
    assert mine(*flags, *how, "--output_dir", "out")[0] == 0
    # the lowest positive has 2.0, so 1.5 stays and 1.6 does not; the copy d5 is a copy whatever it scores
    assert negatives(folder / "out") == {"q": ["d3", "d6", "d7"]}, (
        "r: all score above its positive, -11"
    )
    audit = json.loads((folder / "out" / "audit.json").read_text())
    assert audit["removed by score"] == 2 + 8 and audit["copies of positives removed"] == 1
    files.write_scores(folder / "teacher.tsv", [pair for pair in pairs if pair[:2] != ("q", "d6")])
    assert "no score for query q and passage d6" in mine(*flags, *how, "--output_dir", "b")[2]
    assert (
        "--teacher_scores filters nothing"
        in mine(*flags, "--teacher_scores", "x", "--output_dir", "b")[2]
    )


def test_filters_windows_and_draws(planted, mine):
    folder, flags = planted
    mine(*flags, "--depth", 12, "--max_score_margin", 0.25, "--output_dir", "margin")
    assert negatives(folder / "margin")["q"] == ["d6", "d7", "d8", "d9", "d10", "d11"][-6:], (
        "s <= 0.8 - 0.25"
    )
    assert "r" not in negatives(folder / "margin"), "nothing scores 0.25 less than the last"
    mine(*flags, "--depth", 12, "--skip_top", 6, "--num_negatives", 2, "--output_dir", "window")
    assert negatives(folder / "window")["q"] == ["d6", "d7"]
    draws = []
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        mine(
            *flags,
            "--depth",
            12,
            "--num_negatives",
            3,
            "--sample",
            "uniform",
            "--seed",
            seed,
            "--output_dir",
            out,
        )
        draws.append(negatives(folder / out))
    assert draws[0] == draws[1] != draws[2]
    for drawn in draws:
        assert len(drawn["q"]) == 3 and not {"d1", "d2", "d5"} & set(drawn["q"])
        assert drawn["q"] == sorted(drawn["q"], key=lambda pid: int(pid[1:])), (
            "best first also when sampled"
        )


def test_limits_for_negative_scores():
    assert score_limit(0.8, None, 0.95) == pytest.approx(0.76) and score_limit(
        0.8, 0.1, None
    ) == pytest.approx(0.7)
    assert score_limit(-2.0, None, 0.95) == pytest.approx(-2.1), (
        "below the positive; -2.0 * 0.95 would be above it"
    )
    assert (
        score_limit(-2.0, 0.1, 0.95) == pytest.approx(-2.1) and score_limit(1, None, None) == np.inf
    )


def test_from_a_run_and_from_bm25_on_two_processes(tmp_path, tiny_collection, mine, two_processes):
    data = ["--corpus", tiny_collection.corpus, "--qrels", tiny_collection.qrels, "--depth", 10]
    mine("--run", tiny_collection.candidates, *data, "--output_dir", "run")
    positives = files.read_qrels(tiny_collection.qrels)
    assert negatives(tmp_path / "run") == dict(files.read_negatives(tiny_collection.negatives))
    bm25 = ["--bm25", "--queries", tiny_collection.queries, *data]
    mine(*bm25, "--output_dir", "one")
    two_processes("mine_negatives.py", *bm25, "--output_dir", "two")
    assert negatives(tmp_path / "one") == negatives(tmp_path / "two") and negatives(
        tmp_path / "one"
    )
    assert not any(
        set(pids) & positives[qid].keys() for qid, pids in negatives(tmp_path / "one").items()
    )


def test_mistakes_are_one_line_and_leave_nothing(planted, mine):
    folder, flags = planted
    cases = {
        "made by another checkpoint": lambda: finish_embeddings(
            folder / "q", {**files.read_json(folder / "q" / "meta.json"), "model_hash": "2"}
        ),
        "passage d77 is not in corpus.jsonl": lambda: files.write_qrels(
            folder / "qrels", {"q": {"d2": 1, "d77": 1}}
        ),
        "not the embeddings of corpus.jsonl": lambda: write_texts(
            folder / "corpus.jsonl", [("d2", "", "x"), ("d11", "", "y"), ("d1", "", "z")]
        ),
    }
    for message, spoil in cases.items():
        before = {
            p: p.read_bytes()
            for p in (folder / "q" / "meta.json", folder / "qrels", folder / "corpus.jsonl")
        }
        spoil()
        status, _, error = mine(*flags, "--output_dir", "bad")
        assert status == 1 and message in error and error.count("\n") == 1
        assert not (folder / "bad").exists()
        for path, content in before.items():
            path.write_bytes(content)
