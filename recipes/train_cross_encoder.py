"""Train a cross-encoder on the groups of a training file, by sentence-transformers' own trainer
(pip install 'sentence-transformers==6.2.0').

The loss is the listwise softmax cross-entropy over 1 positive + n negatives of RetroMAE's teacher
(arXiv 2205.12035). A killed run begins again from its first step.

Writes --output_dir, a folder for recipes/score_pairs.py and CrossEncoder; `done` last

    python -m recipes.train_cross_encoder --model M --train T --corpus C --queries Q --output_dir O
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.arguments import arg, identity, parse_args
from lib.checkpoint import checkpoint_folder, loading, model_hash
from lib.encoder import positions
from lib.files import UserError, file_fingerprint, read_training_file, write_lines
from lib.launch import claim_output, describe, echo, make_accelerator, run
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
    max_steps: int | None = arg(None, least=1, help="optimizer steps, in place of --num_epochs")
    seed: int = arg(42, least=0, help="decides data order, new head and dropout")


def main():
    args = parse_args(Args)
    try:
        from datasets import Dataset
        from sentence_transformers import cross_encoder as st
        from transformers import set_seed
    except ImportError as error:
        raise UserError(f"{error} — pip install sentence-transformers") from error
    accelerator, folder = make_accelerator(), checkpoint_folder(args.model)
    with accelerator.main_process_first():
        corpus, queries = open_texts(args.corpus), open_texts(args.queries)
    rows = [row for _, row in read_training_file(args.train) if row.neg]
    if not rows:
        raise UserError(f"{args.train}: no line has negatives — mine some with mine_negatives.py")
    set_seed(args.seed)  # of the new head; the trainer sets it only after this line
    with loading(folder):
        model = st.CrossEncoder(
            str(folder), num_labels=1, max_length=args.max_length, trust_remote_code=False
        )
    if args.max_length > positions(model.model):
        limit = positions(model.model)
        raise UserError(f"{folder}: it has {limit} positions — lower --max_length")
    texts = [corpus.fingerprint, queries.fingerprint]
    inputs = {"model": model_hash(folder), "train": file_fingerprint(args.train), "texts": texts}
    if claim_output(accelerator, args.output_dir, identity(args, inputs)):
        return
    facts = {"queries": f"{len(rows)} of {args.train}", "running on": describe(accelerator)}
    echo(accelerator, "training a cross-encoder", facts)

    query_rows = require_rows(queries, [row.qid for row in rows], args.train, "query")
    columns = {"query": [queries[at][1] for at in query_rows], "docs": [], "labels": []}
    for row in rows:
        pids = [row.pos[0], *row.neg[: args.passages_per_query - 1]]
        found = [corpus[at] for at in require_rows(corpus, pids, args.train, "passage")]
        columns["docs"].append([join_title(*one, args.title, model.tokenizer) for one in found])
        columns["labels"].append([POSITIVE] + [0.0] * (len(pids) - 1))
    settings = st.CrossEncoderTrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=args.per_device_batch_size,
        learning_rate=args.learning_rate,
        num_train_epochs=args.num_epochs,
        max_steps=args.max_steps or -1,
        warmup_steps=0.05,
        seed=args.seed,
        save_strategy="no",
        ddp_find_unused_parameters=False,  # DDP does not find the scores in what forward returns
        dataloader_pin_memory=accelerator.device.type == "cuda",
        report_to=[],
    )
    loss, data = st.losses.ListNetLoss(model), Dataset.from_dict(columns)
    st.CrossEncoderTrainer(model=model, args=settings, train_dataset=data, loss=loss).train()
    if accelerator.is_main_process:
        model.save_pretrained(args.output_dir)
        write_lines(Path(args.output_dir) / "done", [])


if __name__ == "__main__":
    run(main)
