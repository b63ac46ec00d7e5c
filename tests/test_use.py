"""The code of the model card and of docs/use.md runs as it stands.

Run: python -m pytest tests/test_use.py"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.checkpoint import load_encoder, save_encoder
from lib.encoder import Head
from lib.text import format_texts, pad, to_ids

PAGE = (Path(__file__).parents[1] / "docs" / "use.md").read_text()
CORPUS = [("Ants", "They live in colonies."), ("", "Lava is molten rock.")]


def run(code, folder, monkeypatch):
    """The variables that a piece of Python leaves, run beside the folder that it names."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    space = {}
    exec(code, space)
    return space


@torch.no_grad()
def ours(model, texts, kind):
    rows = [(tuple(filter(None, [title])), text) for title, text in texts]
    strings = format_texts(rows, kind, model.format, model.tokenizer)
    return model.encode(pad(to_ids(strings, model.tokenizer, 40), model.tokenizer), kind).numpy()


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("dense", "space"),
        ("dense", "sep"),
        ("dense", "none"),
        ("sparse", "sep"),
        ("table", "space"),
    ],
)
def test_the_code_of_the_card_runs(tiny_model_dir, tmp_path, monkeypatch, title, kind):
    pytest.importorskip("sentence_transformers")
    head = Head("mean") if kind == "dense" else Head(kind="sparse")
    form = {"title": title, "query_prompt": "" if kind == "table" else "what of "}
    model = load_encoder(tiny_model_dir, head, form)
    if kind == "table":
        model.query_table = model.make_table(torch.rand(model.dim), learned=True)
    save_encoder(model, tmp_path / "it's a model", {})
    card = (tmp_path / "it's a model" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    lines = [line for line in code.splitlines() if line and "import" not in line]
    assert len(lines) <= 7
    space = run(code, tmp_path, monkeypatch)
    assert space["corpus"] == CORPUS
    passages, queries = (
        np.asarray(one.to_dense() if kind != "dense" else one)
        for one in (space["passages"], space["queries"])
    )
    expected = ours(model, CORPUS, "passage")
    assert passages == pytest.approx(expected, rel=1e-4, abs=1e-5)
    asked = ours(model, [("", "who lives in colonies?")], "query")
    assert queries == pytest.approx(asked, rel=1e-4, abs=1e-5)
    scores = asked @ expected.T
    assert np.asarray(space["rows"]).tolist() == (-scores).argsort(1).tolist()
    assert np.asarray(space["scores"]) == pytest.approx(-np.sort(-scores), rel=1e-4)
    assert ("joins titles by a space, not as above" in card) == (title != "space")


def test_the_card_of_what_they_cannot_express_has_no_code(tiny_model_dir, tmp_path):
    save_encoder(load_encoder(tiny_model_dir, Head("cls"), {"max_chunks": 3}), tmp_path / "a", {})
    assert "```" not in (tmp_path / "a" / "README.md").read_text()


def piece(name):
    return re.search(rf"```python\n(# {name}\n.*?)```", PAGE, flags=re.DOTALL)[1]


def test_the_code_of_the_page_runs(tiny_collection, tiny_model_dir, tmp_path, script, monkeypatch):
    pytest.importorskip("sentence_transformers")
    heads = {"dense": Head("mean"), "sparse": Head(kind="sparse")}
    for name, head in heads.items():
        save_encoder(load_encoder(tiny_model_dir, head), tmp_path / name / "model", {})
        space = run(piece(name), tmp_path / name, monkeypatch)
        assert np.asarray(space["rows"]).shape == (1, 2)
    for kind, what in (("query", "queries"), ("passage", "corpus")):
        flags = ["--model", "model", "--input", getattr(tiny_collection, what), "--kind", kind]
        monkeypatch.chdir(tmp_path / "dense")
        assert script("encode", *flags, "--num_workers", 0, "--output_dir", what)[0] == 0
    space = run(piece("our index"), tmp_path / "dense", monkeypatch)
    queries, corpus = (space[name].take(range(len(space[name]))) for name in ("queries", "corpus"))
    best = -np.sort(-(queries @ corpus.T))[:, :10]
    assert space["scores"] == pytest.approx(best, rel=1e-5)


def test_the_lines_on_titles_are_those_of_the_card(tiny_model_dir, tmp_path):
    for title in ("space", "sep", "none"):
        form = {"title": title}
        save_encoder(load_encoder(tiny_model_dir, Head("cls"), form), tmp_path / title, {})
        card = (tmp_path / title / "README.md").read_text()
        line = re.search(rf"^\| `{title}` \| `(.*?)`", PAGE, flags=re.MULTILINE)[1]
        assert line in card
