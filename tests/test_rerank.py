"""pytest tests/test_rerank.py — recipes/rerank.py: the loss, learning, resume, two processes, scores, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from recipes.rerank import (
    Collator,
    PairFormat,
    Pairs,
    listwise_loss,
    load_cross_encoder,
    save_cross_encoder,
)
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder as TheirCrossEncoder
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizerFast,
)

from lib.files import read_json, read_qrels, read_run, read_scores
from lib.groups import Groups
from lib.text import join_title
from lib.texts import open_texts
from recipes import rerank

ROOT = Path(__file__).parents[1]


def config(tokenizer, dropout=0.0):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        initializer_range=0.1,
        **sizes,
        **drop,
    )


@pytest.fixture(scope="module")
def encoder(tiny_model_dir, tmp_path_factory):
    """One layer without dropout, saved with its LM head and so without pooler or classifier."""
    folder, tokenizer = (
        tmp_path_factory.mktemp("encoder"),
        AutoTokenizer.from_pretrained(tiny_model_dir),
    )
    torch.manual_seed(0)
    BertForMaskedLM(config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flags(tiny_collection, encoder):
    """flags("train", output_dir, **changes) -> the command line; None leaves a flag out, True gives it alone."""
    files = {
        name: getattr(tiny_collection, name) for name in ("corpus", "queries", "qrels", "negatives")
    }
    texts = {"max_query_length": 20, "max_length": 48}
    steps = {
        "passages_per_query": 4,
        "per_device_batch_size": 8,
        "learning_rate": 1e-2,
        "max_steps": 80,
    }

    def build(task, output_dir, **changes):
        options = {
            "task": task,
            "model": encoder,
            "output_dir": output_dir,
            "num_workers": 0,
        } | files
        options |= texts | steps | {"log_every": 1} if task == "train" else {"shard_pairs": 25}
        words = [(f"--{k}", v) for k, v in (options | changes).items() if v is not None]
        return [str(w) for k, v in words for w in ((k,) if v is True else (k, v))]

    return build


def call(words):
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rerank.py", *words])
        rerank.main()


@pytest.fixture(scope="module")
def teacher(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "out"
    call(flags("train", folder))
    return folder


@pytest.fixture(scope="module")
def scored(flags, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored") / "out"
    call(flags("score", folder, model=teacher))
    return folder


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "queries/s"} for line in lines]


def one_by_one(folder, collection, title="space"):
    """{(qid, pid): score} by AutoModelForSequenceClassification, a pair at a time: neither batches nor padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus, queries = open_texts(collection.corpus), open_texts(collection.queries)

    def score(qid, pid):
        query = queries[queries.rows([qid])[0]][1]
        passage = join_title(*corpus[corpus.rows([pid])[0]], title, tokenizer)
        batch = tokenizer(
            query, passage, truncation="only_second", max_length=48, return_tensors="pt"
        )
        with torch.no_grad():
            return model(**batch).logits[0].tolist()

    return score


# ------------------------------------------------------------------------------------------------
# the loss and the pairs


def test_loss_and_gradient_equal_a_loop_over_queries():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 1]]).bool()
    scores = torch.randn(
        int(mask.sum()), generator=torch.Generator().manual_seed(0), dtype=torch.double
    )
    loss, accuracy = listwise_loss(scores.requires_grad_(), mask)
    loss.backward()
    expected, gradient, first, at = 0.0, [], 0, 0
    for row in mask:
        own = scores[at : at + int(row.sum())].tolist()  # the positive first, no fillers
        at += len(own)
        total = sum(np.exp(own))
        expected += -np.log(np.exp(own[0]) / total) / 3
        gradient += [(np.exp(s) / total - (i == 0)) / 3 for i, s in enumerate(own)]
        first += all(own[0] > s for s in own[1:])
    assert loss.item() == pytest.approx(expected, abs=1e-6) and accuracy.item() == pytest.approx(
        first / 3
    )
    np.testing.assert_allclose(scores.grad.numpy(), gradient, atol=1e-6)


def test_pairs_are_what_the_tokenizer_makes_of_them(encoder, tiny_collection, tmp_path):
    bpe = ByteLevelBPETokenizer()
    bpe.train(str(tiny_collection.corpus), vocab_size=300, show_progress=False)
    bpe.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    bpe.save_model(str(tmp_path))
    roberta = RobertaTokenizerFast.from_pretrained(tmp_path)
    corpus, queries = open_texts(tiny_collection.corpus), open_texts(tiny_collection.queries)
    for tokenizer, types in ((AutoTokenizer.from_pretrained(encoder), True), (roberta, False)):
        for form in (
            PairFormat("space", 40, 60),
            PairFormat("sep", 40, 128),
            PairFormat("none", 3, 20),
        ):
            holder = type("model", (), {"tokenizer": tokenizer, "format": form})
            pairs = Pairs(queries, corpus, holder)
            tokenizer("this leaves a cut behind", truncation=True, max_length=4)
            found = pairs.ids(5, np.arange(8))
            texts = [join_title(*corpus[row], form.title, tokenizer) for row in range(8)]
            query = tokenizer(queries[5][1], add_special_tokens=False)["input_ids"]
            if len(query) <= form.max_query_length:
                how = {"truncation": "only_second", "max_length": form.max_length}
                theirs = tokenizer([queries[5][1]] * 8, texts, return_token_type_ids=True, **how)
                assert [ids for ids, _ in found] == theirs["input_ids"]
                assert not types or [one for _, one in found] == theirs["token_type_ids"]
                batch = pairs.pad(found)
                padded = tokenizer.pad(
                    tokenizer([queries[5][1]] * 8, texts, **how), return_tensors="pt"
                )
                assert batch.keys() == padded.keys() and ("token_type_ids" in batch) == types
                assert all(torch.equal(batch[name], padded[name]) for name in batch)
            else:
                assert all(
                    ids[1:4] == query[:3] and ids[4] == tokenizer.sep_token_id for ids, _ in found
                )
                assert max(len(ids) for ids, _ in found) == form.max_length


def test_fillers_are_not_encoded_and_order_is_query_major(encoder, tiny_collection):
    model = load_cross_encoder(encoder, {"max_length": 48, "max_query_length": 12}, train=True)
    corpus, queries = open_texts(tiny_collection.corpus), open_texts(tiny_collection.queries)
    groups = Groups(
        queries, corpus, tiny_collection.qrels, tiny_collection.negatives, 7
    )  # 5 or 6 negatives each
    pairs, items = (
        Pairs(queries, corpus, model),
        [groups[example, 0, example] for example in range(6)],
    )
    batch = Collator(groups, pairs, chunk_rows=5)(items)
    real = [(index, row) for index, rows, _ in items for row in rows if row >= 0]
    assert batch["mask"].shape == (6, 7) and 0 < (~batch["mask"]).sum() == 42 - len(real)
    assert sum(len(chunk["input_ids"]) for chunk in batch["batches"]) == len(real)
    with torch.no_grad():
        scores = model(batch["batches"])[batch["order"]]
        alone = [
            model([pairs.pad(pairs.ids(groups.query_rows[index], [row]))]) for index, row in real
        ]
    torch.testing.assert_close(scores, torch.cat(alone), atol=1e-5, rtol=0)
    lonely = [(index, np.append(rows[:1], [-1] * 6), scores) for index, rows, scores in items[:2]]
    batch = Collator(groups, pairs, chunk_rows=5)(lonely)
    loss, accuracy = listwise_loss(model(batch["batches"])[batch["order"]], batch["mask"])
    loss.backward()
    assert (
        loss == 0
        and accuracy == 1
        and all(p.grad is None or not p.grad.any() for p in model.parameters())
    )


# ------------------------------------------------------------------------------------------------
# training


def test_it_learns_and_ranks_positives_first(teacher, scored, tiny_collection):
    losses = [line["loss"] for line in log_of(teacher)]
    assert len(losses) == 80 and np.mean(losses[-10:]) < 0.2 * np.mean(losses[:5])
    assert np.mean([line["accuracy"] for line in log_of(teacher)][-10:]) > 0.9
    assert (teacher / "done").is_file() and (teacher / "args.json").is_file()
    qrels, scores = read_qrels(tiny_collection.qrels), {}
    for qid, pid, number in read_scores(scored / "scores.tsv"):
        scores.setdefault(qid, {})[pid] = number
    above = [
        scores[qid][positive] > other
        for qid, judged in qrels.items()
        for positive in judged
        for pid, other in scores[qid].items()
        if pid not in judged
    ]
    assert np.mean(above) > 0.95, np.mean(above)


def test_killed_and_resumed_it_ends_bit_identical(flags, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    BertForMaskedLM(config(tokenizer, dropout=0.1)).save_pretrained(tmp_path / "dropout")
    tokenizer.save_pretrained(tmp_path / "dropout")
    how = {
        "model": tmp_path / "dropout",
        "gradient_accumulation_steps": 2,
        "max_steps": 60,
        "save_every": 3,
    }
    call(flags("train", tmp_path / "whole", **how))
    words = flags("train", tmp_path / "cut", **how)
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes.rerank", *words],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not (tmp_path / "cut" / "state" / "state.pt").is_file():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    call([*words, "--resume"])
    whole, cut = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes() and log_of(tmp_path / "whole") == log_of(
        tmp_path / "cut"
    )


def test_two_processes_score_and_train_like_one(
    flags, teacher, scored, tmp_path, two_processes, monkeypatch
):
    how = {"max_steps": 4, "learning_rate": 1e-3}
    call(flags("train", tmp_path / "one", **how))
    both = (
        flags("score", tmp_path / "scores", model=teacher),
        flags("train", tmp_path / "two", **how),
    )
    both[1][both[1].index("--per_device_batch_size") + 1] = "4"
    (tmp_path / "both.py").write_text(  # one launch, as imports take seconds
        f"""
import sys
from lib.launch import run
from recipes import rerank
def main():
    for words in {both}:
        sys.argv = ["rerank.py", *words]
        rerank.main()
run(main)
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert two_processes(tmp_path / "both.py").count("2 process(es)") == 3
    for one, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in (
        one
    ):  # but two, whose gradient is zero save for rounding, of which Adam makes steps of full size
        if not name.endswith(("key.bias", "classifier.bias")):
            torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=0, msg=name)
    for name in ("scores.tsv", "meta.json"):
        assert (tmp_path / "scores" / name).read_bytes() == (scored / name).read_bytes()


# ------------------------------------------------------------------------------------------------
# scores


def test_scores_are_those_of_one_pair_at_a_time(teacher, scored, flags, tiny_collection, tmp_path):
    naive, rows = one_by_one(teacher, tiny_collection), [*read_scores(scored / "scores.tsv")]
    for qid, pid, number in rows:
        assert number == pytest.approx(naive(qid, pid)[0], abs=1e-5)
    groups = {}
    for line in tiny_collection.qrels.read_text().splitlines()[1:]:
        groups.setdefault(line.split()[0], []).append(line.split()[1])
    for line in tiny_collection.negatives.read_text().splitlines():
        groups[line.split("\t")[0]] += line.split("\t")[1].split(",")
    assert [(qid, pid) for qid, pid, _ in rows] == [
        (qid, pid) for qid, pids in groups.items() for pid in pids
    ]
    call(
        flags(
            "score",
            tmp_path / "wide",
            model=teacher,
            tokens_per_batch=100_000,
            shard_pairs=1000,
            depth=2,
        )
    )
    fewer = {
        (qid, pid): number for qid, pid, number in read_scores(tmp_path / "wide" / "scores.tsv")
    }
    assert len(fewer) == 30 + 20 * 2
    assert all(
        fewer.get((qid, pid), number) == pytest.approx(number, abs=1e-5)
        for qid, pid, number in rows
    )


def test_what_is_scored_serves_as_teacher_scores(scored, tiny_collection):
    corpus, queries = open_texts(tiny_collection.corpus), open_texts(tiny_collection.queries)
    given = tiny_collection.qrels, tiny_collection.negatives, 4
    groups = Groups(queries, corpus, *given, scores_path=scored / "scores.tsv")
    index, rows, numbers = groups[7, 3, 2]
    stored = {(qid, pid): number for qid, pid, number in read_scores(scored / "scores.tsv")}
    expected = [stored[queries.id(groups.query_rows[index]), corpus.id(row)] for row in rows]
    np.testing.assert_allclose(numbers, expected, rtol=1e-6)


def test_sentence_transformers_gives_the_same_raw_scores(teacher, scored, tiny_collection):
    corpus, queries = open_texts(tiny_collection.corpus), open_texts(tiny_collection.queries)
    rows = [*read_scores(scored / "scores.tsv")]
    model = TheirCrossEncoder(str(teacher), device="cpu")
    texts = [
        (queries[queries.rows([q])[0]][1], join_title(*corpus[corpus.rows([p])[0]], "space", None))
        for q, p, _ in rows
    ]
    np.testing.assert_allclose(model.predict(texts), [number for *_, number in rows], atol=1e-5)
    assert min(number for *_, number in rows) < 0  # what no sigmoid gives


def test_a_run_is_ranked_anew(flags, teacher, tiny_collection, tmp_path):
    how = {"model": teacher, "qrels": None, "negatives": None, "run": tiny_collection.candidates}
    call(flags("score", tmp_path / "a", **how, depth=4))
    naive, before, after = (
        one_by_one(teacher, tiny_collection),
        read_run(tiny_collection.candidates),
        read_run(tmp_path / "a" / "run.trec"),
    )
    assert list(after) == list(before)
    for qid, entry in after.items():
        expected = sorted(before[qid].pids[:4], key=lambda pid: -naive(qid, pid)[0])
        assert entry.pids == expected
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "args.json", "meta.json", "run.trec", "scores.tsv"
    ]  # fmt: skip


def test_shards_are_kept_and_lost_ones_made_again(
    flags, teacher, scored, tmp_path, capsys, monkeypatch
):
    words, out = flags("score", tmp_path / "a", model=teacher), tmp_path / "a"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rerank, "write_scores", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        call(words)
    assert len(list(out.glob("shard-*.npy"))) == 6 and not (out / "scores.tsv").exists()
    (out / "shard-00001.npy").unlink()
    (out / "shard-00005.npy").unlink()
    np.save(
        out / "shard-00000.npy", np.load(out / "shard-00000.npy") + 1
    )  # so that a kept shard shows
    call(words)
    expected, found = ([*read_scores(folder / "scores.tsv")] for folder in (scored, out))
    for at, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert one[:2] == other[:2] and other[2] == pytest.approx(one[2] + (at < 25), abs=1e-6)
    assert not list(out.glob("shard-*")) and not (out / "progress.json").exists()
    capsys.readouterr()
    call([*words, "--override"])
    assert "is complete" in capsys.readouterr().out


def test_two_labels_give_log_odds_and_override_takes_other_texts(
    flags, encoder, tiny_collection, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    BertForSequenceClassification(config(tokenizer)).save_pretrained(
        tmp_path / "two"
    )  # num_labels 2
    tokenizer.save_pretrained(tmp_path / "two")
    call(
        flags(
            "score",
            tmp_path / "a",
            model=tmp_path / "two",
            max_query_length=20,
            max_length=48,
            title="none",
        )
    )
    naive = one_by_one(tmp_path / "two", tiny_collection, "none")
    for qid, pid, number in [*read_scores(tmp_path / "a" / "scores.tsv")][:20]:
        no, yes = naive(qid, pid)
        assert number == pytest.approx(yes - no, abs=1e-5)
    model = load_cross_encoder(
        tmp_path / "two", {"max_query_length": 9}, train=True
    )  # a new head for one label
    assert model.new_head and model.classifier.config.num_labels == 1
    save_cross_encoder(model, tmp_path / "saved", {})
    again = load_cross_encoder(tmp_path / "saved", {"max_length": 40})
    assert not again.new_head and again.format == PairFormat("space", 9, 40)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_bf16_trains_and_scores(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    call(flags("train", tmp_path / "bf16", max_steps=3))
    assert {w.dtype for w in load_file(tmp_path / "bf16" / "model.safetensors").values()} == {
        torch.float32
    }
    call(flags("score", tmp_path / "a", model=tmp_path / "bf16"))
    assert "precision bf16" in capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    call(flags("score", tmp_path / "b", model=tmp_path / "bf16"))
    a, b = (
        np.array([number for *_, number in read_scores(tmp_path / n / "scores.tsv")]) for n in "ab"
    )
    assert (a != b).any() and np.abs(a - b).max() < 0.05
    assert read_json(tmp_path / "a" / "meta.json")["precision"] == "bf16"


def test_long_positions_and_left_padding_are_the_models(tiny_collection, tmp_path):
    """RoBERTa: 40 embeddings are 38 positions, and it has no token types."""
    bpe = ByteLevelBPETokenizer()
    bpe.train(str(tiny_collection.corpus), vocab_size=300, show_progress=False)
    bpe.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    bpe.save_model(str(tmp_path))
    tokenizer = RobertaTokenizerFast.from_pretrained(tmp_path)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": tokenizer.pad_token_id + 39,
    }
    RobertaModel(RobertaConfig(vocab_size=len(tokenizer), **sizes, **special)).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    model = load_cross_encoder(tmp_path / "model", {"max_query_length": 10}, train=True)
    assert model.format == PairFormat("space", 10, 38) and model.new_head
    pairs = Pairs(open_texts(tiny_collection.queries), open_texts(tiny_collection.corpus), model)
    found = pairs.ids(0, np.arange(40))
    assert max(len(ids) for ids, _ in found) == 38
    with torch.no_grad():
        alone = torch.cat([model([pairs.pad([pair])]) for pair in found])
        torch.testing.assert_close(model([pairs.pad(found)]), alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(model([pairs.pad(found[20:])]), alone[20:], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------
# what is refused


def test_dry_runs_leave_nothing(flags, teacher, tmp_path, capsys):
    call(flags("train", tmp_path / "a", dry_run=True))
    call(flags("score", tmp_path / "b", model=teacher, dry_run=True))
    shown = capsys.readouterr().out
    for fact in (
        "new head",
        "[CLS] what about",
        "at max_length",
        "1 positive + 3 negatives",
        "GB",
        "6 shard(s) of 25",
    ):
        assert fact in shown
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_folder_made_with_other_settings_is_refused(script, flags, teacher, scored, tmp_path):
    shutil.copytree(scored, tmp_path / "a")
    shutil.copytree(teacher, tmp_path / "model")
    words = flags("score", tmp_path / "a", model=tmp_path / "model")
    arguments = read_json(tmp_path / "a" / "args.json")
    arguments["arguments"]["model"] = str(tmp_path / "model")
    (tmp_path / "a" / "args.json").write_text(json.dumps(arguments))
    assert "is complete" in script("recipes.rerank", *words)[1]
    weights = load_file(teacher / "model.safetensors")
    save_file(
        {name: weight + 1 for name, weight in weights.items()},
        tmp_path / "model" / "model.safetensors",
    )
    status, _, error = script("recipes.rerank", *words)
    assert status == 1 and "made with model_hash" in error
    assert "made with --depth 200, now 3" in script("recipes.rerank", *words, "--depth", 3)[2]


def test_mistakes_end_in_one_line(script, flags, teacher, encoder, tiny_collection, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    three = config(tokenizer)
    three.num_labels = 3
    BertForSequenceClassification(three).save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    shutil.copytree(encoder, tmp_path / "holes")
    weights = load_file(encoder / "model.safetensors")
    kept = {
        name: weight.clone()
        for name, weight in weights.items()
        if "attention.self.query" not in name
    }
    save_file(kept, tmp_path / "holes" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(teacher, tmp_path / "nan")
    weights = load_file(teacher / "model.safetensors")
    weights["classifier.bias"].fill_(float("nan"))
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "unknown.tsv").write_text("q0\tp1,p2\nq1\tp3,p999\n")
    (tmp_path / "run.trec").write_text("q0 Q0 p1 1 3.5 x\nq88 Q0 p2 1 3.5 x\n")
    (tmp_path / "run2.trec").write_text("q0 Q0 p1 1 3.5 x\nq0 Q0 p77 2 3.5 x\n")
    run, score = {"qrels": None, "negatives": None}, {"task": "score", "model": teacher}
    cases = [
        ({"negatives": None}, "--task train: of what? — give --qrels and --negatives"),
        ({"run": tiny_collection.candidates}, "--task train: of what?"),
        (score | {"qrels": None}, "give --qrels and --negatives, or --run"),
        (score | {"run": tiny_collection.candidates}, "--run and --qrels or --negatives"),
        ({"passages_per_query": 1}, "--passages_per_query 1"),
        ({"per_device_batch_size": 0}, "--per_device_batch_size 0"),
        (score | {"shard_pairs": 0}, "--shard_pairs 0"),
        ({"task": "rank"}, "argument --task: invalid choice"),
        ({"negatives": tmp_path / "unknown.tsv"}, "unknown.tsv:2: passage p999 is not in"),
        (score | {"negatives": tmp_path / "unknown.tsv"}, "unknown.tsv:2: passage p999 is not in"),
        (score | run | {"run": tmp_path / "run.trec"}, "run.trec:2: query q88 is not in"),
        (score | run | {"run": tmp_path / "run2.trec"}, "run2.trec:2: passage p77 is not in"),
        ({"model": tmp_path / "nowhere"}, "nowhere: no such folder"),
        (
            {"model": tmp_path / "holes"},
            "weights are missing or misshapen (bert.encoder.layer.0.attention.self.query",
        ),
        (score | {"model": encoder}, "has no classification head"),
        (score | {"model": tmp_path / "three"}, "3 labels"),
        (score | {"title": "sep"}, "its title is space, not sep"),
        (
            score | {"max_length": 40},
            "its max_length is 48, not 40 — leave it out, or add --override",
        ),
        ({"max_length": 200}, "the model has 128 positions"),
        ({"max_query_length": 46}, "the passage needs room"),
        (
            {"learning_rate": 1e38, "warmup_steps": 0, "max_grad_norm": 0},
            "not finite for queries q",
        ),
        (score | {"model": tmp_path / "nan"}, "the score of query q0 and passage p0 is not finite"),
    ]
    for number, (changes, what) in enumerate(cases):
        words = flags(**{"task": "train", "output_dir": tmp_path / f"out{number}", **changes})
        status, _, error = script("recipes.rerank", *words)
        lines = [
            line
            for line in error.replace("\r", "\n").splitlines()
            if line.startswith("recipes.rerank.py:")
        ]
        assert status == 1 and len(lines) == 1 and what in lines[0] and " — " in lines[0], (
            what,
            error,
        )
        assert not (tmp_path / f"out{number}" / "done").exists()
