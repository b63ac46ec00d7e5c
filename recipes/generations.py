"""The miner's side of ANCE, before and after our scripts: what to mine with and for, and the publishing.

    --task next      waits for a checkpoint of --run that is newer than the newest generation in --negatives_dir, and
                     prepares --work/step-00000500: a copy of the checkpoint, which the trainer may remove at any time,
                     and the judged queries of one of --slices, which take turns (ANCE's ann_chunk_factor), as
                     queries.jsonl and qrels.tsv; prints its path. Before there is any generation, the checkpoint is
                     --initial, of step 0. A folder that a killed miner left is handed out again, or the miner would
                     never come to an end. Prints nothing once the run is done
    --task publish   --work/step-.../negatives/negatives.tsv as a new generation, whose manifest names the checkpoint
                     and what evaluation/metrics.json says of the development set; then the folder is removed

recipes/ance.sh calls them in turns. Files and folders: lib/generations.py.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from lib.checkpoint import checkpoint_folder
from lib.files import (
    UserError,
    atomic,
    line_of,
    lines,
    read_json,
    read_qrels,
    write_json,
    write_qrels,
)
from lib.generations import newest_checkpoint, publish, read_generations
from lib.launch import parse_args, run
from lib.texts import open_texts, write_texts


@dataclass
class Args:
    task: Literal["next", "publish"] = HfArg(help="see above")
    negatives_dir: str = HfArg(help="where the generations are")
    work: str = HfArg(help="folder for what is between checkpoint and generation")
    run: str = HfArg(default=None, help="next: output_dir of finetune_biencoder.py")
    initial: str = HfArg(default=None, help="next: the model of the first generation")
    queries: str = HfArg(default=None, help="next: training queries")
    qrels: str = HfArg(default=None, help="next: training judgments")
    slices: int = HfArg(default=5, help="next: of the judged queries (ANCE 5)")
    poll: float = HfArg(default=10.0, help="next: seconds between looks")


def prepare(args: Args) -> None:
    work, run_folder = Path(args.work), Path(args.run)
    for leftover in work.glob(".tmp-*"):
        shutil.rmtree(leftover)
    while not (run_folder / "done").is_file():
        generations = read_generations(args.negatives_dir)
        last = generations[-1].step if generations else -1
        for path in work.glob("step-*"):
            if read_json(path / "next.json")["step"] > last:
                return print(path)
            shutil.rmtree(path)  # killed between publishing and removing it
        step, checkpoint = newest_checkpoint(run_folder) or (
            0,
            args.initial and checkpoint_folder(args.initial),
        )
        if step > last and checkpoint:
            path = work / f"step-{step:08d}"
            try:
                with atomic(path) as temporary:
                    others = shutil.ignore_patterns("state", "checkpoints", "best")
                    shutil.copytree(checkpoint, temporary / "checkpoint", ignore=others)
                    take_slice(args, len(generations), temporary)
                    write_json(
                        temporary / "next.json", {"step": step, "checkpoint": str(checkpoint)}
                    )
                return print(path)
            except OSError:
                if checkpoint.is_dir():
                    raise  # else the trainer has just removed it: look again
        time.sleep(args.poll)


def take_slice(args: Args, number: int, folder: Path) -> None:
    """queries.jsonl and qrels.tsv of every --slices-th judged query, beginning with the `number`-th."""
    qrels = read_qrels(args.qrels)
    if not 1 <= args.slices <= len(qrels):
        raise UserError(f"--slices {args.slices}: of {len(qrels)} judged queries — give 1 to that")
    qids, queries = list(qrels)[number % args.slices :: args.slices], open_texts(args.queries)
    rows = queries.rows(qids)
    if rows.min() < 0:
        qid = qids[int(rows.argmin())]
        raise UserError(
            f"{line_of(args.qrels, qid)}: query {qid} is not in {args.queries} — give its queries"
        )
    write_texts(
        folder / "queries.jsonl",
        ((qid, *queries[row]) for qid, row in zip(qids, rows, strict=True)),
    )
    write_qrels(folder / "qrels.tsv", {qid: qrels[qid] for qid in qids})


def publish_negatives(args: Args) -> None:
    (path,) = Path(args.work).glob("step-*")
    negatives = path / "negatives" / "negatives.tsv"
    (dev,) = read_json(path / "evaluation" / "metrics.json")["splits"].values()
    manifest = {
        **read_json(path / "next.json"),
        "queries": sum(1 for _ in lines(negatives)),
        "dev": dev["metrics"],
    }
    generation = publish(args.negatives_dir, negatives, manifest)
    shown = "  ".join(f"{name} {value:.4f}" for name, value in dev["metrics"].items())
    print(f"{generation}: {manifest['queries']} queries, of step {manifest['step']}  {shown}")
    shutil.rmtree(path)


def main():
    args = parse_args(Args)
    if args.task == "next" and not (args.run and args.queries and args.qrels):
        raise UserError("--task next needs --run, --queries and --qrels — see --help")
    (prepare if args.task == "next" else publish_negatives)(args)


if __name__ == "__main__":
    run(main)
