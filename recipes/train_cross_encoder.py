"""Train a cross-encoder on the groups of a training file, by sentence-transformers' own trainer.

The loss is the listwise softmax cross-entropy over 1 positive + n negatives of RetroMAE's teacher
(arXiv 2205.12035). Everything else is CrossEncoderTrainer's, which needs
pip install 'sentence-transformers==6.2.0'. A killed run begins again from its first step.

Writes --output_dir, a folder for recipes/score_pairs.py and sentence-transformers' CrossEncoder.

    python -m recipes.train_cross_encoder --model M --train T --corpus C --queries Q --output_dir O
"""

from dataclasses import dataclass
from typing import Literal

from lib.arguments import arg, parse_args
from lib.files import UserError, read_training_file
from lib.launch import run
from lib.text import join_title
from lib.texts import open_texts, require_rows

POSITIVE = 20.0  # ListNet's target is the softmax of the labels: with this one 1 for the positive


@dataclass(kw_only=True)
class Args:
    model: str = arg(help="encoder to start from")
    train: str = arg(help="training file with negatives")
    corpus: str = arg(help="passages")
    queries: str = arg(help="queries")
    output_dir: str = arg(help="folder for the checkpoint")
    title: Literal["none", "space", "sep"] = arg("space", help="how titles are joined to passages")
    passages_per_query: int = arg(16, least=2, help="1 positive, the rest negatives (RetroMAE 65)")
    max_length: int = arg(256, least=8, help="tokens of a pair (RetroMAE 200)")
    per_device_batch_size: int = arg(4, least=1, help="queries per process (RetroMAE 1)")
    learning_rate: float = arg(1e-5, above=0, help="peak learning rate (RetroMAE 1e-5)")
    num_epochs: float = arg(4.0, above=0, help="passes over the queries (RetroMAE 4)")
    max_steps: int = arg(-1, help="optimizer steps, in place of --num_epochs")
    seed: int = arg(42, least=0, help="decides data order, new head and dropout")


def examples(args, tokenizer) -> dict[str, list]:
    """Columns of the trainer's data: query, its passages (the positive first), their labels."""
    queries, corpus = open_texts(args.queries), open_texts(args.corpus)
    columns = {"query": [], "docs": [], "labels": []}
    for _, row in read_training_file(args.train):
        if row.neg:
            pids = [row.pos[0], *row.neg[: args.passages_per_query - 1]]
            query = require_rows(queries, [row.qid], args.train, "query")[0]
            found = [corpus[at] for at in require_rows(corpus, pids, args.train, "passage")]
            columns["query"].append(queries[query][1])
            columns["docs"].append([join_title(*one, args.title, tokenizer) for one in found])
            columns["labels"].append([POSITIVE] + [0.0] * (len(pids) - 1))
    if not columns["query"]:
        raise UserError(f"{args.train}: no line has negatives — mine some with mine_negatives.py")
    return columns


def main():
    args = parse_args(Args)
    try:
        from datasets import Dataset
        from sentence_transformers import cross_encoder as st
        from transformers import set_seed
    except ImportError as error:
        raise UserError(f"{error} — pip install sentence-transformers") from error
    set_seed(args.seed)  # of the new head; the trainer sets it only after this line
    model = st.CrossEncoder(args.model, num_labels=1, max_length=args.max_length)
    settings = st.CrossEncoderTrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=args.per_device_batch_size,
        learning_rate=args.learning_rate,
        num_train_epochs=args.num_epochs,
        max_steps=args.max_steps,
        warmup_steps=0.05,
        seed=args.seed,
        report_to=[],
    )
    loss = st.losses.ListNetLoss(model)
    data = Dataset.from_dict(examples(args, model.tokenizer))
    st.CrossEncoderTrainer(model=model, args=settings, train_dataset=data, loss=loss).train()
    model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    run(main)
