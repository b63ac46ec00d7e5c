"""The recipes that evaluate. Run: python -m pytest tests/test_recipes.py"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_beir_evaluates_every_collection_of_a_folder(tiny_collection, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "data" / name / "qrels").mkdir(parents=True)
        shutil.copy(tiny_collection.corpus, tmp_path / "data" / name / "corpus.jsonl")
        lines = [line.split("\t") for line in tiny_collection.queries.read_text().splitlines()]
        rows = "".join(f'{{"_id": "{qid}", "text": "{text}"}}\n' for qid, text in lines)
        (tmp_path / "data" / name / "queries.jsonl").write_text(rows)
        shutil.copy(tiny_collection.qrels, tmp_path / "data" / name / "qrels" / "test.tsv")
    environment = {**os.environ, "LAUNCH": "python", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "recipes/beir.sh", "bm25", tmp_path / "data", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert [row[0] for row in table] == ["one", "two", "average"] and table[0][1:] == table[1][1:]
    assert float(table[2][-3]) == float(table[0][2]) > 0.5
    empty = subprocess.run(
        [*command[:3], ROOT / "lib", tmp_path / "x"], env=environment, capture_output=True, text=True
    )
    assert empty.returncode == 1 and "no collection in it" in empty.stderr
