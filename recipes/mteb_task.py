"""MTEB's evaluation of a checkpoint on a collection of your own, without a network.

MTEB loads the checkpoint with sentence-transformers, and encodes, searches and measures by itself,
so its numbers check ours. The collection is a folder in BEIR layout: corpus.jsonl, queries.jsonl
and qrels/SPLIT.tsv, each plain or .gz. Differences from evaluate.py:
  1. MTEB drops queries without a relevant passage; here they count 0.
  2. MTEB joins a title to its text by a space. This recipe joins them as the checkpoint states.

Writes  --output_dir: what MTEB writes, in its layout; the scores also to the terminal

    pip install -r requirements-mteb.txt
    python -m recipes.mteb_task --model model --collection data --output_dir mteb-results

docs/use.md has the call for the public benchmark, which needs a network.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.arguments import arg, parse_args
from lib.checkpoint import checkpoint_folder, load_encoder
from lib.encoder import BiEncoder, SparseBiEncoder
from lib.files import UserError, positives, read_qrels
from lib.launch import run
from lib.text import join_title
from lib.texts import open_texts, require_rows

METRICS = {"ndcg_at_10": "nDCG@10", "mrr_at_10": "RR@10", "recall_at_100": "R@100"}


@dataclass(kw_only=True)
class Args:
    model: str = arg(help="checkpoint")
    collection: str = arg(help="folder in BEIR layout")
    split: str = arg("test", help="name of the file in qrels/")
    output_dir: str = arg(help="folder for the results")
    batch_size: int = arg(32, least=1, help="texts that are encoded at a time")
    ignore_identical_ids: bool = arg(
        False, help="drop passages whose id is that of the query (ArguAna, Quora)"
    )


def file_of(folder: Path, name: str) -> Path:
    """The plain file if it is there, else the gzipped one."""
    path = folder / name
    return path if path.exists() else path.with_name(f"{path.name}.gz")


def read_collection(args: Args, model: BiEncoder) -> dict:
    """What a task of MTEB holds of a split: two data sets of id and text, and the judgments.
    UserError: a file is missing, or an id is unknown."""
    from datasets import Dataset

    folder = Path(args.collection)
    corpus = open_texts(file_of(folder, "corpus.jsonl"))
    queries = open_texts(file_of(folder, "queries.jsonl"))
    path = file_of(folder, f"qrels/{args.split}.tsv")
    qrels = read_qrels(path)
    qrels = {qid: qrels[qid] for qid in positives(qrels)}
    rows = require_rows(queries, list(qrels), path, "query")

    def passages() -> Iterator[dict]:
        for pid, titles, text in corpus.stream():
            yield {"id": pid, "text": join_title(titles, text, model.format.title, model.tokenizer)}

    asked = [{"id": qid, "text": queries[row][1]} for qid, row in zip(qrels, rows, strict=True)]
    return {
        "corpus": Dataset.from_list(list(passages())),
        "queries": Dataset.from_list(asked),
        "relevant_docs": qrels,
        "top_ranked": None,
    }


def make_task(args: Args, collection: dict):
    """The collection as a task of MTEB."""
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Task(AbsTaskRetrieval):
        ignore_identical_ids = args.ignore_identical_ids
        metadata = TaskMetadata(
            name=Path(args.collection).resolve().name,
            description="a folder in BEIR layout",
            type="Retrieval",
            dataset={"path": args.collection, "revision": "local"},
            eval_splits=[args.split],
            eval_langs=["und-Zyyy"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **_):
            self.dataset = {"default": {args.split: collection}}
            self.data_loaded = True

    return Task()


def main():
    args = parse_args(Args)
    try:
        import mteb
        from sentence_transformers import SentenceTransformer, SparseEncoder
    except ImportError as error:
        raise UserError(f"{error} — pip install -r requirements-mteb.txt") from error
    folder = checkpoint_folder(args.model)
    ours = load_encoder(folder)
    if not ours.portable:
        wrong = f"{folder}: sentence-transformers cannot express this checkpoint"
        raise UserError(f"{wrong} — evaluate it with evaluate.py")
    task = make_task(args, read_collection(args, ours))
    library = SparseEncoder if isinstance(ours, SparseBiEncoder) else SentenceTransformer
    results = mteb.evaluate(
        library(str(folder)),
        task,
        cache=mteb.ResultCache(args.output_dir),
        encode_kwargs={"batch_size": args.batch_size},
        overwrite_strategy="always",
    )
    (scores,) = results.task_results[0].scores[args.split]
    print(f"{task.metadata.name}, {args.split}, by MTEB {mteb.__version__}")
    for theirs, name in METRICS.items():
        print(f"   {name:<10} {scores[theirs]:.5f}")


if __name__ == "__main__":
    run(main)
