"""README, docs and docstrings are true: files, tests, flags, sizes, and the pieces of code in them.

Run: python -m pytest tests/test_readme.py
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = ("pretrain_mae", "finetune_biencoder", "mine_negatives", "encode", "evaluate")
RECIPES = (
    "import_training_data",
    "score_pairs",
    "cluster_queries",
    "train_cross_encoder",
    "export_anserini",
    "generations",
    "python_docs",
    "train_tokenizer",
)
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
COMING_FROM = DOCS["coming-from.md"]
PAGES = {"README.md": README, **DOCS}
LAUNCH = {"--multi_gpu", "--num_processes", "--mixed_precision", "--cpu", "--help", "--gpu_ids"}
LAUNCH |= {"--main_process_ip", "--main_process_port"}
SHELL = {"--titles", "--triples", "--id_triples", "--bm25_negatives", "--documents", "--check"}
SHELL_SCRIPTS = ("get_msmarco.sh", "msmarco_eval.sh")  # whose own flags these are


def module(name):
    return importlib.import_module(name if name in SCRIPTS else f"recipes.{name}")


@pytest.fixture(scope="module")
def flags():
    """The flags of each script, and of each recipe in Python."""
    found = {}
    for name in (*SCRIPTS, *RECIPES):
        fields = dataclasses.fields(module(name).Args)
        found[name] = {
            f"--no_{field.name}" if field.default is True else f"--{field.name}" for field in fields
        }
    return found


def commands(text):
    """(script, flags) of the commands in bash blocks and of the recipes, lines joined at a backslash."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:\b(\w+)\.py|-m recipes\.(\w+))\b([^#]*)", line)
        if found and (found[1] or found[2]) in (*SCRIPTS, *RECIPES):
            yield found[1] or found[2], set(re.findall(r"(?<![\w-])--[a-z]\w+", found[3]))


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 250 and len(README.encode()) <= 12_000
    assert max(map(len, lines)) <= 120
    first_screen = lines[:45]
    assert sum(line.startswith("| `") and ".py" in line for line in first_screen) == len(SCRIPTS)
    assert "bash recipes/quickstart.sh" in "\n".join(first_screen)


def test_every_command_in_the_readme_uses_flags_of_its_script(flags):
    found = [pair for block in blocks(README, "bash") for pair in commands(block)]
    shown = {script for script, _ in found}
    assert shown >= {"finetune_biencoder", "mine_negatives", "encode", "evaluate", "score_pairs"}
    for script, used in found:
        assert used <= flags[script], (script, used - flags[script])


def test_every_command_in_a_recipe_uses_flags_of_its_script(flags):
    for path in sorted((ROOT / "recipes").glob("*.sh")):
        for script, used in commands(path.read_text()):
            assert used <= flags[script], (path.name, script, used - flags[script])


def test_every_flag_in_the_text_exists(flags):
    """Not in docs/results.md, whose commands are of the commits beside them, and not where the text says that a flag
    is another project's or has gone."""
    known = set().union(*flags.values()) | LAUNCH
    prose = README.split("## What went")[0]
    for row in prose.splitlines():
        named = set(re.findall(r"(?<![\w-])--[a-z]\w+", row))
        if any(f"recipes/{name}" in row for name in SHELL_SCRIPTS):
            named -= SHELL
        assert named <= known, (row, named - known)
    for name in ("formats.md", "silent-failures.md"):
        named = set(re.findall(r"(?<![\w-])--[a-z]\w+", DOCS[name]))
        assert named <= known, (name, named - known)
    ours = [line.split(" | ")[-1] for line in COMING_FROM.splitlines() if line.startswith("| ")]
    assert len(ours) > 80
    for cell in ours:
        named = set(re.findall(r"(?<![\w-])--[a-z]\w+", cell))
        assert named <= known, (cell, named - known)


def test_what_went_has_gone(flags):
    went = README.split("## What went")[1]
    for names, successor in re.findall(r"((?:`--\w+`(?:, | and )?)+)[^:;`]*(:)?", went):
        if not successor:
            continue
        gone = set(re.findall(r"--\w+", names))
        training = flags["finetune_biencoder"]
        assert not gone & training, gone & training
    table = COMING_FROM.split("## Version 1")[1].split("\n## ")[0]
    for line in table.splitlines():
        theirs = line.strip("| ").split(" | ")[0]
        if line.startswith("| `--"):
            gone = set(re.findall(r"--\w+", theirs))
            assert not gone & flags["finetune_biencoder"], gone


@pytest.mark.parametrize("name", PAGES)
def test_every_file_test_and_link_that_a_page_names_exists(name):
    text, folder = PAGES[name], ROOT if name == "README.md" else ROOT / "docs"
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for test in set(re.findall(r"`(?:tests/)?(test_\w+\.py)`", text)):
        assert (ROOT / "tests" / test).is_file(), test
    for test in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {test}(" in code, test
    if name != "results.md":  # its files are of the commits beside them
        for path in set(re.findall(r"\b((?:lib|recipes|tests|bench|docs)/\w+\.\w+)", text)):
            assert (ROOT / path).is_file(), path
    for link in set(re.findall(r"\]\((?!http)([^)]+)\)", text)):
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / name
        assert target.exists(), link
        titles = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, link


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings_show_three_commands_with_flags_that_exist(script, flags):
    text = importlib.import_module(script).__doc__
    parts = ("Reads ", "Writes ", "CPU toy ", "1 GPU ", "N GPUs ")
    assert all(f"\n{start} " in text for start in parts)
    known = set().union(*flags.values()) | LAUNCH
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", text)) <= known


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_says_what_it_is_for(script):
    for field in dataclasses.fields(importlib.import_module(script).Args):
        assert len(field.metadata.get("help", "")) > 3, field.name


def test_pandas_imports_beside_a_folder_of_our_name(tmp_path):
    """pandas probes for optional packages; a clone in the current folder must not be taken for one."""
    (tmp_path / "isthmus" / "lib").mkdir(parents=True)
    command = [sys.executable, "-c", "import pandas; print(pandas.DataFrame({'a': [1]}).a.sum())"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr


# the pieces of "Tweak it", as they stand
def piece(start):
    (found,) = [block for block in blocks(README, "python") if start in block]
    return found


def test_my_own_loss(monkeypatch, script, tiny_collection, tiny_model_dir, tmp_path):
    import finetune_biencoder

    original = finetune_biencoder.contrastive_loss
    exec(piece("def contrastive_loss"), namespace := {})
    loss = namespace["contrastive_loss"]
    scores = torch.tensor([[2.0, 1.5, 0.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert loss(scores, torch.tensor([0]), mask).tolist() == [0.25]  # (0.5 + 0) / 2
    assert original(scores, torch.tensor([0]), mask).shape == (1,)
    monkeypatch.setattr(finetune_biencoder, "contrastive_loss", loss)
    flags = ["--model", tiny_model_dir, "--corpus", tiny_collection.corpus, "--pooling", "cls"]
    flags += ["--queries", tiny_collection.queries, "--train", tiny_collection.qrels]
    flags += ["--max_steps", 2, "--num_workers", 0, "--output_dir", tmp_path / "model"]
    status, _, errors = script("finetune_biencoder", *flags)
    assert status == 0, errors
    assert (tmp_path / "model" / "done").is_file()


def test_my_own_pooling(monkeypatch, script, tiny_collection, tiny_model_dir, tmp_path):
    from lib import encoder

    monkeypatch.setattr(encoder, "POOLINGS", dict(encoder.POOLINGS))
    exec(piece("POOLINGS["), vars(encoder))
    flags = ["--model", tiny_model_dir, "--corpus", tiny_collection.corpus]
    flags += ["--queries", tiny_collection.queries, "--train", tiny_collection.qrels]
    flags += ["--max_steps", 2, "--num_workers", 0, "--output_dir", tmp_path / "model"]
    status, _, errors = script("finetune_biencoder", *flags, "--pooling", "cls_mean")
    assert status == 0, errors
    assert (tmp_path / "model" / "done").is_file()


def test_my_own_negatives(tmp_path):
    rows = [
        {"qid": "a", "pos": ["1"], "neg": list("23456"), "pos_scores": [9.0]},
        {"qid": "b", "pos": ["2"], "neg": ["3"]},
    ]
    rows[0]["neg_scores"] = [5.0, 4.0, 3.0, 2.0, 1.0]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-c", piece("without_the_best")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    first, second = map(json.loads, (tmp_path / "mine.jsonl").read_text().splitlines())
    assert first["neg"] == ["5", "6"] and first["neg_scores"] == [2.0, 1.0]
    assert second["qid"] == "b" and not second.get("neg")
