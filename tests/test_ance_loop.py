"""pytest tests/test_ance_loop.py — recipes/ance.sh: trainer and miner side by side, killed at
random moments."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

from lib.files import read_qrels, read_training_file
from lib.generations import read_generations
from lib.texts import open_texts

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY, REFRESHES = 600, 40, 2
ENVIRONMENT = {
    "LAUNCH": "python",
    "SLICES": "2",
    "STEPS": str(EVERY),
    "POLL": "0.2",
    "DEPTH": "30",
    "NEGATIVES": "8",
}


def call(script, *flags):
    done = subprocess.run(
        [sys.executable, *script.split(), *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def collection(tmp_path):
    """The documentation of numpy, 600 passages, laid out for recipes/ance.sh; and BM25
    negatives."""
    docs, data = tmp_path / "docs", tmp_path / "data"
    roots = ["--roots", Path(numpy.__file__).parent, "--eval_queries", 60, "--max_passages", 600]
    call("-m recipes.python_docs", *roots, "--output_dir", docs)
    data.mkdir()
    shutil.copy(docs / "corpus.jsonl", data)
    for split in ("train", "dev"):
        shutil.copy(docs / f"queries.{split}.jsonl", data)
        shutil.copy(docs / "qrels" / f"{split}.tsv", data / f"qrels.{split}.tsv")
    files = ["--queries", data / "queries.train.jsonl", "--corpus", data / "corpus.jsonl"]
    files += ["--qrels", data / "qrels.train.tsv", "--output_dir", tmp_path / "bm25", "--depth", 5]
    call("mine_negatives.py", "--bm25", *files)
    return data


class Side:
    """One of the two processes of the recipe, in a group of its own."""

    def __init__(self, role, command, folder):
        self.role, self.command, self.output, self.process = (
            role,
            command,
            folder / f"{role}.log",
            None,
        )

    def start(self):
        with open(self.output, "a") as stream:
            command = [
                "bash",
                str(ROOT / "recipes" / "ance.sh"),
                self.role,
                *map(str, self.command),
            ]
            environment = {
                **os.environ,
                **ENVIRONMENT,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            }
            how = {
                "stdout": stream,
                "stderr": stream,
                "start_new_session": True,
                "env": environment,
            }
            self.process = subprocess.Popen(command, **how)

    def signal(self, number):
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()

    def running(self):
        status = self.process.poll()
        assert status in (None, 0), self.output.read_text()
        return status is None


@pytest.mark.slow
@pytest.mark.timeout(660)
def test_killed_over_and_over_it_ends_with_all_refreshes_and_nothing_half_read(
    collection, tiny_model_dir, tmp_path
):
    draw, out = random.Random(5), tmp_path / "ance"
    texts = [
        "--max_query_length",
        16,
        "--max_passage_length",
        32,
        "--num_workers",
        0,
        "--loss",
        "triplet",
    ]
    texts += ["--per_device_batch_size", 4, "--optimizer", "lamb", "--weight_decay", 0]
    files = [
        "--queries",
        collection / "queries.train.jsonl",
        "--corpus",
        collection / "corpus.jsonl",
    ]
    warm = [
        "--model",
        tiny_model_dir,
        "--pooling",
        "cls",
        "--train",
        tmp_path / "bm25" / "train.jsonl",
        "--passages_per_query",
        2,
        *files,
        *texts,
    ]
    call(
        "finetune_biencoder.py",
        *warm,
        "--max_steps",
        60,
        "--learning_rate",
        0.01,
        "--output_dir",
        tmp_path / "warm",
    )

    half = out / "generations" / "generation-9999"  # of a miner that died, had it no temporary name
    half.mkdir(parents=True)
    (half / "train.jsonl").write_text("nobody\tnothing\n")
    how = [*texts, "--max_steps", STEPS, "--learning_rate", 0.001, "--passages_per_query", 3]
    miner = Side("mine", [collection, tmp_path / "warm", out], tmp_path)
    trainer = Side("train", [collection, tmp_path / "warm", out, *how, "--log_every", 10], tmp_path)

    def progress():
        log = out / "model" / "log.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        return json.loads(lines[-1])["step"] if lines else 0

    kills, deadline, stopped = [], time.monotonic() + 540, False
    miner.start()
    moment = time.monotonic() + draw.uniform(
        2, 15
    )  # of the next kill; the first hits the miner while it is alone
    while miner.running() or trainer.process is None or trainer.running():
        assert time.monotonic() < deadline, (
            trainer.output.read_text()[-3000:] + miner.output.read_text()[-3000:]
        )
        done = len(read_generations(out / "generations"))
        if done and trainer.process is None:
            trainer.start()
            moment = time.monotonic() + draw.uniform(4, 14)
        if (
            trainer.process and trainer.running()
        ):  # so many steps for each generation, so that none is missed
            ahead = done <= REFRESHES and progress() >= STEPS * done / (REFRESHES + 1) - EVERY
            if ahead != stopped:
                trainer.signal(signal.SIGSTOP if ahead else signal.SIGCONT)
                stopped = ahead
        if time.monotonic() > moment and len(kills) < (6 if trainer.process else 1):
            sides = [miner, trainer][: 1 + bool(trainer.process)]
            for side in (
                sides if len(kills) == 2 else [sides[len(kills) % 2 % len(sides)]]
            ):  # once both together
                if side.running():
                    side.signal(signal.SIGKILL)
                    kills.append(side.role)
                    side.start()
                    stopped = stopped and side is not trainer
            moment = time.monotonic() + draw.uniform(4, 14)
        time.sleep(0.05)

    assert len(kills) >= 5 and {"mine", "train"} <= set(kills)
    assert (out / "model" / "done").is_file() and not (out / "mining").exists()
    found = read_generations(out / "generations")
    assert [g.number for g in found] == list(range(1, len(found) + 1)) and len(found) > REFRESHES
    assert found[0].step == 0 and all(
        a.step < b.step for a, b in zip(found, found[1:], strict=False)
    )
    qrels = read_qrels(collection / "qrels.train.tsv")
    corpus = open_texts(collection / "corpus.jsonl")
    mined = [{row.qid: row for _, row in read_training_file(g.train)} for g in found]
    for rows in mined:
        assert rows and all(set(row.neg).isdisjoint(qrels[qid]) for qid, row in rows.items())
        assert all(
            len(row.neg) <= 8 and set(row.pos) == set(qrels[row.qid]) for row in rows.values()
        )
        assert all((corpus.rows([*row.pos, *row.neg]) >= 0).all() for row in rows.values())
    assert not mined[0].keys() & mined[1].keys() and mined[0].keys() == mined[2].keys(), (
        "slices take turns"
    )
    manifest = json.loads((found[1].train.parent / "manifest.json").read_text())
    assert manifest["step"] == found[1].step and manifest["dev"].keys() == {
        "RR@10",
        "nDCG@10",
        "Hole@10",
    }

    looks = [
        line.split("\t") for line in (out / "model" / "generations.tsv").read_text().splitlines()
    ]
    assert [int(step) for step, _ in looks] == list(range(0, STEPS, 10)), (
        "one decision for each look, once"
    )
    adopted = [int(number) for _, number in looks]
    assert adopted == sorted(adopted) and len(set(adopted)) >= REFRESHES + 1
    steps = {g.number: g.step for g in found}
    assert all(
        steps[number] <= int(step)
        for step, number in zip((s for s, _ in looks), adopted, strict=True)
    )
    log = [json.loads(line) for line in (out / "model" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(10, STEPS + 1, 10))
    assert all(line["lag"] == line["step"] - steps[line["generation"]] for line in log)
    assert [line["generation"] for line in log] == adopted
