"""Resident memory of opening a corpus, beyond what the imports take: a million passages must cost
less than 300 MB.

python bench/open_corpus.py --passages 1000000 --folder /tmp/bench-corpus
"""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURE = """
import resource, sys, time
import datasets, torch, transformers
from lib.texts import open_texts
def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize() / 2**20
before, began = resident(), time.perf_counter()
texts = open_texts(sys.argv[1])
opened, seconds = resident(), time.perf_counter() - began
rows = range(0, len(texts), max(len(texts) // 20000, 1))
began = time.perf_counter()
for row in rows: texts[row]
read = (time.perf_counter() - began) / len(rows) * 1e6
print(f"{len(texts)} passages: imports {before:.0f} MB, "
      f"open +{opened - before:.1f} MB in {seconds:.3f} s, "
      f"random read {read:.1f} us (mapped pages then: +{resident() - opened:.0f} MB)")
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the corpus and its memory-mapped copy go"
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    corpus = args.folder / f"corpus-{args.passages}.tsv"
    if not corpus.is_file():
        draw, words = random.Random(0), [f"word{i}" for i in range(20_000)]
        with open(corpus, "w") as stream:
            for row in range(args.passages):
                stream.write(f"p{row}\t{' '.join(draw.choices(words, k=55))}\n")
    environment = {
        **os.environ,
        "ISTHMUS_CACHE": str(args.folder / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    for note in ("first use, which writes the memory-mapped copy", "later uses"):
        began = time.perf_counter()
        print(f"{note}:", flush=True)
        subprocess.run([sys.executable, "-c", MEASURE, str(corpus)], env=environment, check=True)
        print(f"   whole process {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
