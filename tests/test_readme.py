"""What the README and the docstrings name exists: files, tests, flags. Run: python -m pytest tests/test_readme.py"""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("pretrain_mae", "finetune_biencoder", "mine_negatives", "encode", "evaluate")
README = (ROOT / "README.md").read_text()
RECIPES = {"rerank": "recipes.rerank", "export_anserini": "recipes.export_anserini"}
FLAGS = {
    script: {
        f"--{field.name}" for field in dataclasses.fields(importlib.import_module(module).Args)
    }
    for script, module in {**{script: script for script in SCRIPTS}, **RECIPES}.items()
}
LAUNCH = {"--multi_gpu", "--num_processes", "--mixed_precision", "--cpu", "--help"}
LAUNCH |= {"--main_process_ip", "--main_process_port"}
ALL = set().union(*FLAGS.values()) | {
    f"--no_{flag[2:]}" for flags in FLAGS.values() for flag in flags
}


def commands(text):
    """(script, flags) of the commands in bash blocks, lines joined at a backslash."""
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:\b(\w+)\.py|-m recipes\.(\w+))\b([^#]*)", line)
            if found and (found[1] or found[2]) in FLAGS:
                yield found[1] or found[2], re.findall(r"(?<!\S)--\w+", found[3])


def test_every_command_uses_flags_of_its_script():
    found = list(commands(README))
    assert {script for script, _ in found} == FLAGS.keys()
    for script, flags in found:
        assert set(flags) <= FLAGS[script], (script, set(flags) - FLAGS[script])


def test_every_flag_on_the_right_of_the_mapping_exists():
    table = README.split("| theirs | ours |")[1].split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    assert len(rows) > 25
    for _, ours in rows:
        named = set(re.findall(r"(?<![\w-])--\w+", ours)) - LAUNCH
        assert named <= ALL, named - ALL


def test_every_file_and_test_that_is_named_exists():
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(?:tests/)?(test_\w+\.py)`", README)):
        assert (ROOT / "tests" / name).is_file(), name
    for name in set(re.findall(r"`(test_\w+)`", README)):
        assert f"def {name}(" in code, name
    for name in set(re.findall(r"\b((?:lib|recipes|tests|bench)/\w+\.(?:py|sh))", README)):
        assert (ROOT / name).is_file(), name
    for name in set(re.findall(r"\]\((?!http)([^)#]+)\)", README)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings_show_three_commands_with_flags_that_exist(script):
    text = importlib.import_module(script).__doc__
    assert all(
        f"\n{start} " in text for start in ("Reads ", "Writes ", "CPU toy ", "1 GPU ", "N GPUs ")
    )
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", text)) <= ALL | LAUNCH


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_says_what_it_is_for(script):
    for field in dataclasses.fields(importlib.import_module(script).Args):
        assert len(field.metadata.get("help", "")) > 3, field.name
