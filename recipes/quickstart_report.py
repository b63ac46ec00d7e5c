"""The end of the quickstart: how well BM25, stage 1, stage 2, and stage 2 fused with BM25 find the
passage of each test query, three examples. With --table, the end of recipes/two_stages.sh: a table
alone, for each test split, with the p-value of the difference from BM25.

Reads   --folder, as recipes/quickstart.sh or, with --table, recipes/two_stages.sh leaves it

    python -m recipes.quickstart_report --folder runs/quickstart
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from lib.arguments import arg, parse_args
from lib.files import read_json, read_qrels, read_run
from lib.launch import run
from lib.metrics import p_text
from lib.texts import open_texts

METRICS = "RR@10", "nDCG@10", "R@100"
STAGES = {"bm25": "BM25", "stage1": "stage 1", "stage2": "stage 2", "fused": "stage 2 + BM25"}
WIDTH = 14  # of the names in a table
HEADER = f"{'':<{WIDTH}}{'MRR@10':>10}{'nDCG@10':>10}{'Recall@100':>12}"


@dataclass(kw_only=True)
class Args:
    folder: str = arg(help="OUT of recipes/quickstart.sh or recipes/two_stages.sh")
    table: bool = arg(False, help="print a table for each test split, and nothing else")


def shorten(text: str, width: int = 96) -> str:
    return text if len(text) <= width else text[: width - 4] + " ..."


def result(out: Path, stage: str) -> dict:
    return read_json(out / f"evaluation-{stage}" / "metrics.json")["splits"]["test"]


def verdict(ours: str, theirs: str, part: dict, metric: str = "RR@10") -> str:
    """The paired comparison of evaluate.py --compare in words."""
    found = part["compare"][metric]
    if found["p"] >= 0.05:
        return f"{ours} and {theirs} cannot be told apart at this size (MRR@10, p {found['p']:.2f})"
    word = "ahead of" if found["difference"] > 0 else "behind"
    difference = f"{abs(found['difference']):.4f} (MRR@10, {p_text(found['p'])})"
    return f"{ours} is {word} {theirs} by {difference}"


def row(name: str, part: dict) -> str:
    """A line of the table: the metrics of a split."""
    reciprocal, ndcg, recall = (part["metrics"][metric] for metric in METRICS)
    return f"{name:<{WIDTH}}{reciprocal:>10.4f}{ndcg:>10.4f}{recall:>12.4f}"


def show_table(out: Path) -> None:
    """BM25, the two stages and the fusion, for each test split."""
    results = {stage: read_json(out / f"evaluation-{stage}/metrics.json") for stage in STAGES}
    for split, bm25 in results["bm25"]["splits"].items():
        print(f"\n{split}: {bm25['queries']} queries")
        print(f"{HEADER}   nDCG@10 against BM25")
        for stage, name in STAGES.items():
            part = results[stage]["splits"][split]
            gap = part.get("compare", {}).get("nDCG@10")  # BM25 has none
            gap = f"   {gap['difference']:+.4f}, {p_text(gap['p'])}" if gap else ""
            print(row(name, part) + gap)


def main():
    args = parse_args(Args)
    out = Path(args.folder)
    if args.table:
        return show_table(out)
    results = {stage: result(out, stage) for stage in STAGES}
    corpus = open_texts(out / "collection/corpus.jsonl")
    queries = open_texts(out / "collection/queries.test.jsonl")
    qrels = read_qrels(out / "collection/qrels/test.tsv")
    ranked = read_run(out / "evaluation-stage2/run.trec")

    qids = sorted(qrels)
    for qid in qids[:: max(len(qids) // 3, 1)][:3]:
        print(f"\n{shorten(queries[queries.rows([qid])[0]][1])}")
        for rank, pid in enumerate(ranked[qid].pids[:3], 1):
            (title,), text = corpus[corpus.rows([pid])[0]]
            mark = "*" if pid in qrels[qid] else " "
            print(f"   {rank}{mark} {title}: {shorten(text)}")
    print("   (* = the passage that belongs to the query)")

    print("\nfiles")
    for name, what in (
        ("collection", "corpus, queries, qrels"),
        ("pretrained", "DupMAE checkpoint"),
        ("stage2", "the retriever: loads in sentence-transformers too"),
        ("stage2-corpus", "its vectors of the corpus"),
        ("evaluation-stage2", "its TREC run, metrics with intervals, per-query values"),
    ):
        print(f"   {str(out / name):<48} {what}")

    print(f"\n{results['bm25']['queries']} test queries against {len(corpus)} passages")
    print(HEADER)
    for stage, name in STAGES.items():
        print(row(name, results[stage]))
    print(verdict("stage 2", "stage 1", result(out, "gain")))
    print(verdict("stage 2", "BM25", results["stage2"]))
    print(verdict("stage 2 + BM25", "BM25", results["fused"]))
    print("(stage 2 continues stage 1: twice the steps, and negatives that stage 1 finds hard)")
    print("\nask it yourself (an empty line ends):")
    python, here = Path(sys.executable), Path.cwd()
    python = python.relative_to(here) if python.is_relative_to(here) else "python"  # .venv is here
    print(f"   {python} -m recipes.search {shlex.quote(str(out))} --bm25")


if __name__ == "__main__":
    run(main)
