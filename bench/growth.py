"""How the cost of each stage grows with the corpus: time, memory, disk, and their exponents.

    python -m bench.growth --folder /tmp/bench-growth --passages 10000 100000
    python -m recipes.plot --kind growth --input /tmp/bench-growth --output growth.svg

The passages are synthetic. Their lengths are log-normal: mean 56 words, as those of MS MARCO have
(55.98 in table 1 of BEIR, arXiv 2104.08663), and a standard deviation of the logarithm of 0.39, as
32,256 passages of MS MARCO have that systems returned for TREC DL 2019 and 2020. Word r of 20,000
is drawn in proportion to 1 / (r + 50), so that none is as frequent as a stopword. A query is six
words of one passage, its only positive. The dense model is a small random BERT, so its speed says
nothing about real ones, but its exponent does. Sparse vectors are those of bench/search_sparse.py.

Every stage is a process of its own, on all cores. Seconds are those beyond its imports, by the
clock, and those of all cores together, which are steadier on a busy machine; memory is its peak
beyond what it has after them, with the pages of mapped files; disk is what it leaves.
What does not depend on the corpus (loading a model, printing) lowers the exponents of small sizes.
The same searches are made in each corpus. Exact search of dense vectors has no index to build.

Written: FOLDER/growth.jsonl, a line for each stage and size. Printed: a Markdown table."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from scipy.sparse import load_npz, save_npz

import encode
import evaluate
import mine_negatives
from bench.encode_memory import WORDS, make_model
from bench.search_sparse import SHARD, VOCABULARY, generated, generated_queries
from lib.bm25 import open_bm25
from lib.embeddings import Embeddings, finish_embeddings, write_shard
from lib.inverted import open_sparse
from lib.search import DenseIndex
from lib.texts import open_texts
from recipes.plot import exponent

ROOT = Path(__file__).resolve().parents[1]
MEAN, SPREAD, QUERY = 56, 0.39, 6  # words
WARM_UP = 2_000  # passages of a first round, which compiles kernels; it is not reported
DEPTH = 1_000
BEFORE = "encode, queries"  # a stage that does not depend on the corpus, and is not reported
COSTS = {
    "seconds": "s",
    "cpu_seconds": "CPU s",
    "memory_mb": "MB beyond imports",
    "disk_mb": "MB on disk",
}


def prepare(folder: Path, passages: int, queries: int) -> None:
    """Texts, judgments, the dense model with the vectors of the queries, sparse vectors."""
    draw = np.random.default_rng(0)
    share = (1 / (np.arange(len(WORDS)) + 50)).cumsum()
    share /= share[-1]
    asked = np.linspace(0, passages - 1, queries).astype(int)
    texts, qrels = open(folder / "queries.tsv", "w"), open(folder / "qrels.tsv", "w")
    with texts, qrels, open(folder / "corpus.tsv", "w") as corpus:
        lengths = draw.lognormal(np.log(MEAN) - SPREAD**2 / 2, SPREAD, passages)
        for row, length in enumerate(lengths.round().astype(int).clip(1)):
            text = [WORDS[at] for at in np.searchsorted(share, draw.random(length))]
            corpus.write(f"p{row}\t{' '.join(text)}\n")
            for number in np.flatnonzero(asked == row):
                texts.write(f"q{number}\t{' '.join(draw.choice(text, QUERY))}\n")
                qrels.write(f"q{number} 0 p{row} 1\n")
    for shard, start in enumerate(range(0, passages, SHARD)):
        rows = min(SHARD, passages - start)
        ids = [f"p{row}" for row in range(start, start + rows)]
        write_shard(folder / "sparse", shard, generated(draw, rows), ids)
    meta = {"count": passages, "dim": VOCABULARY, "head": "sparse", "kind": "passage"}
    finish_embeddings(folder / "sparse", meta)
    save_npz(folder / "sparse-queries.npz", generated_queries(draw, queries))
    make_model(folder / "model")
    run_stage(BEFORE, folder)


# ---- the stages: each reads from `folder` and writes to `out`, a name in it that is free


def call(script, folder: Path, out: Path, *words: str) -> None:
    """Run main() of a script; words that name something in `folder` become its path."""
    paths = [str(folder / word) if (folder / word).exists() else word for word in words]
    sys.argv = [script.__name__, "--output_dir", str(out), *paths]
    script.main()


def open_corpus(folder: Path, out: Path) -> None:
    os.environ["ISTHMUS_CACHE"] = str(out)
    open_texts(folder / "corpus.tsv")


def encode_texts(kind: str, file: str, folder: Path, out: Path) -> None:
    flags = f"--model model --pooling cls --kind {kind} --input {file} --num_workers 0"
    call(encode, folder, out, *flags.split())


def build_bm25(folder: Path, out: Path) -> None:
    open_bm25(open_texts(folder / "corpus.tsv"), out)


def search_bm25(folder: Path, out: Path) -> None:
    index = open_bm25(open_texts(folder / "corpus.tsv"), folder / "BM25, build")
    index.search([text for _, _, text in open_texts(folder / "queries.tsv").stream()], DEPTH)


def build_sparse(folder: Path, out: Path) -> None:
    open_sparse(Embeddings(folder / "sparse"), out)


def search_sparse(folder: Path, out: Path) -> None:
    index = open_sparse(Embeddings(folder / "sparse"), folder / "sparse, build")
    index.search(load_npz(folder / "sparse-queries.npz"), DEPTH)


def search_dense(folder: Path, out: Path) -> None:
    queries = Embeddings(folder / BEFORE)
    index = DenseIndex(Embeddings(folder / "encode"))
    index.search(queries.take(np.arange(len(queries))), DEPTH)


MINE = ["--corpus", "corpus.tsv", "--qrels", "qrels.tsv"]
BM25 = ["--bm25", "--queries", "queries.tsv", "--bm25_index", "BM25, build"]
DENSE = ["--queries_embeddings", BEFORE, "--corpus_embeddings", "encode"]
STAGES = {
    "open the corpus": open_corpus,
    "encode": partial(encode_texts, "passage", "corpus.tsv"),
    "BM25, build": build_bm25,
    "BM25, search": search_bm25,
    "BM25, mine": lambda folder, out: call(mine_negatives, folder, out, *MINE, *BM25),
    "sparse, build": build_sparse,
    "sparse, search": search_sparse,
    "dense, search": search_dense,
    "dense, mine": lambda folder, out: call(mine_negatives, folder, out, *MINE, *DENSE),
    "evaluate": lambda folder, out: call(evaluate, folder, out, "--qrels", "qrels.tsv", *DENSE),
}


# ---- measured


def memory(key: str) -> float:
    """MB of this process."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure(name: str, folder: Path) -> dict[str, float]:
    """The costs of a stage in this process."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    began = np.array([time.perf_counter(), time.process_time()])
    stage = STAGES.get(name) or partial(encode_texts, "query", "queries.tsv")
    stage(folder, folder / name)
    seconds = np.array([time.perf_counter(), time.process_time()]) - began
    files = [path for path in (folder / name).rglob("*") if path.is_file()]
    disk = sum(path.stat().st_size for path in files) / 1e6
    costs = [*seconds.tolist(), memory("VmHWM") - before, disk]
    return dict(zip(COSTS, costs, strict=True))


def run_stage(name: str, folder: Path) -> dict[str, float]:
    """Its costs, in a process of its own."""
    command = [sys.executable, "-m", "bench.growth", "--stage", name, "--folder", folder]
    cache = str(folder / "open the corpus")
    environment = {**os.environ, "ISTHMUS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    how = {"env": environment, "cwd": ROOT, "text": True, "capture_output": True}
    done = subprocess.run(command, **how)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, dict[int, dict[str, float]]], sizes: list[int]) -> str:
    """Markdown: a row for each stage; for each cost the sizes, then the exponent."""
    head, rows = ["stage"], []
    for unit in COSTS.values():
        head += [*(f"{unit}, {size:,}" for size in sizes), "exponent"]
    for stage, by_size in found.items():
        cells = [stage]
        for cost in COSTS:
            values = [by_size[size][cost] for size in sizes]
            slope = exponent([point for point in zip(sizes, values, strict=True) if point[1] > 0])
            cells += [f"{value:.2f}" for value in values]
            cells.append("" if slope is None else f"{slope:.2f}")
        rows.append(cells)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for growth.jsonl and the data")
    parser.add_argument("--passages", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        return print(json.dumps(measure(args.stage, args.folder)))
    args.folder.mkdir(parents=True, exist_ok=True)
    found = {stage: {} for stage in STAGES}
    with open(args.folder / "growth.jsonl", "w") as log:
        for round, size in enumerate([WARM_UP, *args.passages]):
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                prepare(Path(folder), size, args.queries)
                for stage in STAGES:
                    found[stage][size] = run_stage(stage, Path(folder))
                    if round:
                        line = {"stage": stage, "passages": size, **found[stage][size]}
                        print(json.dumps(line), file=log, flush=True)
    print(table(found, args.passages))


if __name__ == "__main__":
    main()
