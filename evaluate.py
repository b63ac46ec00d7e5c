"""Search, or take run files, and measure: full ranking, re-ranking of candidates, fusion of runs,
significance of differences. Without judgments it searches for all queries and measures nothing.

A run comes from embeddings by exact search, from BM25, or from files; several files are fused by
reciprocal rank. Metrics are trec_eval's (through pytrec_eval), and trec_eval on the run.trec that
is written here prints the same numbers. Deliberate deviations from the evaluation scripts of the
papers:
  1. Queries without a result count 0 in every metric (beir and pytrec_eval drop them).
  2. R@k is the fraction of the relevant passages found (LexMAE's recall@k is Success@k here).
  3. --relevance_level applies to every binary metric, RR included (ANCE's notebook tests pid > 0
     for grade > 0).
  4. Ties are broken as trec_eval breaks them: score descending, then id descending. The score of
     an MS MARCO run (qid, pid, rank) is its rank, so its order is that of the MS MARCO script.

Reads   embeddings of queries and corpus (encode.py) | --bm25 with texts | run files; qrels
Writes  --output_dir: run.trec; with --qrels also per_query.tsv (qid, split, one column per
        metric), then metrics.json. To continue a killed run, give the same command again.

CPU toy   python evaluate.py --bm25 --queries queries.jsonl --corpus corpus.jsonl \\
              --qrels test.tsv --output_dir out
1 GPU     accelerate launch evaluate.py --queries_embeddings q --corpus_embeddings p \\
              --qrels test.tsv --output_dir out
N GPUs    accelerate launch --multi_gpu --num_processes 8 evaluate.py ...
          (each process searches its part of the corpus)
"""

import timeit
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from lib import files, metrics
from lib.arguments import arg, identity, parse_args
from lib.files import RunList, UserError, file_fingerprint
from lib.index import Index, check_identical_ids, open_index
from lib.launch import claim_output, describe, echo, make_accelerator, run, versions
from lib.texts import open_texts, require_rows

METRICS = "RR@10", "nDCG@10", "AP", "R@100", "R@1000", "Success@5", "Hole@10"
NEEDS_QRELS = {"compare": None, "metrics": METRICS, "relevance_level": 1, "allow_unknown": False}
RESULT_BYTES = 100  # of a passage in a list, most of it the string of its id


@dataclass(kw_only=True)
class Args:
    bm25: bool = arg(False, group="source (one of three)", help="search texts with BM25")
    queries_embeddings: str | None = arg(None, help="folder that encode.py --kind query wrote")
    corpus_embeddings: str | None = arg(None, help="folder that encode.py --kind passage wrote")
    run: list[str] = arg([], help="run files; several are fused by reciprocal rank")

    qrels: list[str] = arg(
        [], group="data", help="judgments, each file a split; without them nothing is measured"
    )
    queries: str | None = arg(None, help="query texts, for --bm25")
    corpus: str | None = arg(None, help="passage texts, for --bm25")
    candidates: str | None = arg(None, help="re-rank only these passages: a run or top1000.dev")
    allow_unknown: bool = arg(False, help="accept judged passages that are not in the corpus")
    output_dir: str = arg(help="folder for run.trec, per_query.tsv and metrics.json")

    depth: int = arg(
        1000, group="search", least=1, most=1_000_000, help="passages kept per query, also of --run"
    )
    k1: float = arg(0.9, least=0, help="parameter of BM25; the default is Anserini's for passages")
    b: float = arg(0.4, least=0, most=1, help="parameter of BM25; as k1")
    bm25_index: str | None = arg(
        None, help="folder of the index of BM25 or sparse vectors, built if absent; in --output_dir"
    )

    metrics: list[str] = arg(
        METRICS, group="metrics", help="nDCG@k, RR@k (MRR@k), R@k, AP (MAP), P@k, Success@k, Hole@k"
    )
    relevance_level: int = arg(
        1, least=1, most=32768, help="lowest grade that is relevant, but to nDCG; 2 for TREC DL"
    )
    ignore_identical_ids: bool = arg(
        False, help="drop passages whose id is that of the query (ArguAna, Quora)"
    )
    compare: str | None = arg(None, help="another run file: paired differences from it, with tests")
    seed: int = arg(0, least=0, help="seed of the bootstrap and of the randomisation test")
    dry_run: bool = arg(False, group="runtime", help="show what would be searched, and stop")


def search(
    args: Args, index: Index, qids: list[str], listed: dict[str, RunList] | None
) -> tuple[dict[str, RunList], dict[str, str]]:
    """run[qid] by searching, or by scoring the candidates `listed`, and facts worth printing."""
    facts = {"searched": f"{len(index.corpus)} passages with {index.name}"}
    asked = index.queries.rows(qids)
    if listed is None:
        lists = zip(*index.search(asked, args.depth + args.ignore_identical_ids), strict=True)
    else:
        wanted = [index.corpus.rows(listed[qid].pids if qid in listed else []) for qid in qids]
        lost = sum(int((rows < 0).sum()) for rows in wanted)
        none = sum(qid not in listed for qid in qids)
        missing = f"{lost} not in the corpus, {none} queries without any"
        facts["candidates"] = f"{args.candidates}; {missing}"
        wanted = [np.sort(rows[rows >= 0]) for rows in wanted]
        lists = zip(index.score(asked, wanted), wanted, strict=True)
    found = {}
    for qid, (scores, rows) in zip(qids, lists, strict=True):
        found[qid] = RunList(index.corpus.ids(rows[rows >= 0]), scores[rows >= 0])
    return found, facts


def plan(args: Args, index: Index, qids: list[str], device: torch.device) -> dict[str, str]:
    """What --dry_run shows of a search."""
    queries, corpus = index.queries, index.corpus
    results = len(qids) * min(args.depth, len(corpus))
    facts = {
        "queries": f"{len(qids)} of {len(queries)} in {queries.source}",
        "first query": qids[0],
        "passages": f"{len(corpus)} of {corpus.source}",
        "index": index.name,
        "memory": f"about {results * RESULT_BYTES / 1e9:.2f} GB for {results} results",
    }
    source, texts = "", queries
    if not args.bm25:
        kind, unit = ("sparse", "terms") if corpus.sparse else ("dense", "dimensions")
        facts["vectors"] = f"{corpus.num_vectors} {kind} vectors of {corpus.dim} {unit}"
        source, texts = queries.meta.get("input") or "", None
        if not (corpus.sparse or args.candidates):
            block = torch.rand(4096, corpus.dim, device=device)
            seconds = min(timeit.repeat(lambda: (block @ block[:1024].T).max().item(), number=1))
            seconds *= len(qids) * corpus.num_vectors / (4096 * 1024)
            facts["time"] = f"{seconds:.1f} s or more, divided by the processes"
    if Path(source).is_file():
        texts = open_texts(source)
    row = texts.rows(qids[:1])[0] if texts else -1
    facts["first query"] += f": {texts[row][1][:200]}" if row >= 0 else ""
    return facts


def what_counts(run: dict[str, RunList], qids: list[str], args: Args) -> dict[str, RunList]:
    """The lists of some queries in trec_eval's order: --depth passages of each, without that of the
    query's own id if --ignore_identical_ids is given."""
    found = {}
    for qid in qids:
        if qid in run:
            own = qid if args.ignore_identical_ids else None
            places = [at for at in metrics.order(run[qid]) if run[qid].pids[at] != own]
            places = places[: args.depth]
            found[qid] = RunList([run[qid].pids[at] for at in places], run[qid].scores[places])
    return found


def check_judgments(args: Args, splits: dict[str, dict], index: Index) -> int:
    """The number of relevant passages that the corpus lacks. UserError: there is one and
    --allow_unknown is not given, or a judged query is unknown."""
    lost = 0
    for path, qrels in zip(args.qrels, splits.values(), strict=True):
        require_rows(index.queries, list(qrels), path, "query")
        pids = list(chain.from_iterable(files.positives(qrels).values()))
        lost += int((index.corpus.rows(pids) < 0).sum())
        if lost and not args.allow_unknown:
            try:
                require_rows(index.corpus, pids, path, "passage")
            except UserError as error:
                raise UserError(f"{error}, or add --allow_unknown") from None
    return lost


def measure(run: dict, qrels: dict, other: dict | None, args: Args) -> tuple[dict, dict]:
    """(what metrics.json says about a split, values[metric][qid])."""
    values = metrics.score_run(run, qrels, args.metrics, args.relevance_level)
    part = {"queries": len(qrels), "metrics": {}, "intervals": {}}
    for name, by_query in values.items():
        part["metrics"][name] = float(np.mean(list(by_query.values())))
        part["intervals"][name] = metrics.bootstrap_interval(list(by_query.values()), args.seed)
    if other is not None:
        part["compare"] = {}
        theirs = metrics.score_run(other, qrels, args.metrics, args.relevance_level)
        for name, by_query in theirs.items():
            gap = np.array([values[name][qid] - by_query[qid] for qid in qrels])
            part["compare"][name] = {
                "value": float(np.mean(list(by_query.values()))),
                "difference": float(gap.mean()),
                "p": metrics.randomisation_test(gap, args.seed),
                "interval": metrics.bootstrap_interval(gap, args.seed),
            }
    return part, values


def show(result: dict) -> None:
    """Print the table."""
    for split, part in result["splits"].items():
        print(f"{split}: {part['queries']} queries")
        for name, value in part["metrics"].items():
            low, high = part["intervals"][name]
            line = f"   {name:<10} {value:.4f}   95% {low:.4f} to {high:.4f}"
            if "compare" in part:
                other = part["compare"][name]
                low, high = other["interval"]
                line += f"   {other['difference']:+.4f} against {other['value']:.4f}, "
                line += f"{metrics.p_text(other['p'])}, 95% {low:+.4f} to {high:+.4f}"
            print(line)
    for name, text in result["policy"].items():
        print(f"{name}: {text}")


def main():
    # ---- setup
    args = parse_args(Args)
    if args.candidates and args.run:
        raise UserError("--candidates: a run file is ranked already — give embeddings or --bm25")
    for name, plain in NEEDS_QRELS.items():
        if not args.qrels and getattr(args, name) != plain:
            raise UserError(f"--{name}: nothing is measured without judgments — add --qrels")
    args.metrics = list(dict.fromkeys(metrics.metric_name(name) for name in args.metrics))
    accelerator = make_accelerator()
    splits = {}
    for path in args.qrels:
        name = Path(path).name.removesuffix(".gz").rsplit(".", 1)[0]
        if name in splits:
            raise UserError(f"--qrels: two files, so two splits, are named {name} — rename one")
        splits[name] = files.read_qrels(path)
        if args.ignore_identical_ids:
            check_identical_ids(path, files.positives(splits[name]))
    out = Path(args.output_dir)
    index = open_index(
        bm25=(args.k1, args.b) if args.bm25 else None,
        run=bool(args.run),
        texts=(args.queries, args.corpus),
        embeddings=(args.queries_embeddings, args.corpus_embeddings),
        folder=Path(args.bm25_index or out / "index"),
    )
    lost = check_judgments(args, splits, index) if index else 0
    runs = [files.read_run(path) for path in args.run]
    listed = files.read_run(args.candidates) if args.candidates else None
    other = files.read_run(args.compare) if args.compare else None
    listing = dict.fromkeys(qid for one in runs for qid in one)  # the queries of all runs
    qids, place = list(listing), "searched for"
    if args.qrels:
        qids = list(dict.fromkeys(qid for qrels in splits.values() for qid in qrels))
        place = f"judged in {args.qrels[0]}"
    elif index:
        qids = index.queries.ids(range(len(index.queries)))
    given = [(args.candidates, listed), (args.compare, other), ("".join(args.run[:1]), listing)]
    for path, lists in given:  # lists of no query at all are a run that found nothing
        if lists and not any(qid in lists for qid in qids):
            wrong = f"{path}: no query in it is {place}"
            raise UserError(f"{wrong} — give files that belong together")
    if args.dry_run:
        facts = plan(args, index, qids, accelerator.device) if index else {}
        facts |= {path: f"{len(read)} queries" for path, read in zip(args.run, runs, strict=True)}
        return echo(accelerator, "dry run", {**facts, "running on": describe(accelerator)})
    read = {"qrels": args.qrels, "run": args.run}
    read |= {"candidates": [args.candidates], "compare": [args.compare]}
    inputs = {name: file_fingerprint(*filter(None, paths)) for name, paths in read.items()}
    inputs |= index.inputs if index else {}
    last_file = "metrics.json" if args.qrels else "run.trec"
    if claim_output(accelerator, out, identity(args, inputs), last_file):
        if accelerator.is_main_process and args.qrels:
            show(files.read_json(out / last_file))
        return

    # ---- the run
    if index:
        found, facts = search(args, index, qids, listed)
    else:
        how = " (reciprocal rank fusion, k 60)" if len(runs) > 1 else ""
        facts = {"run": " + ".join(args.run) + how}
        facts["queries not judged"] = f"{len(listing.keys() - set(qids))}, ignored"
    echo(accelerator, "evaluation", {"running on": describe(accelerator), **facts})
    if not accelerator.is_main_process:
        return
    if runs:
        found = runs[0] if len(runs) == 1 else metrics.reciprocal_rank_fusion(runs)
    ranked = what_counts(found, qids, args)
    files.write_run(out / "run.trec", ((qid, *entry) for qid, entry in ranked.items()))
    if not args.qrels:
        print(f"{len(qids)} queries, not judged -> {out / 'run.trec'}")
        return

    # ---- metrics
    other = None if other is None else what_counts(other, qids, args)
    result, table = {"splits": {}}, ["\t".join(["qid", "split", *args.metrics])]
    for split, qrels in splits.items():
        result["splits"][split], values = measure(ranked, qrels, other, args)
        for qid in qrels:
            row = [f"{by_query[qid]:.6g}" for by_query in values.values()]
            table.append("\t".join([qid, split, *row]))
    missing = sum(qid not in ranked or not ranked[qid].pids for qid in qids)
    level = args.relevance_level
    judgments = [judged for qrels in splits.values() for judged in qrels.values()]
    empty = sum(max(judged.values()) < level for judged in judgments)
    dropped = "dropped" if args.ignore_identical_ids else "kept (--ignore_identical_ids drops it)"
    result["policy"] = {
        "ties": "score descending, then id descending, as trec_eval",
        "queries without a result": f"{missing}, count 0",
        "queries without a relevant passage": f"{empty}, count 0 (relevant: grade >= {level})",
        "passage id = query id": dropped,
        "depth": f"the first {args.depth} passages of a query are counted",
    }
    if lost:
        result["policy"]["corpus"] = f"{lost} relevant passages are not in the corpus"
    if other is not None:
        result["policy"]["compared with"] = args.compare
    files.write_lines(out / "per_query.tsv", table)
    files.write_json(out / "metrics.json", {**result, "facts": facts, "versions": versions()})
    show(result)


if __name__ == "__main__":
    run(main)
