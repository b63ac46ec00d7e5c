"""What passes between a trainer and a miner that run at the same time: ANCE (arXiv 2007.00808,
figure 1).

    output_dir/checkpoints/checkpoint-00000500/   of the trainer
    output_dir/done                               the trainer has ended
    output_dir/generations.tsv                    its looks for a generation: `step TAB generation`
    generations/generation-0003/                  of the miner: train.jsonl, and manifest.json with
                                                  the "step" of its checkpoint

A folder gets its name when it is complete. Each side may run alone, be killed, or stand on another
machine that shares the folders. Generation numbers and the steps behind them only grow. (The ANCE
repositories let every process list the folder for itself, and keep no record of what was used.)"""

import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from lib.dist import from_main
from lib.files import UserError, lines, read_json, write_lines

KEPT_CHECKPOINTS = 2  # for the miner


class Generation(NamedTuple):
    number: int  # from 1; 0 is a training file without generations
    step: int  # optimizer steps of the checkpoint that found these negatives
    train: Path  # its training file


def _numbered(folder: Path, name: str, last_file: str) -> list[tuple[int, Path]]:
    """(number, path) of folder/name-NUMBER with `last_file` in it, ascending."""
    paths = [path.parent for path in folder.glob(f"{name}-*/{last_file}")]
    found = [(re.fullmatch(rf"{name}-(\d+)", path.name), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in found if match)


def checkpoint_path(output_dir, step: int) -> Path:
    return Path(output_dir) / "checkpoints" / f"checkpoint-{step:08d}"


def complete_checkpoints(output_dir) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints of a run, ascending."""
    return _numbered(Path(output_dir) / "checkpoints", "checkpoint", "isthmus.json")


def remove_old_checkpoints(output_dir) -> None:
    """All but the newest, and what a killed run left unfinished. Each loses its name first, so that
    nobody finds half of one."""
    for _, path in complete_checkpoints(output_dir)[:-KEPT_CHECKPOINTS]:
        os.replace(path, path.with_name(f".old-{path.name}"))
    for path in (Path(output_dir) / "checkpoints").glob(".*"):
        shutil.rmtree(path)


def read_generations(folder) -> list[Generation]:
    """The complete generations in a folder, ascending. UserError: one that states no step."""
    found = []
    for number, path in _numbered(Path(folder), "generation", "manifest.json"):
        manifest = read_json(path / "manifest.json")
        step = manifest.get("step") if isinstance(manifest, dict) else None
        if not isinstance(step, int):
            raise UserError(f"{path}/manifest.json: it states no step — remove the generation")
        found.append(Generation(number, step, path / "train.jsonl"))
    return found


class Generations:
    """What a run trains on: at every look the newest generation of a folder, of those of a step
    that this run has reached (others are of another run). The main process writes its decision to
    `record` before anyone acts upon it, and a resumed run repeats it. `train` may also be a
    training file, which is then the only generation.

    used, groups   the generation in use, and read(its file); at first the one that was used last
    UserError: no generation yet; one that the run has used is gone."""

    def __init__(self, train, record, read: Callable[[Path], Dataset]):
        self.folder = Path(train)
        self.is_folder = self.folder.is_dir()
        self.record = Path(record)
        self.read = read
        self.decisions = {}
        for line, row in lines(record) if self.record.is_file() else ():
            step, _, number = row.partition("\t")
            if not (step.isdecimal() and number.isdecimal()):
                raise UserError(f"{record}:{line}: not `step TAB generation` — correct the line")
            self.decisions[int(step)] = int(number)
        self.used = self._generation(max(self.decisions, default=0))
        self.groups = read(self.used.train)

    def renew(self, step: int, accelerator) -> bool:
        """Look for what to use after `step` steps; True if it is another generation, which is then
        read. Call it on all processes."""
        if not self.is_folder:
            return False
        before = self.used
        self.used = from_main(accelerator, partial(self._decide, step))
        if self.used != before:
            self.groups = self.read(self.used.train)
        return self.used != before

    @property
    def fingerprint(self) -> str | None:
        """Of a training file; what a folder had at which step is in `record`."""
        return None if self.is_folder else self.groups.file.fingerprint

    def log(self, step: int) -> dict[str, int]:
        lag = step - self.used.step
        return {"generation": self.used.number, "lag": lag} if self.is_folder else {}

    def _decide(self, step: int) -> Generation:
        generation = self._generation(step)
        if step not in self.decisions:
            self.decisions[step] = generation.number
            write_lines(self.record, (f"{s}\t{number}" for s, number in self.decisions.items()))
        return generation

    def _generation(self, step: int) -> Generation:
        if not self.is_folder:
            return Generation(0, 0, self.folder)
        number = self.decisions.get(step)
        for generation in reversed(read_generations(self.folder)):
            if generation.number == number or (number is None and generation.step <= step):
                return generation
        if number is None:
            raise UserError(f"{self.folder}: no generation for step {step} — see recipes/ance.sh")
        raise UserError(f"{self.folder}: generation {number}, used before, is gone — restore it")
