"""pytest tests/test_msmarco_eval.py — recipes/msmarco_eval.sh: numbers, levels, re-ranking,
documents, BM25."""

import json
import shutil

import numpy as np
import pytest
import pytrec_eval


@pytest.fixture
def msmarco(tiny_collection, tmp_path):
    """A folder of the collection with the names and formats that recipes/get_msmarco.sh leaves. All
    sets have the same queries."""
    folder = tmp_path / "msmarco"
    folder.mkdir()
    passages = [json.loads(line) for line in tiny_collection.corpus.read_text().splitlines()]
    (folder / "corpus.tsv").write_text(
        "".join(f"{p['_id']}\t{p['title']}\t{p['text']}\n" for p in passages)
    )
    judged = [line.split("\t") for line in tiny_collection.qrels.read_text().splitlines()[1:]]
    for name in ("train", "dev", "dl19", "dl20"):
        shutil.copy(tiny_collection.queries, folder / f"queries.{name}.tsv")
        qrels = folder / f"qrels.{name}.{'txt' if name.startswith('dl') else 'tsv'}"
        qrels.write_text("".join(f"{qid}\t0\t{pid}\t2\n" for qid, pid, _ in judged))
    return folder


def read_rows(path, columns):
    """The given columns of a file of words, line by line."""
    return [[line.split()[at] for at in columns] for line in path.read_text().splitlines()]


def lists(path):
    """run[qid] = pids, in the order of a TREC run."""
    run = {}
    for qid, pid in read_rows(path, (0, 2)):
        run.setdefault(qid, []).append(pid)
    return run


def expected(folder, qrels_path, names, level):
    """The metrics of folder/run.trec by pytrec_eval; what that has not is counted here."""
    qrels, run = {}, {}
    for qid, pid, grade in read_rows(qrels_path, (0, 2, 3)):
        qrels.setdefault(qid, {})[pid] = int(grade)
    for qid, pid, score in read_rows(folder / "run.trec", (0, 2, 4)):
        run.setdefault(qid, {})[pid] = float(score)
    theirs = {"nDCG@10": "ndcg_cut_10", "AP": "map", "R@100": "recall_100", "R@1000": "recall_1000"}
    wanted = {"ndcg_cut.10", "map", "recall.100,1000", "recip_rank"}
    values = pytrec_eval.RelevanceEvaluator(qrels, wanted, relevance_level=level).evaluate(run)
    ranked = lists(folder / "run.trec")
    result = []
    for name in names:
        kind, _, cut = name.partition("@")
        if name in theirs:
            per_query = [values[qid][theirs[name]] if qid in values else 0 for qid in qrels]
        elif kind == "RR":
            reciprocal = [values[qid]["recip_rank"] if qid in values else 0 for qid in qrels]
            per_query = [value if value >= 1 / int(cut) else 0 for value in reciprocal]
        else:
            assert name == "Hole@10"
            first = [(ranked.get(qid, [])[:10], judged) for qid, judged in qrels.items()]
            per_query = [
                np.mean([pid not in judged for pid in pids]) if pids else 0
                for pids, judged in first
            ]
        result.append(f"{np.mean(per_query):.4f}")
    return result


def candidates_of(tiny_collection):
    """candidates[qid] = pids; the last query has none."""
    return dict(list(lists(tiny_collection.candidates).items())[:-1])


def texts_of(tiny_collection):
    passages = [json.loads(line) for line in tiny_collection.corpus.read_text().splitlines()]
    return {passage["_id"]: passage["text"] for passage in passages}


def table(done, out):
    """The rows of the table, printed and written alike."""
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in (out / "table.tsv").read_text().splitlines()]
    assert [line.split() for line in done.stdout.splitlines()[-len(rows) :]] == rows
    return rows


@pytest.mark.slow
def test_passages_by_bm25_count_grade_2_on_trec_and_grade_1_on_dev(
    recipe, msmarco, tiny_collection, tmp_path
):
    (msmarco / "queries.dl20.tsv").unlink()  # a set that was not fetched
    candidates, texts = candidates_of(tiny_collection), texts_of(tiny_collection)
    (msmarco / "collection.tsv").write_text(
        "".join(f"{pid}\t{text}\n" for pid, text in texts.items())
    )
    pairs = [(qid, pid) for qid, pids in candidates.items() for pid in pids]
    (msmarco / "top1000.dl19.tsv").write_text(
        "".join(f"{q}\t{p}\twhat?\t{texts[p]}\n" for q, p in pairs)
    )
    judged = [
        (qid, pid, 1 if int(qid[1:]) < 10 else 2)
        for qid, pid in read_rows(msmarco / "qrels.dl19.txt", (0, 2))
    ]
    judged += [
        (f"q{number}", candidates[f"q{number}"][0], 2) for number in range(10)
    ]  # not what BM25 finds
    for name in ("qrels.dl19.txt", "qrels.dev.tsv"):
        (msmarco / name).write_text(
            "".join(f"{qid}\t0\t{pid}\t{grade}\n" for qid, pid, grade in judged)
        )

    out = tmp_path / "out"
    names, *rows = table(recipe("msmarco_eval.sh", "bm25", msmarco, out, "--k1", "1.2"), out)
    assert names == ["set", "ranking", "queries", "RR@10", "nDCG@10", "AP", "R@1000", "Hole@10"]
    assert [row[:3] for row in rows] == [
        ["dev", "full", "20"],
        ["dl19", "full", "20"],
        ["dl19", "reranked", "20"],
    ]
    dev, full, reranked = (out / f"evaluation-{name}" for name in ("dev", "dl19", "dl19-reranked"))
    assert rows[0][3:] == expected(dev, msmarco / "qrels.dev.tsv", names[3:], 1)
    for row, folder in zip(rows[1:], (full, reranked), strict=True):
        assert row[3:] == expected(folder, msmarco / "qrels.dl19.txt", names[3:], 2)
        assert row[3] != expected(folder, msmarco / "qrels.dl19.txt", names[3:], 1)[0]
    assert lists(dev / "run.trec") == lists(full / "run.trec") and float(rows[0][3]) > float(
        rows[1][3]
    )
    for qid, pids in lists(reranked / "run.trec").items():
        assert sorted(pids) == sorted(candidates[qid])
    arguments = json.loads((dev / "args.json").read_text())["arguments"]
    assert (
        arguments["corpus"].endswith("collection.tsv")
        and arguments["k1"] == 1.2
        and arguments["depth"] == 1000
    )


@pytest.mark.slow
def test_documents_by_a_model_go_on_by_the_same_command(
    recipe, msmarco, tiny_collection, tiny_model_dir, tmp_path
):
    documents = msmarco / "documents"
    documents.mkdir()
    texts = texts_of(tiny_collection)
    rows = [f"{pid}\thttp://x.org/{pid}\tTitle of {pid}\t{text}\n" for pid, text in texts.items()]
    (documents / "corpus.tsv").write_text("".join(rows))
    (documents / "queries.dl19.tsv").write_text(tiny_collection.queries.read_text())
    judged = read_rows(msmarco / "qrels.dl19.txt", (0, 2))
    qrels = documents / "qrels.dl19.txt"
    qrels.write_text(
        "".join(f"{qid} Q0 {pid} {1 + at % 3}\n" for at, (qid, pid) in enumerate(judged))
    )
    candidates = candidates_of(tiny_collection)
    kept = [
        line
        for line in tiny_collection.candidates.read_text().splitlines()
        if line.split()[0] in candidates
    ]
    (documents / "top100.dl19.trec").write_text("\n".join(kept) + "\n")

    out = tmp_path / "out"
    command = ("msmarco_eval.sh", tiny_model_dir, msmarco, out, "--documents", "--pooling", "mean")
    names, *rows = table(recipe(*command), out)
    assert names[3:] == ["RR@10", "RR@100", "nDCG@10", "AP", "R@100", "Hole@10"]
    assert [row[:3] for row in rows] == [["dl19", "full", "20"], ["dl19", "reranked", "20"]]
    for row, name in zip(rows, ("dl19", "dl19-reranked"), strict=True):
        folder = out / f"evaluation-{name}"
        assert row[3:] == expected(folder, qrels, names[3:], 1)
        assert row[4] != expected(folder, qrels, names[3:], 2)[1]
        assert json.loads((folder / "args.json").read_text())["arguments"]["depth"] == 100
    everything, again = (
        lists(out / f"evaluation-{name}" / "run.trec") for name in ("dl19", "dl19-reranked")
    )
    assert again == {q: [p for p in everything[q] if p in pids] for q, pids in candidates.items()}

    (out / "table.tsv").unlink()
    changed = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert table(recipe(*command), out) == [names, *rows]
    assert changed == {path: path.stat().st_mtime_ns for path in changed}


def test_what_is_missing_is_named(recipe, tmp_path):
    done = recipe("msmarco_eval.sh", "bm25")
    assert done.returncode == 1 and "MODEL DATA [OUT]" in done.stderr
    done = recipe("msmarco_eval.sh", "bm25", tmp_path, tmp_path / "out", "--documents")
    assert done.returncode == 1 and f"{tmp_path}/documents: no corpus.tsv" in done.stderr
    (tmp_path / "corpus.tsv").write_text("1\tants\n")
    done = recipe("msmarco_eval.sh", "bm25", tmp_path, tmp_path / "out")
    assert done.returncode == 1 and "no queries of dev, dl19 or dl20" in done.stderr
    assert not (tmp_path / "out").exists()
