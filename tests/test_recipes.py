"""The recipes, at SCALE=tiny. Run: python -m pytest tests/test_recipes.py"""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_beir_evaluates_every_collection_of_a_folder(recipe, tiny_beir, tmp_path):
    done = recipe("beir.sh", "bm25", tiny_beir, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert [row[0] for row in table] == ["one", "two", "average"] and table[0][1:] == table[1][1:]
    assert float(table[2][-3]) == float(table[0][2]) > 0.5
    empty = recipe("beir.sh", "bm25", ROOT / "lib", tmp_path / "x")
    assert empty.returncode == 1 and "no collection in it" in empty.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "evaluated"), [("retromae", ["dev", "dl19", "dl20"]), ("seed", ["dev"])])
def test_msmarco_pipelines_run_from_end_to_end(name, evaluated, recipe, tiny_msmarco, tmp_path):
    done = recipe(f"{name}_msmarco.sh", tiny_msmarco, tmp_path / "out", SCALE="tiny")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/pretrained/decoder.json").read_text())["objective"] == name
    for part in evaluated:
        metrics = json.loads((tmp_path / f"out/evaluation-{part}/metrics.json").read_text())
        assert metrics["splits"][f"qrels.{part}"]["queries"] == 20


@pytest.mark.slow
def test_lexmae_pretrains_with_the_published_values(recipe, tiny_msmarco, tmp_path):
    done = recipe("lexmae_msmarco.sh", tiny_msmarco, tmp_path / "out", SCALE="tiny")
    assert done.returncode == 0, done.stderr
    args = json.loads((tmp_path / "out/pretrained/args.json").read_text())["arguments"]
    assert args["learning_rate"] == 3e-4 and args["max_length"] == 144 and args["max_grad_norm"] == 0
    assert json.loads((tmp_path / "out/pretrained/bottleneck.json").read_text())["title"] == "sep"


@pytest.mark.slow
def test_coco_pretrains_on_all_collections(recipe, tiny_beir, tmp_path):
    done = recipe("coco_beir.sh", tiny_beir, tmp_path / "out", SCALE="tiny")
    assert done.returncode == 0, done.stderr
    assert "corpus one" in done.stdout and "corpus two" in done.stdout and "50.0% of a batch" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[-3:]] == ["one", "two", "average"]
    settings = json.loads((tmp_path / "out/pretrained/decoder.json").read_text())
    assert settings["objective"] == "cocondenser" and settings["encoder_mask_ratio"] == 0.15
