"""Time and peak memory of importing MS MARCO's triples of texts: memory must be bounded.

Generates triples like triples.train.small.tsv (a query, its positive, a negative; every
query comes about 80 times, at random places) and imports them in a process of its own.

python bench/import_triples.py --triples 2000000 --folder /tmp/bench-triples
"""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def generate(path: Path, triples: int) -> None:
    draw = random.Random(0)
    words = [f"word{i}" for i in range(20_000)]
    block = " ".join(draw.choices(words, k=60))
    queries, passages = max(triples // 80, 1), max(triples // 4, 2)
    with open(path, "w") as stream:
        for _ in range(triples):
            query, negative = draw.randrange(queries), draw.randrange(passages)
            line = (
                f"what about query {query}\tpositive {query} {block}\tnegative {negative} {block}\n"
            )
            stream.write(line)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--triples", type=int, nargs="+", default=[200_000, 2_000_000])
    parser.add_argument("--folder", type=Path, required=True, help="where files are written")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "recipes.import_training_data"]
    for triples in args.triples:
        path = args.folder / f"triples-{triples}.tsv"
        if not path.is_file():
            generate(path, triples)
        size = path.stat().st_size / 1e9
        began = time.perf_counter()
        out = args.folder / f"import-{triples}-{time.time_ns()}"
        flags = ["--input", str(path), "--output_dir", str(out)]
        process = subprocess.Popen([*command, *flags], cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        assert status == 0
        peak = usage.ru_maxrss / 1024
        print(f"{triples} triples, {size:.2f} GB: {seconds:.0f} s, peak {peak:.0f} MB")


if __name__ == "__main__":
    main()
