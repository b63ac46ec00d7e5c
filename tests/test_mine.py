"""Mined negatives: what may not be among them, and the numbers of the audit.

Run: python -m pytest tests/test_mine.py
"""

import json

import numpy as np
import pytest

from lib import files
from lib.embeddings import finish_embeddings, write_shard
from lib.files import TrainingRow
from lib.texts import open_texts, write_texts


@pytest.fixture
def mine(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *flags: script("mine_negatives", *flags)


@pytest.fixture
def planted(tmp_path):
    """Embeddings of 12 passages on a line: query q scores passage d{i} with 1 - i/10, so the last
    two are negative. d2 is q's positive, d5 an exact copy of it, d1 a positive too; d3 is judged 0.
    r has the single positive d11."""
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


def rows(folder):
    """{qid: line of the training file}"""
    return {row.qid: row for _, row in files.read_training_file(folder / "train.jsonl")}


def negatives(folder):
    return {qid: row.neg for qid, row in rows(folder).items()}


def test_positives_and_their_copies_are_removed_and_counted(planted, mine):
    folder, flags = planted
    status, shown, _ = mine(*flags, "--depth", 8, "--output_dir", "out")
    assert status == 0
    assert negatives(folder / "out") == {
        "q": ["d0", "d3", "d4", "d6", "d7"],
        "r": [f"d{i}" for i in range(8)],
    }
    assert {qid: row.pos for qid, row in rows(folder / "out").items()} == {
        "q": ["d2", "d1"],
        "r": ["d11"],
    }, "grade 0 is no positive"
    assert all(row[3:] == (None, None, None) for row in rows(folder / "out").values())
    audit = json.loads((folder / "out" / "audit.json").read_text())
    assert (
        audit["positives removed"],
        audit["copies of positives removed"],
        audit["queries left without"],
    ) == (2, 1, 0)
    assert audit["negatives per query"] == "min 5, median 6, max 8" and "positives removed" in shown
    assert "is complete" in mine(*flags, "--depth", 8, "--output_dir", "out")[1]
    assert "made with --depth 8, now 9" in mine(*flags, "--depth", 9, "--output_dir", "out")[2]
    files.write_qrels(folder / "qrels", {"r": {"d11": 1}})
    assert "it was made with qrels" in mine(*flags, "--depth", 8, "--output_dir", "out")[2]


def test_the_scores_of_a_training_file_tell_false_negatives(planted, mine):
    folder, flags = planted
    scores = {0: 3.0, 3: 1.4, 4: 1.6, 5: 9.0, 6: -3.0, 7: 1.5}
    others = [f"d{i}" for i in range(11)]
    scored = [
        TrainingRow(
            "q", ["d1", "d2"], [f"d{i}" for i in scores], [4.0, 2.0], [*scores.values()], 7
        ),
        TrainingRow("r", ["d11"], others, [-11.0], [-float(i) for i in range(11)], 7),
    ]
    files.write_training_file(folder / "train.jsonl", scored)
    source = ["--run", "train.jsonl", *flags[4:]]
    how = ["--depth", 11, "--max_score_margin", 0.5]
    assert mine(*source, *how, "--output_dir", "out")[0] == 0
    # the lowest positive has 2.0, so 1.5 stays and 1.6 does not; the copy d5 is a copy anyway
    found = rows(folder / "out")
    assert found["q"] == TrainingRow(
        "q", ["d2", "d1"], ["d7", "d3", "d6"], [2.0, 4.0], [1.5, pytest.approx(1.4), -3.0], None
    )
    assert found["r"].neg == [], "all score above the positive, which has -11"
    audit = json.loads((folder / "out" / "audit.json").read_text())
    assert audit["removed by score"] == 2 + 11 and audit["copies of positives removed"] == 1
    mine(*source, "--depth", 11, "--output_dir", "all")
    assert rows(folder / "all")["q"].neg_scores == [3.0, *map(np.float32, (1.6, 1.5, 1.4)), -3.0]

    files.write_training_file(folder / "train.jsonl", [scored[0], scored[1]._replace(pos=["d2"])])
    error = mine(*source, *how, "--output_dir", "b")[2]
    assert "train.jsonl: no score for query r and passage d11" in error
    plain = [row._replace(pos_scores=None, neg_scores=None) for row in scored]
    files.write_training_file(folder / "train.jsonl", plain)
    assert "--max_score_margin needs scores" in mine(*source, *how, "--output_dir", "b")[2]
    mine(*source, "--depth", 3, "--output_dir", "plain")
    assert rows(folder / "plain")["q"] == TrainingRow("q", ["d2", "d1"], ["d0", "d3", "d4"])


def test_lists_that_somebody_else_mined_and_ids_with_commas(tmp_path, mine):
    texts = [("a,1", "", "one"), ("b,2", "", "two"), ("c", "", "three"), ("d", "", "four")]
    write_texts(tmp_path / "corpus.jsonl", texts)
    write_texts(tmp_path / "queries.jsonl", [("q,1", "", "two three four")])
    (tmp_path / "qrels").write_text("q,1 0 a,1 1\nq,1 0 c 0\n")
    data = ["--corpus", "corpus.jsonl", "--qrels", "qrels"]
    mine("--bm25", "--queries", "queries.jsonl", *data, "--output_dir", "bm25")
    assert rows(tmp_path / "bm25") == {"q,1": TrainingRow("q,1", ["a,1"], ["b,2", "c", "d"])}
    (tmp_path / "lists").write_text("q0\tc\nq,1\td,c,d\nq,1\tc\n")
    mine("--run", "lists", *data, "--output_dir", "lists-out")
    assert negatives(tmp_path / "lists-out") == {"q,1": ["d", "c"]}
    (tmp_path / "lists").write_text("q0\tc\nq,1\td,b,2\n")
    error = mine("--run", "lists", *data, "--output_dir", "bad")[2]
    assert "lists:2: passage b is not in" in error and not (tmp_path / "bad").exists()
    (tmp_path / "run").write_text("q,1 Q0 b,2 1 3 t\nq,1 Q0 a,1 2 2 t\nq,1 Q0 gone,3 3 1 t\n")
    error = mine("--run", "run", *data, "--output_dir", "bad")[2]
    assert "run:3: passage gone,3 is not in" in error
    (tmp_path / "qrels").write_text("q,1 0 a,1 1\nq,1 0 gone,3 1\n")
    error = mine("--run", "run", *data, "--output_dir", "bad")[2]
    assert "qrels:2: passage gone,3 is not in" in error


def test_margins_and_draws(planted, mine):
    folder, flags = planted
    mine(*flags, "--depth", 12, "--max_score_margin", 0.25, "--output_dir", "margin")
    assert negatives(folder / "margin")["q"] == ["d6", "d7", "d8", "d9", "d10", "d11"][-6:], (
        "s <= 0.8 - 0.25"
    )
    assert negatives(folder / "margin")["r"] == [], "nothing scores 0.25 less than the last"
    mine(*flags, "--depth", 12, "--num_negatives", 2, "--output_dir", "window")
    assert negatives(folder / "window")["q"] == ["d0", "d3"]
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


def test_from_a_run_and_from_bm25_on_two_processes(tmp_path, tiny_collection, mine, two_processes):
    data = ["--corpus", tiny_collection.corpus, "--qrels", tiny_collection.qrels, "--depth", 10]
    mine("--run", tiny_collection.candidates, *data, "--output_dir", "run")
    positives = files.read_qrels(tiny_collection.qrels)
    listed = files.read_run(tiny_collection.negatives)
    assert negatives(tmp_path / "run") == {qid: entry.pids for qid, entry in listed.items()}
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


@pytest.mark.parametrize(
    "flags",
    [
        "--depth 0",
        "--depth 3000000000",
        "--k1 nan",
        "--b -0.1",
        "--num_negatives -1",
        "--max_score_margin nan",
        "--max_score_margin -1",
        "--max_score_margin inf",
        "--seed -1",
        "--sample best",
    ],
)
def test_numbers_without_sense_are_refused_before_anything_is_written(planted, mine, flags):
    folder, source = planted
    status, _, error = mine(*source, *flags.split(), "--output_dir", "out")
    assert status == 1 and flags.split()[0] in error and error.count("\n") == 1
    assert not (folder / "out").exists()


def test_a_folder_is_of_all_that_was_read(planted, mine):
    """Vectors made anew, or another run, corpus or qrels, are another run's inputs."""
    folder, flags = planted
    files.write_run(folder / "run", [("q", ["d4", "d3"], [2, 1])])

    def other_vectors(name):
        vectors = np.load(folder / name / "shard-00000.npy")
        vectors[0] += 1
        write_shard(
            folder / name, 0, vectors, (folder / name / "shard-00000.ids.txt").read_text().split()
        )

    def other_text():
        path = folder / "corpus.jsonl"
        path.write_text(path.read_text().replace("text 9", "text nine"))

    spoil = {
        "queries_embeddings": lambda: other_vectors("q"),
        "corpus_embeddings": lambda: other_vectors("p"),
        "qrels": lambda: files.write_qrels(folder / "qrels", {"q": {"d1": 1}}),
        "run": lambda: files.write_run(folder / "run", [("q", ["d3", "d4"], [2, 1])]),
        "corpus": other_text,
    }
    sources = {"vectors": flags, "lists": ["--run", "run", *flags[4:]]}
    for out, source in sources.items():
        assert mine(*source, "--output_dir", out)[0] == 0
        for name, change in spoil.items():
            before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            change()
            status, shown, error = mine(*source, "--output_dir", out)
            unread = ("run",) if out == "vectors" else ("queries_embeddings", "corpus_embeddings")
            if name in unread:
                assert f"{out} is complete" in shown
            elif (out, name) == ("vectors", "corpus"):
                assert status == 1 and "p: not the embeddings of corpus.jsonl" in error
            else:
                assert status == 1 and f"{out}: it was made with {name} " in error, (out, name)
            for path, content in before.items():
                path.write_bytes(content)


def test_identical_ids_that_are_positives_are_not_ignored(tmp_path, mine):
    write_texts(tmp_path / "corpus.jsonl", [("a", "", "one"), ("b", "", "two")])
    (tmp_path / "qrels").write_text("a 0 b 1\nb 0 b 1\n")
    (tmp_path / "run").write_text("a a 1\nb a 1\n")
    flags = ["--run", "run", "--corpus", "corpus.jsonl", "--qrels", "qrels", "--output_dir", "out"]
    status, _, error = mine(*flags, "--ignore_identical_ids")
    assert status == 1 and "qrels: the passage with the id of the query is relevant to b" in error
    assert not (tmp_path / "out").exists()
    (tmp_path / "qrels").write_text("a 0 b 1\nb 0 b 0\n")
    assert mine(*flags, "--ignore_identical_ids")[0] == 0
    assert negatives(tmp_path / "out") == {"a": []}


def test_nothing_found_leaves_queries_without_negatives(tmp_path, mine):
    write_texts(tmp_path / "corpus.jsonl", [("a", "", "one"), ("b", "", "two")])
    write_texts(tmp_path / "queries.jsonl", [("q", "", "zebra")])
    (tmp_path / "qrels").write_text("q 0 b 1\n")
    data = ["--corpus", "corpus.jsonl", "--qrels", "qrels", "--output_dir", "out"]
    status, shown, error = mine("--bm25", "--queries", "queries.jsonl", *data)
    assert status == 0 and "min 0, median 0, max 0" in shown, error
    assert negatives(tmp_path / "out") == {"q": []}


def test_a_dry_run_shows_what_would_be_mined_and_writes_nothing(planted, mine):
    folder, flags = planted
    before = sorted(path.name for path in folder.iterdir())
    status, shown, errors = mine(*flags, "--output_dir", "out", "--dry_run")
    assert status == 0, errors
    facts = {line[3:27].strip(): line[28:] for line in shown.splitlines() if line.startswith("   ")}
    assert facts["judged pairs"] == "3" and facts["queries"] == "2" and facts["passages"] == "12"
    assert facts["candidates"] == "the first 200 of m, exact search"
    assert facts["first query"] == "q: (add --queries to see its text)"
    assert (facts["positive d2"], facts["positive d1"]) == ("the same text", "text 1")
    assert facts["memory"].endswith("GB for each process") and facts["time"].startswith("about ")

    bm25 = ["--bm25", "--queries", "queries.jsonl", *flags[4:], "--output_dir", "out"]
    status, shown, _ = mine(*bm25, "--dry_run")
    assert status == 0 and "q: a query" in shown and "an index must be built first" in shown
    (folder / "lists").write_text("r\td1,d2\n")
    status, shown, _ = mine("--run", "lists", *flags[4:], "--output_dir", "out", "--dry_run")
    assert status == 0 and "queries with a list      1" in shown
    (folder / "lists").write_text("r\td1,d99\n")
    status, _, errors = mine("--run", "lists", *flags[4:], "--output_dir", "out", "--dry_run")
    assert status == 1 and "lists:1: passage d99" in errors
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "lists"])
