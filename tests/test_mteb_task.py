"""recipes/mteb_task.py: MTEB and evaluate.py measure the same. Needs requirements-mteb.txt, which
CI does without.

Run: python -m pytest tests/test_mteb_task.py"""

import re

import pytest

from lib.checkpoint import load_encoder, save_encoder
from lib.encoder import Head
from lib.files import read_json

METRICS = ["nDCG@10", "RR@10", "R@100"]


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_mteb_measures_what_we_measure(tiny_data, tiny_model_dir, tmp_path, script, name):
    pytest.importorskip("mteb")
    head = Head(kind="sparse") if name == "sparse" else Head("mean", normalize=True)
    form = {"query_prompt": "what of ", "title": "sep", "max_query_length": 12}
    save_encoder(load_encoder(tiny_model_dir, head, form), tmp_path / "model", {})
    data = tiny_data / "beir" / "crafts"
    for kind, what in (("query", "queries"), ("passage", "corpus")):
        flags = ["--input", data / f"{what}.jsonl", "--kind", kind, "--dtype", "float32"]
        flags += ["--num_workers", 0, "--output_dir", tmp_path / what]
        status, _, error = script("encode", "--model", tmp_path / "model", *flags)
        assert status == 0, error
    vectors = ["--queries_embeddings", tmp_path / "queries"]
    vectors += ["--corpus_embeddings", tmp_path / "corpus", "--metrics", *METRICS]
    qrels = ["--qrels", data / "qrels" / "test.tsv", "--output_dir", tmp_path / "ours"]
    assert script("evaluate", *vectors, *qrels)[0] == 0
    flags = ["--model", tmp_path / "model", "--collection", data, "--output_dir", tmp_path / "mteb"]
    status, shown, error = script("recipes.mteb_task", *flags)
    assert status == 0, error
    found = dict(re.findall(r"^   (\S+) +([\d.]+)$", shown, flags=re.MULTILINE))
    ours = read_json(tmp_path / "ours" / "metrics.json")["splits"]["test"]["metrics"]
    found = {name: float(value) for name, value in found.items()}  # MTEB rounds to five digits
    assert found == pytest.approx(ours, abs=1e-5) and 0 < found["nDCG@10"] < 1
    assert list((tmp_path / "mteb").rglob("crafts.json"))


def test_without_mteb_one_line_says_what_to_install(script, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mteb", None)
    flags = ["--model", "m", "--collection", "c", "--output_dir", tmp_path / "out"]
    status, _, error = script("recipes.mteb_task", *flags)
    assert status == 1 and " — pip install -r requirements-mteb.txt\n" in error
