"""What weighting groups of queries costs: steps of finetune_biencoder.py with --dro against the
same without.

    python -m bench.dro --model DIR --corpus FILE --queries FILE --qrels FILE [--train FILE]

Both train with triplets on the same queries, one negative each, no loader processes; queries belong
to --groups groups at random, so that nearly all are in every batch of 64. Each run is a process of
its own, in turns. Printed: the median time of a step without the first two, the peak of resident
memory, and how many groups a batch has on average.
"""

import argparse
import random
import statistics
import tempfile
from pathlib import Path

from bench.finetune import prepare, train
from lib.files import read_training_file, write_training_file


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "corpus", "queries", "qrels", "train"):
        parser.add_argument(f"--{name}")
    triplets = ["--max_query_length", "32", "--loss", "triplet"]
    flags = {False: triplets, True: [*triplets, "--dro"]}
    sizes = {"batch": 64, "group": 2, "max_length": 128, "steps": 6, "rounds": 3, "groups": 50}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    seconds, peaks = {False: [], True: []}, {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        folder, draw = Path(folder), random.Random(0)
        prepare(args, folder)
        rows = [row for _, row in read_training_file(folder / "train.jsonl")]
        clusters = [*range(args.groups), *(draw.randrange(args.groups) for _ in rows)]
        rows = [row._replace(cluster=c) for row, c in zip(rows, clusters, strict=False)]
        write_training_file(folder / "train.jsonl", rows)
        for _ in range(args.rounds):
            for weighted in (False, True):
                times, peak = train(args, folder, *flags[weighted])
                seconds[weighted] += times[2:]
                peaks[weighted].append(peak)
    plain, weighted = (statistics.median(seconds[kind]) for kind in (False, True))
    present = args.groups * (1 - (1 - 1 / args.groups) ** args.batch)
    print(
        f"{args.batch} queries x {args.group} passages, "
        f"about {present:.0f} of {args.groups} groups in a batch"
    )
    print(f"plain {plain:.3f} s/step, weighted {weighted:.3f} s/step: {weighted / plain:.2f}x")
    memory = [statistics.median(peaks[kind]) for kind in (False, True)]
    print(f"peak memory {memory[0]:.0f} MB, {memory[1]:.0f} MB: {memory[1] / memory[0]:.2f}x")


if __name__ == "__main__":
    main()
