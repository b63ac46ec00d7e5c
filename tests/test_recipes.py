"""The recipes, at SCALE=tiny. Run: python -m pytest tests/test_recipes.py"""

import dataclasses
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from accelerate.commands import launch

from lib.arguments import parse_args
from lib.files import UserError
from lib.generations import read_generations
from recipes import generations

ROOT = Path(__file__).parents[1]


class Killed(BaseException):
    """Nothing catches it."""


# in the place of python: writes its words to a file; the first `next` of a miner gets a folder
STUB = """#!/usr/bin/env bash
printf '%s\\0' "$@" end-of-call >>"$RECORD/words"
case "$*" in
    -c*) echo "$RECORD" ;;
    *"--task next"*) mkdir "$RECORD/next" 2>/dev/null && echo "$RECORD/next" ;;
esac
exit 0
"""
SET = "--num_machines 1 --mixed_precision no --dynamo_backend no"
ODD = "-w 'x' \"y\" [z]*?$HOME"
MSMARCO = "corpus.tsv queries.train.tsv qrels.train.tsv queries.dev.tsv qrels.dev.tsv".split()


@pytest.fixture
def stubbed(tmp_path):
    """stubbed("beir.sh", *arguments, NAME=value) -> (finished process, the calls of python, each a
    list of words), called in tmp_path."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STUB)
    (tmp_path / "bin" / "python").chmod(0o755)

    def call(name, *arguments, **environment):
        shutil.rmtree(tmp_path / "record", ignore_errors=True)
        (tmp_path / "record").mkdir()
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        own = {"PATH": path, "LAUNCH": "python", "RECORD": str(tmp_path / "record"), "POLL": "1"}
        command = ["bash", ROOT / "recipes" / name, *map(str, arguments)]
        how = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 60}
        done = subprocess.run(command, env={**os.environ, **own, **environment}, **how)
        words = tmp_path / "record" / "words"
        calls = words.read_text().split("end-of-call\0")[:-1] if words.is_file() else []
        return done, [call.split("\0")[:-1] for call in calls]

    return call


def smi(folder, gpus):
    """A nvidia-smi that lists this many GPUs."""
    folder.mkdir(exist_ok=True)
    lines = "".join(f"GPU {number}: NVIDIA (UUID: GPU-{number})\n" for number in range(gpus))
    found = f"printf '{lines}'" if gpus else "echo 'No devices were found'; exit 6"
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{found}\n")
    (folder / "nvidia-smi").chmod(0o755)


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """launcher(gpus, NAME=value) -> what a recipe starts scripts with on such a machine."""
    for name in ("LAUNCH", "CUDA_VISIBLE_DEVICES", "ACCELERATE_MIXED_PRECISION", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(gpus, **environment):
        smi(tmp_path / "bin", gpus)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        words = f'. {shlex.quote(str(ROOT / "recipes" / "paths.sh"))}; echo "${{launch[@]}}"'
        environment = {**os.environ, "PATH": path, **environment}
        return subprocess.check_output(["bash", "-c", words], env=environment, text=True).strip()

    return call


@pytest.fixture
def odd(tmp_path):
    """A folder whose name has all that a shell may stumble over: collections, MS MARCO, a model."""
    folder = tmp_path / ODD
    for name in ("msmarco", "msmarco/documents"):
        (folder / name).mkdir(parents=True)
        for file in (*MSMARCO, "triples.train.small.tsv"):
            (folder / name / file).touch()
    for name in ("arguana", "quora", "other"):
        (folder / "beir" / name / "qrels").mkdir(parents=True)
        for file in ("corpus.jsonl", "queries.jsonl.gz", "qrels/train.tsv", "qrels/test.tsv"):
            (folder / "beir" / name / file).touch()
    (folder / "model").mkdir()
    return folder


SOURCES = {path.stem: path.read_text() for path in (ROOT / "recipes").glob("*.py")}
TOOLS = sorted(name for name, source in SOURCES.items() if "class Args" in source)
PIPELINES = {
    "two_stages.sh": ("beir/other", "model", "out"),
    "beir.sh": ("model", "beir", "out"),
    "coco_beir.sh": ("beir", "out"),
    "coco_dr.sh": ("beir", "msmarco", "out"),
    "msmarco_eval.sh": ("model", "msmarco", "out"),
    "retromae_msmarco.sh": ("msmarco", "out"),
    "lexmae_msmarco.sh": ("msmarco", "out"),
    "seed_msmarco.sh": ("msmarco", "out"),
    "ance_msmarco.sh": ("msmarco", "out"),
    "splade.sh": ("msmarco", "out"),
    "adapt.sh": ("msmarco/corpus.tsv", "model", "out"),
    "quickstart.sh": ("out",),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_any_path_reaches_the_scripts_whole(name, stubbed, odd, tmp_path):
    """A leading dash, spaces, quotes and glob characters, relative to the caller's folder."""
    done, calls = stubbed(name, *(f"{ODD}/{path}" for path in PIPELINES[name]), EPISODES="1")
    assert done.returncode == 0 and len(calls) > 1, done.stderr
    words = [word for call in calls if call[0] != "-c" for word in call]
    paths = {word for word in words if set(word) & set(" '\"[]*?$")}
    assert paths and all(word.startswith(f"{odd}/") for word in paths), paths
    assert not (ROOT / ODD).exists() and {path.name for path in tmp_path.iterdir()} == {
        "bin",
        "record",
        ODD,
    }


def test_ance_hands_the_text_flags_on_to_the_miner(stubbed, odd):
    sides = [f"{ODD}/{path}" for path in ("msmarco", "model", "out")]
    flags = ["--title=sep", "--max_query_length=16", "--max_passage_length", 32]
    done, calls = stubbed("ance.sh", "mine", *sides, *flags)
    assert done.returncode == 0, done.stderr
    encoded = [call for call in calls if call[0] == "encode.py"]
    assert len(encoded) == 3 and all(call[4:6] == ["--title", "sep"] for call in encoded)
    lengths = [call[call.index("--max_length") + 1] for call in encoded]
    assert lengths == ["32", "16", "16"]
    done, calls = stubbed("ance.sh", "train", *sides, *flags)
    assert calls[0][-4:] == list(map(str, flags)) and str(odd / "out" / "model") in calls[0]


def test_equal_ids_are_dropped_on_arguana_and_quora_alone(stubbed, odd, tmp_path):
    done, calls = stubbed("beir.sh", f"{ODD}/model", f"{ODD}/beir", "--pooling", "cls")
    assert done.returncode == 0, done.stderr
    evaluated = [call for call in calls if call[0] == "evaluate.py"]
    dropped = {Path(call[-1]).parent.name for call in evaluated if "--ignore_identical_ids" in call}
    assert len(evaluated) == 3 and dropped == {"arguana", "quora"}
    encoded = [call for call in calls if call[0] == "encode.py"]
    assert all(call[-2:] == ["--pooling", "cls"] for call in encoded)  # it is not taken for OUT
    assert encoded[0][-3].startswith(f"{tmp_path}/runs/beir-model/")


@pytest.mark.parametrize(
    "name, value, recipe_name",
    [
        ("SCALE", "large", "retromae_msmarco.sh"),
        ("SCALE", "large", "quickstart.sh"),
        ("STEPS", "0", "ance_msmarco.sh"),
        ("DEPTH", "1e3", "ance_msmarco.sh"),
        ("POLL", "-1", "seed_msmarco.sh"),
        ("WINDOW", "-2", "seed_msmarco.sh"),
        ("BALANCE", "nan", "coco_beir.sh"),
        ("CLUSTERS", "1", "coco_dr.sh"),
        ("EPISODES", "0", "coco_dr.sh"),
        ("EPISODE_STEPS", "1) + __import__('os').system('touch here'", "coco_dr.sh"),
        ("EPISODE_STEPS", "3000000000", "coco_dr.sh"),
    ],
)
def test_settings_that_make_no_sense_are_one_line_before_work_begins(
    name, value, recipe_name, stubbed, odd
):
    paths = [f"{ODD}/{path}" for path in PIPELINES[recipe_name]]
    done, calls = stubbed(recipe_name, *paths, **{name: value})
    assert done.returncode == 1 and not calls and not (odd / "out").exists()
    assert done.stderr.startswith(f"{recipe_name}: {name}={value} — give ")
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_file_is_one_line_before_work_begins(stubbed, odd):
    (odd / "msmarco" / "qrels.train.tsv").unlink()
    for name in ("retromae_msmarco.sh", "lexmae_msmarco.sh", "splade.sh", "coco_dr.sh"):
        done, calls = stubbed(name, *(f"{ODD}/{path}" for path in PIPELINES[name]))
        assert done.returncode == 1 and not calls and not (odd / "out").exists()
        file = odd / "msmarco" / "qrels.train.tsv"
        assert (
            done.stderr
            == f"{name}: {file}: no such file — see the lines on DATA in recipes/{name}\n"
        )


@pytest.mark.parametrize("name", TOOLS)
def test_every_number_of_a_tool_has_a_range_and_is_checked(name, monkeypatch):
    args = importlib.import_module(f"recipes.{name}").Args
    fields = dataclasses.fields(args)
    required = [f for f in fields if f.default is dataclasses.MISSING]
    given = [f"--{field.name}=50" for field in required if "Literal" not in str(field.type)]
    given += [
        f"--{field.name}={get_args(field.type)[0]}" for field in required if get_args(field.type)
    ]
    for field in fields:
        if not {int, float} & {field.type, *get_args(field.type)}:
            continue
        limits = field.metadata["limits"]
        assert limits.keys() & {"least", "above"}, field.name
        below = limits["least"] - 1 if "least" in limits else limits["above"]
        for value in (below, "nan", "inf", "-inf", "x", ""):
            monkeypatch.setattr(sys, "argv", [name, *given, f"--{field.name}={value}"])
            with pytest.raises(UserError, match=f"--{field.name}.* — (give|see)"):
                parse_args(args)


def test_a_miner_killed_while_it_cleans_up_goes_on(script, tmp_path, monkeypatch):
    """Of a published folder, and of a generation that was being written."""
    mining, published = tmp_path / "mining", tmp_path / "generations"
    work = mining / "step-00000500"
    (work / "negatives").mkdir(parents=True)
    (work / "negatives" / "train.jsonl").write_text('{"qid": "q1", "pos": ["7"], "neg": ["9"]}\n')
    (work / "next.json").write_text('{"step": 500, "checkpoint": "c"}')
    (work / "evaluation").mkdir()
    (work / "evaluation" / "metrics.json").write_text(
        '{"splits": {"dev": {"metrics": {"RR@10": 0.5}}}}'
    )
    flags = ["--generations", published, "--work", mining, "--task"]

    def killed(path):
        (path / "next.json").unlink()  # it may be the first to go
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(generations.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            script("recipes.generations", *flags, "publish")
    (published / ".tmp-1-generation-0002").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "done").touch()
    texts = ["--queries", "unused", "--qrels", "unused"]
    status, shown, error = script(
        "recipes.generations", *flags, "next", "--run", tmp_path / "run", *texts
    )
    assert status == 0 and not shown, error
    assert not list(mining.iterdir())
    assert [path.name for path in published.iterdir()] == ["generation-0001"]
    assert [generation.step for generation in read_generations(published)] == [500]
    status, _, error = script("recipes.generations", *flags, "publish")
    assert status == 1 and "nothing to publish — run --task next" in error


def test_beir_evaluates_every_collection_of_a_folder(recipe, tiny_data, tmp_path):
    out = os.path.relpath(tmp_path / "out", tiny_data)
    done = recipe("beir.sh", "bm25", "beir", out, cwd=tiny_data)  # paths are the caller's
    assert done.returncode == 0 and (tmp_path / "out" / "crafts").is_dir(), done.stderr
    table = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert [row[:-3] for row in table] == [
        ["crafts", "20"],
        ["nature", "20"],
        ["average", "of", "the", "rows"],
    ]
    values = [[float(value) for value in row[-3:]] for row in table]
    for crafts, nature, average in zip(*values, strict=True):
        assert average == pytest.approx((crafts + nature) / 2, abs=2e-4) and crafts > 0.5
    empty = recipe("beir.sh", "bm25", ROOT / "lib", tmp_path / "x")
    assert empty.returncode == 1 and "no collection in it" in empty.stderr
    unasked = recipe("beir.sh", cwd=tmp_path)
    assert unasked.returncode == 1 and "bash recipes/beir.sh MODEL FOLDER" in unasked.stderr


def test_paths_are_the_callers_and_names_stay(tmp_path):
    for name in ("checkpoint", "bm25"):
        (tmp_path / name).mkdir()
    script = f"""
. {shlex.quote(str(ROOT / "recipes" / "paths.sh"))}
path out; path /out
model checkpoint; model bert-base-uncased; model bm25
echo "$MODEL $TEACHER $PWD"
"""
    environment = {**os.environ, "MODEL": "checkpoint", "TEACHER": "org/teacher"}
    found = subprocess.check_output(
        ["bash", "-c", script], cwd=tmp_path, env=environment, text=True
    )
    here = f"{tmp_path}/checkpoint"
    expected = [
        f"{tmp_path}/out",
        "/out",
        here,
        "bert-base-uncased",
        "bm25",
        f"{here} org/teacher {ROOT}",
    ]
    assert found.splitlines() == expected


@pytest.mark.parametrize(
    "gpus, environment, expected",
    [
        (0, {}, "python"),
        (0, {"CUDA_VISIBLE_DEVICES": "0"}, "python"),
        (1, {}, f"accelerate launch --num_processes 1 {SET}"),
        (3, {}, f"accelerate launch --multi_gpu --num_processes 3 {SET}"),
        (
            3,
            {"CUDA_VISIBLE_DEVICES": "0,2"},
            f"accelerate launch --multi_gpu --num_processes 2 {SET}",
        ),
        (3, {"CUDA_VISIBLE_DEVICES": "2"}, f"accelerate launch --num_processes 1 {SET}"),
        (3, {"CUDA_VISIBLE_DEVICES": ""}, "python"),
        (3, {"CUDA_VISIBLE_DEVICES": "-1"}, "python"),
        (
            1,
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            f"accelerate launch --num_processes 1 {SET.replace('no', 'bf16', 1)}",
        ),
        (1, {"LAUNCH": "python -X dev"}, "python -X dev"),
    ],
)
def test_scripts_are_started_for_the_gpus_there_are(
    gpus, environment, expected, launcher, monkeypatch, caplog
):
    assert launcher(gpus, **environment) == expected
    if expected.startswith("accelerate"):  # it has no value to warn about
        monkeypatch.setattr(launch, "default_config_file", "absent")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        parsed = launch.launch_command_parser().parse_args([*expected.split()[2:], "script.py"])
        caplog.clear()
        launch._validate_launch_command(parsed)
        assert not caplog.records


def test_a_configuration_of_accelerate_is_obeyed_where_accelerate_finds_it(
    launcher, tmp_path, monkeypatch
):
    from accelerate.commands.config import config_args

    for name, value in (("XDG_CACHE_HOME", tmp_path / "xdg"), ("HF_HOME", tmp_path / "hf")):
        monkeypatch.setenv(name, str(value))
        assert launcher(0) == "python"
        with monkeypatch.context() as patch:
            patch.setattr(config_args.os, "environ", dict(os.environ))
            path = Path(importlib.reload(config_args).default_config_file)
        path.parent.mkdir(parents=True)
        path.write_text("num_processes: 2\n")
        assert path.is_relative_to(tmp_path)
        assert launcher(0) == launcher(2) == "accelerate launch"


def test_trainer_and_miner_do_not_share_gpus_by_default(stubbed, odd, tmp_path):
    smi(tmp_path / "bin", 2)
    paths = [f"{ODD}/{path}" for path in PIPELINES["seed_msmarco.sh"]]
    done, calls = stubbed("seed_msmarco.sh", *paths, LAUNCH="", HF_HOME=str(tmp_path))
    assert done.returncode == 1 and not calls and not (odd / "out").exists()
    assert "would use the same GPUs — set TRAIN_LAUNCH and MINE_LAUNCH" in done.stderr


def test_two_stages_checks_the_flags_before_any_work(recipe, tiny_data, tmp_path):
    command = ["two_stages.sh", tiny_data / "beir/crafts", tiny_data / "model", tmp_path / "out"]
    for flags, wrong in (
        (["--max_steps", 2], "states no pooling — add --pooling"),
        (["--pooling", "cls", "--kl_weight", 1], "lines without scores"),
    ):
        done = recipe(*command, *flags)
        assert done.returncode == 1 and wrong in done.stderr and not done.stdout
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_the_table_of_two_stages(script, tmp_path):
    metrics = {"RR@10": 0.5, "nDCG@10": 0.25, "R@100": 1.0}
    for stage in ("bm25", "stage1", "stage2", "fused"):
        part = {"queries": 7, "metrics": metrics}
        if stage != "bm25":
            part["compare"] = {"nDCG@10": {"difference": -0.125, "p": 0.03}}
        (tmp_path / f"evaluation-{stage}").mkdir()
        text = json.dumps({"splits": {"test": part, "test-2": part}})
        (tmp_path / f"evaluation-{stage}" / "metrics.json").write_text(text)
    status, shown, errors = script("recipes.quickstart_report", "--folder", tmp_path, "--table")
    assert status == 0, errors
    values = ["0.5000", "0.2500", "1.0000"]
    tables = shown.split("test")[1:]
    assert len(tables) == 2 and tables[1].startswith("-2: 7 queries\n")
    for table in tables:
        rows = [line.split() for line in table.splitlines() if line][2:]
        gap = ["-0.1250,", "p", "0.0300"]
        assert rows == [
            ["BM25", *values],
            ["stage", "1", *values, *gap],
            ["stage", "2", *values, *gap],
            ["stage", "2", "+", "BM25", *values, *gap],
        ]


TRIED = [name for name in PIPELINES if name != "quickstart.sh"] + ["ance.sh"]


@pytest.mark.parametrize("name", TRIED)
def test_each_recipe_states_a_command_that_tries_it(name, stubbed, tiny_data, tmp_path):
    """It fits the data of recipes/tiny_data.py, and the arguments of the recipe."""
    text = (ROOT / "recipes" / name).read_text().replace(" \\\n#", "")
    said = text.split("call `python -m recipes.tiny_data`, and then\n#")[1].splitlines()[0].split()
    at = said.index("bash")
    assert said[at + 1] == f"recipes/{name}"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(tiny_data)
    environment = dict(word.split("=") for word in said[:at])
    assert ("SCALE" in environment) == ("recipes/scale.sh" in text)
    done, calls = stubbed(name, *said[at + 2 :], **environment)
    assert done.returncode == 0 and len(calls) > 1, done.stderr


@pytest.mark.slow
def test_retromae_runs_from_end_to_end(recipe, tiny_msmarco, tmp_path):
    done = recipe("retromae_msmarco.sh", tiny_msmarco, tmp_path / "out", SCALE="tiny")
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "out/pretrained/decoder.json").read_text())["objective"]
        == "retromae"
    )
    for part in ("dev", "dl19", "dl20"):
        metrics = json.loads((tmp_path / f"out/evaluation-{part}/metrics.json").read_text())
        assert metrics["splits"][f"qrels.{part}"]["queries"] == 20


@pytest.mark.slow
def test_lexmae_from_pretraining_to_stage_3_with_the_published_values(
    recipe, tiny_msmarco, tmp_path
):
    done = recipe("lexmae_msmarco.sh", tiny_msmarco, tmp_path / "out", SCALE="tiny")
    assert done.returncode == 0, done.stderr

    def arguments(stage):
        return json.loads((tmp_path / "out" / stage / "args.json").read_text())["arguments"]

    args = arguments("pretrained")
    assert (
        args["learning_rate"] == 3e-4 and args["max_length"] == 144 and args["max_grad_norm"] == 0
    )
    published = {
        1: (0.002, 1000, 16, 1.0, 0.0),
        2: (0.008, 200, 16, 1.0, 0.0),
        3: (0.008, 100, 24, 0.2, 1.0),  # on scores of a cross-encoder
    }
    names = (
        "flops_passages",
        "negatives_depth",
        "passages_per_query",
        "contrastive_weight",
        "kl_weight",
    )
    for stage, values in published.items():
        args = arguments(f"stage{stage}")
        assert tuple(args[name] for name in names) == values and args["model"].endswith(
            "out/pretrained"
        )
        state = json.loads((tmp_path / f"out/stage{stage}/isthmus.json").read_text())
        assert state["title"] == "sep" and state["exclude_special_tokens"]
    for part in ("dev", "dl19", "dl20"):
        metrics = json.loads((tmp_path / f"out/evaluation-{part}/metrics.json").read_text())
        assert metrics["splits"][f"qrels.{part}"]["queries"] == 20


@pytest.mark.slow
def test_splade_gives_folders_for_sentence_transformers(recipe, tiny_msmarco, tmp_path):
    done = recipe("splade.sh", tiny_msmarco, tmp_path / "out", SCALE="tiny")
    assert done.returncode == 0, done.stderr
    cls = pytest.importorskip("sentence_transformers").SparseEncoder
    for stage in ("plusplus", "v3"):
        log = (tmp_path / "out" / stage / "log.jsonl").read_text().splitlines()
        assert {"kl", "margin_mse", "p_flops", "p_terms"} <= json.loads(log[-1]).keys()
        model = cls(str(tmp_path / "out" / stage), device="cpu")
        assert model.encode(["ants and sugar"]).shape == (1, model.get_embedding_dimension())
    assert (tmp_path / "out/evaluation-dl20/metrics.json").is_file()


@pytest.mark.slow
def test_coco_pretrains_on_all_collections(recipe, tiny_data, tmp_path):
    done = recipe("coco_beir.sh", tiny_data / "beir", tmp_path / "out", SCALE="tiny")
    assert done.returncode == 0, done.stderr
    assert (
        "crafts/corpus.jsonl 40 texts" in done.stdout
        and "nature/corpus.jsonl 40 texts" in done.stdout
        and "50.0% of a batch" in done.stdout
    )
    assert [line.split()[0] for line in done.stdout.splitlines()[-3:]] == [
        "crafts",
        "nature",
        "average",
    ]
    settings = json.loads((tmp_path / "out/pretrained/decoder.json").read_text())
    assert settings["objective"] == "cocondenser" and settings["encoder_mask_ratio"] == 0.15
