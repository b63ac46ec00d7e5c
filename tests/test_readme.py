"""The README, the pages of docs/ and the docstrings are true: the files, tests and flags that they
name exist, and the pieces of code in the README run. Run: python -m pytest tests/test_readme.py"""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import encoder, losses, sentence_files
from lib.checkpoint import load_encoder, save_encoder
from lib.encoder import Head
from lib.files import TrainingRow, read_training_file, write_training_file
from lib.text import pad, to_ids

ROOT = Path(__file__).parents[1]
SCRIPTS = ("pretrain_mae", "finetune_biencoder", "mine_negatives", "encode", "evaluate")
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))
}
RECIPES = ("import_training_data", "cluster_queries", "score_pairs", "train_cross_encoder")
RECIPES += ("export_anserini", "search", "mteb_task", "plot")
LAUNCH = {"--multi_gpu", "--num_processes", "--mixed_precision", "--cpu", "--gpu_ids", "--help"}
LAUNCH |= {"--main_process_ip", "--main_process_port"}


def flags_of(module):
    """The flags of a script; a field that is True by default has --no_NAME."""
    return {
        f"--no_{field.name}" if field.default is True else f"--{field.name}"
        for field in dataclasses.fields(importlib.import_module(module).Args)
    }


def module_of(name):
    return name if name in SCRIPTS else f"recipes.{name}"


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z]\w+", text))


def all_flags():
    modules = [module_of(name) for name in (*SCRIPTS, *RECIPES)]
    return set().union(*map(flags_of, modules)) | LAUNCH


def commands(text):
    """(script, flags) of the commands in bash blocks; lines that end in a backslash are joined."""
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:\b(\w+)\.py|-m recipes\.(\w+))\b([^#]*)", line)
            if found and (found[1] or found[2]) in (*SCRIPTS, *RECIPES):
                yield found[1] or found[2], re.findall(r"(?<!\S)--\w+", found[3])


def piece(name):
    """The code block of the README whose first line is `# name`."""
    return re.search(rf"```python\n(# {name}\n.*?)```", README, flags=re.DOTALL)[1]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250
    assert len(README.encode()) <= 12_288


def test_every_command_uses_flags_of_its_script():
    found = [pair for page in PAGES.values() for pair in commands(page)]
    assert {"finetune_biencoder", "mine_negatives", "encode", "evaluate"} <= dict(found).keys()
    for script, flags in found:
        unknown = set(flags) - flags_of(module_of(script))
        assert not unknown, (script, unknown)


def test_every_command_in_a_recipe_uses_flags_of_its_script():
    for path in sorted((ROOT / "recipes").glob("*.sh")):
        for script, flags in commands(f"```bash\n{path.read_text()}```"):
            unknown = set(flags) - flags_of(module_of(script))
            assert not unknown, (path.name, script, unknown)


def test_every_flag_in_the_text_of_the_readme_exists():
    text = README.split("## What version 2 dropped")[0]
    text = re.sub(r"```bash\n.*?```", "", text, flags=re.DOTALL)
    known = all_flags() | {"--quiet"}  # of accelerate launch
    assert len(flags_in(text)) > 20
    assert flags_in(text) <= known, flags_in(text) - known


def test_what_was_dropped_is_gone():
    table = README.split("## What version 2 dropped")[1].split("\n\n")[1]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    gone = set().union(*(flags_in(row[0]) for row in rows))
    assert len(gone) == 21
    left = {script: gone & flags_of(script) for script in SCRIPTS if gone & flags_of(script)}
    assert not left


def test_every_flag_on_the_right_of_the_mapping_exists():
    rows = re.findall(r"^\|(.*)\|(.*)\|$", PAGES["docs/coming-from.md"], flags=re.MULTILINE)
    assert len(rows) > 80
    known = all_flags() | {"--format"}
    for _, ours in rows:
        assert flags_in(ours) <= known, (ours, flags_in(ours) - known)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_test_that_is_named_exists(page):
    text = PAGES[page]
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(?:tests/)?(test_\w+\.py)`", text)):
        assert (ROOT / "tests" / name).is_file(), name
    for name in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {name}(" in code, name
    for link in set(re.findall(r"\]\((?!http)([^)]+)\)", text)):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, link
    files = set(re.findall(r"\b((?:lib|recipes|tests|bench|docs)/[\w-]+\.(?:py|sh|md))", text))
    files |= {f"recipes/{name}.py" for name in re.findall(r"-m recipes\.(\w+)", text)}
    files |= {f"recipes/{name}" for name in re.findall(r"`(\w+\.sh)`", text)}
    for name in files:
        assert (ROOT / name).is_file(), name


def test_the_diagram_shows_the_five_scripts():
    diagram = re.search(r"```mermaid\n(.*?)```", README, flags=re.DOTALL)[1]
    assert set(re.findall(r"\[(\w+)\.py\]", diagram)) == set(SCRIPTS)


def test_my_own_loss_runs():
    """Without smoothing it is info_nce; masked columns get no gradient."""
    space = {}
    exec(piece("my own loss"), space)
    torch.manual_seed(0)
    scores = torch.randn(3, 5, requires_grad=True)
    positives = torch.tensor([0, 2, 4])
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 1] = False
    loss = space["contrastive_loss"](scores, positives, mask)
    assert loss.shape == (3,)
    loss.sum().backward()
    assert torch.isfinite(scores.grad).all() and scores.grad[0, 1] == 0

    plain = {}
    exec(piece("my own loss").replace("smoothing = 0.1", "smoothing = 0.0"), plain)
    expected = losses.info_nce(scores, positives, mask)
    torch.testing.assert_close(plain["contrastive_loss"](scores, positives, mask), expected)


def test_my_own_loss_trains_in_the_place_of_the_one_in_the_script(
    monkeypatch, script, tiny_collection, tiny_model_dir, tmp_path
):
    finetune_biencoder = importlib.import_module("finetune_biencoder")
    assert callable(finetune_biencoder.contrastive_loss)
    space = {}
    exec(piece("my own loss"), space)
    monkeypatch.setattr(finetune_biencoder, "contrastive_loss", space["contrastive_loss"])
    flags = ["--model", tiny_model_dir, "--corpus", tiny_collection.corpus, "--pooling", "cls"]
    flags += ["--queries", tiny_collection.queries, "--train", tiny_collection.qrels]
    flags += ["--max_steps", 2, "--num_workers", 0, "--output_dir", tmp_path / "model"]
    status, _, errors = script("finetune_biencoder", *flags)
    assert status == 0, errors
    assert (tmp_path / "model" / "done").is_file()


def test_my_own_pooling_trains_and_loads_in_sentence_transformers(
    tiny_model_dir, tmp_path, monkeypatch
):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(encoder, "POOLINGS", dict(encoder.POOLINGS))
    monkeypatch.setattr(sentence_files, "POOLINGS", encoder.POOLINGS)
    space = {"POOLINGS": encoder.POOLINGS, "Pooling": encoder.Pooling}
    exec(piece("my own pooling"), space)
    hidden = torch.arange(12.0).reshape(1, 3, 4)
    pooled = space["weighted_mean"](hidden, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(pooled, (hidden[:, 0] + 2 * hidden[:, 1]) / 3)

    model = load_encoder(tiny_model_dir, Head("weighted_mean"))
    save_encoder(model, tmp_path / "model", {})
    texts = ["ants and sugar", "ice and snow " * 6]
    ours = load_encoder(tmp_path / "model")
    batch = pad(to_ids(texts, ours.tokenizer, ours.format.max_passage_length), ours.tokenizer)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(
            ours.encode(batch), theirs.encode(texts, convert_to_tensor=True), rtol=1e-4, atol=1e-5
        )


def test_my_own_negatives_run(tmp_path):
    ids = [f"p{i}" for i in range(12)]
    with_scores = TrainingRow("q1", ["a"], ids, [9.0], [float(-i) for i in range(12)], 3)
    (tmp_path / "negatives").mkdir()
    path = tmp_path / "negatives" / "train.jsonl"
    write_training_file(path, [with_scores, TrainingRow("q2", ["b"], ids[:4])])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    code = piece("my own negatives")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    first, second = (row for _, row in read_training_file(tmp_path / "mine.jsonl"))
    expected = with_scores._replace(neg=["p10", "p11"], neg_scores=[-10.0, -11.0])
    assert first == expected
    assert second.neg == [] and second.neg_scores is None


def test_pandas_is_imported_beside_a_clone(tmp_path):
    """pandas looks for a package named bottleneck, and finds a folder of that name: a clone must
    have another."""
    (tmp_path / "isthmus").mkdir()
    (tmp_path / "isthmus" / "__init__.py").touch()
    subprocess.run([sys.executable, "-c", "import pandas"], cwd=tmp_path, check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings_show_three_commands_with_flags_that_exist(script):
    text = importlib.import_module(script).__doc__
    assert all(
        f"\n{start} " in text for start in ("Reads ", "Writes ", "CPU toy ", "1 GPU ", "N GPUs ")
    )
    scripts = set().union(*map(flags_of, SCRIPTS))
    assert flags_in(text) <= scripts | LAUNCH


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_says_what_it_is_for(script):
    for field in dataclasses.fields(importlib.import_module(script).Args):
        assert len(field.metadata.get("help", "")) > 3, field.name
