"""Search, or take run files, and measure: full ranking, re-ranking of candidates, fusion, significance.

The run comes from embeddings (exact search, or any faiss index), from BM25, or from files; several files are fused by
reciprocal rank. Metrics are trec_eval's (through pytrec_eval) and RR@k by the MS MARCO definition; trec_eval on the
run.trec written here prints the same numbers. Deliberate deviations from the evaluation scripts of the papers:
  1. Queries without a result count 0 in every metric (beir and pytrec_eval drop them).
  2. R@k is the fraction of the relevant passages found (LexMAE's recall@k, success, is Success@k here).
  3. --relevance_level applies to every binary metric, RR included (ANCE's notebook tests pid > 0 for grade > 0).
  4. Ties are broken as trec_eval breaks them, score descending, then id descending; --ties rank follows the run's rank
     column, as the MS MARCO script does.

Reads   embeddings of queries and corpus (encode.py) | --bm25 with texts | run files; qrels: see lib/files.py
Writes  --output_dir: run.trec, per_query.tsv (qid, split, one column per metric), metrics.json last

CPU toy   python evaluate.py --bm25 --queries queries.jsonl --corpus corpus.jsonl --qrels test.tsv --output_dir out
1 GPU     accelerate launch evaluate.py --queries_embeddings q --corpus_embeddings p --qrels test.tsv --output_dir out
N GPUs    accelerate launch --multi_gpu --num_processes 8 evaluate.py ...   (each searches its part of the corpus)
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from transformers.hf_argparser import HfArg

from lib.bm25 import BM25
from lib.embeddings import Embeddings
from lib.files import (
    RunList,
    UserError,
    line_of,
    read_candidates,
    read_json,
    read_qrels,
    read_run,
    write_json,
    write_lines,
    write_run,
)
from lib.inverted import Sparse
from lib.launch import claim_output, describe, echo, make_accelerator, parse_args, run, versions
from lib.metrics import (
    bootstrap_interval,
    metric_name,
    mrr_at_k,
    order,
    randomisation_test,
    reciprocal_rank_fusion,
    score_run,
)
from lib.search import DenseIndex, check_pair
from lib.texts import open_texts


@dataclass
class Args:
    # what is evaluated: one of these three
    queries_embeddings: str = HfArg(default=None, help="folder that encode.py --kind query wrote")
    corpus_embeddings: str = HfArg(default=None, help="folder that encode.py --kind passage wrote")
    bm25: bool = HfArg(default=False, help="search --corpus for --queries with BM25")
    run: list[str] = HfArg(
        default_factory=list, help="run files; several are fused by reciprocal rank"
    )
    # data
    qrels: list[str] = HfArg(
        default_factory=list, help="judgments; several files are several splits, named after them"
    )
    output_dir: str = HfArg(default=None, help="where run.trec, per_query.tsv and metrics.json go")
    queries: str = HfArg(default=None, help="query texts, for --bm25")
    corpus: str = HfArg(default=None, help="passage texts, for --bm25")
    titles: str = HfArg(default=None, help="`pid TAB title` file to join to the corpus")
    candidates: str = HfArg(default=None, help="re-rank only these: top1000.dev or a run")
    allow_unknown: bool = HfArg(
        default=False, help="judged passages that the corpus lacks count as not found"
    )
    # search
    depth: int = HfArg(default=1000, help="passages per query in the run")
    index: str = HfArg(
        default=None, help="faiss factory string, as IVF4096,Flat or HNSW32; default: exact search"
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
    # metrics
    metrics: list[str] = HfArg(
        default_factory=lambda: [
            "RR@10",
            "nDCG@10",
            "AP",
            "R@100",
            "R@1000",
            "Success@5",
            "Hole@10",
        ],
        help="nDCG@k RR@k (MRR@k) R@k (Recall@k) AP (MAP) P@k Success@k Hole@k",
    )
    relevance_level: int = HfArg(
        default=1, help="lowest relevant grade of binary metrics; TREC DL passages 2"
    )
    ties: Literal["score", "rank"] = HfArg(
        default="score", help="order of a run: as trec_eval, or its rank column"
    )
    ignore_identical_ids: bool = HfArg(
        default=False, help="drop passages whose id is the query's (ArguAna, Quora)"
    )
    compare: str = HfArg(
        default=None, help="a second run file: differences with paired test and interval"
    )
    seed: int = HfArg(default=0, help="of bootstrap, randomisation test and faiss training")


def search(args, accelerator, qids, qrels_of) -> tuple[dict[str, RunList], dict[str, str]]:
    """run[qid] for the judged queries, and facts worth printing."""
    if args.bm25:
        with accelerator.main_process_first():
            corpus, queries = open_texts(args.corpus, args.titles), open_texts(args.queries)
        facts = {
            "searched": f"{len(corpus)} passages with BM25, k1 {args.k1}, b {args.b} (bm25s, Lucene's variant)"
        }
    else:
        queries, corpus = Embeddings(args.queries_embeddings), Embeddings(args.corpus_embeddings)
        check_pair(queries, corpus, args.index)
        facts = {
            "searched": f"{len(corpus)} passages, {args.index or 'exact'}, encoded by {corpus.meta['model']}"
        }
    rows = queries.rows(qids)
    if (rows < 0).any():
        qid = qids[int(rows.argmin())]
        raise UserError(
            f"{line_of(qrels_of[qid], qid)}: query {qid} is not in {args.queries or queries.folder} "
            f"({(rows < 0).sum()} such) — give the queries of these qrels"
        )
    if args.bm25:
        folder = args.bm25_index or Path(args.output_dir) / "bm25"
        index, asked = (
            BM25.open(corpus, folder, args.k1, args.b, accelerator),
            [queries[row][1] for row in rows],
        )
    else:
        if corpus.sparse:
            folder = Path(args.sparse_index or Path(args.output_dir) / "postings")
            index = Sparse.open(corpus, folder, args.bits, accelerator)
            size = sum(path.stat().st_size for path in folder.iterdir())
            facts["index"] = f"{size / 1e6:.1f} MB, {args.bits} bits a weight"
        else:
            index = DenseIndex(
                corpus, accelerator, None if args.candidates else args.index, args.seed
            )
        asked = queries.take(rows)
    if args.candidates:
        listed = read_candidates(args.candidates)
        wanted = [corpus.rows(listed.get(qid, ())) for qid in qids]
        lost = sum(int((w < 0).sum()) for w in wanted)
        empty = sum(qid not in listed for qid in qids)
        facts["candidates"] = (
            f"{args.candidates}; {lost} not in the corpus, {empty} queries without any"
        )
        wanted = [np.sort(w[w >= 0]) for w in wanted]
        lists = list(zip(index.score(asked, wanted), wanted, strict=True))
    else:
        lists = list(zip(*index.search(asked, args.depth + args.ignore_identical_ids), strict=True))
    found, dropped = {}, 0
    for qid, (scores, hits) in zip(qids, lists, strict=True):
        best = np.argsort(
            -scores, kind="stable"
        )  # rows ascend or are in order already: ties by corpus row
        best = best[hits[best] >= 0]
        pids = corpus.ids(hits[best])
        keep = [at for at, pid in enumerate(pids) if not (args.ignore_identical_ids and pid == qid)]
        dropped += len(pids) - len(keep)
        keep = keep[: args.depth]
        ranks = np.arange(1, len(keep) + 1, dtype=np.int32)
        found[qid] = RunList(
            [pids[at] for at in keep], scores[best][keep].astype(np.float32), ranks
        )
    if args.ignore_identical_ids:
        facts["identical ids dropped"] = dropped
    return found, facts


def check_judged_passages(args, qrels_by_split) -> str | None:
    """The judged passages that the corpus lacks: refused, or said if --allow_unknown."""
    if not (args.bm25 or args.corpus_embeddings):
        return None
    corpus, lost = (
        open_texts(args.corpus, args.titles) if args.bm25 else Embeddings(args.corpus_embeddings),
        0,
    )
    for path, qrels in zip(args.qrels, qrels_by_split.values(), strict=True):
        for qid, judged in qrels.items():
            pids = [pid for pid, grade in judged.items() if grade > 0]
            rows = corpus.rows(pids)
            if len(pids) and rows.min() < 0 and not args.allow_unknown:
                pid = pids[int(rows.argmin())]
                raise UserError(
                    f"{line_of(path, qid, pid)}: passage {pid} is not in the corpus — give the files that belong "
                    "together, or add --allow_unknown"
                )
            lost += int((rows < 0).sum())
    return f"{lost} relevant passages are not in the corpus" if lost else None


def show(result) -> None:
    """The table, on the console."""
    for split, part in result["splits"].items():
        print(f"{split}: {part['queries']} queries")
        for name, value in part["metrics"].items():
            low, high = part["intervals"][name]
            line = f"   {name:<10} {value:.4f}   95% {low:.4f} to {high:.4f}"
            if "compare" in part:
                other = part["compare"][name]
                line += f"   {other['difference']:+.4f} against {other['value']:.4f}, p {other['p']:.4f}, "
                line += "95% {:+.4f} to {:+.4f}".format(*other["interval"])
            print(line)
    for name, text in result["policy"].items():
        print(f"{name}: {text}")


def main():
    # ---- setup
    args = parse_args(Args)
    sources = [bool(args.queries_embeddings or args.corpus_embeddings), args.bm25, bool(args.run)]
    if sum(sources) != 1 or (
        sources[0] and not (args.queries_embeddings and args.corpus_embeddings)
    ):
        raise UserError(
            "what to evaluate — give --queries_embeddings and --corpus_embeddings, or --bm25, or --run"
        )
    if args.bm25 and not (args.queries and args.corpus):
        raise UserError("--bm25 searches texts — give --queries and --corpus")
    if not args.qrels or not args.output_dir:
        raise UserError("--qrels and --output_dir are needed — see --help")
    if args.candidates and args.run:
        raise UserError(
            "--candidates re-ranks with embeddings or BM25 — a run file is ranked already"
        )
    if args.depth < 1:
        raise UserError(f"--depth {args.depth}: at least 1 — raise it")
    metrics = list(dict.fromkeys(metric_name(name) for name in args.metrics))
    accelerator = make_accelerator()
    splits = {
        Path(path).name.removesuffix(".gz").rsplit(".", 1)[0]: read_qrels(path)
        for path in args.qrels
    }
    if len(splits) < len(args.qrels):
        raise UserError(
            "--qrels: two files of the same name — results are named after them, rename one"
        )
    with accelerator.main_process_first():
        unknown = check_judged_passages(args, splits)
    runs = [read_run(path) for path in args.run]
    other = read_run(args.compare) if args.compare else None
    if claim_output(args, accelerator, "metrics.json"):
        if accelerator.is_main_process:
            print(f"{args.output_dir} is complete:")
            show(read_json(Path(args.output_dir) / "metrics.json"))
        return

    # ---- the run
    qrels_of = {
        qid: path for path, qrels in zip(args.qrels, splits.values(), strict=True) for qid in qrels
    }
    qids = list(qrels_of)
    if args.run:
        found = runs[0] if len(runs) == 1 else reciprocal_rank_fusion(runs, args.ties)
        facts = {
            "run": " + ".join(args.run)
            + (" (reciprocal rank fusion, k 60)" if len(runs) > 1 else "")
        }
        facts["queries not judged"] = f"{len(found.keys() - qrels_of.keys())}, ignored"
        found = {qid: found[qid] for qid in qids if qid in found}
        if not found:
            raise UserError(
                f"{args.run[0]}: none of its queries is judged in {args.qrels[0]} — give matching files"
            )
        if args.ignore_identical_ids:
            found = {qid: without(entry, qid) for qid, entry in found.items()}
    else:
        found, facts = search(args, accelerator, qids, qrels_of)
    echo(accelerator, "evaluation", {"running on": describe(accelerator), **facts})
    if not accelerator.is_main_process:
        return
    orders = {qid: order(entry, args.ties) for qid, entry in found.items()}
    ranked = {qid: [found[qid].pids[at] for at in positions] for qid, positions in orders.items()}
    scores = {qid: found[qid].scores[positions] for qid, positions in orders.items()}
    if args.ties == "rank":  # whoever sorts run.trec by score must find the same order
        scores = {qid: -np.arange(1.0, len(pids) + 1) for qid, pids in ranked.items()}
    out = Path(args.output_dir)
    write_run(out / "run.trec", ((qid, pids, scores[qid]) for qid, pids in ranked.items()))

    missing = sum(qid not in found or not found[qid].pids for qid in qids)
    ranked = {qid: pids[:10] for qid, pids in ranked.items()}
    del (
        runs,
        found,
        orders,
        scores,
    )  # a run of 16 M lines takes gigabytes; it is read again as it was written

    # ---- metrics
    result, table = {"splits": {}}, ["\t".join(["qid", "split", *metrics])]
    written = read_run(out / "run.trec")
    for split, qrels in splits.items():
        values = score_run(written, qrels, metrics, args.relevance_level)
        official = mrr_at_k(ranked, qrels, 10, args.relevance_level)
        ours = np.mean(
            list(score_run(written, qrels, ["RR@10"], args.relevance_level)["RR@10"].values())
        )
        assert abs(official - ours) < 1e-9, "RR@10 of run.trec is not the official definition's"
        part = {"queries": len(qrels), "metrics": {}, "intervals": {}}
        for name in metrics:
            part["metrics"][name] = float(np.mean(list(values[name].values())))
            part["intervals"][name] = bootstrap_interval(list(values[name].values()), args.seed)
        if other:
            theirs, part["compare"] = (
                score_run(other, qrels, metrics, args.relevance_level, args.ties),
                {},
            )
            for name in metrics:
                gap = np.array([values[name][qid] - theirs[name][qid] for qid in qrels])
                part["compare"][name] = {
                    "value": float(np.mean(list(theirs[name].values()))),
                    "difference": float(gap.mean()),
                    "p": randomisation_test(gap, args.seed),
                    "interval": bootstrap_interval(gap, args.seed),
                }
        result["splits"][split] = part
        table += [
            "\t".join([q, split, *(f"{values[name][q]:.6g}" for name in metrics)]) for q in qrels
        ]
    empty = sum(
        max(judged.values()) < args.relevance_level
        for qrels in splits.values()
        for judged in qrels.values()
    )
    result["policy"] = {
        "ties": "score descending, then id descending, as trec_eval"
        if args.ties == "score"
        else "the rank column",
        "queries without a result": f"{missing}, count 0",
        "queries without a relevant passage": f"{empty}, count 0 (relevant: grade >= {args.relevance_level})",
        "passage id = query id": "dropped"
        if args.ignore_identical_ids
        else "kept (--ignore_identical_ids drops it)",
        "RR@10": "equals the official MS MARCO definition on run.trec",
        **({"corpus": unknown} if unknown else {}),
        **({"compared with": args.compare} if other else {}),
    }
    write_lines(out / "per_query.tsv", table)
    write_json(out / "metrics.json", {**result, "facts": facts, "versions": versions()})
    show(json.loads((out / "metrics.json").read_text()))


def without(entry: RunList, pid: str) -> RunList:
    """The list without one passage."""
    keep = [at for at, one in enumerate(entry.pids) if one != pid]
    return RunList([entry.pids[at] for at in keep], entry.scores[keep], entry.ranks[keep])


if __name__ == "__main__":
    run(main)
