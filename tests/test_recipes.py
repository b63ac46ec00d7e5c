"""The recipes, at SCALE=tiny. Run: python -m pytest tests/test_recipes.py"""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_beir_evaluates_every_collection_of_a_folder(recipe, tiny_beir, tmp_path):
    done = recipe(
        "beir.sh", "bm25", "beir", "out", cwd=tmp_path
    )  # paths count from where it is called
    assert done.returncode == 0 and (tmp_path / "out" / "one").is_dir(), done.stderr
    table = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert [row[0] for row in table] == ["one", "two", "average"] and table[0][1:] == table[1][1:]
    assert float(table[2][-3]) == float(table[0][2]) > 0.5
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
def test_splade_gives_a_folder_for_sentence_transformers(recipe, tiny_msmarco, tmp_path):
    done = recipe("splade.sh", tiny_msmarco, tmp_path / "out", SCALE="tiny")
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "out/model/log.jsonl").read_text().splitlines()
    assert {"contrastive", "margin_mse", "p_flops", "p_terms"} <= json.loads(log[-1]).keys()
    model = pytest.importorskip("sentence_transformers").SparseEncoder(
        str(tmp_path / "out/model"), device="cpu"
    )
    assert model.encode(["ants and sugar"]).shape == (1, model.get_embedding_dimension())
    assert (tmp_path / "out/evaluation-dl20/metrics.json").is_file()


@pytest.mark.slow
def test_coco_pretrains_on_all_collections(recipe, tiny_beir, tmp_path):
    done = recipe("coco_beir.sh", tiny_beir, tmp_path / "out", SCALE="tiny")
    assert done.returncode == 0, done.stderr
    assert (
        "one/corpus.jsonl 40 texts" in done.stdout
        and "two/corpus.jsonl 40 texts" in done.stdout
        and "50.0% of a batch" in done.stdout
    )
    assert [line.split()[0] for line in done.stdout.splitlines()[-3:]] == ["one", "two", "average"]
    settings = json.loads((tmp_path / "out/pretrained/decoder.json").read_text())
    assert settings["objective"] == "cocondenser" and settings["encoder_mask_ratio"] == 0.15
