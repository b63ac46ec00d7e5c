"""Runs with several seeds against one of them: means, and paired differences query by query.

    python -m bench.seeds OUT/{}-{}/evaluation --base mlm --others retromae dupmae --seeds 0 1

The pattern takes run and seed and names an output_dir of evaluate.py. A query counts with the mean
over its seeds, so the interval is about queries; the differences of the seeds stand behind it.
"""

import argparse
from pathlib import Path

import numpy as np

from lib.metrics import bootstrap_interval


def read(pattern: str, run: str, seeds: list[str]) -> dict[tuple[str, str], np.ndarray]:
    """(split, metric) -> values (seeds, queries), the queries of every file in the same order."""
    found = {}
    for seed in seeds:
        head, *lines = (Path(pattern.format(run, seed)) / "per_query.tsv").read_text().splitlines()
        for qid, split, *values in sorted(line.split("\t") for line in lines):
            for metric, value in zip(head.split("\t")[2:], values, strict=True):
                found.setdefault((split, metric), {}).setdefault(seed, {})[qid] = float(value)
    return {
        key: np.array([[*by_query.values()] for by_query in values.values()])
        for key, values in found.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pattern")
    parser.add_argument("--base", required=True)
    parser.add_argument("--others", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", required=True)
    args = parser.parse_args()
    base = read(args.pattern, args.base, args.seeds)
    others = {run: read(args.pattern, run, args.seeds) for run in args.others if run != args.base}
    for key, plain in base.items():
        print(f"\n{key[0]}, {plain.shape[1]} queries, {key[1]}: {args.base} {plain.mean():.4f}")
        for run, values in others.items():
            gap = values[key] - plain  # (seeds, queries)
            low, high = bootstrap_interval(gap.mean(0))
            seeds = " ".join(f"{x:+.4f}" for x in gap.mean(1))
            shown = f"{gap.mean():+.4f} ({low:+.4f} to {high:+.4f}; by seed {seeds})"
            print(f"  {run:<14}{values[key].mean():.4f}   {shown}")


if __name__ == "__main__":
    main()
