"""All five scripts in a row, each on two gloo processes, and again on one. Run: python -m pytest
tests/test_pipeline.py"""

import json

import numpy as np
import pytest

from lib import files
from lib.embeddings import Embeddings


@pytest.mark.slow
def test_from_corpus_to_metrics_on_two_processes(
    tmp_path, tiny_collection, tiny_model_dir, script, two_processes
):
    data = tiny_collection
    texts = ["--corpus", data.corpus, "--queries", data.queries, "--qrels", data.qrels]

    def pipeline(out, call):
        batch = 4 if call is two_processes else 8
        small = [
            "--per_device_batch_size",
            batch,
            "--max_steps",
            6,
            "--log_every",
            2,
            "--num_workers",
            0,
        ]
        start = ["--model", tiny_model_dir, "--corpus", data.corpus, "--max_length", 48]
        call(
            "pretrain_mae.py",
            *start,
            *small,
            "--objective",
            "retromae",
            "--output_dir",
            out / "pretrained",
        )
        call(
            "mine_negatives.py", "--bm25", *texts, "--depth", 20, "--output_dir", out / "negatives"
        )
        group = [
            "--negatives",
            out / "negatives/negatives.tsv",
            "--passages_per_query",
            3,
            "--pooling",
            "cls",
        ]
        call(
            "finetune_biencoder.py",
            "--model",
            out / "pretrained",
            *texts,
            *group,
            *small,
            "--output_dir",
            out / "tuned",
        )
        for kind, source in (("query", data.queries), ("passage", data.corpus)):
            flags = [
                "--model",
                out / "tuned",
                "--input",
                source,
                "--kind",
                kind,
                "--output_dir",
                out / kind,
            ]
            call("encode.py", *flags, "--shard_rows", 7, "--num_workers", 0)
        vectors = [
            "--queries_embeddings",
            out / "query",
            "--corpus_embeddings",
            out / "passage",
            "--qrels",
            data.qrels,
        ]
        call(
            "evaluate.py",
            *vectors,
            "--depth",
            15,
            "--metrics",
            "RR@10",
            "R@10",
            "--output_dir",
            out / "result",
        )
        return json.loads((out / "result" / "metrics.json").read_text())["splits"]["qrels"][
            "metrics"
        ]

    def one_process(name, *flags):
        status, shown, error = script(name.removesuffix(".py"), *flags)
        assert status == 0 and "1 process(es)" in shown, error

    pair, single = (
        pipeline(tmp_path / "two", two_processes),
        pipeline(tmp_path / "one", one_process),
    )
    assert pair.keys() == single.keys() and all(0 < value <= 1 for value in pair.values())
    # mining and, at equal weights, encoding and searching do not depend on the number of processes
    assert (tmp_path / "two/negatives/negatives.tsv").read_text() == (
        tmp_path / "one/negatives/negatives.tsv"
    ).read_text()
    one_process("encode.py", "--model", tmp_path / "two/tuned", "--input", data.corpus, "--kind", "passage",
                "--output_dir", tmp_path / "again", "--shard_rows", 7, "--num_workers", 0)  # fmt: skip
    stored, again = Embeddings(tmp_path / "two/passage"), Embeddings(tmp_path / "again")
    rows = range(len(again))
    assert stored.ids(rows) == again.ids(rows) and (stored.take(rows) == again.take(rows)).all()


@pytest.mark.slow
def test_the_sparse_track(tmp_path, tiny_collection, tiny_model_dir, script, two_processes):
    data = tiny_collection
    texts = ["--corpus", data.corpus, "--queries", data.queries, "--qrels", data.qrels]

    def call(name, *flags):
        status, shown, error = script(name, *flags)
        assert status == 0, error
        return shown

    small = [
        "--per_device_batch_size",
        8,
        "--max_steps",
        4,
        "--num_workers",
        0,
        "--max_passage_length",
        48,
    ]
    head = ["--head", "sparse", "--passages_per_query", 3, "--negatives", data.negatives]
    call(
        "finetune_biencoder",
        "--model",
        tiny_model_dir,
        *texts,
        *head,
        *small,
        "--output_dir",
        tmp_path / "model",
    )
    for kind, source in (("query", data.queries), ("passage", data.corpus)):
        flags = [
            "--model",
            tmp_path / "model",
            "--input",
            source,
            "--kind",
            kind,
            "--output_dir",
            tmp_path / kind,
        ]
        call("encode", *flags, "--shard_rows", 7, "--num_workers", 0)
    vectors = [
        "--queries_embeddings",
        tmp_path / "query",
        "--corpus_embeddings",
        tmp_path / "passage",
    ]
    judged = ["--qrels", data.qrels, "--depth", 15, "--metrics", "RR@10", "R@10"]
    shown = call("evaluate", *vectors, *judged, "--output_dir", tmp_path / "result")
    assert "bits a weight" in shown

    # the run is the naive product's
    q, p = Embeddings(tmp_path / "query"), Embeddings(tmp_path / "passage")
    scores = (q.take(range(20)) @ p.take(range(40)).T).toarray()
    run = files.read_run(tmp_path / "result" / "run.trec")
    for row, qid in enumerate(q.ids(range(20))):
        best = np.argsort(-scores[row], kind="stable")[:15]
        np.testing.assert_allclose(run[qid].scores, scores[row][best], rtol=1e-5)
        assert set(run[qid].pids[:5]) == set(p.ids(best[:5]))

    two_processes("evaluate.py", *vectors, *judged, "--output_dir", tmp_path / "two")
    assert (tmp_path / "two" / "run.trec").read_text() == (
        tmp_path / "result" / "run.trec"
    ).read_text()
    call(
        "evaluate",
        *vectors,
        *judged,
        "--candidates",
        data.candidates,
        "--output_dir",
        tmp_path / "reranked",
    )
    call("evaluate", *vectors, *judged, "--bits", 8, "--output_dir", tmp_path / "small")
    call("evaluate", "--bm25", *texts, "--depth", 15, "--output_dir", tmp_path / "bm25")
    runs = tmp_path / "result" / "run.trec", tmp_path / "bm25" / "run.trec"
    call("evaluate", "--run", *runs, "--qrels", data.qrels, "--output_dir", tmp_path / "fused")
    mine = ["--corpus", data.corpus, "--qrels", data.qrels, "--depth", 12]
    call(
        "mine_negatives",
        *vectors,
        *mine,
        "--max_score_margin",
        0,
        "--output_dir",
        tmp_path / "negatives",
    )
    judged_positives = {qid: set(pids) for qid, pids in files.read_qrels(data.qrels).items()}
    for qid, pids in files.read_negatives(tmp_path / "negatives" / "negatives.tsv"):
        assert (
            pids == [pid for pid in run[qid].pids[:12] if pid in pids]
            and not set(pids) & judged_positives[qid]
        )
    status, _, error = script(
        "evaluate", *vectors, *judged, "--index", "Flat", "--output_dir", tmp_path / "x"
    )
    assert status == 1 and "--index is for dense vectors" in error
