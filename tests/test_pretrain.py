"""pytest tests/test_pretrain.py — the script: from scratch, chained, killed and resumed, on two
processes, misused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM

import pretrain_mae
from lib import launch
from lib.files import UserError

ROOT = Path(__file__).parents[1]
CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def command(out, **flags):
    """Arguments of a small run."""
    flags = {
        "output_dir": out,
        "max_length": 32,
        "per_device_batch_size": 4,
        "num_workers": 0,
        "log_every": 1,
        **flags,
    }
    parts = []
    for name, value in flags.items():
        if isinstance(value, bool):
            parts.append(f"--{name}" if value else f"--no_{name}")
        else:
            parts += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return [str(part) for part in parts]


@pytest.fixture
def here(monkeypatch):
    """Runs the script in this process."""

    def call(out, **flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        monkeypatch.setattr(sys, "argv", ["pretrain_mae.py", *command(out, **flags)])
        try:
            pretrain_mae.main()
        finally:
            launch.release_output()
        return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]

    return call


def shown_decoder(echo):
    """What the start of the last run says of its decoder."""
    lines = [line for line in echo.splitlines() if line.startswith("   decoder  ")]
    return lines[-1].split(maxsplit=1)[1]


def start(out, **flags):
    """Runs it in a process of its own."""
    words = [sys.executable, ROOT / "pretrain_mae.py", *command(out, **flags)]
    with open(
        f"{out}.log", "a"
    ) as log:  # no pipe: who reads it to the end waits for loader workers too
        return subprocess.Popen(
            words, stdout=log, stderr=log, env=os.environ | {"ACCELERATE_USE_CPU": "true"}
        )


def scratch(tmp_path, tiny_model_dir, **more):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bert", **CONFIG, "max_position_embeddings": 64, **more})
    )
    return {"model_config": tmp_path / "config.json", "tokenizer": tiny_model_dir}


def test_from_scratch_and_on_from_there(tmp_path, tiny_model_dir, tiny_collection, here, capsys):
    corpus, new = tiny_collection.corpus, scratch(tmp_path, tiny_model_dir)
    log = here(
        tmp_path / "mlm", corpus=corpus, objective="mlm", max_steps=30, learning_rate=1e-2, **new
    )
    assert len(log) == 30 and log[-1]["loss"] == log[-1]["encoder_loss"] < log[0]["loss"] - 0.5
    assert log[0]["lr"] == pytest.approx(1e-2 / 3) and log[2]["lr"] == 1e-2 > log[-1]["lr"] > 0
    assert (tmp_path / "mlm" / "done").is_file() and not (
        tmp_path / "mlm" / "decoder.json"
    ).is_file()

    path = new["model_config"]
    path.write_text(path.read_text().replace("{", '{"layer_norm_eps": 1e-9, ', 1))
    with pytest.raises(UserError, match="it was made with model_config .*, now .* — choose"):
        here(
            tmp_path / "mlm",
            corpus=corpus,
            objective="mlm",
            max_steps=30,
            learning_rate=1e-2,
            **new,
        )

    log = here(
        tmp_path / "one",
        corpus=corpus,
        model=tmp_path / "mlm",
        max_steps=6,
        title="sep",
        save_every=2,
    )
    assert log[0]["loss"] == pytest.approx(log[0]["encoder_loss"] + log[0]["decoder_loss"])
    assert shown_decoder(capsys.readouterr().out) == "new"
    here(tmp_path / "two", corpus=corpus, model=tmp_path / "one", max_steps=2)
    echo = capsys.readouterr().out
    assert shown_decoder(echo) == f"that of {tmp_path / 'one'}"
    assert "title: sep" in echo, "the checkpoint's own join"
    assert (
        load_file(tmp_path / "one" / "decoder.safetensors").keys()
        == load_file(tmp_path / "two" / "decoder.safetensors").keys()
    )
    for name in ("mlm", "one", "two"):
        _, info = AutoModelForMaskedLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.values()), info
        _, info = AutoModel.from_pretrained(tmp_path / name, output_loading_info=True)
        assert all(key.startswith("pooler.") for key in info["missing_keys"])
    here(tmp_path / "two", corpus=corpus, model=tmp_path / "one", max_steps=2)
    assert "is complete" in capsys.readouterr().out


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, tiny_model_dir, tiny_collection, here):
    flags = {
        "corpus": tiny_collection.corpus,
        "model": tiny_model_dir,
        "max_steps": 80,
        "save_every": 5,
    }
    flags |= {"gradient_accumulation_steps": 2, "num_workers": 1, "learning_rate": 1e-3}
    whole, killed = start(tmp_path / "whole", **flags), start(tmp_path / "killed", **flags)
    log, when = tmp_path / "killed" / "log.jsonl", random.randint(1, 60)
    while not log.is_file() or log.read_text().count("\n") < when:
        assert killed.poll() is None, (tmp_path / "killed.log").read_text()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "done").exists()
    with pytest.raises(UserError, match="add --resume"):
        here(tmp_path / "killed", **flags)
    resumed = start(tmp_path / "killed", resume=True, **flags)
    assert resumed.wait(120) == 0 and whole.wait(120) == 0, (tmp_path / "killed.log").read_text()
    for name in ("model.safetensors", "decoder.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "killed" / name
        ).read_bytes(), f"killed at {when}"
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 81))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory, tiny_collection):
    """The passages of the collection, each sentence of a few words, so that every text has several
    spans."""
    path = tmp_path_factory.mktemp("sentences") / "corpus.jsonl"
    rows = [json.loads(line) for line in tiny_collection.corpus.read_text().splitlines()]
    for row in rows:
        words = row["text"].split()
        row["text"] = " ".join(f"A {' '.join(words[i : i + 4])}." for i in range(0, len(words), 4))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


OBJECTIVES = {
    "mlm": {"terms": ["encoder"], "gradient_checkpointing": True},
    "bow": {"terms": ["encoder", "bow"]},
    "dupmae": {"terms": ["encoder", "decoder", "bow"]},
    "lexmae": {"terms": ["encoder", "decoder"]},
    "seed": {"terms": ["encoder", "decoder"], "attention_window": 8},
    "condenser": {"terms": ["encoder", "decoder"]},
    "cocondenser": {
        "terms": ["encoder", "decoder", "contrast"],
        "chunk_size": 2,
        "span_tokens": 12,
    },
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_stops_resumes_and_goes_on(
    objective, tmp_path, tiny_model_dir, tiny_collection, sentences, here, monkeypatch, capsys
):
    options = {**OBJECTIVES[objective]}
    terms = options.pop("terms")
    flags = {
        "corpus": sentences,
        "objective": objective,
        **options,
        "learning_rate": 1e-3,
        "save_every": 2,
    }
    probes = {
        "probe_every": 3,
        "probe_queries": tiny_collection.queries,
        "probe_qrels": tiny_collection.qrels,
    }
    log = here(tmp_path / "whole", model=tiny_model_dir, max_steps=5, **probes, **flags)
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in log] == [0, 1, 2, 3, 3, 4, 5, 5] and len(steps) == 5
    for line in steps:
        weights = (
            {"bow": 0.1}
            if objective == "dupmae"
            else dict.fromkeys(terms, 0.5)
            if objective == "seed"
            else {}
        )
        total = sum(weights.get(term, 1.0) * line[f"{term}_loss"] for term in terms)
        assert line["loss"] == pytest.approx(total) and line["tokens/s"] > 1
    for line in log:
        assert ("probe_cosine" in line) == ("loss" not in line)
    assert {"probe_cosine", "probe_recall@100"} < log[-1].keys() and log[-1][
        "probe_recall@100"
    ] == 1
    assert ("probe_rebuild" in log[-1]) == (objective not in ("mlm", "bow"))

    def stop(*args):
        save_state(*args)
        raise KeyboardInterrupt

    save_state = launch.save_state
    monkeypatch.setattr(launch, "save_state", stop)
    with pytest.raises(KeyboardInterrupt):
        here(tmp_path / "stopped", model=tiny_model_dir, max_steps=5, **flags)
    monkeypatch.setattr(launch, "save_state", save_state)
    here(tmp_path / "stopped", model=tiny_model_dir, max_steps=5, resume=True, **flags)
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert (
        names == ["model.safetensors"]
        if objective in ("mlm", "bow")
        else ["decoder.safetensors", "model.safetensors"]
    )
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "stopped" / name
        ).read_bytes()
    _, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(info.values()), info

    capsys.readouterr()
    with pytest.raises(FileNotFoundError):  # there is no log
        here(tmp_path / "dry", model=tmp_path / "whole", dry_run=True, **flags)
    shown = capsys.readouterr().out
    assert "[MASK]" in shown
    assert shown_decoder(shown).startswith("none" if objective in ("mlm", "bow") else "that of")
    assert ("decoder sees" in shown) == (objective not in ("mlm", "bow"))
    here(
        tmp_path / "other",
        corpus=sentences,
        model=tmp_path / "whole",
        max_steps=1,
        objective="retromae",
    )
    origin = (
        ""
        if objective in ("mlm", "bow")
        else f", that of {tmp_path / 'whole'} is of the objective {objective}"
    )
    assert shown_decoder(capsys.readouterr().out) == f"new{origin}"


def test_cocondenser_goes_on_with_the_head_of_condenser(
    tmp_path, tiny_model_dir, sentences, here, capsys
):
    flags = {"corpus": sentences, "max_steps": 1}
    here(tmp_path / "one", objective="condenser", model=tiny_model_dir, **flags)
    here(
        tmp_path / "two",
        objective="cocondenser",
        model=tmp_path / "one",
        encoder_dropout=False,
        **flags,
    )
    assert shown_decoder(capsys.readouterr().out) == f"that of {tmp_path / 'one'}"
    here(tmp_path / "three", objective="condenser", model=tmp_path / "two", **flags)
    assert shown_decoder(capsys.readouterr().out) == f"that of {tmp_path / 'two'}"


def test_several_corpora(tmp_path, tiny_model_dir, tiny_collection, sentences, here, capsys):
    corpora = [tiny_collection.corpus, sentences]
    here(
        tmp_path / "out",
        corpus=corpora,
        model=tiny_model_dir,
        max_steps=2,
        balance=100.0,
        objective="mlm",
    )
    shown = capsys.readouterr().out
    assert all(f"corpus {path}" in shown for path in corpora) and "40 texts" in shown


def test_two_processes_log_the_losses_of_one(
    tmp_path, tiny_model_dir, tiny_collection, here, two_processes
):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    flags = {
        "corpus": tiny_collection.corpus,
        "max_steps": 3,
        **scratch(tmp_path, tiny_model_dir, **still),
    }
    assert "2 process(es) on cpu" in two_processes(
        "pretrain_mae.py", *command(tmp_path / "pair", **flags)
    )
    single = here(tmp_path / "single", **{**flags, "per_device_batch_size": 8})
    logged = [
        json.loads(line) for line in (tmp_path / "pair" / "log.jsonl").read_text().splitlines()
    ]
    for one, two in zip(single, logged, strict=True):
        for name in ("encoder_loss", "decoder_loss", "grad_norm"):
            assert one[name] == pytest.approx(two[name], abs=1e-4), name


def test_a_dry_run_shows_and_writes_nothing(
    tmp_path, tiny_model_dir, tiny_collection, here, capsys
):
    with pytest.raises(FileNotFoundError):  # there is no log
        here(tmp_path / "out", corpus=tiny_collection.corpus, model=tiny_model_dir, dry_run=True)
    shown = capsys.readouterr().out
    assert (
        "[MASK]" in shown
        and "decoder sees h and" in shown
        and "4 blocks x 1 process(es) x 1 accumulated = 4" in shown
    )
    assert not (tmp_path / "out").exists()


def test_mistakes_end_in_a_line(tmp_path, tiny_model_dir, tiny_collection, here):
    good = {"corpus": tiny_collection.corpus, "model": tiny_model_dir, "max_steps": 9}
    for flags, message in (
        (
            {"learning_rate": 1e30},
            r"step \d: the loss or gradient is not finite for p\d+, .* — lower",
        ),
        ({"max_length": 129}, "the model has 128 positions"),
        (
            {"encoder_mask_ratio": 1.5},
            "--encoder_mask_ratio 1.5 — give a finite number above 0 and below 1",
        ),
        (
            {"per_device_batch_size": 0},
            "--per_device_batch_size 0 — give a finite number at least 1",
        ),
        ({"span_tokens": 9}, "--span_tokens: retromae has no such option"),
        ({"warmup_steps": -1}, "--warmup_steps -1.0 — give a finite number at least 0"),
        ({"objective": "mlm", "chunk_size": 2}, "--chunk_size: mlm has no such option"),
        (
            {"objective": "lexmae", "decoder_mask_ratio": 0.1},
            "--decoder_mask_ratio is below --encoder_mask_ratio",
        ),
        (
            {"objective": "cocondenser", "per_device_batch_size": 1},
            "the contrast needs another document",
        ),
        ({"balance": 0}, "--balance 0.0 — give a finite number at least 1"),
        (
            {"probe_every": 1, "probe_queries": tiny_collection.queries},
            "give all of --probe_every, --probe_queries and --probe_qrels",
        ),
        ({"model": tmp_path}, "no config.json in it"),
        ({"model_config": "x.json"}, "which model"),
        ({"corpus": tmp_path / "none.jsonl"}, "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            here(tmp_path / f"out{len(message)}", **{**good, **flags})
    here(tmp_path / "first", **{**good, "max_steps": 1})
    decoder = load_file(tmp_path / "first" / "decoder.safetensors")
    torch.save({}, tmp_path / "first" / "decoder.safetensors")
    with pytest.raises(UserError, match="first, its decoder: cannot be loaded .*SafetensorError"):
        here(tmp_path / "second", **{**good, "model": tmp_path / "first"})
    assert len(decoder) == 16 and not (tmp_path / "second").exists()
