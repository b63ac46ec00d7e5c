"""All five scripts in a row, each on two gloo processes, and again on one. Run: python -m pytest
tests/test_pipeline.py"""

import json

import pytest

from lib import files


@pytest.mark.slow
def test_from_corpus_to_metrics_on_two_processes(tmp_path, tiny_collection, tiny_model_dir, script, two_processes):
    data = tiny_collection
    texts = ["--corpus", data.corpus, "--queries", data.queries, "--qrels", data.qrels]

    def pipeline(out, call):
        batch = 4 if call is two_processes else 8
        small = ["--per_device_batch_size", batch, "--max_steps", 6, "--log_every", 2, "--num_workers", 0]
        start = ["--model", tiny_model_dir, "--corpus", data.corpus, "--max_length", 48]
        call("pretrain_mae.py", *start, *small, "--objective", "retromae", "--output_dir", out / "pretrained")
        call("mine_negatives.py", "--bm25", *texts, "--depth", 20, "--output_dir", out / "negatives")
        group = ["--negatives", out / "negatives/negatives.tsv", "--passages_per_query", 3, "--pooling", "cls"]
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
            flags = ["--model", out / "tuned", "--input", source, "--kind", kind, "--output_dir", out / kind]
            call("encode.py", *flags, "--shard_rows", 7, "--num_workers", 0)
        vectors = [
            "--queries_embeddings",
            out / "query",
            "--corpus_embeddings",
            out / "passage",
            "--qrels",
            data.qrels,
        ]
        call("evaluate.py", *vectors, "--depth", 15, "--metrics", "RR@10", "R@10", "--output_dir", out / "result")
        return json.loads((out / "result" / "metrics.json").read_text())["splits"]["qrels"]["metrics"]

    def one_process(name, *flags):
        status, shown, error = script(name.removesuffix(".py"), *flags)
        assert status == 0 and "1 process(es)" in shown, error

    pair, single = pipeline(tmp_path / "two", two_processes), pipeline(tmp_path / "one", one_process)
    assert pair.keys() == single.keys() and all(0 < value <= 1 for value in pair.values())
    # mining and, at equal weights, encoding and searching do not depend on the number of processes
    assert (tmp_path / "two/negatives/negatives.tsv").read_text() == (
        tmp_path / "one/negatives/negatives.tsv"
    ).read_text()
    one_process("encode.py", "--model", tmp_path / "two/tuned", "--input", data.corpus, "--kind", "passage",
                "--output_dir", tmp_path / "again", "--shard_rows", 7, "--num_workers", 0)  # fmt: skip
    stored, again = files.Embeddings(tmp_path / "two/passage"), files.Embeddings(tmp_path / "again")
    rows = range(len(again))
    assert stored.ids(rows) == again.ids(rows) and (stored.take(rows) == again.take(rows)).all()
