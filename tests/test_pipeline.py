"""All five scripts in a row, each on two gloo processes, and again on one; and from the training
files of others to metrics. Run: python -m pytest tests/test_pipeline.py"""

import json

import numpy as np
import pytest

from lib import files
from lib.embeddings import Embeddings


def flags(**values):
    """name=value, ... -> a command line; a list is several values."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", *(value if isinstance(value, list | tuple) else [value])]
    return words


@pytest.fixture
def call(script):
    """call("encode", *flags) -> stdout of a script that ends well."""

    def run(name, *words):
        status, shown, error = script(name.removesuffix(".py"), *words)
        assert status == 0, error
        return shown

    return run


def metrics_of(folder):
    (part,) = json.loads((folder / "metrics.json").read_text())["splits"].values()
    return part["metrics"]


@pytest.mark.slow
def test_from_corpus_to_metrics_on_two_processes(
    tmp_path, tiny_collection, tiny_model_dir, call, two_processes
):
    data = tiny_collection

    def pipeline(out, call):
        batch = 4 if call is two_processes else 8
        small = flags(per_device_batch_size=batch, max_steps=6, log_every=2, num_workers=0)
        texts = flags(corpus=data.corpus, queries=data.queries)
        start = flags(model=tiny_model_dir, corpus=data.corpus, max_length=48)
        objective = flags(objective="retromae", output_dir=out / "pretrained")
        call("pretrain_mae.py", *start, *small, *objective)
        mined = flags(qrels=data.qrels, depth=20, output_dir=out / "negatives")
        call("mine_negatives.py", "--bm25", *texts, *mined)
        group = flags(train=out / "negatives/train.jsonl", passages_per_query=3, pooling="cls")
        model = flags(model=out / "pretrained", output_dir=out / "tuned")
        call("finetune_biencoder.py", *model, *texts, *group, *small)
        for kind, source in (("query", data.queries), ("passage", data.corpus)):
            what = flags(model=out / "tuned", input=source, kind=kind, output_dir=out / kind)
            call("encode.py", *what, "--shard_rows", 7, "--num_workers", 0)
        vectors = flags(queries_embeddings=out / "query", corpus_embeddings=out / "passage")
        judged = flags(qrels=data.qrels, depth=15, metrics=["RR@10", "R@10"])
        call("evaluate.py", *vectors, *judged, "--output_dir", out / "result")
        return metrics_of(out / "result")

    pair = pipeline(tmp_path / "two", two_processes)
    single = pipeline(tmp_path / "one", call)
    assert pair.keys() == single.keys() and all(0 < value <= 1 for value in pair.values())
    # mining and, at equal weights, encoding and searching do not depend on the number of processes
    name = "negatives/train.jsonl"
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    what = flags(model=tmp_path / "two/tuned", input=data.corpus, kind="passage")
    out = flags(output_dir=tmp_path / "again", shard_rows=7, num_workers=0)
    call("encode", *what, *out)
    stored, again = Embeddings(tmp_path / "two/passage"), Embeddings(tmp_path / "again")
    rows = range(len(again))
    assert stored.ids(rows) == again.ids(rows) and (stored.take(rows) == again.take(rows)).all()


@pytest.mark.slow
def test_the_sparse_track(tmp_path, tiny_collection, tiny_model_dir, call, script, two_processes):
    data = tiny_collection
    texts = flags(corpus=data.corpus, queries=data.queries)
    small = flags(per_device_batch_size=8, max_steps=4, num_workers=0, max_passage_length=48)
    head = flags(head="sparse", passages_per_query=3, train=data.train)
    model = flags(model=tiny_model_dir, output_dir=tmp_path / "model")
    call("finetune_biencoder", *model, *texts, *head, *small)
    for kind, source in (("query", data.queries), ("passage", data.corpus)):
        what = flags(model=tmp_path / "model", input=source, kind=kind, output_dir=tmp_path / kind)
        call("encode", *what, "--shard_rows", 7, "--num_workers", 0)
    vectors = flags(queries_embeddings=tmp_path / "query", corpus_embeddings=tmp_path / "passage")
    judged = flags(qrels=data.qrels, depth=15, metrics=["RR@10", "R@10"])
    call("evaluate", *vectors, *judged, "--output_dir", tmp_path / "result")

    # the run is the naive product's
    q, p = Embeddings(tmp_path / "query"), Embeddings(tmp_path / "passage")
    scores = (q.take(range(20)) @ p.take(range(40)).T).toarray()
    run = files.read_run(tmp_path / "result" / "run.trec")
    for row, qid in enumerate(q.ids(range(20))):
        best = np.argsort(-scores[row], kind="stable")[:15]
        np.testing.assert_allclose(run[qid].scores, scores[row][best], rtol=1e-5)
        assert set(run[qid].pids[:5]) == set(p.ids(best[:5]))

    two_processes("evaluate.py", *vectors, *judged, "--output_dir", tmp_path / "two")
    one, two = (tmp_path / name / "run.trec" for name in ("result", "two"))
    assert one.read_text() == two.read_text()
    reranked = flags(candidates=data.candidates, output_dir=tmp_path / "reranked")
    call("evaluate", *vectors, *judged, *reranked)
    bm25 = flags(qrels=data.qrels, depth=15, output_dir=tmp_path / "bm25")
    call("evaluate", "--bm25", *texts, *bm25)
    runs = [tmp_path / "result" / "run.trec", tmp_path / "bm25" / "run.trec"]
    call("evaluate", *flags(run=runs, qrels=data.qrels, output_dir=tmp_path / "fused"))
    mine = flags(corpus=data.corpus, qrels=data.qrels, depth=12, max_score_margin=0)
    call("mine_negatives", *vectors, *mine, "--output_dir", tmp_path / "negatives")
    positives = {qid: set(pids) for qid, pids in files.read_qrels(data.qrels).items()}
    for _, row in files.read_training_file(tmp_path / "negatives" / "train.jsonl"):
        assert row.neg == [pid for pid in run[row.qid].pids[:12] if pid in row.neg]
        assert not set(row.neg) & positives[row.qid]


# ------------------------------------------------------------------------------------------------
# training files of others, written by hand in their documented form

TEXTS = {
    "ants": ("how do ants find sugar", "Ants follow a trail of scent.", "Whales eat krill."),
    "bread": ("why does dough rise", "Yeast makes dough rise.", "Glaciers carve valleys."),
    "comets": ("what is a coma", "The coma is the cloud around a comet.", "Curd becomes cheese."),
    "maps": ("what does a legend show", "A legend explains the signs of a map.", "Lava is hot."),
}
FLAG = [
    {"query": q, "pos": [p], "neg": [n], "pos_scores": [9.5], "neg_scores": [1.5]}
    for q, p, n in TEXTS.values()
]
TEVATRON = [
    {
        "query_id": name,
        "query": q,
        "positive_passages": [{"docid": f"{name},1", "title": name, "text": p}],
        "negative_passages": [{"docid": f"{name},2", "title": "", "text": n}],
    }
    for name, (q, p, n) in TEXTS.items()
]
TRIPLETS = [{"anchor": q, "positive": p, "negative": n} for q, p, n in TEXTS.values()]


@pytest.mark.parametrize(
    "rows, more",
    [(FLAG, flags(kl_weight=1, contrastive_weight=0.2)), (TEVATRON, []), (TRIPLETS, [])],
    ids=["FlagEmbedding", "tevatron", "sentence-transformers"],
)
def test_a_training_file_of_others_is_imported_trained_on_and_evaluated(
    rows, more, tmp_path, tiny_model_dir, script, call
):
    source, data = tmp_path / "theirs.jsonl", tmp_path / "data"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = flags(corpus=data / "corpus.jsonl", queries=data / "queries.jsonl")
    model = flags(model=tiny_model_dir, pooling="mean", output_dir=tmp_path / "model")
    small = flags(passages_per_query=2, per_device_batch_size=4, max_steps=60, num_workers=0)
    how = flags(learning_rate=2e-3, max_query_length=16, max_passage_length=24)

    import_flags = flags(input=source, output_dir=data)
    call("recipes.import_training_data", *import_flags)
    status, _, error = script("finetune_biencoder", *model, *texts, "--train", source, *small)
    command = f"python -m recipes.import_training_data --input {source} --output_dir OUT"
    assert status == 1 and error.count("\n") == 1 and command in error

    train = flags(train=data / "train.jsonl")
    call("finetune_biencoder", *model, *texts, *train, *small, *how, *more)
    for kind, name in (("query", "queries"), ("passage", "corpus")):
        what = flags(model=tmp_path / "model", input=data / f"{name}.jsonl", kind=kind)
        call("encode", *what, *flags(output_dir=tmp_path / kind, num_workers=0))
    vectors = flags(queries_embeddings=tmp_path / "query", corpus_embeddings=tmp_path / "passage")
    judged = flags(qrels=data / "qrels.tsv", metrics=["RR@10"], output_dir=tmp_path / "result")
    call("evaluate", *vectors, *judged)
    assert metrics_of(tmp_path / "result")["RR@10"] > 0.6  # of eight passages, after 60 steps
