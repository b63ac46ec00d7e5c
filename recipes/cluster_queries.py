"""Clusters of the training queries: the groups of group-robust training (COCO-DR, arXiv 2210.15212).

k-means (faiss, L2) over the query embeddings as encode.py stored them; each query belongs to its nearest centroid.
Deliberate deviations from the official code:
  1. All queries train the centroids, or the stated --sample (official: 256 per centroid, what faiss silently keeps;
     of MS MARCO's 503k queries 12,800).
  2. Clusters are numbered by size, 0 is the largest (official: as faiss happens to).
  3. They are a file of their own (official: a column of the mined negatives).

Clusters belong to a checkpoint: those of the next episode's embeddings are others, whatever their numbers.

Reads   --queries_embeddings: a folder that encode.py --kind query wrote, dense; --queries for texts in the summary
Writes  --output_dir: clusters.tsv (`qid TAB cluster`, in the order of the embeddings), summary.txt (each cluster's
        size, share, mean distance and nearest queries), meta.json last. The same command writes the same bytes (on one
        machine, with the same number of threads), and does all again where a run was killed.

    python -m recipes.cluster_queries --queries_embeddings q --queries queries.tsv --clusters 50 --output_dir clusters
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from transformers.hf_argparser import HfArg

from lib.embeddings import Embeddings
from lib.files import UserError, read_json, write_json, write_lines
from lib.launch import claim_output, echo, make_accelerator, parse_args, run, versions
from lib.texts import open_texts


@dataclass
class Args:
    queries_embeddings: str = HfArg(help="folder that encode.py --kind query wrote")
    clusters: int = HfArg(help="number of clusters K (COCO-DR 50)")
    output_dir: str = HfArg(help="where clusters.tsv and the summary go")
    queries: str = HfArg(
        default=None, help="the queries that were encoded: the summary then shows their texts"
    )
    nearest: int = HfArg(
        default=5,
        help="queries that the summary shows of each cluster, the nearest to its centroid",
    )
    niter: int = HfArg(
        default=100, help="iterations at most; a converged run ends by itself (COCO-DR 500)"
    )
    nredo: int = HfArg(
        default=5, help="runs from other starts, of which the best one counts (COCO-DR 5)"
    )
    sample: int = HfArg(
        default=0, help="queries that train the centroids, drawn at random; 0 = all"
    )
    seed: int = HfArg(default=42, help="of the starts and the sample (COCO-DR 1234)")


def kmeans(
    vectors: np.ndarray, K: int, niter: int, nredo: int, sample: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """vectors (Q, D) float32 -> (cluster (Q,) int64, L2 distance to its centroid (Q,) float32). Every cluster has a
    query; they are numbered by size, equal ones by their first query.

    UserError if fewer than K of the training vectors are there or differ."""
    rows = slice(None)
    if 0 < sample < len(vectors):
        rows = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:sample])
    train = vectors[rows]
    if len(train) < K:
        raise UserError(
            f"--clusters {K}: more than the {len(train)} queries to make them from — give fewer"
        )
    faiss.omp_set_num_threads(torch.get_num_threads())
    # else faiss samples where there are more than 256 points to a centroid, and warns where fewer than 39
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(train)}
    found = faiss.Kmeans(vectors.shape[1], K, niter=niter, nredo=nredo, seed=seed, **limits)
    found.train(train)
    squared, labels = found.assign(vectors)
    filled, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    if len(filled) < K:
        raise UserError(
            f"--clusters {K}: {K - len(filled)} of them are empty, too few vectors differ — give fewer, or check "
            "whether the checkpoint gives all queries one vector"
        )
    number = np.argsort(np.lexsort((first, -sizes)))  # of each of faiss' clusters
    return number[labels], np.sqrt(
        np.maximum(squared, 0)
    )  # of |x|² + |c|² - 2xc, which rounding may take below 0


def summary(clusters: np.ndarray, distances: np.ndarray, show, nearest: int) -> Iterator[str]:
    """Lines of text, cluster by cluster; show(row) is a query as it is to be read."""
    order = np.lexsort((distances, clusters))  # by cluster, then distance, then row
    for cluster, members in enumerate(
        np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1)
    ):
        share, distance = len(members) / len(clusters), distances[members].mean(dtype=np.float64)
        yield f"cluster {cluster}: {len(members)} queries, {share:.2%}, mean distance {distance:.4g}"
        yield from (f"    {distances[row]:<10.4g} {show(row)}" for row in members[:nearest])


def main():
    args = parse_args(Args)
    for name, least in {
        "clusters": 2,
        "nearest": 0,
        "niter": 1,
        "nredo": 1,
        "sample": 0,
        "seed": 0,
    }.items():
        if getattr(args, name) < least:
            raise UserError(
                f"--{name} {getattr(args, name)}: at least {least} — give a larger number"
            )
    accelerator, out = make_accelerator(), Path(args.output_dir)
    embeddings = Embeddings(args.queries_embeddings)
    if embeddings.sparse:
        raise UserError(
            f"{embeddings.folder}: sparse vectors, k-means needs dense ones — encode with a dense checkpoint"
        )
    if embeddings.meta["kind"] != "query":
        raise UserError(
            f"{embeddings.folder}: embeddings of kind {embeddings.meta['kind']} — give those of queries"
        )
    source = {
        key: embeddings.meta.get(key)
        for key in ("model", "model_hash", "input_fingerprint", "count")
    }
    texts = open_texts(args.queries) if args.queries else None
    if texts and texts.fingerprint != source["input_fingerprint"]:
        raise UserError(
            f"{embeddings.folder}: not the embeddings of {args.queries} — give the queries it was made of"
        )
    if claim_output(args, accelerator, "meta.json"):
        if read_json(out / "meta.json")["source"] != source:
            raise UserError(
                f"{out}: of other embeddings than {embeddings.folder} holds now — remove the folder"
            )
        return print(f"{out} is complete")

    Q = len(embeddings)
    trained_on = min(args.sample or Q, Q)
    facts = {
        "queries": f"{Q} of {source['model']}, {embeddings.dim} dimensions",
        "k-means": f"{args.clusters} clusters, the best of {args.nredo} runs of at most {args.niter} iterations",
        "trained on": f"{'all' if trained_on == Q else trained_on} queries, seed {args.seed}",
    }
    echo(accelerator, "clustering", facts)
    ids, vectors = embeddings.ids(range(Q)), embeddings.take(range(Q))
    finite = np.isfinite(vectors.sum(1))
    if not finite.all():
        raise UserError(
            f"{embeddings.folder}: the vector of {ids[finite.argmin()]} is not finite — encode again"
        )
    clusters, distances = kmeans(
        vectors, args.clusters, args.niter, args.nredo, args.sample, args.seed
    )

    def show(row: int) -> str:
        return (
            f"{ids[row]}  {' '.join(texts[texts.rows([ids[row]])[0]][1].split())}"
            if texts
            else ids[row]
        )

    write_lines(
        out / "clusters.tsv",
        (f"{qid}\t{cluster}" for qid, cluster in zip(ids, clusters, strict=True)),
    )
    write_lines(out / "summary.txt", summary(clusters, distances, show, args.nearest))
    sizes = np.bincount(clusters).tolist()
    spread = {
        "sizes": sizes,
        "trained_on": trained_on,
        "mean_squared_distance": float((distances.astype(np.float64) ** 2).mean()),
    }
    write_json(out / "meta.json", {"source": source, **spread, "versions": versions()})
    print(
        f"{args.clusters} clusters of {sizes[0]} to {sizes[-1]} queries, the median {int(np.median(sizes))} -> {out}"
    )


if __name__ == "__main__":
    run(main)
