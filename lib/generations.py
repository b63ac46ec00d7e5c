"""What passes between a trainer and a miner that run at the same time: ANCE (arXiv 2007.00808,
figure 1).

    output_dir/checkpoints/checkpoint-00000500/   of the trainer; it gets this name when it is
                                                  complete
    output_dir/done                               the trainer has ended
    generations/generation-0003/                  of the miner; it gets this name when it is
                                                  complete: train.jsonl, and the last file,
                                                  manifest.json: {"step": 500,
                                                  "checkpoint": ..., ...}
    output_dir/generations.tsv                    of the trainer: `step TAB generation` of every
                                                  look for a new one

Files are all that couples the two, so each may run alone, be killed, or stand on another machine
that shares the folders. Generation numbers and the steps behind them only grow. (The ANCE
repositories write the file that says "ready" in place, let every process list the folder for
itself, and leave no record of what was used when.)"""

import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lib.dist import from_main
from lib.files import UserError, read_json, write_lines


class Generation(NamedTuple):
    number: int  # from 1
    step: int  # optimizer steps of the checkpoint that found these negatives
    train: Path  # its training file


def _numbered(folder, name: str, last_file: str) -> list[tuple[int, Path]]:
    """(number, path) of folder/name-NUMBER with `last_file` in it, ascending."""
    matches = [(re.fullmatch(rf"{name}-(\d+)", path.name), path) for path in Path(folder).glob("*")]
    found = [(int(match[1]), path) for match, path in matches if match]
    return sorted((number, path) for number, path in found if (path / last_file).is_file())


def checkpoint_path(output_dir, step: int) -> Path:
    return Path(output_dir) / "checkpoints" / f"checkpoint-{step:08d}"


def newest_checkpoint(output_dir) -> tuple[int, Path] | None:
    """(step, folder) of the last complete checkpoint of a run; None if there is none yet."""
    found = _numbered(Path(output_dir) / "checkpoints", "checkpoint", "isthmus.json")
    return found[-1] if found else None


def remove_old_checkpoints(output_dir, keep: int) -> None:
    """All but the `keep` newest, and what a killed run left unfinished. Each loses its name first,
    so that nobody finds half of one."""
    folder = Path(output_dir) / "checkpoints"
    for _, path in _numbered(folder, "checkpoint", "isthmus.json")[:-keep]:
        os.replace(path, path.with_name(f".old-{path.name}"))
    for path in folder.glob(".*"):
        shutil.rmtree(path)


def read_generations(folder) -> list[Generation]:
    """The complete generations in a folder, ascending. UserError: one whose step is below that of
    the one before."""
    found = []
    for number, path in _numbered(folder, "generation", "manifest.json"):
        step = read_json(path / "manifest.json")["step"]
        if found and step < found[-1].step:
            raise UserError(
                f"{path}: its step {step} is below {found[-1].step} of the generation before, so "
                "two runs have written to this folder — give each run its own"
            )
        found.append(Generation(number, step, path / "train.jsonl"))
    return found


class Refresh:
    """Which generation a run trains on: the newest complete one at every look. The main process
    decides, and writes the decision to `record` before anyone acts upon it; a resumed run that
    repeats these steps repeats its decisions.

    A generation of a checkpoint that this run has not reached yet belongs to another run, and is
    passed over. UserError: no generation yet; one that the run has used is gone."""

    def __init__(self, folder, record):
        self.folder, self.record = Path(folder), Path(record)
        rows = []
        if self.record.is_file():
            text = self.record.read_text()
            rows = text.split("\n")[:-1]  # what follows the last newline was not written to its end
            if not text.endswith("\n"):
                write_lines(self.record, rows)
        self.decisions = {int(step): int(number) for step, number in (r.split("\t") for r in rows)}

    def first(self) -> Generation:
        """What was used last, or will be used first. Writes nothing."""
        found = read_generations(self.folder)
        last = max(self.decisions, default=None)
        return self._newest(found, 0) if last is None else self._find(found, self.decisions[last])

    def at(self, step: int, accelerator) -> Generation:
        """What to use after `step` steps, the same on every process; call it on all of them."""
        return from_main(accelerator, partial(self._look, step))

    def _look(self, step: int) -> Generation:
        found = read_generations(self.folder)
        if step not in self.decisions:
            self._decide(found, step)
        return self._find(found, self.decisions[step])

    def _decide(self, found: list[Generation], step: int) -> None:
        earlier = [number for look, number in self.decisions.items() if look < step]
        number = max([self._newest(found, step).number, *earlier])
        with open(self.record, "a") as stream:
            stream.write(f"{step}\t{number}\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.decisions[step] = number

    def _newest(self, found: list[Generation], step: int) -> Generation:
        reached = [generation for generation in found if generation.step <= step]
        if not reached:
            raise UserError(
                f"{self.folder}: it has no generation of training data for step {step} — publish "
                "one (recipes/ance.sh)"
            )
        return reached[-1]

    def _find(self, found: list[Generation], number: int) -> Generation:
        for generation in found:
            if generation.number == number:
                return generation
        raise UserError(
            f"{self.folder}: generation {number}, which this run has used, is gone — restore it"
        )
