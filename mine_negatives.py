"""Mine hard negatives for training queries: from BM25, from embeddings, or from lists in a file.

What the retriever ranks high and nobody judged relevant is a hard negative: ANCE (arXiv
2007.00808), RetroMAE's and LexMAE's second stages. Deliberate deviations from their code:
  1. Every judged positive of a query is removed, not one (ANCE), and every exact copy of its text.
  2. Negatives are drawn with a seed per query: the order of processes and queries does not matter
     (ANCE: unseeded).
  3. Negatives stay best first when they were sampled (ANCE: shuffled), so training can use the
     first ones only.
  4. A list that is shorter than asked stays short, and the audit counts it (FlagEmbedding fills it
     with random passages).

Probable false negatives, which score near a positive or above it, are dropped with
--max_score_margin. The scores are those of the retriever, or of a cross-encoder when --run is a
training file that recipes/score_pairs.py scored; its scores are then kept (its clusters are not).

Reads   embeddings of queries and corpus (encode.py) | --bm25 | --run: a run, TREC or MS MARCO;
        lists that were mined elsewhere (`qid TAB pid,pid,...`); top1000.dev; a training file
        corpus texts, to find exact copies; qrels
Writes  --output_dir: train.jsonl (one line per query with a positive, negatives best first), then
        audit.json. To continue a killed run, give the same command again.

CPU toy   python mine_negatives.py --bm25 --queries queries.jsonl --corpus corpus.jsonl \\
              --qrels qrels/train.tsv --depth 100 --output_dir negatives-bm25
1 GPU     accelerate launch mine_negatives.py --queries_embeddings q --corpus_embeddings p \\
              --corpus corpus.jsonl --qrels qrels/train.tsv --depth 200 --output_dir negatives-1
N GPUs    accelerate launch --multi_gpu --num_processes 8 mine_negatives.py ...
"""

import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from lib.arguments import arg, identity, parse_args
from lib.files import (
    RunList,
    TrainingRow,
    UserError,
    file_fingerprint,
    first_line,
    read_positives,
    read_run,
    write_json,
    write_training_file,
)
from lib.index import Index, check_identical_ids, open_index
from lib.launch import claim_output, describe, echo, make_accelerator, run, versions
from lib.text import step_seed
from lib.texts import Texts, open_texts, require_rows

QUERIES_AT_A_TIME = 4096
SAMPLE_QUERIES = 256  # with which a dry run measures the search
SAMPLE_VECTORS = 1 << 15
NO_LIST = RunList([], np.zeros(0, dtype=np.float32))


@dataclass(kw_only=True)
class Args:
    bm25: bool = arg(
        False, group="source (one of three)", help="search --corpus for --queries with BM25"
    )
    queries_embeddings: str | None = arg(None, help="folder that encode.py --kind query wrote")
    corpus_embeddings: str | None = arg(None, help="folder that encode.py --kind passage wrote")
    run: str | None = arg(None, help="file with lists of passages: a run, mined lists, train.jsonl")

    corpus: str = arg(group="data", help="passage texts; they also tell exact copies of positives")
    queries: str | None = arg(None, help="query texts, for --bm25")
    qrels: str = arg(help="training judgments; a passage with a grade above 0 is a positive")
    output_dir: str = arg(help="folder for train.jsonl and audit.json")

    depth: int = arg(
        200,
        group="search",
        least=1,
        most=1_000_000,
        help="number of ranks to take (RetroMAE, ANCE 200; LexMAE 512)",
    )
    k1: float = arg(0.9, least=0, help="parameter of BM25; the default is Anserini's for passages")
    b: float = arg(0.4, least=0, most=1, help="parameter of BM25; as k1")
    bm25_index: str | None = arg(
        None, help="folder of the index of BM25 or sparse vectors, built if absent; in --output_dir"
    )

    num_negatives: int = arg(
        0, group="choice", least=0, help="negatives per query (ANCE 20, COCO-DR 30); 0 keeps all"
    )
    sample: Literal["top", "uniform"] = arg(
        "top", help="keep the best negatives, or draw them uniformly from all ranks (ANCE)"
    )
    max_score_margin: float | None = arg(
        None,
        least=0,
        help="drop passages that score above the lowest positive of the query minus this",
    )
    ignore_identical_ids: bool = arg(False, help="drop passages whose id is that of the query")
    seed: int = arg(42, least=0, help="seed of --sample uniform")
    dry_run: bool = arg(
        False, group="runtime", help="show the inputs, estimate memory and time, then stop"
    )


class Lists:
    """The lists of a file in the place of an index; queries are ids here.

    UserError: no list is of a query in `qids`, a passage is unknown, scores are missing."""

    def __init__(self, path: str, corpus: Texts, qids: Sequence[str], need_scores: bool):
        self.path, self.name, self.corpus = path, path, corpus
        entries, self.lists, scored = read_run(path), {}, False
        for qid in qids:
            entry = entries.pop(qid, NO_LIST)
            rows = require_rows(corpus, entry.pids, path, "passage")
            best = np.argsort(-entry.scores, kind="stable")
            self.lists[qid] = scores, _ = entry.scores[best], rows[best]
            scored |= bool((scores != -np.arange(1, len(scores) + 1)).any())
        if not any(len(rows) for _, rows in self.lists.values()):
            raise UserError(f"{path}: no query in it is judged — give the qrels of its queries")
        if need_scores and not scored:
            wrong = f"{path}: --max_score_margin needs scores, which this file does not have"
            raise UserError(f"{wrong} — score a training file with recipes/score_pairs.py")
        self.teacher = scored and first_line(path).startswith("{")  # a training file with scores

    def search(self, qids: Sequence[str], k: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        lists = [self.lists[qid] for qid in qids]
        return [scores[:k] for scores, _ in lists], [rows[:k] for _, rows in lists]

    def score(self, qids: Sequence[str], rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The scores of given passages. One that a list does not have scores at most as its last
        passage; in a training file with scores this is an error."""
        found = []
        for qid, wanted in zip(qids, rows, strict=True):
            scores, listed = self.lists[qid]
            known = dict(zip(listed.tolist(), scores.tolist(), strict=True))
            for row in wanted.tolist():
                if self.teacher and row not in known:
                    pair = f"query {qid} and passage {self.corpus.id(row)}"
                    raise UserError(f"{self.path}: no score for {pair} — score all positives")
            last = min(known.values(), default=0.0)
            found.append(np.float32([known.get(row, last) for row in wanted.tolist()]))
        return found


def preview(args: Args, corpus: Texts, positives: dict[str, list[str]]) -> dict[str, str]:
    """What a dry run shows of the inputs: the first query, and the texts of its positives."""
    qid, pids = next(iter(positives.items()))
    text = "(add --queries to see its text)"
    if args.queries:
        queries = open_texts(args.queries)
        text = queries[require_rows(queries, [qid], args.qrels, "query")[0]][1]
    facts = {"judged pairs": sum(map(len, positives.values()))}
    facts["first query"] = f"{qid}: {text[:90]}"
    for pid, row in zip(pids[:2], corpus.rows(pids[:2]), strict=True):
        titles, text = corpus[row]
        facts[f"positive {pid}"] = " | ".join([*titles, text])[:90]
    return facts


def estimate(args: Args, index: Index | Lists, asked: Sequence) -> dict[str, str]:
    """What a dry run says of time and memory. Time is measured with a part of the queries, and of
    dense vectors with a part of the corpus too; not if this would write an index first."""
    if args.run:
        listed = sum(len(rows) > 0 for _, rows in index.lists.values())
        return {"queries with a list": listed, "memory": memory_text(0)}
    corpus = index.corpus
    dense = not (args.bm25 or corpus.sparse)
    ready = dense or index.folder.is_dir()
    wanted = 0
    duration = "unknown, because an index must be built first"
    if dense:  # keys of the best passages
        wanted = min(len(asked), QUERIES_AT_A_TIME) * args.depth * corpus.max_chunks * 16
    elif args.bm25 and not ready:  # two numbers of 4 bytes for each word, while it is built
        words = [len(corpus[row][1].split()) for row in range(min(len(corpus), 1000))]
        wanted = 8 * np.mean(words) * len(corpus)
    if ready:
        times = max(1, len(asked) / SAMPLE_QUERIES)
        if dense:
            part = index.engine.stop - index.engine.start
            times *= max(1, part / SAMPLE_VECTORS)
            index.engine.stop = index.engine.start + min(part, SAMPLE_VECTORS)
        index.search(asked[:1], args.depth)  # compiles
        began = time.perf_counter()
        index.search(asked[:SAMPLE_QUERIES], args.depth)
        duration = f"about {(time.perf_counter() - began) * times:.1f} s for the search"
    return {"time": duration, "memory": memory_text(wanted)}


def memory_text(more: float) -> str:
    """The largest memory of this process until now, and `more` bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used *= 1 if sys.platform == "darwin" else 1024
    return f"about {(used + more) / 1e9:.1f} GB for each process"


def main():
    # ---- setup
    args = parse_args(Args)
    accelerator = make_accelerator()
    out = Path(args.output_dir)
    index = open_index(
        bm25=(args.k1, args.b) if args.bm25 else None,
        run=bool(args.run),
        texts=(args.queries, args.corpus),
        embeddings=(args.queries_embeddings, args.corpus_embeddings),
        folder=Path(args.bm25_index or out / "index"),
    )
    positives = read_positives(args.qrels)
    if args.ignore_identical_ids:
        check_identical_ids(args.qrels, positives)
    qids = list(positives)
    if not qids:
        raise UserError(f"{args.qrels}: no passage has a grade above 0 — mining needs positives")
    corpus = open_texts(args.corpus)
    flat = [pid for qid in qids for pid in positives[qid]]
    edges = np.cumsum([len(positives[qid]) for qid in qids])[:-1]
    positive_rows = np.split(require_rows(corpus, flat, args.qrels, "passage"), edges)
    inputs = {"corpus": corpus.fingerprint, "qrels": file_fingerprint(args.qrels)}
    if index is None:
        index, asked = Lists(args.run, corpus, qids, args.max_score_margin is not None), qids
        inputs["run"] = file_fingerprint(args.run)
    else:
        asked = require_rows(index.queries, qids, args.qrels, "query")
        inputs |= index.inputs
    if args.corpus_embeddings and index.corpus.meta.get("input_fingerprint") != corpus.fingerprint:
        problem = f"{args.corpus_embeddings}: not the embeddings of {args.corpus}"
        raise UserError(f"{problem} — encode it")
    facts = {"candidates": f"the first {args.depth} of {index.name}", "queries": len(qids)}
    facts["passages"] = len(corpus)
    if args.dry_run:
        facts |= preview(args, corpus, positives)
        facts |= estimate(args, index, asked)
        return echo(accelerator, "dry run: mining", facts)
    if claim_output(accelerator, args.output_dir, identity(args, inputs), "audit.json"):
        return
    echo(accelerator, "mining", {**facts, "running on": describe(accelerator)})

    # ---- mine
    counts, sizes = Counter(), []
    keep_scores = bool(args.run) and index.teacher
    need_scores = keep_scores or args.max_score_margin is not None

    def mined():
        hidden = not accelerator.is_main_process
        for start in tqdm(range(0, len(qids), QUERIES_AT_A_TIME), "queries", disable=hidden):
            block = slice(start, start + QUERIES_AT_A_TIME)
            lists = index.search(asked[block], args.depth)  # by all processes
            own = [None] * len(lists[0])
            if need_scores:
                own = index.score(asked[block], positive_rows[block])
            if not hidden:
                yield from map(chosen, qids[block], positive_rows[block], own, *lists)

    def chosen(qid, positive, positive_scores, scores, rows) -> TrainingRow:
        """A line of the training file, from the list of a query."""
        scores, rows = scores[rows >= 0], rows[rows >= 0]
        judged = np.isin(rows, positive)
        copy = np.isin(corpus.text_keys[rows], corpus.text_keys[positive]) & ~judged
        left = ~judged & ~copy
        counts.update(positive=int(judged.sum()), copy=int(copy.sum()))
        if args.max_score_margin is not None:
            too_high = left & (scores > positive_scores.min() - args.max_score_margin)
            counts.update(too_high=int(too_high.sum()))
            left &= ~too_high
        if args.ignore_identical_ids:
            left &= rows != corpus.rows([qid])[0]
        kept = np.flatnonzero(left)
        if 0 < args.num_negatives < len(kept) and args.sample == "uniform":
            draw = np.random.default_rng(step_seed(args.seed, *qid.encode()))
            kept = np.sort(draw.choice(kept, args.num_negatives, replace=False))
        kept = kept[: args.num_negatives or None]
        sizes.append(len(kept))
        return TrainingRow(
            qid=qid,
            pos=positives[qid],
            neg=corpus.ids(rows[kept]),
            pos_scores=positive_scores.tolist() if keep_scores else None,
            neg_scores=scores[kept].tolist() if keep_scores else None,
            cluster=None,
        )

    if not accelerator.is_main_process:
        list(mined())
        return
    write_training_file(out / "train.jsonl", mined())

    # ---- audit
    median = int(np.median(sizes))
    audit = {
        **facts,
        "negatives per query": f"min {min(sizes)}, median {median}, max {max(sizes)}",
        "positives removed": counts["positive"],
        "copies of positives removed": counts["copy"],
        "removed by score": counts["too_high"],
        "queries left without": sizes.count(0),
        "queries with fewer than asked": sum(size < args.num_negatives for size in sizes),
    }
    echo(accelerator, f"audit of {out / 'train.jsonl'}", audit)
    write_json(out / "audit.json", {**audit, "versions": versions()})


if __name__ == "__main__":
    run(main)
