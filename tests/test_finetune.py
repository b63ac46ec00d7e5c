"""pytest tests/test_finetune.py — finetune_biencoder.py: kill -9 and resume, two processes, best/,
refusals."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import finetune_biencoder
from lib import checkpoint, launch
from lib.dev import DevSet, describe_best
from lib.files import UserError, read_training_file, write_training_file

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("queries/s", "waited")  # what a log line says of time


@pytest.fixture
def arguments(tiny_collection, tiny_model_dir, tmp_path):
    """Function from changes to the command line of a run of some seconds."""

    def build(*flags, **changes):
        files = {name: getattr(tiny_collection, name) for name in ("corpus", "queries", "train")}
        texts = {
            "model": tiny_model_dir,
            "pooling": "mean",
            "max_query_length": 16,
            "max_passage_length": 48,
        }
        steps = {
            "passages_per_query": 4,
            "per_device_batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": 12,
        }
        how = {"log_every": 1, "save_every": 2, "num_workers": 0, "output_dir": tmp_path / "out"}
        options = files | texts | steps | how | changes
        words = []
        for name, value in options.items():
            if value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words + list(flags)

    return build


@pytest.fixture
def call(monkeypatch):
    """Run main() in this process with a command line."""

    def main(words):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        monkeypatch.setattr(sys, "argv", ["finetune_biencoder.py", *words])
        try:
            finetune_biencoder.main()
        finally:
            launch.release_output()

    return main


@pytest.fixture
def sparse(tiny_collection, tiny_model_dir, tmp_path):
    """Changes to `arguments` for a sparse model with a teacher."""

    def score(row, name):
        pids = getattr(row, name)
        return [float((7 * int(row.qid[1:]) + 3 * int(pid[1:])) % 10 - 5) for pid in pids]

    rows = [row for _, row in read_training_file(tiny_collection.train)]
    scored = [r._replace(pos_scores=score(r, "pos"), neg_scores=score(r, "neg")) for r in rows]
    write_training_file(tmp_path / "scored.jsonl", scored)
    objective = {"train": tmp_path / "scored.jsonl", "kl_weight": 1, "margin_mse_weight": 0.1}
    flops = {"flops_passages": 0.05, "flops_warmup_steps": 12}
    return (
        {"head": "sparse", "pooling": None, "contrastive_weight": 0.2, "learning_rate": 2e-3}
        | objective
        | flops
    )


def dev_files(collection):
    return {"dev": [collection.queries, collection.qrels, collection.candidates]}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(one, other, atol=0, without="nothing"):
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    for name in one | other:
        if without not in name:
            torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("head", ["dense", "sparse"])
def test_killed_at_random_moments_it_ends_bit_identical(
    arguments, call, tiny_collection, tmp_path, sparse, head
):
    how = dev_files(tiny_collection) | {
        "eval_every": 3,
        "num_workers": 1,
        "gradient_accumulation_steps": 2,
    }
    how |= sparse if head == "sparse" else {}
    call(arguments(**how, output_dir=tmp_path / "whole"))
    script, kills = [sys.executable, str(ROOT / "finetune_biencoder.py")], 0
    moments = [random.SystemRandom().uniform(0, 3) for _ in range(2)]
    for moment in moments:
        process = subprocess.Popen(
            [*script, *arguments(*["--resume"] * bool(kills), **how)],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while process.poll() is None and not (tmp_path / "out" / "args.json").is_file():
            time.sleep(0.02)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills, "the run ended before it could be killed"
    subprocess.run([*script, *arguments("--resume", **how)], check=True, capture_output=True)
    same_weights(tmp_path / "whole", tmp_path / "out")
    same_weights(tmp_path / "whole" / "best", tmp_path / "out" / "best")
    fixed = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in log_of(tmp_path / n)]
        for n in ("whole", "out")
    ]
    assert fixed[0] == fixed[1], moments
    assert (tmp_path / "out" / "done").is_file()


@pytest.mark.parametrize("head, chunk_size", [("dense", 5), ("sparse", 5), ("sparse", 0)])
def test_two_processes_train_like_one_with_twice_the_batch(
    arguments, call, tiny_model_dir, tmp_path, sparse, head, chunk_size, two_processes
):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model = AutoModelForMaskedLM.from_pretrained(
        tiny_model_dir, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "model")
    how = sparse if head == "sparse" else {}
    how |= {
        "model": tmp_path / "model",
        "max_steps": 4,
        "chunk_size": chunk_size,
        "learning_rate": 1e-3,
    }
    call(arguments(**how, per_device_batch_size=8, output_dir=tmp_path / "one"))
    printed = two_processes("finetune_biencoder.py", *arguments(**how, output_dir=tmp_path / "two"))
    assert "4 queries x 2 process(es) x 1 accumulated = 8" in printed
    sparse_names = ("kl", "margin_mse", "q_flops", "p_flops", "q_terms", "p_terms", "shared_terms")
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in (
            "loss",
            "accuracy",
            "candidates",
            "grad_norm",
            *(sparse_names if head == "sparse" else ()),
        ):
            # Adam makes steps of full size of gradients that are zero but for rounding: an LM head
            # has many. The rest differs by rounding alone, which four steps of 1e-3 spread, more on
            # one CPU's kernels than on another's
            rel = 1e-5 if one["step"] == 1 else 1e-3 if head == "sparse" else 2e-4
            assert two[name] == pytest.approx(one[name], abs=1e-5, rel=rel), (one["step"], name)
    if head == "dense":  # the same is true of the bias of a key
        same_weights(tmp_path / "one", tmp_path / "two", atol=1e-4, without="key.bias")
    else:
        one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
        apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one])
        assert (apart > 1e-4).float().mean() < 0.02 and apart.max() < 8e-3


def test_it_learns_and_best_is_what_its_score_says(
    arguments, call, tiny_collection, tmp_path, capsys
):
    call(arguments(**dev_files(tiny_collection), eval_every=10, max_steps=30, log_every=5))
    log = log_of(tmp_path / "out")
    losses = [line["loss"] for line in log if "loss" in line]
    assert sum(losses[-2:]) < sum(losses[:2])
    scores = {line["step"]: line["dev_mrr@10"] for line in log if "dev_mrr@10" in line}
    assert list(scores) == [0, 10, 20, 30]
    again = {
        "model": tmp_path / "out" / "best",
        "pooling": None,
        "max_steps": 1,
        "learning_rate": 1e-9,
        "output_dir": tmp_path / "again",
    }
    call(arguments(**dev_files(tiny_collection), **again))
    assert log_of(tmp_path / "again")[0]["dev_mrr@10"] == pytest.approx(
        max(scores.values()), abs=1e-9
    )
    shown = capsys.readouterr().out
    for fact in (
        "4 queries x 1 process(es) x 1 accumulated = 4",
        "1 positive + 3 negatives",
        "30 positives of 20 queries",
    ):
        assert fact in shown
    call(arguments(**dev_files(tiny_collection), eval_every=10, max_steps=30, log_every=5))
    assert "is complete" in capsys.readouterr().out


def test_best_is_not_overwritten_by_a_worse_or_an_equal_one(
    arguments, call, tiny_collection, tmp_path, monkeypatch, capsys
):
    scores, saved = iter([0.1, 0.5, 0.5, 0.2, 0.6, 0.3]), []
    monkeypatch.setattr(DevSet, "mrr", lambda *_: next(scores))
    monkeypatch.setattr(finetune_biencoder.checkpoint, "check_checkpoint", lambda *_: None)
    monkeypatch.setattr(
        finetune_biencoder.checkpoint,
        "save_encoder",
        lambda model, folder, card: saved.append((Path(folder).name, card)),
    )
    call(arguments(**dev_files(tiny_collection), eval_every=2, max_steps=10))
    said = "best holds the model of step 8, the best on the development set: MRR@10 0.1000 at step "
    assert said + "0, 0.6000 at step 8, 0.3000 at step 10" in capsys.readouterr().out
    assert [(name, card["metrics"]["dev MRR@10"]) for name, card in saved] == [
        ("best", 0.1), ("best", 0.5), ("best", 0.6), ("out", 0.3),
    ]  # fmt: skip


def test_best_that_was_not_trained_is_said():
    said = describe_best("out/best", {0: 0.5, 10: 0.5, 20: 0.25})
    assert said.startswith("out/best holds THE MODEL AS IT CAME (step 0), the best on the dev")
    assert said.endswith("0.5000 at step 0, 0.2500 at step 20; training has not improved it")


def test_there_are_ten_evaluations_by_default(
    arguments, call, tiny_collection, tmp_path, monkeypatch
):
    monkeypatch.setattr(DevSet, "mrr", lambda *_: 0.5)
    call(arguments(**dev_files(tiny_collection), max_steps=19, save_every=100))
    steps = [line["step"] for line in log_of(tmp_path / "out") if "dev_mrr@10" in line]
    assert steps == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 19]


def test_judgments_that_are_also_trained_on_are_counted_by_text(
    arguments, call, tiny_collection, tmp_path, capsys
):
    rows = [row for _, row in read_training_file(tiny_collection.train)]
    write_training_file(tmp_path / "train.jsonl", rows[:5])
    names = {"q": "dev"}  # other ids for the same texts
    for name in ("queries", "qrels", "candidates"):
        lines = getattr(tiny_collection, name).read_text().splitlines()
        renamed = [re.sub(r"^q(\d)", rf"{names['q']}\1", line) for line in lines]
        (tmp_path / name).write_text("\n".join(renamed) + "\n")
    dev = {"dev": [tmp_path / name for name in ("queries", "qrels", "candidates")]}
    shared = sum(len(row.pos) for row in rows[:5])
    everything = sum(len(row.pos) for row in rows)
    call(arguments("--dry_run", train=tmp_path / "train.jsonl", **dev))
    said = f"NOTE: {shared} of its {everything} relevant pairs are also trained on, so MRR@10 is"
    assert said in capsys.readouterr().out
    write_training_file(tmp_path / "train.jsonl", rows[5:])
    judged = [f"dev{row.qid[1:]} 0 {row.pos[0]} 1\n" for row in rows[:5]]
    (tmp_path / "qrels").write_text("".join(judged))
    call(arguments("--dry_run", train=tmp_path / "train.jsonl", **dev))
    assert "development set          5 queries\n" in capsys.readouterr().out


def test_a_model_that_no_file_states_is_refused_before_the_first_step(
    arguments, call, tmp_path, monkeypatch
):
    """As a copied script with a pooling of its own. What was saved stays after another try."""

    def changed(*args, **kwargs):
        model = checkpoint.load_encoder(*args, **kwargs)
        encode = model.vectors
        model.vectors = lambda *given: encode(*given).roll(1, dims=1)
        return model

    own = SimpleNamespace(**vars(checkpoint) | {"load_encoder": changed})
    monkeypatch.setattr(finetune_biencoder, "checkpoint", own)
    for name in ("out.refused", "out.refused1"):
        with pytest.raises(UserError, match=f"out: .* another model .*; it is in .*{name} — look"):
            call(arguments())
        assert (tmp_path / name / "model.safetensors").is_file()
    assert (tmp_path / "out.refused").is_dir() and not (tmp_path / "out" / "log.jsonl").exists()


def test_dry_run_shows_and_leaves_nothing(arguments, call, tmp_path, capsys):
    call(arguments("--dry_run", chunk_size=8, gradient_accumulation_steps=3))
    shown = capsys.readouterr().out
    for fact in ("[CLS] what about", "cut at 48", "accumulated = 12", "GB"):
        assert fact in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, what",
    [
        (
            {"train": "QRELS", "passages_per_query": 4},
            "it has no negatives for --passages_per_query 4",
        ),
        (
            {"train": "QRELS", "per_device_batch_size": 1, "passages_per_query": 1},
            "has no negatives",
        ),
        ({"loss": "triplet", "passages_per_query": 1}, "has no negatives"),
        ({"dev": ["x.tsv"]}, "argument --dev: expected 3 arguments"),
        ({"eval_every": 5}, "there is no development set — give --dev"),
        ({"kl_weight": 1}, "lines without scores — add them with recipes/score_pairs.py"),
        ({"learning_rate": "nan"}, "--learning_rate nan — give a finite number above 0"),
        ({"max_steps": -1}, "--max_steps -1 — give a finite number at least 0"),
        ({"head": "sparse"}, "leave out --pooling"),
        (
            {"head": "sparse", "pooling": None, "flops_passages": 1e6, "learning_rate": 0.5},
            "step .* nearly empty",
        ),
        ({"learning_rate": 1e38}, r"step \d+: .*(q\d+, ){3}q\d+"),
    ],
)
def test_refusals_name_the_remedy(arguments, call, tiny_collection, tmp_path, changes, what):
    with pytest.raises(UserError, match=what) as error:
        changes = {k: tiny_collection.qrels if v == "QRELS" else v for k, v in changes.items()}
        call(arguments(**changes))
    assert " — " in str(error.value)
    assert not (tmp_path / "out" / "done").exists()


def test_triplets_and_a_projection_train(arguments, call, tmp_path, capsys):
    call(arguments(loss="triplet", projection=24, max_steps=3, max_grad_norm=0))
    shown = capsys.readouterr().out
    assert "24 dimensions" in shown
    assert all(0 < line["loss"] < 20 for line in log_of(tmp_path / "out"))


def test_a_model_that_stays_dense_is_stopped(arguments, call):
    small = {
        "per_device_batch_size": 2,
        "passages_per_query": 2,
        "max_steps": 120,
        "log_every": 50,
        "save_every": 200,
    }
    with pytest.raises(UserError, match="step 120: .* still dense — raise --flops_passages"):
        call(
            arguments(
                head="sparse",
                pooling=None,
                flops_passages=0,
                learning_rate=1e-6,
                warmup_steps=0,
                **small,
            )
        )


def test_a_sparse_model_learns_and_gets_sparser(
    arguments, call, sparse, tiny_collection, tmp_path, capsys
):
    how = sparse | {"kl_weight": 0, "margin_mse_weight": 0, "contrastive_weight": 1}
    how |= {"flops_passages": 0.3, "flops_warmup_steps": 0, "learning_rate": 5e-3}
    call(
        arguments(
            "--exclude_special_tokens",
            **how | dev_files(tiny_collection),
            eval_every=20,
            max_steps=40,
        )
    )
    log = [line for line in log_of(tmp_path / "out") if "loss" in line]
    for name, least in (("contrastive", 0.7), ("p_flops", 0.5), ("p_terms", 0.7)):
        assert sum(line[name] for line in log[-5:]) < least * sum(line[name] for line in log[:5]), (
            name
        )
    assert all(0 <= line["shared_terms"] <= line["q_terms"] for line in log)
    assert [line["step"] for line in log_of(tmp_path / "out") if "dev_mrr@10" in line] == [
        0,
        20,
        40,
    ]
    assert json.loads((tmp_path / "out" / "isthmus.json").read_text())["exclude_special_tokens"]


def test_bf16_saves_what_fp32_reads(
    arguments, call, tiny_collection, tmp_path, monkeypatch, capsys
):
    for precision in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        call(
            arguments(
                **dev_files(tiny_collection),
                max_steps=3,
                chunk_size=5,
                output_dir=tmp_path / precision,
            )
        )
    assert "precision bf16" in capsys.readouterr().out
    weights = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    losses = [
        [line["loss"] for line in log_of(tmp_path / n) if "loss" in line] for n in ("no", "bf16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


def test_a_folder_is_complete_only_for_the_inputs_it_was_made_from(
    arguments, call, tiny_collection, tmp_path, capsys
):
    rows = [row for _, row in read_training_file(tiny_collection.train)]
    train = tmp_path / "train.jsonl"
    write_training_file(train, rows)
    call(arguments(train=train, max_steps=2))
    call(arguments(train=train, max_steps=2))
    assert "out is complete" in capsys.readouterr().out
    write_training_file(train, [row._replace(neg=row.neg[::-1]) for row in rows])
    for resume in ([], ["--resume"]):
        with pytest.raises(UserError, match="it was made with train .* — choose another"):
            call(arguments(*resume, train=train, max_steps=2))
