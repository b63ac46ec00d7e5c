"""pytest tests/test_generations.py — generations of negatives: published whole, found, adopted,
replayed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.files import UserError, read_qrels
from lib.generations import (
    Generations,
    checkpoint_path,
    complete_checkpoints,
    read_generations,
    remove_old_checkpoints,
)
from lib.texts import read_texts
from recipes import generations
from recipes.generations import publish

MAIN = SimpleNamespace(is_main_process=True)


LINE = '{"qid": "q1", "pos": ["p1"], "neg": ["p2", "p3"]}\n'


@pytest.fixture
def mined(tmp_path):
    (tmp_path / "mined.jsonl").write_text(LINE)
    return tmp_path / "mined.jsonl"


def refresh(folder):
    return Generations(folder / "generations", folder / "generations.tsv", read=lambda train: train)


def at(run, step):
    """What is used after so many steps."""
    before = run.used
    assert run.renew(step, MAIN) == (run.used != before) and run.groups == run.used.train
    return run.used


def test_generations_are_numbered_and_only_whole_ones_are_seen(tmp_path, mined):
    folder = tmp_path / "generations"
    assert read_generations(folder) == []
    for number, step in enumerate((0, 40, 40), 1):
        path = publish(folder, mined, {"step": step})
        assert path.name == f"generation-{number:04d}"
        assert (path / "train.jsonl").read_text() == LINE
    assert json.loads((path / "manifest.json").read_text()) == {"generation": 3, "step": 40}
    (folder / "generation-0009").mkdir()  # half of one, as a miner without atomic() would leave it
    (folder / "generation-0009" / "train.jsonl").write_text(LINE[:20])
    (folder / ".tmp-77-generation-0010").mkdir()
    assert [(g.number, g.step) for g in read_generations(folder)] == [(1, 0), (2, 40), (3, 40)]
    with pytest.raises(UserError, match="of step 40, and these are of step 39"):
        publish(folder, mined, {"step": 39})


def test_a_run_takes_the_newest_that_its_own_past_has_made(tmp_path, mined):
    folder = tmp_path / "generations"
    publish(folder, mined, {"step": 0})
    run = refresh(tmp_path)
    assert run.used == (1, 0, folder / "generation-0001/train.jsonl") == at(run, 0)
    publish(folder, mined, {"step": 15})
    publish(folder, mined, {"step": 25})
    assert at(run, 10).number == 1, "the second is of a step that the run has not reached"
    assert at(run, 20) == (2, 15, folder / "generation-0002/train.jsonl")
    assert at(run, 40).number == 3
    assert (tmp_path / "generations.tsv").read_text() == "0\t1\n10\t1\n20\t2\n40\t3\n"


def test_a_resumed_run_repeats_its_decisions(tmp_path, mined):
    publish(tmp_path / "generations", mined, {"step": 0})
    first = [at(refresh(tmp_path), step).number for step in (0, 10, 20)]
    publish(tmp_path / "generations", mined, {"step": 10})
    again = refresh(tmp_path)
    assert again.used.number == 1
    assert [at(again, step).number for step in (0, 10, 20)] == first == [1, 1, 1]
    assert at(again, 30).number == 2
    assert (tmp_path / "generations.tsv").read_text() == "0\t1\n10\t1\n20\t1\n30\t2\n"


def test_what_is_missing_is_said(tmp_path, mined):
    (tmp_path / "generations").mkdir()
    with pytest.raises(UserError, match="no generation for step 0 — see recipes/ance.sh"):
        refresh(tmp_path)
    publish(tmp_path / "generations", mined, {"step": 0})
    run = refresh(tmp_path)
    assert at(run, 20).number == 1
    shutil.rmtree(tmp_path / "generations/generation-0001")
    publish(tmp_path / "generations", mined, {"step": 50})  # of another run
    with pytest.raises(UserError, match="no generation for step 30"):
        run.renew(30, MAIN)
    (tmp_path / "generations/generation-0001/manifest.json").unlink()
    with pytest.raises(UserError, match="generation 1, used before, is gone — restore it"):
        refresh(tmp_path)


def test_damaged_records_are_said(tmp_path, mined):
    for content in ("[]", '{"step": "3"}', "{}"):
        (tmp_path / "generations" / "generation-0001").mkdir(parents=True, exist_ok=True)
        (tmp_path / "generations" / "generation-0001" / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="manifest.json: it states no step — "):
            read_generations(tmp_path / "generations")
    (tmp_path / "generations.tsv").write_text("0\t1\n5\t")
    with pytest.raises(UserError, match="generations.tsv:2: not `step TAB generation` — "):
        Generations(tmp_path, tmp_path / "generations.tsv", None)


def test_a_training_file_is_the_only_generation(tmp_path, mined):
    run = Generations(mined, tmp_path / "generations.tsv", read=lambda train: train)
    assert run.groups == mined and not run.is_folder and run.log(5) == {}
    assert not run.renew(5, MAIN) and not (tmp_path / "generations.tsv").exists()


def test_checkpoints_are_found_newest_first_and_the_old_ones_go(tmp_path):
    assert complete_checkpoints(tmp_path) == []
    for step in (5, 10, 100, 20):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
        (checkpoint_path(tmp_path, step) / "isthmus.json").write_text("{}")
    checkpoint_path(tmp_path, 200).mkdir()  # empty
    (tmp_path / "checkpoints" / ".tmp-1-checkpoint-00000300").mkdir()
    assert complete_checkpoints(tmp_path)[-1] == (100, checkpoint_path(tmp_path, 100))
    remove_old_checkpoints(tmp_path)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["checkpoint-00000020", "checkpoint-00000100", "checkpoint-00000200"]


@pytest.fixture
def tool(tmp_path, tiny_collection, tiny_model_dir, capsys, monkeypatch):
    """tool("next", ...) -> what recipes/generations.py prints, stripped."""

    def call(task, *flags):
        files = [
            "--queries",
            tiny_collection.queries,
            "--qrels",
            tiny_collection.qrels,
            "--slices",
            3,
        ]
        how = [
            "--generations",
            tmp_path / "generations",
            "--work",
            tmp_path / "mining",
            "--run",
            tmp_path / "run",
        ]
        how += ["--initial", tiny_model_dir, "--poll", 0, *files]
        monkeypatch.setattr(
            "sys.argv", ["generations.py", "--task", task, *map(str, [*how, *flags])]
        )
        generations.main()
        return capsys.readouterr().out.strip()

    return call


def mine(work, qids):
    (work / "negatives").mkdir()
    (work / "evaluation").mkdir()
    lines = (f'{{"qid": "{qid}", "pos": ["p1"], "neg": []}}\n' for qid in qids)
    (work / "negatives/train.jsonl").write_text("".join(lines))
    (work / "evaluation/metrics.json").write_text(
        '{"splits": {"dev": {"metrics": {"RR@10": 0.25}}}}'
    )


def test_the_miner_takes_slices_in_turn_and_finishes_what_it_began(
    tool, tmp_path, tiny_collection, tiny_model_dir
):
    seen = []
    for number in range(3):
        work = Path(tool("next"))
        assert work.name == f"step-{8 * number:08d}" and (work / "checkpoint/config.json").is_file()
        listed = [qid for qid, _, _ in read_texts(work / "queries.jsonl")]
        assert listed == list(read_qrels(work / "qrels.tsv"))
        checkpoint = checkpoint_path(tmp_path / "run", 8 * number + 8)
        checkpoint.mkdir(parents=True)
        for name in ("isthmus.json", "config.json"):
            (checkpoint / name).write_text("{}")
        assert tool("next") == str(work), "a newer checkpoint waits until this one is mined"
        mine(work, listed)
        assert f"of step {8 * number}  RR@10 0.2500" in tool("publish") and not work.exists()
        seen += listed
    assert sorted(seen) == sorted(read_qrels(tiny_collection.qrels)) and len(set(seen)) == len(seen)
    manifest = json.loads((tmp_path / "generations/generation-0003/manifest.json").read_text())
    path = str(checkpoint_path(tmp_path / "run", 16))
    dev = {"RR@10": 0.25}
    assert manifest == {
        "generation": 3,
        "step": 16,
        "checkpoint": path,
        "queries": len(listed),
        "dev": dev,
    }
    work = Path(tool("next"))
    shutil.copytree(work, tmp_path / "kept")
    mine(work, listed)
    tool("publish")
    shutil.copytree(tmp_path / "kept", work)  # killed before it could be removed
    (tmp_path / "run/done").touch()
    assert tool("next") == ""
    with pytest.raises(UserError, match="--slices 99: .* has only 20 judged queries"):
        (tmp_path / "run/done").unlink()
        shutil.rmtree(tmp_path / "generations")
        shutil.rmtree(tmp_path / "mining")
        tool("next", "--slices", 99)
