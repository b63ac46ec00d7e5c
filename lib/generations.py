"""What passes between a trainer and a miner that run at the same time: ANCE (arXiv 2007.00808, figure 1).

    output_dir/checkpoints/checkpoint-00000500/   of the trainer: takes its name when it is whole
    output_dir/done                               the trainer has ended
    negatives_dir/generation-0003/                of the miner: takes its name when it is whole; negatives.tsv and,
                                                  written last, manifest.json: {"step": 500, "checkpoint": ..., ...}
    output_dir/generations.tsv                    of the trainer: `step TAB generation` of every look at negatives_dir

Files are all that couples the two, so each may run alone, be killed, or stand on another machine that shares the
folders. Numbers of generations and the steps behind them only grow. (The ANCE repositories write the file that says
"ready" in place, let every process list the folder for itself, and leave no record of what was used when.)
"""

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import broadcast_object_list

from lib.files import UserError, atomic, lines, read_json, write_json, write_lines


class Generation(NamedTuple):
    number: int  # from 1; 0: the file that the run was started with
    step: int  # optimizer steps of the checkpoint that found these negatives
    negatives: Path


def _numbered(folder, name: str, last_file: str) -> list[tuple[int, Path]]:
    """(number, path) of folder/name-NUMBER with `last_file` in it, ascending."""
    found = [
        (re.fullmatch(rf"{name}-(\d+)", path.name), path) for path in Path(folder).glob(f"{name}-*")
    ]
    return sorted(
        (int(match[1]), path) for match, path in found if match and (path / last_file).is_file()
    )


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints, for the miner


def checkpoint_path(output_dir, step: int) -> Path:
    return Path(output_dir) / "checkpoints" / f"checkpoint-{step:08d}"


def newest_checkpoint(output_dir) -> tuple[int, Path] | None:
    """(step, folder) of the last whole checkpoint of a run; None if there is none yet."""
    found = _numbered(Path(output_dir) / "checkpoints", "checkpoint", "isthmus.json")
    return found[-1] if found else None


def remove_old_checkpoints(output_dir, keep: int) -> None:
    """All but the `keep` newest, and what a killed run left unfinished. Each loses its name first, so that nobody
    finds half of one."""
    folder = Path(output_dir) / "checkpoints"
    for _, path in _numbered(folder, "checkpoint", "isthmus.json")[:-keep]:
        os.replace(path, path.with_name(f".old-{path.name}"))
    for path in folder.glob(".*"):
        shutil.rmtree(path)


# ---------------------------------------------------------------------------------------------------------------------
# generations, for the trainer


def read_generations(folder) -> list[Generation]:
    """The whole generations in a folder, ascending. UserError: one whose step is below that of the one before."""
    found = []
    for number, path in _numbered(folder, "generation", "manifest.json"):
        generation = Generation(
            number, read_json(path / "manifest.json")["step"], path / "negatives.tsv"
        )
        if found and generation.step < found[-1].step:
            raise UserError(
                f"{path}: of step {generation.step}, after one of step {found[-1].step} — two runs have written to "
                "this folder: give each its own"
            )
        found.append(generation)
    return found


def publish(folder, negatives, manifest: dict) -> Path:
    """A new generation: a copy of a file of negatives, and a manifest, which holds `step` at least."""
    before = read_generations(folder)
    if before and manifest["step"] < before[-1].step:
        raise UserError(
            f"{folder}: holds negatives of step {before[-1].step}, these are of step {manifest['step']} — another "
            "run's folder? give each its own"
        )
    number = before[-1].number + 1 if before else 1
    path = Path(folder) / f"generation-{number:04d}"
    with atomic(path) as temporary:
        temporary.mkdir()
        shutil.copyfile(negatives, temporary / "negatives.tsv")
        write_json(temporary / "manifest.json", {"generation": number, **manifest})
    return path


class Refresh:
    """Which negatives a run uses after so many optimizer steps: the newest whole generation, looked for every `every`
    steps. The main process decides and writes the decision to `record` before anyone acts upon it; a resumed run that
    repeats these steps repeats the decisions.

    start: negatives to begin with while there is no generation; None = there must be one.
    A generation of a checkpoint that this run has not come to yet is another run's, and passed over."""

    def __init__(self, folder, record, every: int, start=None):
        self.folder, self.record, self.every, self.start = Path(folder), Path(record), every, start
        if self.record.is_file() and not (whole := self.record.read_bytes()).endswith(
            b"\n"
        ):  # killed in writing
            write_lines(self.record, whole.decode().split("\n")[:-1])
        known = (
            [line.split("\t") for _, line in lines(self.record)] if self.record.is_file() else []
        )
        self.decisions = {
            int(step): int(number) for step, number in known
        }  # by the step of the look

    def newest(self, step: int) -> Generation:
        found = [
            generation for generation in read_generations(self.folder) if generation.step <= step
        ]
        if not found and not self.start:
            raise UserError(
                f"{self.folder}: no generation of negatives for step {step} — publish one (recipes/ance.sh), or give "
                "--negatives to begin with"
            )
        return found[-1] if found else Generation(0, 0, Path(self.start))

    def first(self) -> Generation:
        """What was used last, or will be first: to open the data with before the step is known. Writes nothing."""
        return self._find(self.decisions[max(self.decisions)]) if self.decisions else self.newest(0)

    def at(self, step: int, accelerator) -> Generation:
        """What to use after `step` steps, the same on every process; call it on all of them."""
        look, verdict = step - step % self.every, [None, None]
        if accelerator.is_main_process:
            try:
                known = look in self.decisions
                verdict[0] = tuple(
                    self._find(self.decisions[look]) if known else self._decide(look)
                )
            except UserError as error:  # the others wait for a word
                verdict[1] = str(error)
        broadcast_object_list(verdict)
        if verdict[1]:
            raise UserError(verdict[1])
        return Generation(*verdict[0])

    def _decide(self, look: int) -> Generation:
        before = max((number for step, number in self.decisions.items() if step < look), default=0)
        generation = self.newest(look)
        if generation.number < before:  # what was used has been taken away
            generation = self._find(before)
        with open(self.record, "a") as stream:
            stream.write(f"{look}\t{generation.number}\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.decisions[look] = generation.number
        return generation

    def _find(self, number: int) -> Generation:
        if number == 0 and self.start:
            return Generation(0, 0, Path(self.start))
        for generation in read_generations(self.folder):
            if generation.number == number:
                return generation
        raise UserError(
            f"{self.folder}: generation {number}, which this run has used, is gone — bring it back"
        )
