"""Cluster the queries of a training file: the groups of group-robust training (COCO-DR, arXiv
2210.15212).

k-means (faiss, L2) over the query vectors as encode.py stored them; each query belongs to its
nearest centroid. Deliberate deviations from the official code:
  1. All queries train the centroids, or the stated --sample (official: 256 per centroid, which is
     what faiss keeps without a word; of MS MARCO's 503k queries 12,800).
  2. Clusters are numbered by size, 0 is the largest (official: in the order of faiss).

Clusters belong to a checkpoint: another episode has other embeddings and other clusters.

Reads   --train; --queries_embeddings: a folder that encode.py --kind query wrote, dense; --queries
        for texts in the summary
Writes  --output_dir: train.jsonl (the rows of --train, each with its "cluster"), summary.txt (size,
        share, mean distance and nearest queries of each cluster), meta.json last. The same command
        writes the same bytes (on one machine, with the same number of threads), and starts again
        where a run was killed.

    python -m recipes.cluster_queries --train negatives/train.jsonl --queries_embeddings q \\
        --queries queries.tsv --clusters 50 --output_dir clusters
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch

from lib.arguments import arg, identity, parse_args
from lib.embeddings import Embeddings
from lib.files import (
    TrainingRow,
    UserError,
    file_fingerprint,
    read_training_file,
    write_json,
    write_lines,
    write_training_file,
)
from lib.launch import claim_output, echo, make_accelerator, run, versions
from lib.texts import open_texts, require_rows


@dataclass(kw_only=True)
class Args:
    train: str = arg(group="data", help="training file whose queries are clustered")
    queries_embeddings: str = arg(help="folder that encode.py --kind query wrote")
    queries: str | None = arg(
        None, help="the queries that were encoded; the summary then shows their texts"
    )
    nearest: int = arg(5, least=0, help="queries of each cluster in the summary, nearest first")
    output_dir: str = arg(help="folder for the new training file and the summary")

    clusters: int = arg(group="k-means", least=2, help="number of clusters (COCO-DR 50)")
    niter: int = arg(
        100, least=1, help="most iterations; a run that has converged ends before (COCO-DR 500)"
    )
    nredo: int = arg(5, least=1, help="runs from other starts; the best one is kept (COCO-DR 5)")
    sample: int = arg(0, least=0, help="number of random queries that train the centroids; 0 = all")
    seed: int = arg(42, least=0, help="seed of the starts and of the sample (COCO-DR 1234)")


def kmeans(
    vectors: np.ndarray, K: int, niter: int, nredo: int, sample: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """vectors (Q, D) float32 -> (cluster (Q,) int64, L2 distance to its centroid (Q,) float32).
    Every cluster has a query; they are numbered by size, equal ones by their first query.

    UserError: fewer than K vectors differ."""
    rows = slice(None)
    if 0 < sample < len(vectors):
        rows = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:sample])
    train = vectors[rows]
    faiss.omp_set_num_threads(torch.get_num_threads())
    # without these limits faiss samples 256 points per centroid, and warns below 39
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(train)}
    found = faiss.Kmeans(vectors.shape[1], K, niter=niter, nredo=nredo, seed=seed, **limits)
    found.train(train)
    squared, labels = found.assign(vectors)
    filled, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    if len(filled) < K:
        problem = f"--clusters {K}: {K - len(filled)} of them are empty, too few vectors differ"
        raise UserError(f"{problem} — give fewer, or check that the vectors of queries differ")
    number = np.argsort(np.lexsort((first, -sizes)))  # of each of faiss' clusters
    distances = np.sqrt(np.maximum(squared, 0))  # rounding may take |x|² + |c|² - 2xc below 0
    return number[labels], distances


def summary(clusters: np.ndarray, distances: np.ndarray, show, nearest: int) -> Iterator[str]:
    """Lines of text, cluster by cluster; show(row) is a query as it is to be read."""
    order = np.lexsort((distances, clusters))  # by cluster, then distance, then row
    edges = np.flatnonzero(np.diff(clusters[order])) + 1
    for cluster, members in enumerate(np.split(order, edges)):
        share = len(members) / len(clusters)
        mean = distances[members].mean(dtype=np.float64)
        yield f"cluster {cluster}: {len(members)} queries, {share:.2%}, mean distance {mean:.4g}"
        yield from (f"    {distances[row]:<10.4g} {show(row)}" for row in members[:nearest])


def main():
    args = parse_args(Args)
    accelerator, out = make_accelerator(), Path(args.output_dir)
    embeddings = Embeddings(args.queries_embeddings)
    if embeddings.sparse:
        problem = f"{embeddings.folder}: sparse vectors, k-means needs dense ones"
        raise UserError(f"{problem} — encode with a dense checkpoint")
    kind = embeddings.meta["kind"]
    if kind != "query":
        raise UserError(f"{embeddings.folder}: embeddings of kind {kind} — give those of queries")
    texts = open_texts(args.queries) if args.queries else None
    if texts and texts.fingerprint != embeddings.meta.get("input_fingerprint"):
        problem = f"{embeddings.folder}: not the embeddings of {args.queries}"
        raise UserError(f"{problem} — give the queries that were encoded")
    qids = [row.qid for _, row in read_training_file(args.train)]
    if not qids:
        raise UserError(f"{args.train}: no query in it — check the path")
    trained_on = min(args.sample or len(qids), len(qids))
    if args.clusters > trained_on:
        problem = f"--clusters {args.clusters}: more than the {trained_on} queries to"
        raise UserError(f"{problem} make them from — give fewer")
    inputs = {"embeddings": embeddings.fingerprint, "training file": file_fingerprint(args.train)}
    if claim_output(accelerator, out, identity(args, inputs), "meta.json"):
        return

    vectors = embeddings.take(require_rows(embeddings, qids, args.train, "query"))
    facts = {
        "queries": f"{len(qids)} of {embeddings.meta.get('model')}, {embeddings.dim} dimensions",
        "clusters": f"{args.clusters}, the best of {args.nredo} runs",
        "iterations": f"at most {args.niter}",
        "trained on": f"{trained_on} queries, seed {args.seed}",
    }
    echo(accelerator, "clustering", facts)
    clusters, distances = kmeans(
        vectors, args.clusters, args.niter, args.nredo, args.sample, args.seed
    )

    def show(row: int) -> str:
        if texts is None:
            return qids[row]
        return f"{qids[row]}  {' '.join(texts[texts.rows([qids[row]])[0]][1].split())}"

    def rows() -> Iterator[TrainingRow]:
        for (_, row), cluster in zip(read_training_file(args.train), clusters, strict=True):
            yield row._replace(cluster=int(cluster))

    write_training_file(out / "train.jsonl", rows())
    write_lines(out / "summary.txt", summary(clusters, distances, show, args.nearest))
    sizes = np.bincount(clusters).tolist()
    squared = float((distances.astype(np.float64) ** 2).mean())
    spread = {"sizes": sizes, "trained_on": trained_on, "mean_squared_distance": squared}
    write_json(out / "meta.json", {"source": embeddings.meta, **spread, "versions": versions()})
    median = int(np.median(sizes))
    shown = f"{args.clusters} clusters of {sizes[0]} to {sizes[-1]} queries, median {median}"
    print(f"{shown} -> {out}")


if __name__ == "__main__":
    run(main)
