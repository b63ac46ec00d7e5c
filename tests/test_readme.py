"""What the README and the docstrings name exists: files, tests, flags. Run: python -m pytest tests/test_readme.py"""

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

ROOT = Path(__file__).parents[1]
SCRIPTS = ("pretrain_mae", "finetune_biencoder", "mine_negatives", "encode", "evaluate")
README = (ROOT / "README.md").read_text()
FLAGS = {
    script: {f"--{field.name}" for field in dataclasses.fields(importlib.import_module(script).Args)}
    for script in SCRIPTS
}
LAUNCH = {"--multi_gpu", "--num_processes", "--mixed_precision", "--cpu", "--help"}
LAUNCH |= {"--main_process_ip", "--main_process_port"}
ALL = set().union(*FLAGS.values()) | {f"--no_{flag[2:]}" for flags in FLAGS.values() for flag in flags}


def commands(text):
    """(script, flags) of the commands in bash blocks, lines joined at a backslash."""
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(\w+)\.py\b(.*)", line)
            if found and found[1] in SCRIPTS:
                yield found[1], re.findall(r"(?<!\S)--\w+", found[2])


def test_every_command_uses_flags_of_its_script():
    found = list(commands(README))
    assert len(found) > 5
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
    assert all(f"\n{start} " in text for start in ("Reads ", "Writes ", "CPU toy ", "1 GPU ", "N GPUs "))
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", text)) <= ALL | LAUNCH


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_says_what_it_is_for(script):
    for field in dataclasses.fields(importlib.import_module(script).Args):
        assert len(field.metadata.get("help", "")) > 3, field.name


@pytest.mark.slow
def test_the_ms_marco_commands_run_from_end_to_end(tiny_collection, tiny_model_dir, tmp_path):
    """The README's block word for word, but for the download, the launcher, the model and the number of steps."""
    block = next(b for b in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) if "get_msmarco" in b)
    for old, new in {
        r"bash recipes/get_msmarco.sh .*": "",
        r"M=data/msmarco R=runs/msmarco": f"M={tmp_path} R={tmp_path}/runs",
        r"accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16": "python",
        r"bert-base-uncased": f"{tmp_path}/bert",
        r"--num_epochs \d+": "--max_steps 2",
    }.items():
        block, count = re.subn(old, new, block)
        assert count, old
    config = BertConfig.from_pretrained(tiny_model_dir, max_position_embeddings=150)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "bert")
    passages = [json.loads(line) for line in tiny_collection.corpus.read_text().splitlines()]
    (tmp_path / "corpus.tsv").write_text("".join(f"{p['_id']}\t{p['title']}\t{p['text']}\n" for p in passages))
    judged = [line.split("\t") for line in tiny_collection.qrels.read_text().splitlines()[1:]]
    for name in ("train", "dev", "dl19", "dl20"):
        shutil.copy(tiny_collection.queries, tmp_path / f"queries.{name}.tsv")
        qrels = tmp_path / f"qrels.{name}.{'txt' if name.startswith('dl') else 'tsv'}"
        qrels.write_text("".join(f"{qid}\t0\t{pid}\t2\n" for qid, pid, _ in judged))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", block]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("dev", "dl19", "dl20"):
        metrics = json.loads((tmp_path / "runs" / f"evaluation-{name}" / "metrics.json").read_text())
        assert metrics["splits"][f"qrels.{name}"]["queries"] == 20
