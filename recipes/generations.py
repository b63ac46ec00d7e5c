"""The miner's side of ANCE, between our scripts: which checkpoint to mine with, for which queries, and the publishing.

    --task next      prints `step TAB folder` of the newest checkpoint of --run that no generation in --negatives_dir
                     was made with, and waits until there is one; prints nothing once the run is done. Before there is
                     any generation, it is --initial, of step 0
    --task slice     --output_dir/queries.jsonl and qrels.tsv: the judged queries of slice n of --slices, n the number
                     of generations so far, so that the slices take turns (ANCE's ann_chunk_factor, 5)
    --task publish   --negatives as a new generation; its manifest names step, checkpoint, and the --metrics of the
                     development set that evaluate.py wrote

recipes/ance.sh calls them in this order. Files and folders: lib/generations.py.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from lib.data import known_rows
from lib.files import UserError, lines, open_texts, read_json, read_qrels, write_qrels, write_texts
from lib.generations import newest_checkpoint, publish, read_generations
from lib.launch import parse_args, run


@dataclass
class Args:
    task: Literal["next", "slice", "publish"] = HfArg(help="see above")
    negatives_dir: str = HfArg(help="where the generations are")
    run: str = HfArg(default=None, help="next: output_dir of finetune_biencoder.py")
    initial: str = HfArg(default=None, help="next: the model of the first generation")
    poll: float = HfArg(default=10.0, help="next: seconds between looks")
    queries: str = HfArg(default=None, help="slice: training queries")
    qrels: str = HfArg(default=None, help="slice: training judgments")
    slices: int = HfArg(default=5, help="slice: how many")
    output_dir: str = HfArg(default=None, help="slice: where the two files go")
    negatives: str = HfArg(default=None, help="publish: file that mine_negatives.py wrote")
    step: int = HfArg(default=None, help="publish: of the checkpoint")
    checkpoint: str = HfArg(default=None, help="publish: for the manifest")
    metrics: str = HfArg(default=None, help="publish: metrics.json of the development set")


def next_checkpoint(args: Args) -> None:
    while not (Path(args.run) / "done").is_file():
        generations, newest = read_generations(args.negatives_dir), newest_checkpoint(args.run)
        if not generations and args.initial:
            newest = newest or (0, args.initial)
        if newest and (not generations or newest[0] > generations[-1].step):
            print(*newest, sep="\t")
            return
        time.sleep(args.poll)


def take_slice(args: Args) -> None:
    qrels, number = read_qrels(args.qrels), len(read_generations(args.negatives_dir))
    if not 1 <= args.slices <= len(qrels):
        raise UserError(f"--slices {args.slices}: of {len(qrels)} judged queries — give 1 to that")
    qids = list(qrels)[number % args.slices :: args.slices]
    queries = open_texts(args.queries)
    rows = known_rows(queries, qids, args.qrels, "query")
    out = Path(args.output_dir)
    write_texts(out / "queries.jsonl", ((qid, *queries[row]) for qid, row in zip(qids, rows, strict=True)))
    write_qrels(out / "qrels.tsv", {qid: qrels[qid] for qid in qids})
    print(f"slice {number % args.slices + 1} of {args.slices}: {len(qids)} queries")


def publish_negatives(args: Args) -> None:
    manifest = {"step": args.step, "checkpoint": args.checkpoint, "queries": sum(1 for _ in lines(args.negatives))}
    if args.metrics:
        (part,) = read_json(args.metrics)["splits"].values()
        manifest["dev"] = part["metrics"]
    path = publish(args.negatives_dir, args.negatives, manifest)
    shown = "  ".join(f"{name} {value:.4f}" for name, value in manifest.get("dev", {}).items())
    print(f"{path}: {manifest['queries']} queries, of step {args.step}  {shown}")


def main():
    args = parse_args(Args)
    tasks = {
        "next": (next_checkpoint, ("run",)),
        "slice": (take_slice, ("queries", "qrels", "output_dir")),
        "publish": (publish_negatives, ("negatives", "step")),
    }
    task, needed = tasks[args.task]
    for name in needed:
        if getattr(args, name) is None:
            raise UserError(f"--task {args.task} needs --{name} — see --help")
    task(args)


if __name__ == "__main__":
    run(main)
