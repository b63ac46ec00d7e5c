"""Mine hard negatives for the queries of a training set: from BM25, from embeddings, or from a run file.

What the retriever ranks high and nobody judged relevant is a hard negative: ANCE (arXiv 2007.00808), RetroMAE's and
LexMAE's second stages. Deliberate deviations from their official code:
  1. Every judged positive of a query is removed, not one (ANCE), and so is every exact copy of its text.
  2. Negatives are drawn with a seed per query; the order of processes and queries does not matter (ANCE: unseeded).
  3. The file is best first also when its passages were sampled (ANCE: shuffled), so that --negatives_depth can cut it.
  4. A list shorter than asked stays short, and the audit counts it (FlagEmbedding fills it with random passages).

Probable false negatives, which score near a positive or above it, are dropped by the retriever's own scores or by a
cross-encoder's: --max_score_margin, --max_score_ratio, --teacher_scores.

Reads   embeddings of queries and corpus (encode.py) | --bm25 | a run; corpus texts (for exact copies), qrels; teacher
        scores of all candidates (recipes/rerank.py)
Writes  --output_dir: negatives.tsv (`qid TAB pid,pid,...`), audit.json last. A killed run: the same command again.

CPU toy   python mine_negatives.py --bm25 --queries queries.jsonl --corpus corpus.jsonl --qrels qrels/train.tsv \\
              --depth 100 --output_dir negatives-bm25
1 GPU     accelerate launch mine_negatives.py --queries_embeddings q --corpus_embeddings p --corpus corpus.jsonl \\
              --qrels qrels/train.tsv --depth 200 --output_dir negatives-1
N GPUs    accelerate launch --multi_gpu --num_processes 8 mine_negatives.py ...
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from lib.bm25 import BM25
from lib.embeddings import Embeddings
from lib.files import UserError, line_of, read_qrels, read_run, write_json, write_lines
from lib.groups import TeacherScores
from lib.inverted import Sparse
from lib.launch import claim_output, describe, echo, make_accelerator, parse_args, run, versions
from lib.search import DenseIndex, check_pair
from lib.text import step_seed
from lib.texts import open_texts

QUERIES_AT_A_TIME = 4096


@dataclass
class Args:
    # where candidates come from: one of these three
    queries_embeddings: str = HfArg(default=None, help="folder that encode.py --kind query wrote")
    corpus_embeddings: str = HfArg(default=None, help="folder that encode.py --kind passage wrote")
    bm25: bool = HfArg(default=False, help="search --corpus for --queries with BM25")
    run: str = HfArg(default=None, help="a run file, TREC or MS MARCO")
    # data
    corpus: str = HfArg(
        default=None, help="passage texts: copies of positives are found by their text"
    )
    queries: str = HfArg(default=None, help="query texts, for --bm25")
    titles: str = HfArg(default=None, help="`pid TAB title` file to join to the corpus")
    qrels: str = HfArg(
        default=None, help="training judgments: their queries are mined, grade > 0 is a positive"
    )
    output_dir: str = HfArg(default=None, help="where negatives.tsv and audit.json go")
    # search
    depth: int = HfArg(default=200, help="ranks to look at (RetroMAE, ANCE 200; LexMAE 512)")
    index: str = HfArg(
        default=None, help="faiss factory string, as IVF4096,Flat; default: exact search"
    )
    k1: float = HfArg(default=0.9, help="BM25 (Anserini's for passages)")
    b: float = HfArg(default=0.4, help="BM25 (Anserini's for passages)")
    bm25_index: str = HfArg(
        default=None, help="folder of the BM25 index, made if absent; default: in --output_dir"
    )
    sparse_index: str = HfArg(
        default=None, help="folder of the index of sparse vectors, the same way"
    )
    bits: int = HfArg(default=32, help="of a weight in it: 32 exact, 16 or 8 rounded")
    # choice
    num_negatives: int = HfArg(
        default=0, help="negatives kept per query (ANCE 20, COCO-DR 30); 0 = all that are left"
    )
    sample: Literal["top", "uniform"] = HfArg(
        default="top", help="the best ones, or uniform over the ranks (ANCE)"
    )
    skip_top: int = HfArg(default=0, help="leave out so many of the first ranks")
    teacher_scores: str = HfArg(
        default=None, help="`qid TAB pid TAB score` that the next two filter by (rerank.py)"
    )
    max_score_margin: float = HfArg(
        default=None, help="drop what scores above the lowest positive minus this"
    )
    max_score_ratio: float = HfArg(
        default=None, help="drop what scores above s - (1 - ratio)·|s|, s the lowest positive"
    )
    ignore_identical_ids: bool = HfArg(default=False, help="drop passages whose id is the query's")
    seed: int = HfArg(default=42, help="of --sample uniform and of faiss training")


def score_limit(positive_score: float, margin: float | None, ratio: float | None) -> float:
    """The highest score a negative may have beside a positive of this score. The ratio takes its share of |s|, so that
    it lowers the limit for negative scores too (s·ratio would raise it)."""
    limits = [np.inf]
    if margin is not None:
        limits.append(positive_score - margin)
    if ratio is not None:
        limits.append(positive_score - (1 - ratio) * abs(positive_score))
    return min(limits)


def main():
    # ---- setup
    args = parse_args(Args)
    sources = [bool(args.queries_embeddings or args.corpus_embeddings), args.bm25, bool(args.run)]
    if sum(sources) != 1 or (
        sources[0] and not (args.queries_embeddings and args.corpus_embeddings)
    ):
        raise UserError(
            "what to mine from — give --queries_embeddings and --corpus_embeddings, or --bm25, or --run"
        )
    if not (args.qrels and args.output_dir and args.corpus):
        raise UserError("--corpus, --qrels and --output_dir are needed — see --help")
    if args.bm25 and not args.queries:
        raise UserError("--bm25 searches texts — give --queries")
    if args.depth <= args.skip_top or args.skip_top < 0 or args.num_negatives < 0:
        raise UserError(
            f"--depth {args.depth} --skip_top {args.skip_top}: no rank is left — raise --depth"
        )
    filtered = args.max_score_margin is not None or args.max_score_ratio is not None
    if args.teacher_scores and not filtered:
        raise UserError(
            "--teacher_scores filters nothing — give --max_score_margin or --max_score_ratio"
        )
    accelerator = make_accelerator()
    qrels = read_qrels(args.qrels)
    positives = {
        qid: [p for p, grade in judged.items() if grade > 0] for qid, judged in qrels.items()
    }
    qids = [qid for qid, pids in positives.items() if pids]
    if not qids:
        raise UserError(
            f"{args.qrels}: no passage is judged relevant (grade > 0) — mining needs positives"
        )
    with accelerator.main_process_first():
        corpus = open_texts(args.corpus, args.titles)
        queries = open_texts(args.queries) if args.bm25 else None
    positive_rows = {qid: corpus.rows(positives[qid]) for qid in qids}
    for qid, rows in positive_rows.items():
        if rows.min() < 0:
            pid = positives[qid][int(rows.argmin())]
            raise UserError(
                f"{line_of(args.qrels, qid, pid)}: passage {pid} is not in {args.corpus} — give its corpus"
            )
    if not args.run and not args.bm25:
        queries, vectors = Embeddings(args.queries_embeddings), Embeddings(args.corpus_embeddings)
        check_pair(queries, vectors, args.index)
        if vectors.meta["input_fingerprint"] != corpus.fingerprint:
            raise UserError(
                f"{vectors.folder}: not the embeddings of {args.corpus} — encode this corpus"
            )
    if queries is not None:
        query_rows = queries.rows(qids)
        if query_rows.min() < 0:
            qid = qids[int(query_rows.argmin())]
            raise UserError(
                f"{line_of(args.qrels, qid)}: query {qid} is not in the queries — give those of these qrels"
            )
    if claim_output(args, accelerator, "audit.json"):
        accelerator.print(f"{args.output_dir} is complete")
        return

    # ---- candidates: for a block of queries, (scores, corpus rows) lists and the scores of the positives
    teacher = TeacherScores(args.teacher_scores, qids, corpus) if args.teacher_scores else None
    own_scores = filtered and not teacher
    if args.run:
        stored = read_run(args.run)
        if not stored.keys() & positives.keys():
            raise UserError(
                f"{args.run}: none of its queries is judged in {args.qrels} — give matching files"
            )

        def candidates(block):
            lists = []
            for qid in (qids[at] for at in block):
                entry = stored.get(qid)
                best = np.argsort(entry.ranks, kind="stable")[: args.depth] if entry else []
                rows = (
                    corpus.rows([entry.pids[at] for at in best])
                    if entry
                    else np.zeros(0, dtype=np.int64)
                )
                if len(rows) and rows.min() < 0:
                    pid = entry.pids[best[int(rows.argmin())]]
                    raise UserError(
                        f"{line_of(args.run, qid, pid)}: passage {pid} is not in {args.corpus}"
                    )
                lists.append((entry.scores[best] if entry else np.zeros(0, dtype=np.float32), rows))
            if not own_scores:
                return lists, None
            limits = []  # a positive that the run does not list scores at most what its last passage does
            for at, (scores, rows) in zip(block, lists, strict=True):
                listed = dict(zip(rows.tolist(), scores.tolist(), strict=True))
                last = min(scores, default=0.0)
                limits.append([listed.get(row, last) for row in positive_rows[qids[at]].tolist()])
            return lists, limits

    else:
        folder = args.bm25_index or Path(args.output_dir) / "bm25"
        bm25 = args.bm25
        if bm25:
            index = BM25.open(corpus, folder, args.k1, args.b, accelerator)
        elif vectors.sparse:
            folder = args.sparse_index or Path(args.output_dir) / "postings"
            index = Sparse.open(vectors, folder, args.bits, accelerator)
        else:
            index = DenseIndex(vectors, accelerator, args.index, args.seed)

        def candidates(block):
            asked = (
                [queries[row][1] for row in query_rows[block]]
                if bm25
                else queries.take(query_rows[block])
            )
            lists = list(zip(*index.search(asked, args.depth), strict=True))
            return lists, index.score(
                asked, [positive_rows[qids[at]] for at in block]
            ) if own_scores else None

    source = args.run or (
        "BM25" if args.bm25 else f"{vectors.meta['model']}, {args.index or 'exact search'}"
    )
    facts = {
        "candidates": f"the first {args.depth} of {source}",
        "queries": len(qids),
        "passages": len(corpus),
    }
    echo(accelerator, "mining", {**facts, "running on": describe(accelerator)})

    # ---- mine
    counts, sizes, out = Counter(), [], Path(args.output_dir)

    def mined():
        for start in tqdm(
            range(0, len(qids), QUERIES_AT_A_TIME),
            "queries",
            disable=not accelerator.is_main_process,
        ):
            block = np.arange(start, min(start + QUERIES_AT_A_TIME, len(qids)))
            lists, positive_scores = candidates(block)
            if not accelerator.is_main_process:
                continue
            for at, (scores, rows) in zip(block, lists, strict=True):
                qid = qids[at]
                scores, rows = scores[rows >= 0], rows[rows >= 0]
                positive = np.isin(rows, positive_rows[qid])
                copy = (
                    np.isin(corpus.text_keys[rows], corpus.text_keys[positive_rows[qid]])
                    & ~positive
                )
                left, limit = ~positive & ~copy, np.inf
                if teacher:
                    scores = np.where(left, 0, -np.inf)
                    scores[left] = teacher(np.full(left.sum(), at), rows[left])
                    own = teacher(np.full(len(positive_rows[qid]), at), positive_rows[qid])
                elif own_scores:
                    own = positive_scores[at - start]
                if filtered:
                    limit = score_limit(min(own), args.max_score_margin, args.max_score_ratio)
                too_high = (scores > limit) & left
                left &= ~too_high
                left[: args.skip_top] = False
                chosen = rows[left]
                if args.ignore_identical_ids:
                    chosen = chosen[chosen != corpus.rows([qid])[0]]
                if 0 < args.num_negatives < len(chosen):
                    if args.sample == "uniform":
                        draw = np.random.default_rng(step_seed(args.seed, *qid.encode()))
                        chosen = chosen[
                            np.sort(draw.choice(len(chosen), args.num_negatives, replace=False))
                        ]
                    chosen = chosen[: args.num_negatives]
                counts.update(
                    positive=int(positive.sum()), copy=int(copy.sum()), too_high=int(too_high.sum())
                )
                sizes.append(len(chosen))
                if len(chosen):
                    yield f"{qid}\t{','.join(corpus.ids(chosen))}"

    if accelerator.is_main_process:
        write_lines(out / "negatives.tsv", mined())
    else:
        list(mined())

    # ---- audit
    if accelerator.is_main_process:
        audit = {
            **facts,
            "negatives per query": f"min {min(sizes)}, median {int(np.median(sizes))}, max {max(sizes)}",
            "positives removed": counts["positive"],
            "copies of positives removed": counts["copy"],
            "removed by score": counts["too_high"],
            "queries left without": sizes.count(0),
            "queries with fewer than asked": sum(size < args.num_negatives for size in sizes),
        }
        echo(accelerator, f"audit of {out / 'negatives.tsv'}", audit)
        write_json(out / "audit.json", {**audit, "versions": versions()})


if __name__ == "__main__":
    run(main)
