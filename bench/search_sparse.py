"""Exact sparse search: our inverted lists against scipy's product, sentence-transformers, a plain
loop in numba, and Seismic (approximate, arXiv 2404.18812; `pip install pyseismic-lsr`, left out
where it is not installed).

    python -m bench.search_sparse --folder /tmp/bench-sparse --passages 1000000 --queries 256 \\
        --depth 1000
    python -m bench.search_sparse ... --embeddings DIR --queries_embeddings DIR

The second form draws its passages and queries from real vectors.

Without --embeddings, term r of 30,522 is in a share of the passages proportional to 1 / (r + 50)
(Zipf-Mandelbrot), on average 120 terms in each, weights are log-normal (-0.7, 0.6), and the 30
terms of a query are drawn in proportion to the shares of passages: 1.7 postings per query and
passage. (A small SPLADE model on SQuAD: 2.6, with 187 terms per passage, 23 per query, which is the
same for 120 terms.) With --embeddings, each passage takes every term of two real ones with
probability 1/2, the weight times exp(0.2 · normal).

Every contestant runs in a process of its own, in turns, on as many cores as it can use; printed are
the median milliseconds per query by the clock and of all cores together, the ratios to ours, and
the share of the rows that are ours. The slow ones get the first few queries alone.
sentence-transformers takes 20 bytes for a weight, twice, and Seismic long to build: give
--leave_out or fewer passages."""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, load_npz, save_npz, vstack

from lib.embeddings import Embeddings, finish_embeddings, write_shard

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, SHARD = 30_522, 1 << 15
COMMON = """
import gc, json, re, sys, time
import numba, numpy as np, torch
from scipy.sparse import load_npz, vstack
from lib.embeddings import Embeddings
folder, depth = sys.argv[1], int(sys.argv[2])
queries = load_npz(folder + "/queries.npz")
corpus = Embeddings(folder + "/shards")
def whole():
    return vstack([block for _, block in corpus.blocks(0, len(corpus), len(corpus))], "csr")
def clock(): return np.array([time.perf_counter(), time.process_time()])
def memory(key):
    status = open("/proc/self/status").read()
    return int(re.search(key + r":\\s+(\\d+)", status)[1]) / 1024
def best(scores):  # (q, N): the depth best rows, in order
    found = np.argpartition(-scores, depth, axis=1)[:, :depth]
    order = np.argsort(-np.take_along_axis(scores, found, 1), axis=1, kind="stable")
    return np.take_along_axis(found, order, 1)
"""
OURS = """
from lib.inverted import open_sparse
before = memory("VmHWM")
began = clock()
index = open_sparse(corpus, folder + "/index")
build, grown = (clock() - began)[0], memory("VmHWM") - before
index.search(queries[:2], depth)  # compiles, or loads what an earlier run compiled
# this also brings the pages of the index into memory, where the arrays of the others are
index.search(queries, depth)
began = clock()
scores, rows = index.search(queries, depth)
"""
CONTESTANTS = {
    "ours": OURS,
    "scipy, passages @ queries": """
passages, queries = whole(), queries[:16]
began = clock()
rows = best((passages @ queries.T).toarray().T)
""",
    "scipy, one query at a time": """
passages, queries = whole(), queries[:6]
began = clock()
rows = np.concatenate([best((passages @ query.toarray()[0])[None]) for query in queries])
""",
    "scipy, queries @ transposed": """
passages, queries = whole().T.tocsr(), queries[:32]
began = clock()
rows = best((queries @ passages).toarray())
""",
    "sentence-transformers": """
from sentence_transformers.util import dot_score, semantic_search
queries = queries[:16]
def tensor(m):
    m = m.tocoo()
    places = np.stack([m.row, m.col])
    return torch.sparse_coo_tensor(places, m.data, m.shape, check_invariants=False).coalesce()
passages, asked = tensor(whole()), tensor(queries)
began = clock()
found = semantic_search(asked, passages, top_k=depth, score_function=dot_score)
rows = np.array([[hit["corpus_id"] for hit in hits] for hits in found])
""",
    "numba, a list at a time": """
@numba.njit
def add(terms, weights, starts, documents, values, scores):
    for i in range(len(terms)):
        for j in range(starts[terms[i]], starts[terms[i] + 1]):
            scores[documents[j]] += weights[i] * values[j]
lists, queries = whole().tocsc(), queries[:16]
def search(query):
    scores = np.zeros(len(corpus), dtype=np.float32)
    add(query.indices, query.data, lists.indptr, lists.indices, lists.data, scores)
    return np.argsort(-scores, kind="stable")[:depth]
search(queries[0])
began = clock()
rows = np.stack([search(query) for query in queries])
""",
    "seismic (approximate)": """
from seismic import SeismicIndexRaw
index = SeismicIndexRaw.load(folder + "/seismic")
def search(): return index.batch_search(folder + "/queries.bin", depth, 10, 0.7, 0, True)
search()
began = clock()
found = search()
rows = np.full((queries.shape[0], depth), -2)
for q, hits in enumerate(found): rows[q, : len(hits)] = [hit[1] for hit in hits]
""",
}
REPORT = """
milliseconds = (clock() - began) / queries.shape[0] * 1e3
np.save(folder + "/" + sys.argv[3] + ".npy", rows)
facts = {"build": build, "MB while it was built": grown} if "build" in globals() else {}
print(json.dumps({"ms": milliseconds[0], "cpu": milliseconds[1], **facts}))
"""


def generated(draw, rows: int) -> csr_matrix:
    wanted = 1 / (np.arange(VOCABULARY) + 51)
    wanted *= 120 / wanted.sum()
    counts = draw.poisson(
        -np.log1p(-wanted) * rows
    )  # passages drawn with repetition: `wanted` of them are distinct
    terms = np.repeat(np.arange(VOCABULARY), counts)
    keys = np.unique(draw.integers(0, rows, len(terms)) * VOCABULARY + terms)
    starts = np.searchsorted(keys, np.arange(rows + 1) * VOCABULARY)
    weights = draw.lognormal(-0.7, 0.6, len(keys)).astype(np.float32)
    return csr_matrix(
        (weights, (keys % VOCABULARY).astype(np.int32), starts), shape=(rows, VOCABULARY)
    )


def generated_queries(draw, number: int) -> csr_matrix:
    share = 1 / (np.arange(VOCABULARY) + 51)
    terms = np.stack(
        [np.sort(draw.choice(VOCABULARY, 30, False, share / share.sum())) for _ in range(number)]
    )
    weights = draw.lognormal(-0.7, 0.6, terms.size).astype(np.float32)
    return csr_matrix(
        (weights, terms.ravel(), np.arange(number + 1) * 30), shape=(number, VOCABULARY)
    )


def mixed(draw, real: csr_matrix, rows: int) -> csr_matrix:
    halves = []
    for _ in range(2):
        half = real[draw.integers(0, real.shape[0], rows)]
        half.data *= np.exp(0.2 * draw.standard_normal(half.nnz, np.float32)) * (
            draw.random(half.nnz) < 0.5
        )
        half.eliminate_zeros()
        halves.append(half)
    both = halves[0].maximum(halves[1])
    both.sort_indices()
    return both


def write_inner(path, matrix: csr_matrix, mode: str) -> None:
    """What SeismicIndexRaw reads: the number of vectors, then of each its length, terms and
    weights."""
    with open(path, mode) as stream:
        for start, stop in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
            stream.write(
                np.uint32(stop - start).tobytes()
                + matrix.indices[start:stop].astype(np.uint32).tobytes()
            )
            stream.write(matrix.data[start:stop].tobytes())


def prepare(folder: Path, args, with_seismic: bool) -> None:
    """The vectors, and Seismic's index: its authors' settings for MS MARCO, whose 8.8 M passages
    get 4000 postings."""
    if not (folder / "shards" / "meta.json").is_file():
        draw = np.random.default_rng(0)
        if args.embeddings:
            real, asked = Embeddings(args.embeddings), Embeddings(args.queries_embeddings)
            real = vstack([block for _, block in real.blocks(0, len(real), len(real))], "csr")
        for shard, start in enumerate(range(0, args.passages, SHARD)):
            rows = min(SHARD, args.passages - start)
            block = mixed(draw, real, rows) if args.embeddings else generated(draw, rows)
            write_shard(folder / "shards", shard, block, [f"p{start + row}" for row in range(rows)])
        queries = (
            asked.take(np.arange(args.queries))
            if args.embeddings
            else generated_queries(draw, args.queries)
        )
        queries.sort_indices()
        save_npz(folder / "queries.npz", queries)
        finish_embeddings(
            folder / "shards",
            {"count": args.passages, "dim": queries.shape[1], "head": "sparse", "kind": "passage"},
        )
    if with_seismic and not (folder / "seismic").exists():
        from seismic import SeismicIndexRaw

        corpus, queries = Embeddings(folder / "shards"), load_npz(folder / "queries.npz")
        for name, parts, count in (
            ("queries", [(0, queries)], queries.shape[0]),
            ("passages", corpus.blocks(0, len(corpus), SHARD), len(corpus)),
        ):
            (folder / f"{name}.bin").write_bytes(np.uint32(count).tobytes())
            for _, block in parts:
                write_inner(folder / f"{name}.bin", block, "ab")
        index = SeismicIndexRaw.build(
            str(folder / "passages.bin"),
            n_postings=args.passages // 2200,
            centroid_fraction=0.1,
            min_cluster_size=2,
            summary_energy=0.4,
        )
        index.save(str(folder / "seismic"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="for vectors and indexes; kept for the next run"
    )
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--embeddings", help="a folder of real sparse passage vectors to resample")
    parser.add_argument("--queries_embeddings", help="and of query vectors")
    parser.add_argument(
        "--leave_out",
        default=[],
        nargs="*",
        choices=[*CONTESTANTS][1:],
        help="contestants not to run",
    )
    args = parser.parse_args()
    folder = args.folder / f"{'real' if args.embeddings else 'zipf'}-{args.passages}-{args.queries}"
    contestants = {name: code for name, code in CONTESTANTS.items() if name not in args.leave_out}
    if importlib.util.find_spec("seismic") is None:
        contestants.pop("seismic (approximate)", None)
    prepare(folder, args, "seismic (approximate)" in contestants)
    corpus, queries = Embeddings(folder / "shards"), load_npz(folder / "queries.npz")
    frequency, stored = np.zeros(corpus.dim), 0
    for _, block in corpus.blocks(0, len(corpus), SHARD):
        frequency += np.bincount(block.indices, minlength=corpus.dim)
        stored += block.nnz
    touched = frequency[queries.indices].sum() / queries.shape[0] / len(corpus)
    print(
        f"{len(corpus)} passages of {stored / len(corpus):.0f} terms, "
        f"{queries.shape[0]} queries of {queries.nnz / queries.shape[0]:.0f}, top {args.depth}: "
        f"{touched:.2f} postings per query and passage",
        flush=True,
    )
    results = {name: [] for name in contestants}
    for _ in range(args.rounds):
        for name, code in contestants.items():
            done = subprocess.run(
                [sys.executable, "-c", COMMON + code + REPORT, str(folder), str(args.depth), name],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, results[name][-1], flush=True)
    exact = np.load(folder / "ours.npy")
    medians = {
        n: [statistics.median(run[key] for run in runs) for key in ("ms", "cpu")]
        for n, runs in results.items()
    }
    for name, (wall, cpu) in medians.items():
        rows, ours = np.load(folder / f"{name}.npy"), medians["ours"]
        same = np.mean(
            [len(np.intersect1d(a, b)) / args.depth for a, b in zip(rows, exact, strict=False)]
        )
        print(
            f"{name:28} {wall:9.3f} ms per query ({wall / ours[0]:7.1f} x ours), "
            f"{cpu:9.3f} of all cores ({cpu / ours[1]:7.1f} x), {same:.4%} of the rows ours"
        )
    parts = {path.stem: path.stat().st_size for path in (folder / "index").glob("*.bin")}
    postings = parts["documents"] + parts["weights"]
    lists = sum(parts.values()) - postings
    print(
        f"{postings / stored:.2f} bytes per posting, and {lists / stored:.2f} for where lists begin"
    )


if __name__ == "__main__":
    main()
