"""pytest tests/test_score_pairs.py — scores of a cross-encoder: one pair at a time, killed, on two
processes."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lib.embeddings import finish_embeddings, write_shard
from lib.files import read_run, read_training_file
from lib.texts import open_texts

KINDS = ["AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"]


@pytest.fixture(scope="module", params=[1, 2])
def teacher(request, tiny_model_dir, tmp_path_factory):
    """A random cross-encoder with one or two labels."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model_dir, num_labels=request.param
    )
    model.classifier.weight.data.normal_(std=2.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


@pytest.fixture
def score(script, tiny_collection):
    """score(model, output, *flags) -> stdout of recipes/score_pairs.py."""

    def call(model, output, *flags, fails=False):
        texts = ["--corpus", tiny_collection.corpus, "--queries", tiny_collection.queries]
        small = ["--max_query_length", 8, "--max_length", 32, "--num_workers", 0]
        words = ["--model", model, *texts, *small, "--output_dir", output, *flags]
        status, shown, error = script("recipes.score_pairs", *words)
        assert status == fails, error
        return error if fails else shown

    return call


def naive(folder, queries, corpus, qid, pid):
    """One pair by plain transformers: the query cut first, then the passage."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    titles, text = corpus[corpus.rows([pid])[0]]
    query = queries[queries.rows([qid])[0]][1]
    ids = tokenizer(query, add_special_tokens=False)["input_ids"][:8]
    passage = tokenizer(" ".join([*titles, text]), add_special_tokens=False)["input_ids"]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    both = [cls, *ids, sep, *passage[: 32 - 3 - len(ids)], sep]
    types = [0] * (len(ids) + 2) + [1] * (len(both) - len(ids) - 2)
    with torch.no_grad():
        batch = {"input_ids": torch.tensor([both]), "token_type_ids": torch.tensor([types])}
        logits = model(**batch).logits[0]
    return float(logits[-1] - (logits[0] if len(logits) == 2 else 0))


def test_a_training_file_comes_back_with_the_scores_of_its_pairs(
    teacher, score, tiny_collection, tmp_path
):
    shown = score(teacher, tmp_path / "out", "--train", tiny_collection.train)
    before = [row for _, row in read_training_file(tiny_collection.train)]
    after = [row for _, row in read_training_file(tmp_path / "out" / "train.jsonl")]
    assert [row._replace(pos_scores=None, neg_scores=None) for row in after] == before
    queries, corpus = open_texts(tiny_collection.queries), open_texts(tiny_collection.corpus)
    for row in after[:4]:
        scores = [*row.pos_scores, *row.neg_scores]
        for pid, found in zip([*row.pos, *row.neg], scores, strict=True):
            assert found == pytest.approx(naive(teacher, queries, corpus, row.qid, pid), abs=1e-4)
    pairs = sum(len(row.pos) + len(row.neg) for row in before)
    assert f"{pairs} scores" in shown
    assert not list((tmp_path / "out").glob("shard-*"))
    (tmp_path / "out" / "shard-00000.npy").touch()  # of a run killed when it cleaned up
    assert "is complete" in score(teacher, tmp_path / "out", "--train", tiny_collection.train)
    assert not list((tmp_path / "out").glob("shard-*"))


@pytest.mark.parametrize("teacher", [1], indirect=True)
def test_a_killed_run_and_two_processes_write_the_same_bytes(
    teacher, score, tiny_collection, tmp_path, two_processes, monkeypatch
):
    flags = ["--train", tiny_collection.train, "--shard_pairs", 16, "--tokens_per_batch", 200]
    score(teacher, tmp_path / "whole", *flags)
    whole = (tmp_path / "whole" / "train.jsonl").read_bytes()
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for name in ("train.jsonl", "meta.json"):
        (tmp_path / "killed" / name).unlink()
    stale = np.zeros(16, dtype=np.float32)
    np.save(tmp_path / "killed" / "shard-00001.npy", stale)  # kept, as a shard that is whole
    score(teacher, tmp_path / "killed", *flags)
    scores = [
        value
        for _, row in read_training_file(tmp_path / "killed" / "train.jsonl")
        for value in [*row.pos_scores, *row.neg_scores]
    ]
    assert scores[16:32] == [0.0] * 16 and any(scores[:16])
    texts = ["--corpus", tiny_collection.corpus, "--queries", tiny_collection.queries]
    small = ["--max_query_length", 8, "--max_length", 32, "--num_workers", 0]
    out = ["--model", teacher, "--output_dir", tmp_path / "two"]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    two_processes("recipes/score_pairs.py", *out, *texts, *small, *flags)
    assert (tmp_path / "two" / "train.jsonl").read_bytes() == whole


def test_a_run_is_ranked_by_the_scores(teacher, score, tiny_collection, tmp_path):
    score(teacher, tmp_path / "out", "--run", tiny_collection.candidates, "--depth", 5)
    given, ranked = read_run(tiny_collection.candidates), read_run(tmp_path / "out" / "run.trec")
    queries, corpus = open_texts(tiny_collection.queries), open_texts(tiny_collection.corpus)
    assert ranked.keys() == given.keys()
    for qid, entry in ranked.items():
        assert set(entry.pids) == set(given[qid].pids[:5])
        assert (np.diff(entry.scores) <= 0).all()
    best = ranked["q0"].pids[0]
    expected = naive(teacher, queries, corpus, "q0", best)
    assert ranked["q0"].scores[0] == pytest.approx(expected, abs=1e-4)


def test_refusals(teacher, score, tiny_collection, tiny_model_dir, tmp_path):
    train = ["--train", tiny_collection.train]
    assert "which pairs are scored?" in score(teacher, tmp_path / "x", fails=True)
    error = score(tiny_model_dir, tmp_path / "x", *train, fails=True)
    assert "so it is no cross-encoder — train one with" in error
    error = score(teacher, tmp_path / "x", *train, "--max_query_length", 40, fails=True)
    assert "the passage needs room beside the query" in error


def test_a_teacher_is_complete_for_its_arguments_and_made_anew_after_a_kill(
    script, tiny_collection, tiny_model_dir, tmp_path
):
    pytest.importorskip("sentence_transformers")
    texts = ["--corpus", tiny_collection.corpus, "--queries", tiny_collection.queries]
    flags = ["--model", tiny_model_dir, "--train", tiny_collection.train, *texts]
    flags += ["--max_length", 64, "--max_steps", 2, "--output_dir", tmp_path / "out"]
    status, _, error = script("recipes.train_cross_encoder", *flags)
    assert status == 0, error
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert "out is complete" in script("recipes.train_cross_encoder", *flags)[1]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    error = script("recipes.train_cross_encoder", *flags, "--seed", 1)[2]
    assert "it was made with --seed 42, now 1" in error
    weights = tmp_path / "out" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"half")
    (tmp_path / "out" / "done").unlink()
    assert script("recipes.train_cross_encoder", *flags)[0] == 0
    assert weights.read_bytes() == whole and (tmp_path / "out" / "done").is_file()


@pytest.mark.slow
def test_a_teacher_is_trained_on_two_processes(
    tiny_collection, tiny_model_dir, tmp_path, two_processes, monkeypatch
):
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    texts = ["--corpus", tiny_collection.corpus, "--queries", tiny_collection.queries]
    flags = ["--model", tiny_model_dir, "--train", tiny_collection.train, *texts]
    flags += ["--max_length", 64, "--max_steps", 2, "--output_dir", tmp_path / "out"]
    two_processes("recipes/train_cross_encoder.py", *flags)
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert trained.config.num_labels == 1 and (tmp_path / "out" / "done").is_file()


@pytest.mark.slow
def test_a_trained_cross_encoder_ranks_positives_first(
    script, score, tiny_collection, tiny_model_dir, tmp_path
):
    pytest.importorskip("sentence_transformers")
    flags = ["--model", tiny_model_dir, "--train", tiny_collection.train, "--max_length", 64]
    flags += ["--corpus", tiny_collection.corpus, "--queries", tiny_collection.queries]
    flags += ["--max_steps", 400, "--learning_rate", 2e-3, "--passages_per_query", 4]
    status, _, error = script(
        "recipes.train_cross_encoder", *flags, "--output_dir", tmp_path / "teacher"
    )
    assert status == 0, error
    long = ["--max_query_length", 30, "--max_length", 64]
    score(tmp_path / "teacher", tmp_path / "scores", "--train", tiny_collection.train, *long)
    rows = [row for _, row in read_training_file(tmp_path / "scores" / "train.jsonl")]
    first = [max(row.pos_scores) > max(row.neg_scores) for row in rows]
    assert np.mean(first) > 0.6


def test_no_tool_runs_the_code_of_a_checkpoint(
    script, tiny_collection, tiny_model_dir, tmp_path, monkeypatch
):
    """Not even if somebody answers yes: transformers would ask on standard input."""
    pytest.importorskip("sentence_transformers")
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "custom.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    for name, classes in (("config.json", KINDS), ("tokenizer_config.json", ("AutoTokenizer",))):
        content = json.loads((folder / name).read_text())
        own = {kind: ["custom.Own"] * 2 if "Tok" in kind else "custom.Own" for kind in classes}
        content |= {"auto_map": own, "model_type": "own", "tokenizer_class": "Own"}
        (folder / name).write_text(json.dumps(content))
    write_shard(tmp_path / "vectors", 0, csr_matrix(np.ones((1, 9), np.float32)), ["p0"])
    meta = {"model": str(folder), "dim": 9, "count": 1, "kind": "passage", "head": "sparse"}
    finish_embeddings(tmp_path / "vectors", meta)
    texts = ["--corpus", tiny_collection.corpus, "--queries", tiny_collection.queries]
    pairs = ["--model", folder, "--train", tiny_collection.train, *texts]
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    for name, *flags in (
        ("recipes.score_pairs", *pairs),
        ("recipes.train_cross_encoder", *pairs),
        ("recipes.export_anserini", "--embeddings", tmp_path / "vectors"),
        ("finetune_biencoder", *pairs, "--pooling", "cls"),
        ("pretrain_mae", "--model", folder, "--corpus", tiny_collection.corpus),
        ("encode", "--model", folder, "--input", tiny_collection.queries, "--kind", "query"),
    ):
        out = tmp_path / name
        flags += ["--pooling", "cls"] if name == "encode" else []
        status, shown, error = script(name, *flags, "--output_dir", out)
        assert status == 1 and f"{folder}: cannot be loaded" in error, error
        assert len(error.strip().splitlines()) == 1 and not ran.exists() and not out.exists()


def test_what_is_damaged_or_missing_is_one_line(
    teacher, script, tiny_collection, tiny_model_dir, tmp_path
):
    pytest.importorskip("sentence_transformers")
    damaged, empty = tmp_path / "damaged", tmp_path / "empty.jsonl"
    shutil.copytree(tiny_model_dir, damaged)
    (damaged / "model.safetensors").write_bytes(b"half")
    empty.write_text("")
    texts = {"--corpus": tiny_collection.corpus, "--queries": tiny_collection.queries}
    good = {"--model": tiny_model_dir, "--train": tiny_collection.train, **texts}
    for name, changed, message in (
        ("train_cross_encoder", {"--model": damaged}, "damaged: cannot be loaded"),
        ("train_cross_encoder", {"--model": tmp_path / "no"}, "no: no such folder"),
        ("train_cross_encoder", {"--train": tmp_path / "no"}, "no: no such file"),
        ("train_cross_encoder", {"--train": empty}, "the file has no judgments"),
        ("train_cross_encoder", {"--max_length": 129}, "it has 128 positions — lower"),
        ("train_cross_encoder", {"--max_steps": 0}, "--max_steps 0 — give"),
        ("score_pairs", {"--model": damaged}, "damaged: cannot be loaded"),
        ("score_pairs", {"--model": teacher, "--train": empty}, "empty.jsonl: no query in it"),
        ("score_pairs", {"--model": teacher, "--corpus": tmp_path / "no.tsv"}, "no such file"),
    ):
        given = {**good, "--max_length": 100, **changed}
        flags = [word for pair in given.items() for word in pair]
        status, _, error = script(f"recipes.{name}", *flags, "--output_dir", tmp_path / "out")
        assert status == 1 and message in error and len(error.strip().splitlines()) == 1, error
        assert not (tmp_path / "out").exists()
