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


def refused(evaluate, *flags):
    """The one line of a command that must fail."""
    status, _, error = evaluate(*flags)
    assert status == 1 and error.count("\n") == 1 and " — " in error, error
    return error


@pytest.mark.parametrize(
    "flags",
    [
        "--depth 0",
        "--depth 3000000000",
        "--depth -1",
        "--k1 -1",
        "--k1 inf",
        "--b 1.5",
        "--b nan",
        "--seed -1",
        "--relevance_level 0",
        "--relevance_level 3000000000",
        "--metrics R@0",
        "--metrics nDCG@-1",
        "--metrics R@99999999999999999999",
        "--metrics RR@\u0661",
        "--metrics @5",
    ],
)
def test_numbers_without_sense_are_refused_before_anything_is_written(runs, evaluate, flags):
    name = flags.split()[0]
    data = ["--run", "run", "--qrels", "dev.tsv", "--output_dir", "out"]
    assert name in refused(evaluate, *data, *flags.split())
    assert not (runs / "out").exists()


def test_depth_cuts_runs_fusions_and_what_they_are_compared_with(runs, evaluate):
    flags = ["--qrels", "dev.tsv", "--depth", 1, "--metrics", "AP"]
    evaluate("--run", "run", *flags, "--compare", "other", "--output_dir", "one")
    assert files.read_run("one/run.trec")["q1"].pids == ["b"]
    # q1 has b before a, q2 c before b of two relevant ones, q3 nothing
    assert metrics(runs / "one")["metrics"]["AP"] == pytest.approx((0 + 0.5 + 0) / 3)
    assert metrics(runs / "one")["compare"]["AP"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    evaluate("--run", "run", "other", *flags, "--output_dir", "fused")
    assert all(len(entry.pids) == 1 for entry in files.read_run("fused/run.trec").values())
    shown = evaluate("--run", "run", *flags, "--depth", 2, "--output_dir", "two")[1]
    assert "depth: the first 2 passages of a query are counted" in shown
    assert metrics(runs / "two")["metrics"]["AP"] == pytest.approx((0.5 + 1 + 0) / 3)


def test_the_run_compared_with_loses_identical_ids_too(runs, evaluate):
    flags = ["--run", "run", "--compare", "run", "--qrels", "test.tsv", "--metrics", "RR@10"]
    evaluate(*flags, "--ignore_identical_ids", "--output_dir", "out")
    assert metrics(runs / "out", "test")["compare"]["RR@10"]["value"] == 1


def test_identical_ids_that_are_answers_are_not_ignored(runs, evaluate):
    files.write_qrels("own", {"q1": {"a": 1, "q1": 0}, "q4": {"q4": 2}})
    flags = ["--run", "run", "--qrels", "own", "--output_dir", "out"]
    error = refused(evaluate, *flags, "--ignore_identical_ids")
    assert "own: the passage with the id of the query is relevant to q4 (1 of 2 queries)" in error
    assert not (runs / "out").exists() and evaluate(*flags)[0] == 0


def test_nothing_found_is_zero_and_can_be_read_back(tmp_path, tiny_collection, evaluate):
    (tmp_path / "queries.tsv").write_text("q1\tzebra\nq2\tunicorn\n")
    files.write_qrels(tmp_path / "qrels", {"q1": {"p1": 1}, "q2": {"p2": 1}})
    qrels = ["--qrels", "qrels", "--metrics", "RR@10", "AP", "nDCG@10", "Hole@10"]
    texts = ["--bm25", "--queries", "queries.tsv", "--corpus", tiny_collection.corpus]
    (tmp_path / "none").touch()
    sources = {
        "searched": texts,
        "candidates": [*texts, "--candidates", "none"],
        "run": ["--run", "searched/run.trec"],
        "fused": ["--run", "searched/run.trec", "none"],
    }
    for name, source in sources.items():
        status, shown, error = evaluate(*source, *qrels, "--output_dir", name)
        assert status == 0 and "queries without a result: 2, count 0" in shown, error
        assert set(metrics(tmp_path / name, "qrels")["metrics"].values()) == {0.0}
    files.write_run(tmp_path / "others", [("q8", ["p1"], [1])])
    for flags in (["--run", "others"], [*texts, "--candidates", "others"]):
        error = refused(evaluate, *flags, *qrels, "--output_dir", "bad")
        assert "others: no query in it is judged in qrels" in error
        assert not (tmp_path / "bad").exists()


def test_ranks_that_float32_does_not_tell_apart_are_refused(runs, evaluate):
    (runs / "marco").write_text("q1\tb\t3000000000\nq1\ta\t3000000001\n")
    error = refused(evaluate, "--run", "marco", "--qrels", "dev.tsv", "--output_dir", "out")
    assert "marco:1: the rank 3000000000 is above 16777216" in error


def test_a_p_that_no_draw_reached_is_a_bound(runs, evaluate):
    qids = [f"q{number}" for number in range(30)]
    files.write_qrels(runs / "many", {qid: {"a": 1} for qid in qids})
    files.write_run(runs / "right", [(qid, ["a"], [1]) for qid in qids])
    files.write_run(runs / "wrong", [(qid, ["b"], [1]) for qid in qids])
    flags = ["--run", "right", "--compare", "wrong", "--qrels", "many", "--metrics", "RR@10"]
    shown = evaluate(*flags, "--output_dir", "out")[1]
    assert "+1.0000 against 0.0000, p < 0.0002, 95%" in shown


def test_a_folder_is_of_all_that_was_read(embedded, evaluate):
    """A file that changed makes a completed folder, and an unfinished one, another run's."""
    (embedded / "top").write_text("q0\td9,d1\nq1\td3,d4\n")
    files.write_run(embedded / "old", [("q0", ["d3", "d1"], [2, 1])])
    flags = ["--queries_embeddings", "q", "--corpus_embeddings", "p", "--qrels", "test.tsv"]
    flags += ["--candidates", "top", "--compare", "old", "--metrics", "RR@10", "--output_dir", "o"]
    assert evaluate(*flags)[0] == 0 and "o is complete" in evaluate(*flags)[1]

    def other_vectors(folder):
        vectors = np.load(folder / "shard-00000.npy")
        ids = (folder / "shard-00000.ids.txt").read_text().split()
        write_shard(folder, 0, vectors[::-1].copy(), ids)

    spoil = {
        "qrels": lambda: files.write_qrels("test.tsv", {"q0": {"d9": 1}}),
        "candidates": lambda: (embedded / "top").write_text("q0\td1,d9\n"),
        "compare": lambda: files.write_run("old", [("q0", ["d1", "d3"], [2, 1])]),
        "queries_embeddings": lambda: other_vectors(embedded / "q"),
        "corpus_embeddings": lambda: other_vectors(embedded / "p"),
    }
    (embedded / "o" / "run.trec").rename(embedded / "kept")
    for done in (True, False):
        for name, change in spoil.items():
            before = {p: p.read_bytes() for p in embedded.rglob("*") if p.is_file()}
            change()
            assert f"o: it was made with {name} " in refused(evaluate, *flags), (name, done)
            for path, content in before.items():
                path.write_bytes(content)
        assert ("o is complete" in evaluate(*flags)[1]) == done
        (embedded / "o" / "metrics.json").unlink()
        (embedded / "o" / "per_query.tsv").touch()


def test_vectors_of_other_tools_need_four_facts(embedded, evaluate):
    for name, kind, count in (("q", "query", 3), ("p", "passage", 12)):
        finish_embeddings(embedded / name, {"count": count, "dim": 2, "kind": kind})
    flags = ["--queries_embeddings", "q", "--corpus_embeddings", "p", "--qrels", "test.tsv"]
    assert evaluate(*flags, "--depth", 4, "--output_dir", "out")[0] == 0
    assert files.read_run("out/run.trec")["q0"].pids == ["q0", "d1", "d2", "d3"]
    write_shard(embedded / "q", 0, np.ones((3, 5), np.float32), ["q0", "q1", "q2"])
    finish_embeddings(embedded / "q", {"count": 3, "dim": 5, "kind": "query"})
    error = refused(evaluate, *flags, "--output_dir", "bad")
    assert "q: made by another checkpoint or --head than p" in error
    finish_embeddings(embedded / "q", {"count": 3, "dim": 5})
    assert "vectors of kind None" in refused(evaluate, *flags, "--output_dir", "bad")
    assert not (embedded / "bad").exists()


def test_texts_and_their_index_are_compared(tmp_path, evaluate, tiny_collection):
    (tmp_path / "c.tsv").write_text("p1\tants march\np2\tbees fly\n")
    (tmp_path / "q.tsv").write_text("q1\tants\n")
    files.write_qrels(tmp_path / "qrels", {"q1": {"p1": 1}})
    flags = ["--bm25", "--queries", "q.tsv", "--corpus", "c.tsv", "--qrels", "qrels"]
    flags += ["--bm25_index", "index"]
    assert evaluate(*flags, "--output_dir", "o")[0] == 0
    (tmp_path / "q.tsv").write_text("q1\tbees\n")
    assert "o: it was made with queries " in refused(evaluate, *flags, "--output_dir", "o")
    (tmp_path / "c.tsv").write_text("p1\tants march\np2\tants fly\n")
    assert "o: it was made with corpus " in refused(evaluate, *flags, "--output_dir", "o")
    error = refused(evaluate, *flags, "--output_dir", "other")
    assert "index: an index with fingerprint" in error and "remove it" in error
    assert not (tmp_path / "other" / "metrics.json").exists()


def test_the_beir_recipe_does_not_drop_answers(recipe, tmp_path):
    """The queries of Quora are passages; here one of them is judged to be its own answer."""
    folder = tmp_path / "beir" / "quora"
    (folder / "qrels").mkdir(parents=True)
    texts = [{"_id": name, "text": f"how do {name} live?"} for name in ("ants", "bees", "wasps")]
    rows = "".join(json.dumps(text) + "\n" for text in texts)
    for name in ("corpus.jsonl", "queries.jsonl"):
        (folder / name).write_text(rows)
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "test.tsv").write_text(f"{header}ants\tbees\t1\nbees\tants\t1\n")
    done = recipe("beir.sh", "bm25", "beir", "out", cwd=tmp_path)
    assert done.returncode == 0 and "passage id = query id: dropped" in done.stdout, done.stderr
    (folder / "qrels" / "test.tsv").write_text(f"{header}ants\tbees\t1\nbees\tbees\t1\n")
    done = recipe("beir.sh", "bm25", "beir", "other", cwd=tmp_path)
    assert done.returncode == 1 and "the id of the query is relevant to bees" in done.stderr
    assert not (tmp_path / "other" / "quora" / "evaluation").exists()


def test_without_judgments_all_queries_are_searched(embedded, tiny_collection, evaluate):
    """The run alone is written, with the lists that judged queries have."""
    vectors = ["--queries_embeddings", "q", "--corpus_embeddings", "p"]
    texts = ["--bm25", "--queries", tiny_collection.queries, "--corpus", tiny_collection.corpus]
    for name, source in (("vectors", vectors), ("texts", texts)):
        qrels = "test.tsv" if name == "vectors" else tiny_collection.qrels
        status, shown, error = evaluate(*source, "--output_dir", name)
        assert status == 0 and "not judged -> " in shown and "RR@10" not in shown, error
        assert evaluate(*source, "--qrels", qrels, "--output_dir", f"{name}-judged")[0] == 0
        found, judged = (files.read_run(f"{n}/run.trec") for n in (name, f"{name}-judged"))
        assert len(found) == (3 if name == "vectors" else 20) and judged
        for qid, entry in judged.items():
            assert found[qid].pids == entry.pids and (found[qid].scores == entry.scores).all()
        assert {path.name for path in (embedded / name).iterdir()} <= {
            *("args.json", "run.trec", "index")
        }
        again = evaluate(*source, "--output_dir", name)
        assert again[0] == 0 and f"{name} is complete" in again[1]
    assert evaluate("--run", "vectors/run.trec", "texts/run.trec", "--output_dir", "fused")[0] == 0
    assert len(files.read_run("fused/run.trec")) == 20
    (embedded / "top").write_text("q1\td9,d1\n")
    evaluate(*vectors, "--candidates", "top", "--ignore_identical_ids", "--output_dir", "again")
    assert files.read_run("again/run.trec")["q1"].pids == ["d1", "d9"]


@pytest.mark.parametrize(
    "flags", ["--compare run", "--metrics AP", "--relevance_level 2", "--allow_unknown"]
)
def test_what_needs_judgments_says_so(runs, evaluate, flags):
    error = refused(evaluate, "--run", "run", *flags.split(), "--output_dir", "out")
    assert f"{flags.split()[0]}: nothing is measured without judgments — add --qrels" in error
    assert not (runs / "out").exists()


def test_candidates_of_other_queries_are_refused_without_judgments_too(embedded, evaluate):
    (embedded / "top").write_text("q9\td9,d1\n")
    flags = ["--queries_embeddings", "q", "--corpus_embeddings", "p", "--candidates", "top"]
    assert "top: no query in it is searched for" in refused(evaluate, *flags, "--output_dir", "out")
    assert not (embedded / "out").exists()


def test_a_dry_run_shows_the_search_and_writes_nothing(embedded, tiny_collection, evaluate):
    vectors = ["--queries_embeddings", "q", "--corpus_embeddings", "p", "--depth", 5]
    texts = ["--bm25", "--queries", tiny_collection.queries, "--corpus", tiny_collection.corpus]
    meta = files.read_json("q/meta.json")
    (embedded / "q.tsv").write_text("q0\twhich point is this?\n")
    finish_embeddings(embedded / "q", {**meta, "input": str(embedded / "q.tsv")})
    files.write_run("run", [("q1", ["d1"], [1])])
    cases = [
        (
            vectors,
            ["3 of 3 in q", "q0: which point", "12 of p", "12 dense vectors of 2 dimensions"],
        ),
        (vectors, ["exact search", "15 results", " s or more"]),
        ([*vectors, "--qrels", "test.tsv"], ["m, exact search", "3 of 3 in q"]),
        (texts, ["20 of 20 in ", "q0: what about colony", "40 of ", "BM25, k1 0.9", "800 results"]),
        (["--run", "run"], ["run", "1 queries"]),
    ]
    for source, expected in cases:
        status, shown, error = evaluate(*source, "--dry_run", "--output_dir", "out")
        assert status == 0 and all(some in shown for some in expected), (shown, error)
        assert not (embedded / "out").exists()
    files.write_qrels("other.tsv", {"q7": {"d1": 1}})
    error = refused(evaluate, *vectors, "--qrels", "other.tsv", "--dry_run", "--output_dir", "out")
    assert "other.tsv:1: query q7 is not in q" in error
