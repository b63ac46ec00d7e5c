"""pytest tests/test_generations.py — generations of negatives: published whole, found, adopted, replayed."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.files import UserError, read_qrels, read_texts
from lib.generations import (
    Generation,
    Refresh,
    checkpoint_path,
    newest_checkpoint,
    publish,
    read_generations,
    remove_old_checkpoints,
)

MAIN = SimpleNamespace(is_main_process=True)


@pytest.fixture
def negatives(tmp_path):
    (tmp_path / "negatives.tsv").write_text("q1\tp2,p3\n")
    return tmp_path / "negatives.tsv"


def refresh(folder, negatives=None):
    return Refresh(folder / "generations", folder / "generations.tsv", 10, negatives)


def test_generations_are_numbered_and_only_whole_ones_are_seen(tmp_path, negatives):
    folder = tmp_path / "generations"
    assert read_generations(folder) == []
    for number, step in enumerate((0, 40, 40), 1):
        path = publish(folder, negatives, {"step": step})
        assert path.name == f"generation-{number:04d}" and (path / "negatives.tsv").read_text() == "q1\tp2,p3\n"
    assert json.loads((path / "manifest.json").read_text()) == {"generation": 3, "step": 40}
    (folder / "generation-0009").mkdir()  # half of one, as a miner without atomic() would leave it
    (folder / "generation-0009" / "negatives.tsv").write_text("q1\tp2")
    (folder / ".tmp-77-generation-0010").mkdir()
    assert [(g.number, g.step) for g in read_generations(folder)] == [(1, 0), (2, 40), (3, 40)]
    with pytest.raises(UserError, match="these are of step 39 — another run's folder"):
        publish(folder, negatives, {"step": 39})
    (folder / "generation-0009" / "manifest.json").write_text('{"step": 7}')
    with pytest.raises(UserError, match="of step 7, after one of step 40 — two runs"):
        read_generations(folder)


def test_a_run_takes_the_newest_that_its_own_past_has_made(tmp_path, negatives):
    run = refresh(tmp_path, negatives)
    assert run.first() == Generation(0, 0, negatives) == run.at(3, MAIN)
    publish(tmp_path / "generations", negatives, {"step": 0})
    assert run.at(9, MAIN).number == 0, "looked at step 0, decided until 10"
    assert run.at(10, MAIN).number == 1
    publish(tmp_path / "generations", negatives, {"step": 15})
    publish(tmp_path / "generations", negatives, {"step": 25})
    assert run.at(20, MAIN) == (2, 15, tmp_path / "generations/generation-0002/negatives.tsv")
    assert run.at(40, MAIN).number == 3
    assert (tmp_path / "generations.tsv").read_text() == "0\t0\n10\t1\n20\t2\n40\t3\n"


def test_a_resumed_run_repeats_its_decisions(tmp_path, negatives):
    publish(tmp_path / "generations", negatives, {"step": 0})
    first = [refresh(tmp_path).at(step, MAIN).number for step in (0, 10, 20)]
    publish(tmp_path / "generations", negatives, {"step": 10})
    with open(tmp_path / "generations.tsv", "a") as stream:
        stream.write("30\t")  # killed while it wrote
    again = refresh(tmp_path)
    assert again.first().number == 1
    assert [again.at(step, MAIN).number for step in (0, 10, 25)] == first == [1, 1, 1]
    assert again.at(30, MAIN).number == 2
    assert (tmp_path / "generations.tsv").read_text() == "0\t1\n10\t1\n20\t1\n30\t2\n"


def test_what_is_missing_is_said(tmp_path, negatives):
    with pytest.raises(UserError, match="no generation of negatives for step 0 — publish one"):
        refresh(tmp_path).first()
    publish(tmp_path / "generations", negatives, {"step": 50})  # of another run
    with pytest.raises(UserError, match="no generation of negatives for step 20"):
        refresh(tmp_path).at(20, MAIN)
    run = refresh(tmp_path)
    assert run.at(50, MAIN).number == 1
    (tmp_path / "generations/generation-0001/manifest.json").unlink()
    with pytest.raises(UserError, match="generation 1, which this run has used, is gone"):
        refresh(tmp_path).first()


def test_checkpoints_are_found_newest_first_and_the_old_ones_go(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 10, 100, 20):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
        (checkpoint_path(tmp_path, step) / "bottleneck.json").write_text("{}")
    checkpoint_path(tmp_path, 200).mkdir()  # empty
    (tmp_path / "checkpoints" / ".tmp-1-checkpoint-00000300").mkdir()
    assert newest_checkpoint(tmp_path) == (100, checkpoint_path(tmp_path, 100))
    remove_old_checkpoints(tmp_path, 2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["checkpoint-00000020", "checkpoint-00000100", "checkpoint-00000200"]


def call(*flags):
    command = [sys.executable, "-m", "recipes.generations", *map(str, flags)]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)


def test_the_tools_of_the_miner(tmp_path, negatives, tiny_collection):
    folder, files = tmp_path / "g", ["--queries", tiny_collection.queries, "--qrels", tiny_collection.qrels]
    found = call("--task", "next", "--negatives_dir", folder, "--run", tmp_path, "--initial", "M")
    assert found.stdout == "0\tM\n"
    qids = []
    for number in range(3):
        out = tmp_path / f"slice{number}"
        done = call("--task", "slice", "--negatives_dir", folder, *files, "--slices", 3, "--output_dir", out)
        assert f"slice {number + 1} of 3" in done.stdout, done.stderr
        listed = [qid for qid, _, _ in read_texts(out / "queries.jsonl")]
        assert listed == list(read_qrels(out / "qrels.tsv"))
        qids += listed
        publish(folder, negatives, {"step": number})
    assert sorted(qids) == sorted(read_qrels(tiny_collection.qrels)) and len(set(qids)) == len(qids)
    (tmp_path / "metrics.json").write_text('{"splits": {"dev": {"metrics": {"RR@10": 0.25}}}}')
    flags = ["--negatives", negatives, "--step", 7, "--checkpoint", "C", "--metrics", tmp_path / "metrics.json"]
    done = call("--task", "publish", "--negatives_dir", folder, *flags)
    assert "generation-0004: 1 queries, of step 7  RR@10 0.2500" in done.stdout, done.stderr
    manifest = json.loads((folder / "generation-0004/manifest.json").read_text())
    assert manifest == {"generation": 4, "step": 7, "checkpoint": "C", "queries": 1, "dev": {"RR@10": 0.25}}
    (tmp_path / "done").touch()
    assert call("--task", "next", "--negatives_dir", folder, "--run", tmp_path).stdout == ""
    assert "--task next needs --run — see --help" in call("--task", "next", "--negatives_dir", folder).stderr
