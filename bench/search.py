"""Exact top-k search: ours over memory-mapped shards against faiss.IndexFlatIP, which holds all
vectors in memory.

Each in a process of its own, in turns; prints the median seconds of one search, the ratio, and the
peak resident memory of each beyond its imports (faiss: with its vectors, ours: with the pages of
the mapped files).

    python -m bench.search --folder /tmp/bench-search --passages 1000000 --queries 1000 --depth 1000
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from lib.embeddings import finish_embeddings, write_shard

ROOT = Path(__file__).resolve().parents[1]
COMMON = """
import json, re, sys, time
import faiss, numpy as np, torch
from lib.embeddings import Embeddings
from lib.search import DenseIndex
folder, depth = sys.argv[1], int(sys.argv[2])
def memory(key):
    status = open("/proc/self/status").read()
    return int(re.search(key + r":\\s+(\\d+)", status)[1]) / 1024
queries = np.load(folder + "/queries.npy")
corpus = Embeddings(folder + "/shards")
"""
OURS = """
index = DenseIndex(corpus)
index.search(queries[:8], 8)  # compiles, or loads what an earlier run compiled
before = memory("VmRSS")
began = time.perf_counter()
scores, rows = index.search(queries, depth)
seconds = time.perf_counter() - began
peak = memory("VmHWM") - before
"""
PEER = """
before = memory("VmRSS")
index = faiss.IndexFlatIP(corpus.dim)
for _, block in corpus.blocks(0, len(corpus), 65536):
    index.add(np.ascontiguousarray(block, dtype=np.float32))
began = time.perf_counter()
scores, rows = index.search(queries, depth)
seconds = time.perf_counter() - began
peak = memory("VmHWM") - before
"""
REPORT = """
np.save(folder + "/" + sys.argv[3] + ".npy", rows)
print(json.dumps({"seconds": seconds, "peak": peak, "scores": float(scores.sum())}))
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the vectors go; kept for the next run"
    )
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    folder = args.folder / f"{args.passages}x{args.dimension}-{args.queries}"

    if not (folder / "shards" / "meta.json").is_file():
        draw = np.random.default_rng(0)

        def unit(rows):
            vectors = draw.standard_normal((rows, args.dimension), dtype=np.float32)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        for shard, start in enumerate(range(0, args.passages, 100_000)):
            rows = min(100_000, args.passages - start)
            write_shard(
                folder / "shards", shard, unit(rows), [f"p{start + row}" for row in range(rows)]
            )
        np.save(folder / "queries.npy", unit(args.queries))
        finish_embeddings(folder / "shards", {"count": args.passages, "dim": args.dimension})
    results = {"ours": [], "faiss": []}
    for _ in range(args.rounds):
        for name, code in (("ours", OURS), ("faiss", PEER)):
            done = subprocess.run(
                [sys.executable, "-c", COMMON + code + REPORT, str(folder), str(args.depth), name],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                check=True,
                capture_output=True,
                text=True,
            )
            results[name].append(json.loads(done.stdout))
            print(name, results[name][-1], flush=True)
    medians = {
        name: statistics.median(r["seconds"] for r in runs) for name, runs in results.items()
    }
    peaks = {name: statistics.median(r["peak"] for r in runs) for name, runs in results.items()}
    same = (np.load(folder / "ours.npy") == np.load(folder / "faiss.npy")).mean()
    print(
        f"{args.queries} queries, {args.passages} x {args.dimension}, top {args.depth}: "
        f"same row at {same:.4%}"
    )
    print(
        f"median seconds: ours {medians['ours']:.2f}, faiss {medians['faiss']:.2f}, "
        f"ratio faiss / ours {medians['faiss'] / medians['ours']:.2f}"
    )
    print(f"peak memory: ours {peaks['ours']:.0f} MB, faiss {peaks['faiss']:.0f} MB")


if __name__ == "__main__":
    main()
