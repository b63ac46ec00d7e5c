"""Train a cross-encoder on a training file by sentence-transformers' own trainer, with the softmax
over a positive and its best negatives (RetroMAE's teacher, arXiv 2205.12035). A killed run begins
again. Writes --output_dir, a folder for recipes/score_pairs.py and CrossEncoder; `done` last."""

from dataclasses import dataclass
from typing import Literal

from datasets import Dataset
from transformers import set_seed

from lib.arguments import arg, identity, parse_args
from lib.checkpoint import checkpoint_folder, loading, model_hash
from lib.encoder import positions
from lib.files import UserError, one_line, write_lines
from lib.groups import Groups, TrainingFile
from lib.launch import claim_output, describe, echo, make_accelerator, run
from lib.text import join_title
from lib.texts import open_texts


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
    num_epochs: float = arg(4.0, above=0, help="passes over the positives (RetroMAE 4)")
    max_steps: int | None = arg(None, least=1, help="optimizer steps, in place of --num_epochs")
    seed: int = arg(42, least=0, help="decides data order, new head and dropout")


def main():
    args = parse_args(Args)
    with one_line("a package is missing", "pip install sentence-transformers", ImportError):
        from sentence_transformers import cross_encoder as st
    accelerator = make_accelerator()
    path = checkpoint_folder(args.model)
    file = TrainingFile(args.train, open_texts(args.queries), open_texts(args.corpus))
    groups = Groups(file, args.passages_per_query, args.passages_per_query - 1, args.seed)
    set_seed(args.seed)  # of the new head; the trainer sets it only after this line
    with loading(path):
        model = st.CrossEncoder(str(path), num_labels=1, max_length=args.max_length)
    if args.max_length > positions(model.model):
        raise UserError(f"{path}: it has {positions(model.model)} positions — lower --max_length")
    inputs = {"model": model_hash(path), "train": file.fingerprint}
    inputs |= {"corpus": file.corpus.fingerprint, "queries": file.queries.fingerprint}
    if claim_output(accelerator, args.output_dir, identity(args, inputs)):
        return
    echo(accelerator, "cross-encoder", {"running on": describe(accelerator), **groups.notes})
    data = []
    for q, rows, _ in (groups[number, 0, number] for number in range(len(groups))):
        docs = [join_title(*file.corpus[i], args.title, model.tokenizer) for i in rows if i >= 0]
        labels = [20.0] + [0.0] * (len(docs) - 1)  # their softmax, ListNet's target, is 1 and 0
        data.append({"query": file.queries[file.query_rows[q]][1], "docs": docs, "labels": labels})
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
    )
    loss = st.losses.ListNetLoss(model)
    st.CrossEncoderTrainer(model, settings, Dataset.from_list(data), loss=loss).train()
    if accelerator.is_main_process:
        model.save_pretrained(args.output_dir)
        write_lines(f"{args.output_dir}/done", [])


if __name__ == "__main__":
    run(main)
