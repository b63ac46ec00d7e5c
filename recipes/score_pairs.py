"""Score pairs with a cross-encoder, which reads query and passage together: a teacher, or a
re-ranker.

    --train FILE   every (query, positive) and (query, negative) of a training file, which is
                   written again with the scores, for distillation (--kl_weight,
                   --margin_mse_weight of finetune_biencoder.py)
    --run FILE     the first --depth passages of each query of a run (or of top1000.dev), re-ranked

Any AutoModelForSequenceClassification with one label, or two (irrelevant, relevant), is a scorer:
its score is the logit of the one label, or logit 1 - logit 0. recipes/train_cross_encoder.py trains
one. The query is cut first, to --max_query_length tokens; then the passage alone gives way to
--max_length. Pairs are scored in shards, and batches of like length do not cross them, so that any
number of processes writes the same bytes (on one machine, with the same number of threads each),
and the same command finishes a run that was killed.

Reads   --model (a folder or a name on the hub), --corpus, --queries, and --train or --run
Writes  --output_dir: train.jsonl with pos_scores and neg_scores, or run.trec, best first; meta.json
        last

CPU toy   python -m recipes.score_pairs --model T --train train.jsonl --corpus C --queries Q \\
              --output_dir S
1 GPU     accelerate launch --mixed_precision bf16 -m recipes.score_pairs ...
N GPUs    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
              -m recipes.score_pairs ...
"""

from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from lib import launch
from lib.arguments import arg, identity, parse_args
from lib.checkpoint import checkpoint_folder, load_cross_encoder, model_hash
from lib.cpu import speed_up_attention
from lib.embeddings import shard_file
from lib.files import (
    UserError,
    atomic,
    read_run,
    read_training_file,
    write_json,
    write_run,
    write_training_file,
)
from lib.loader import load
from lib.text import TextFormat, join_title, pad, token_batches
from lib.texts import Texts, open_texts, require_rows


@dataclass(kw_only=True)
class Args:
    model: str = arg(group="data", help="cross-encoder")
    corpus: str = arg(help="passages")
    queries: str = arg(help="queries")
    output_dir: str = arg(help="folder for the scores")
    train: str = arg(None, help="training file whose pairs are scored")
    run: str = arg(None, help="run to re-rank, or top1000.dev")
    depth: int = arg(1000, least=1, help="re-rank the first N passages of each query of --run")
    title: Literal["none", "space", "sep"] = arg(
        "space", group="texts", help="how titles are joined to passages"
    )
    max_query_length: int = arg(64, least=1, help="tokens of a query")
    max_length: int = arg(256, least=4, help="tokens of a pair, special tokens included")
    shard_pairs: int = arg(
        8192, group="scoring", least=1, help="pairs per shard, the unit of work and resumption"
    )
    tokens_per_batch: int = arg(
        0, least=0, help="pairs x longest of a batch; 0 = 2048 on a CPU, else 65536"
    )
    dry_run: bool = arg(
        False, group="runtime", help="show the first input and the number of pairs, and stop"
    )
    num_workers: int = arg(2, least=0, most=256, help="loader processes that turn text into ids")


@dataclass
class Pairs(Dataset):
    """The n pairs to score, those of a query next to each other. Item s: the ids of shard s."""

    queries: Texts
    corpus: Texts
    tokenizer: Any
    form: TextFormat  # its max_passage_length: tokens of a pair, special tokens included
    query_rows: np.ndarray  # (n,)
    rows: np.ndarray  # (n,) of passages
    shard_pairs: int

    def shard(self, index: int) -> range:
        """The numbers of its pairs."""
        return range(len(self.rows))[index * self.shard_pairs : (index + 1) * self.shard_pairs]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.shard_pairs)

    def __getitem__(self, index: int) -> list[tuple[list[int], list[int]]]:
        by_query = groupby(self.shard(index), key=self.query_rows.__getitem__)
        found = [self.ids(query_row, self.rows[list(some)]) for query_row, some in by_query]
        return list(chain(*found))

    def ids(self, query_row: int, rows: np.ndarray) -> list[tuple[list[int], list[int]]]:
        """(ids, token types) of a query with each of some passages, in the tokenizer's own
        template: what tokenizer(query, passage, truncation="only_second", max_length=max_length)
        gives once the query is cut."""
        backend, form = self.tokenizer.backend_tokenizer, self.form
        backend.no_truncation()  # of whatever the tokenizer was asked before
        backend.no_padding()
        texts = [join_title(*self.corpus[row], form.title, self.tokenizer) for row in rows]
        strings = [self.queries[query_row][1], *texts]
        query, *passages = backend.encode_batch(strings, add_special_tokens=False)
        query.truncate(form.max_query_length)
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        room = form.max_passage_length - len(query) - special
        for passage in passages:
            passage.truncate(room)
        pairs = [backend.post_process(query, passage) for passage in passages]
        return [(pair.ids, pair.type_ids) for pair in pairs]

    def pad(self, pairs: list, width: int = 0) -> dict[str, Tensor]:
        """What `ids` gave for n pairs -> input_ids, attention_mask and, if the model has them,
        token_type_ids: (n, L) int64, padded to the longest, or to `width` if that is more."""
        ids, types = zip(*pairs, strict=True)
        batch = pad(ids, self.tokenizer, width)
        if "token_type_ids" in self.tokenizer.model_input_names:  # `pad` puts the id of [PAD] there
            padded = pad(types, self.tokenizer, width)["input_ids"]
            batch["token_type_ids"] = padded * batch["attention_mask"]
        return batch


def score(classifier: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(n, L) ids, mask and types -> (n,) fp32 scores."""
    logits = classifier(**batch).logits.float()  # (n, 1 or 2)
    return logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)


def read_lists(args) -> dict[str, list[str]]:
    """{qid: passages to score}: positives and negatives of a training file, or the best of a
    run."""
    if args.train:
        return {row.qid: [*row.pos, *row.neg] for _, row in read_training_file(args.train)}
    lists = {}
    for qid, entry in read_run(args.run).items():
        best = np.argsort(-entry.scores, kind="stable")[: args.depth]
        lists[qid] = [entry.pids[at] for at in best]
    return lists


def write_scores(args, lists: dict[str, list[str]], scores: np.ndarray) -> None:
    ends = np.cumsum([len(pids) for pids in lists.values()])
    by_query = dict(zip(lists, np.split(scores, ends[:-1]), strict=True))
    out = Path(args.output_dir)
    if args.train:
        rows = (row for _, row in read_training_file(args.train))
        split = ((row, by_query[row.qid].tolist()) for row in rows)
        scored = (
            row._replace(pos_scores=own[: len(row.pos)], neg_scores=own[len(row.pos) :])
            for row, own in split
        )
        write_training_file(out / "train.jsonl", scored)
        return
    ranked = ((qid, np.argsort(-by_query[qid], kind="stable")) for qid in lists)
    rows = ((qid, [lists[qid][at] for at in order], by_query[qid][order]) for qid, order in ranked)
    write_run(out / "run.trec", rows)


def main():
    # ---- setup
    args = parse_args(Args)
    if bool(args.train) == bool(args.run):
        raise UserError("which pairs are scored? — give either --train or --run")
    accelerator = launch.make_accelerator()
    rank = accelerator.process_index
    W = accelerator.num_processes
    device = accelerator.device
    budget = args.tokens_per_batch or (2048 if device.type == "cpu" else 65536)
    corpus = open_texts(args.corpus)
    queries = open_texts(args.queries)
    folder = checkpoint_folder(args.model)
    form = TextFormat(
        title=args.title, max_query_length=args.max_query_length, max_passage_length=args.max_length
    )
    classifier, tokenizer = load_cross_encoder(folder, form)
    classifier.to(device)

    # ---- pairs
    source = args.train or args.run
    lists = read_lists(args)
    if not lists:
        raise UserError(f"{source}: no query in it — check the path")
    counts = [len(pids) for pids in lists.values()]
    query_rows = np.repeat(require_rows(queries, list(lists), source, "query"), counts)
    rows = require_rows(corpus, list(chain(*lists.values())), source, "passage")
    pairs = Pairs(queries, corpus, tokenizer, form, query_rows, rows, args.shard_pairs)
    first_ids, _ = pairs.ids(query_rows[0], rows[:1])[0]
    text = tokenizer.decode(first_ids)
    facts = {
        "model": f"{args.model}, {classifier.config.model_type}",
        "texts": f"{args.max_query_length} tokens of a query, {args.max_length} of a pair",
        "first input": text if len(text) < 300 else f"{text[:200]} ... {text[-80:]}",
        "pairs": f"{len(rows)} of {len(lists)} queries of {source}, {len(pairs)} shard(s)",
        "running on": launch.describe(accelerator),
    }
    out = Path(args.output_dir)
    paths = [out / shard_file(shard, sparse=False) for shard in range(len(pairs))]
    if args.dry_run:
        return launch.echo(accelerator, "dry run: scoring", facts)
    digest = xxhash.xxh3_128_hexdigest(query_rows.tobytes() + rows.tobytes())
    inputs = {
        "model": model_hash(folder),
        "corpus": corpus.fingerprint,
        "queries": queries.fingerprint,
        "pairs": digest,
        "precision": accelerator.mixed_precision,
    }
    if launch.claim_output(accelerator, args.output_dir, identity(args, inputs), "meta.json"):
        for path in paths:  # of a run that was killed when all but this was done
            path.unlink(missing_ok=True)
        return
    launch.echo(accelerator, "scoring", facts)

    # ---- score
    speed_up_attention(classifier)
    missing = [shard for shard, path in enumerate(paths) if not path.is_file()]
    accelerator.wait_for_everyone()  # all have listed what is missing before the first adds to it
    mine = missing[rank::W]
    loader = load(Subset(pairs, mine), list, None, args.num_workers)
    total = sum(len(pairs.shard(shard)) for shard in mine)
    bar = tqdm(total=total, unit=" pairs", disable=not accelerator.is_main_process)
    with torch.inference_mode(), accelerator.autocast():  # one context: weights are cast once
        for shard, found in zip(mine, loader, strict=True):
            scores = torch.empty(len(found), device=device)
            lengths = np.array([len(ids) for ids, _ in found])
            for some, width in token_batches(lengths, budget, args.max_length):
                batch = pairs.pad([found[row] for row in some], width)
                batch = send_to_device(batch, device)
                scores[torch.from_numpy(some).to(device)] = score(classifier, batch)
                bar.update(len(some))
            scores = scores.cpu().numpy()
            if not np.isfinite(scores).all():
                at = pairs.shard(shard)[int(np.argmin(np.isfinite(scores)))]
                pair = f"query {queries.id(query_rows[at])} and passage {corpus.id(rows[at])}"
                raise UserError(f"{args.model}: the score of {pair} is not finite — use fp32")
            with atomic(paths[shard]) as temporary, open(temporary, "wb") as stream:
                np.save(stream, scores)
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        scores = np.concatenate([np.load(path) for path in paths])
        write_scores(args, lists, scores)
        write_json(out / "meta.json", {**inputs, "count": len(rows)})
        for path in paths:
            path.unlink()
        spread = f"mean {scores.mean():.3f}, standard deviation {scores.std():.3f}"
        print(f"{len(rows)} scores, {spread} -> {out}")


if __name__ == "__main__":
    launch.run(main)
