"""pytest tests/test_score_pairs.py — scores of a cross-encoder: one pair at a time, killed, on two
processes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lib.files import read_run, read_training_file
from lib.texts import open_texts


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
    assert "is complete" in score(teacher, tmp_path / "out", "--train", tiny_collection.train)


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
