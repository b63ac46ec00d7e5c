"""The miner's side of ANCE: what to mine with, what to mine for, and how the result is published.

    --task next      waits until --run has a checkpoint that is newer than the newest generation in
                     --generations. Then it prepares the folder --work/step-00000500 and prints its
                     path. The folder holds a copy of the checkpoint, because the trainer may
                     remove its own at any time, and one of --slices of the judged queries
                     (queries.jsonl, qrels.tsv). The slices take turns (ANCE's ann_chunk_factor).
                     As long as there is no generation, the checkpoint is --initial, of step 0. If
                     a killed miner left a folder, its path is printed again, so that the work in
                     it is finished. Prints nothing when the run is done
    --task publish   makes a generation of --work/step-.../negatives/train.jsonl. Its manifest names
                     the checkpoint, and holds the metrics of the development set from
                     evaluation/metrics.json. Then it removes the folder

recipes/ance.sh calls the two in turns. lib/generations.py describes the files that trainer and
miner share.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.arguments import arg, parse_args
from lib.checkpoint import checkpoint_folder
from lib.files import UserError, atomic, lines, read_json, read_qrels, write_json, write_qrels
from lib.generations import complete_checkpoints, read_generations
from lib.launch import run
from lib.texts import open_texts, require_rows, write_texts


@dataclass(kw_only=True)
class Args:
    task: Literal["next", "publish"] = arg(group="task", help="what to do, see above")
    generations: str = arg(help="folder of the generations, which the trainer has as --train")
    work: str = arg(help="folder for the files between a checkpoint and its generation")

    run: str = arg(None, group="next", help="output_dir of finetune_biencoder.py")
    initial: str = arg(None, help="model that mines the first generation")
    queries: str = arg(None, help="training queries")
    qrels: str = arg(None, help="training judgments")
    slices: int = arg(5, least=1, help="number of slices of the judged queries (ANCE 5)")
    poll: float = arg(
        10.0, least=0, below=10_000, help="seconds between two looks for a new checkpoint"
    )


def discard(folder: Path) -> None:
    """Remove a folder, which loses its name first, so that nobody finds half of it."""
    aside = folder.with_name(f".tmp-{folder.name}")
    folder.rename(aside)
    shutil.rmtree(aside)


def prepare(args: Args) -> None:
    work, run_folder = Path(args.work), Path(args.run)
    for leftover in [*work.glob(".tmp-*"), *Path(args.generations).glob(".tmp-*")]:
        shutil.rmtree(leftover)
    while not (run_folder / "done").is_file():
        generations = read_generations(args.generations)
        last = generations[-1].step if generations else -1
        for path in work.glob("step-*"):
            if read_json(path / "next.json")["step"] > last:
                print(path)
                return
            discard(path)  # the miner was killed after it had published this folder
        found = complete_checkpoints(run_folder)
        if not found and args.initial:
            found = [(0, checkpoint_folder(args.initial))]
        if found and found[-1][0] > last:
            step, checkpoint = found[-1]
            path = work / f"step-{step:08d}"
            try:
                with atomic(path) as temporary:
                    others = shutil.ignore_patterns("state", "checkpoints", "best")
                    shutil.copytree(checkpoint, temporary / "checkpoint", ignore=others)
                    take_slice(args, len(generations), temporary)
                    record = {"step": step, "checkpoint": str(checkpoint)}
                    write_json(temporary / "next.json", record)
                print(path)
                return
            except OSError:
                if checkpoint.is_dir():
                    raise  # otherwise the trainer removed the checkpoint meanwhile: look again
        time.sleep(args.poll)


def take_slice(args: Args, number: int, folder: Path) -> None:
    """Write queries.jsonl and qrels.tsv of every --slices-th judged query, from the `number`-th on.

    UserError: more slices than judged queries; a judged query without a text."""
    qrels = read_qrels(args.qrels)
    if args.slices > len(qrels):
        raise UserError(
            f"--slices {args.slices}: {args.qrels} has only {len(qrels)} judged queries — choose "
            f"a value between 1 and {len(qrels)}"
        )
    qids = list(qrels)[number % args.slices :: args.slices]
    queries = open_texts(args.queries)
    rows = require_rows(queries, qids, args.qrels, "query")
    texts = ((qid, *queries[row]) for qid, row in zip(qids, rows, strict=True))
    write_texts(folder / "queries.jsonl", texts)
    write_qrels(folder / "qrels.tsv", {qid: qrels[qid] for qid in qids})


def publish(folder, training_file, manifest: dict) -> Path:
    """Add a generation to a folder: a copy of the training file, and the manifest, which must hold
    `step`.

    UserError: the folder already has a generation of a later step."""
    before = read_generations(folder)
    if before and manifest["step"] < before[-1].step:
        raise UserError(
            f"{folder}: it has negatives of step {before[-1].step}, and these are of step "
            f"{manifest['step']}, so the folder is another run's — give each run its own folder"
        )
    number = before[-1].number + 1 if before else 1
    path = Path(folder) / f"generation-{number:04d}"
    with atomic(path) as temporary:
        temporary.mkdir()
        shutil.copyfile(training_file, temporary / "train.jsonl")
        write_json(temporary / "manifest.json", {"generation": number, **manifest})
    return path


def publish_negatives(args: Args) -> None:
    path = next(Path(args.work).glob("step-*"), None)
    if path is None:
        raise UserError(f"{args.work}: nothing to publish — run --task next and mine first")
    training_file = path / "negatives" / "train.jsonl"
    (dev,) = read_json(path / "evaluation" / "metrics.json")["splits"].values()
    manifest = read_json(path / "next.json")
    manifest["queries"] = sum(1 for _ in lines(training_file))
    manifest["dev"] = dev["metrics"]
    generation = publish(args.generations, training_file, manifest)
    shown = "  ".join(f"{name} {value:.4f}" for name, value in dev["metrics"].items())
    print(f"{generation}: {manifest['queries']} queries, of step {manifest['step']}  {shown}")
    discard(path)


def main():
    args = parse_args(Args)
    if args.task == "publish":
        publish_negatives(args)
        return
    if not (args.run and args.queries and args.qrels):
        raise UserError("--task next needs --run, --queries and --qrels — see --help")
    prepare(args)


if __name__ == "__main__":
    run(main)
