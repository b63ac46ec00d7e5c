"""A cross-encoder, which reads query and passage together: the teacher for distillation, and a re-ranker of runs.

    --task train   listwise softmax cross-entropy over 1 positive + n negatives: RetroMAE's teacher (arXiv 2205.12035)
    --task score   the pairs that fine-tuning with these --qrels, --negatives and depth may draw, or those of a --run

Groups are drawn as in finetune_biencoder.py. Deliberate deviations from the official code of RetroMAE and LexMAE:
  1. A list shorter than the group leaves columns out of the softmax (RetroMAE: random passages, LexMAE: repeats), and
     a batch may have any number of queries (RetroMAE's stops at a short last one).
  2. The query is cut first, to --max_query_length; then the passage alone gives way to --max_length.
  3. A teacher scores once, to a file, without dropout (LexMAE's runs beside the student, in train mode).

Scoring cuts the pairs into shards, and batches, of like length, do not cross them: any number of processes writes the
same bytes (on one machine, with the same number of threads each), and the same command finishes a run that died.
Titles and lengths belong to the checkpoint. When scoring, a flag that differs from what it states stops the run;
--override does it anyway. A folder of other origin states nothing and gets the values of PairFormat.

Reads   --model: an encoder, or for scoring a sequence classifier, as Hugging Face saves it; the files of lib/files.py
Writes  train: --output_dir, for AutoModelForSequenceClassification and sentence_transformers.CrossEncoder (which wants
        titles joined); log.jsonl, args.json, state/ to --resume from, `done` last
        score: scores.tsv (`qid TAB pid TAB score`), for --run also run.trec, best first; meta.json last

CPU toy   python -m recipes.rerank --task train --model M --corpus C --queries Q --qrels R --negatives N --output_dir T
          python -m recipes.rerank --task score --model T --corpus C --queries Q --qrels R --negatives N --output_dir S
1 GPU     accelerate launch --mixed_precision bf16 -m recipes.rerank ...
N GPUs    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 -m recipes.rerank ...
"""

import math
import os
import sys
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
import torch
import xxhash
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.hf_argparser import HfArg

from lib import launch
from lib.checkpoint import VERSION, align, checkpoint_folder, fingerprint, model_hash
from lib.cpu import speed_up_attention
from lib.embeddings import shard_name
from lib.encoder import positions
from lib.files import (
    UserError,
    atomic,
    read_candidates,
    read_json,
    write_json,
    write_lines,
    write_run,
    write_scores,
)
from lib.groups import Groups
from lib.loader import load
from lib.losses import in_batch_accuracy, info_nce
from lib.optim import descend, lr_at, parameter_groups, recompute_activations
from lib.text import join_title, pad, step_seed, token_batches
from lib.texts import known_rows, open_texts


@dataclass
class Args:
    task: Literal["train", "score"] = HfArg(help="see above")
    model: str = HfArg(help="encoder, which gets a new head, or a cross-encoder")
    corpus: str = HfArg(help="passages")
    queries: str = HfArg(help="queries")
    output_dir: str = HfArg(help="where the checkpoint, or the scores, go")
    titles: str = HfArg(default=None, help="`pid TAB title` file to join to the corpus")
    qrels: str = HfArg(
        default=None, help="judgments: each line with grade > 0 is an example, or a pair to score"
    )
    negatives: str = HfArg(
        default=None, help="`qid TAB pid,pid,...`, best first, or a TREC run; of any retriever"
    )
    run: str = HfArg(
        default=None, help="score: re-rank these instead, a run in rank order or top1000.dev"
    )
    depth: int = HfArg(
        default=200, help="the first so many of each query in --negatives or --run (RetroMAE 200)"
    )
    allow_overlap: bool = HfArg(
        default=False, help="drop negatives that are judged positives instead of stopping"
    )
    title: Literal["none", "space", "sep"] | None = HfArg(
        default=None, help="how to join; else the checkpoint's"
    )
    max_query_length: int = HfArg(
        default=None, help="tokens of the query alone; else the checkpoint's"
    )
    max_length: int = HfArg(
        default=None, help="tokens of a pair, special ones too (RetroMAE 200); else the same"
    )
    # train
    passages_per_query: int = HfArg(default=16, help="1 positive + n negatives (RetroMAE 65)")
    per_device_batch_size: int = HfArg(
        default=4, help="queries per process and micro-step (RetroMAE 1)"
    )
    gradient_accumulation_steps: int = HfArg(default=1, help="micro-steps per step (RetroMAE 2)")
    gradient_checkpointing: bool = HfArg(default=False, help="encode twice to keep less")
    learning_rate: float = HfArg(default=1e-5, help="peak (RetroMAE 1e-5)")
    weight_decay: float = HfArg(default=0.01, help="not on biases and norms (RetroMAE 0.01)")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping; 0 = none")
    num_epochs: float = HfArg(default=4.0, help="passes over the examples (RetroMAE 4)")
    max_steps: int = HfArg(default=0, help="optimizer steps; wins over --num_epochs")
    warmup_ratio: float = HfArg(
        default=0.05, help="share of linear warm-up before the linear decay"
    )
    warmup_steps: int = HfArg(default=None, help="wins over --warmup_ratio (RetroMAE 1000)")
    seed: int = HfArg(default=42, help="new head, data order, negatives, dropout")
    save_every: int = HfArg(default=1000, help="steps between states to --resume from")
    log_every: int = HfArg(default=20, help="steps between log lines")
    resume: bool = HfArg(default=False, help="go on from the last state")
    report_to: Literal["none", "tensorboard", "wandb"] = HfArg(
        default="none", help="tracker beside log.jsonl"
    )
    deterministic: bool = HfArg(default=False, help="bit-identical reruns on CUDA")
    # score
    override: bool = HfArg(
        default=False, help="take titles and lengths as given where the checkpoint has others"
    )
    tokens_per_batch: int = HfArg(
        default=0, help="rows x longest; 0 = 2048 on a CPU (fits its cache), 65536 on a GPU"
    )
    shard_pairs: int = HfArg(
        default=8192, help="pairs per shard, the unit of work and of resumption"
    )
    # both
    num_workers: int = HfArg(default=2, help="loader processes that turn text into ids; 0 = none")
    dry_run: bool = HfArg(
        default=False, help="show the first input, truncation and the amount of work, and stop"
    )


# ---------------------------------------------------------------------------------------------------------------------
# the model, and how it reads pairs


@dataclass
class PairFormat:
    """How a checkpoint wants its pairs; stored with it in isthmus.json."""

    title: Literal["none", "space", "sep"] = "space"  # see lib/text.py
    max_query_length: int = 64  # tokens of the query alone
    max_length: int = 256  # tokens of the pair, special ones included


class CrossEncoder(nn.Module):
    """A Hugging Face sequence classifier as a scorer. The score is the logit of its one label; of two, (irrelevant,
    relevant), logit 1 - logit 0, the log-odds of the second."""

    def __init__(self, classifier: nn.Module, tokenizer, form: PairFormat, new_head: bool):
        super().__init__()
        self.classifier, self.tokenizer, self.format, self.new_head = (
            classifier,
            tokenizer,
            form,
            new_head,
        )

    def forward(self, batches: list[dict[str, Tensor]]) -> Tensor:
        """Batches of Pairs.pad -> (n,) fp32 scores of all their rows. A list, so that one DDP forward covers it."""
        logits = torch.cat(
            [self.classifier(**batch).logits for batch in batches]
        ).float()  # (n, 1 or 2)
        return logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)


def load_cross_encoder(
    model, overrides: dict, train: bool = False, strict: bool = False
) -> CrossEncoder:
    """In fp32 and eval mode, from a folder or by a name on the hub. overrides: fields of PairFormat in place of what
    the checkpoint states, None = as it states; `strict` refuses one that differs. train: a head for one label that
    the checkpoint lacks is made, from torch's generator; without, that is an error, as missing weights always are."""
    folder = checkpoint_folder(model)
    try:
        how = {"num_labels": 1} if train else {}
        how |= {
            "dtype": torch.float32,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        classifier, report = AutoModelForSequenceClassification.from_pretrained(folder, **how)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder}: cannot be loaded ({reason}) — give the folder of an encoder"
        ) from error

    def refuse(what: str):
        raise UserError(f"{folder}: {what}")

    missing = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    prefix = f"{classifier.base_model_prefix}."
    lost = sorted(key for key in missing if key.startswith(prefix) and ".pooler." not in key)
    labels, kind = classifier.config.num_labels, classifier.config.model_type
    if lost:
        refuse(
            f"{len(lost)} weights are missing or misshapen ({lost[0]}, ...) — give a complete {kind} checkpoint"
        )
    if missing and not train:
        refuse("has no classification head, so it is no cross-encoder — train one from it")
    if labels > 2:
        refuse(f"{labels} labels — a cross-encoder has one, or two (irrelevant, relevant)")
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        refuse(
            "its tokenizer cannot pad, or is not of the fast kind — save one that is and does in the folder"
        )
    private = read_json(folder / "isthmus.json") if (folder / "isthmus.json").is_file() else {}
    if private and private["tokenizer"]["ids"] != fingerprint(tokenizer):
        then, now = private["tokenizer"]["version"], tokenizers.__version__
        refuse(
            f"its tokenizer gives other ids than when it was saved (tokenizers {then}, now {now}) — install {then}"
        )
    stated = {name: private[name] for name in asdict(PairFormat()) if name in private}
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        if strict and stated.get(name, value) != value:
            refuse(f"its {name} is {stated[name]}, not {value} — leave it out, or add --override")
    form, limit = PairFormat(**{**stated, **given}), positions(classifier) or math.inf
    if "max_length" not in given:
        form.max_length = min(form.max_length, limit)
    room = form.max_length - tokenizer.num_special_tokens_to_add(pair=True) - form.max_query_length
    if form.max_query_length < 1 or room < 1 or form.max_length > limit:
        lengths = f"--max_query_length {form.max_query_length} in --max_length {form.max_length}"
        refuse(
            f"{lengths} — the passage needs room beside the query, and the model has {limit} positions"
        )
    if form.title == "sep" and tokenizer.sep_token is None:
        refuse("its tokenizer has no separator token for --title sep — use --title space")
    align(classifier)
    return CrossEncoder(classifier, tokenizer, form, bool(missing)).eval()


def save_cross_encoder(model: CrossEncoder, folder, card: dict) -> None:
    """Main process only. It is the caller who marks the folder complete. card: what the README says."""
    folder, tokenizer = Path(folder), model.tokenizer
    raw = "torch.nn.modules.linear.Identity"  # else sentence-transformers gives the sigmoid of the logit
    model.classifier.config.update({"sentence_transformers": {"activation_fn": raw}})
    model.classifier.config.update(
        {"sbert_ce_default_activation_function": raw}
    )  # what it read before version 4
    model.classifier.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()  # else the last cut would be saved as a setting
    tokenizer.model_max_length = model.format.max_length  # where sentence-transformers cuts
    tokenizer.save_pretrained(folder)
    ids = {"ids": fingerprint(tokenizer), "version": tokenizers.__version__}
    write_json(
        folder / "isthmus.json", {"version": VERSION, **asdict(model.format), "tokenizer": ids}
    )
    for path in folder.glob("model*.safetensors"):  # safetensors lets only the owner read
        path.chmod((folder / "isthmus.json").stat().st_mode)
    facts = [
        f"- **{name}**: {value}" for name, value in {**card, "pairs": asdict(model.format)}.items()
    ]
    write_lines(
        folder / "README.md",
        [f"# {model.classifier.config.model_type}, a cross-encoder", "", *facts],
    )


class Pairs:
    """Rows of queries and corpus to ids."""

    def __init__(self, queries, corpus, model: CrossEncoder):
        self.queries, self.corpus, self.tokenizer, self.form = (
            queries,
            corpus,
            model.tokenizer,
            model.format,
        )

    def ids(self, query_row: int, rows: np.ndarray) -> list[tuple[list[int], list[int]]]:
        """(ids, token types) of a query with each of some passages, in the tokenizer's own template: what
        tokenizer(query, passage, truncation="only_second", max_length=max_length) gives once the query is cut."""
        backend, form = self.tokenizer.backend_tokenizer, self.form
        backend.no_truncation()  # of whatever the tokenizer was asked before
        backend.no_padding()
        texts = [join_title(*self.corpus[row], form.title, self.tokenizer) for row in rows]
        query, *passages = backend.encode_batch(
            [self.queries[query_row][1], *texts], add_special_tokens=False
        )
        query.truncate(form.max_query_length)
        room = form.max_length - len(query) - self.tokenizer.num_special_tokens_to_add(pair=True)
        for passage in passages:
            passage.truncate(room)
        pairs = [backend.post_process(query, passage) for passage in passages]
        return [(pair.ids, pair.type_ids) for pair in pairs]

    def pad(self, pairs: list, width: int = 0) -> dict[str, Tensor]:
        """What `ids` gave for n pairs -> input_ids, attention_mask and, if the model has them, token_type_ids: (n, L)
        int64, padded to the longest, or to `width` if that is more."""
        ids, types = zip(*pairs, strict=True)
        batch = pad(ids, self.tokenizer, width)
        if (
            "token_type_ids" in self.tokenizer.model_input_names
        ):  # `pad` puts the id of [PAD] at padding: make it 0
            batch["token_type_ids"] = (
                pad(types, self.tokenizer, width)["input_ids"] * batch["attention_mask"]
            )
        return batch

    def preview(self, pairs: list) -> dict[str, str]:
        """What the echo says of the first pairs."""
        text, lengths = self.tokenizer.decode(pairs[0][0]), np.array([len(ids) for ids, _ in pairs])
        full = (lengths == self.form.max_length).mean()
        return {
            "texts": ", ".join(f"{name} {value}" for name, value in asdict(self.form).items()),
            "first input": text if len(text) < 300 else f"{text[:200]} ... {text[-80:]}",
            "tokens": f"median {np.median(lengths):.0f}, {full:.1%} of the first {len(pairs)} pairs at max_length",
        }


# ---------------------------------------------------------------------------------------------------------------------
# train: B queries per process, P passages per query, n pairs


@dataclass
class Collator:
    """Rows of Groups -> a batch for one micro-step. Fillers are not encoded.

    batches      list of Pairs.pad of `chunk_rows` pairs of like length, n in all
    order        (n,) place of each pair among their rows: scores[order] is query-major
    mask         (B, P) True = a passage, False = a filler; the positive is column 0
    query_rows   (B,)"""

    groups: Groups
    pairs: Pairs
    chunk_rows: int

    def __call__(self, items: list[tuple[int, np.ndarray, np.ndarray]]) -> dict:
        query_rows = self.groups.query_rows[[index for index, *_ in items]]
        found = []
        for query_row, (_, rows, _) in zip(query_rows, items, strict=True):
            found += self.pairs.ids(query_row, rows[rows >= 0])
        by_length = np.argsort([-len(ids) for ids, _ in found], kind="stable")
        chunks = [
            by_length[start : start + self.chunk_rows]
            for start in range(0, len(found), self.chunk_rows)
        ]
        return {
            "batches": [self.pairs.pad([found[row] for row in chunk]) for chunk in chunks],
            "order": torch.from_numpy(np.argsort(by_length)),
            "mask": torch.from_numpy(np.stack([rows >= 0 for _, rows, _ in items])),
            "query_rows": torch.from_numpy(query_rows),
        }


def listwise_loss(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """scores (n,) query-major, mask (B, P) -> (mean over queries of -log softmax at the positive, accuracy: the share
    of queries whose positive is first)."""
    grid = scores.new_zeros(mask.shape).masked_scatter(mask, scores)  # (B, P)
    positives = torch.zeros(len(mask), dtype=torch.long, device=mask.device)
    return info_nce(grid, positives, mask).mean(), in_batch_accuracy(grid.detach(), positives, mask)


def train(args: Args, accelerator, pairs: Pairs, model: CrossEncoder, facts: dict):
    rank, W, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    B, P, accumulation = (
        args.per_device_batch_size,
        args.passages_per_query,
        args.gradient_accumulation_steps,
    )
    given = args.qrels, args.negatives, P, args.depth, args.seed, args.allow_overlap
    groups = Groups(pairs.queries, pairs.corpus, *given)
    max_steps = args.max_steps or math.ceil(args.num_epochs * len(groups) / (W * B * accumulation))
    warmup_steps = (
        round(args.warmup_ratio * max_steps) if args.warmup_steps is None else args.warmup_steps
    )
    speed_up_attention(model.classifier)
    if args.gradient_checkpointing:
        recompute_activations(model.classifier)
    collate = Collator(groups, pairs, 16 if device.type == "cpu" else 64)
    first = [groups[index, 0, index] for index in range(min(16, len(groups)))]
    weights = sum(p.numel() for p in model.parameters())
    facts |= {
        **pairs.preview(
            [
                pair
                for i, rows, _ in first
                for pair in pairs.ids(groups.query_rows[i], rows[rows >= 0])
            ]
        ),
        "batch": f"{B} queries x {W} process(es) x {accumulation} accumulated = {W * B * accumulation} per step",
        **groups.notes,
        "steps": f"{max_steps}, {len(groups) / (W * B * accumulation):.2f} per epoch, {warmup_steps} of warm-up",
    }
    numbers = weights * 4  # checkpoint, and state with two moments
    if not launch.begin(accelerator, args, "training a cross-encoder", facts, dict, numbers):
        return
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay), lr=args.learning_rate, fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)

    # ---- resume
    step, _ = launch.load_state(args.output_dir, accelerator, model, optimizer)
    micro_step = step * accumulation
    batches = load(
        groups, collate, groups.sampler(B, rank, W, micro_step), args.num_workers, device
    )

    log, means = launch.RunLog(accelerator, args.output_dir, step), launch.Means()
    bar = tqdm(total=max_steps, initial=step, disable=not accelerator.is_main_process)
    model.train()
    while step < max_steps:
        # ---------------------------------------------------------------------------------------- one training step
        batch = send_to_device(next(batches), device, non_blocking=True)
        with accelerator.accumulate(model):
            torch.manual_seed(
                step_seed(args.seed, 2, micro_step, rank)
            )  # dropout; 0 and 1 are order and negatives
            loss, accuracy = listwise_loss(model(batch["batches"])[batch["order"]], batch["mask"])
            accelerator.backward(loss)
            loss = loss.detach()
            lr = lr_at(step, args.learning_rate, warmup_steps, max_steps)
            norm, finite = descend(accelerator, model, optimizer, loss, lr, args.max_grad_norm)
            if not finite:
                what = f"loss or gradient not finite for queries {', '.join(pairs.queries.ids(batch['query_rows']))}"
                raise UserError(f"step {step + 1}: {what} — lower --learning_rate")
        # -------------------------------------------------------------------------------- log, save: once per step
        micro_step += 1
        means.add({"loss": loss, "accuracy": accuracy})
        if not accelerator.sync_gradients:
            continue
        step += 1
        last_step = step == max_steps
        bar.update()
        if step % args.log_every == 0 or last_step:
            values, seconds = means.take()
            values |= {"lr": lr, "grad_norm": norm.item(), "queries/s": W * B / seconds}
            log.write(step, values, bar)
        if step % args.save_every == 0 and not last_step:
            launch.save_state(args.output_dir, step, accelerator, model, optimizer, {})
    bar.close()
    if accelerator.is_main_process:
        data = ", ".join([args.corpus, args.queries, args.qrels, args.negatives])
        card = {
            "base": args.model,
            "data": data,
            "command": " ".join(sys.argv),
            "metrics": {"steps": step, **values},
        }
        save_cross_encoder(accelerator.unwrap_model(model), args.output_dir, card)
    launch.finish(accelerator, args.output_dir)


# ---------------------------------------------------------------------------------------------------------------------
# score: n pairs, those of a query together


def read_pairs(args: Args, queries, corpus) -> tuple[np.ndarray, np.ndarray, dict]:
    """(row of the query (n,), row of the passage (n,), notes for the echo); UserError for an id without a text."""
    if args.run:
        run = {qid: pids[: args.depth] for qid, pids in read_candidates(args.run).items()}
        query_rows, notes = known_rows(queries, list(run), args.run, "query"), {"queries": len(run)}
        lists = [known_rows(corpus, pids, args.run, "passage", qid) for qid, pids in run.items()]
    else:
        groups = Groups(
            queries,
            corpus,
            args.qrels,
            args.negatives,
            2,
            args.depth,
            allow_overlap=args.allow_overlap,
        )
        query_rows, notes = groups.query_rows, groups.notes
        positives = np.split(groups.positive_rows, groups.positive_starts[1:-1])
        negatives = np.split(groups.negative_rows, groups.negative_starts[1:-1])
        lists = [np.concatenate(both) for both in zip(positives, negatives, strict=True)]
    notes = {name: note for name, note in notes.items() if name not in ("group", "short lists")}
    query_rows = np.repeat(query_rows, [len(one) for one in lists])
    return query_rows.astype(np.int32), np.concatenate(lists).astype(np.int32), notes


@dataclass
class Shards(Dataset):
    """Item s: Pairs.ids of the pairs from spans[s][0] to spans[s][1]."""

    pairs: Pairs
    query_rows: np.ndarray
    rows: np.ndarray
    spans: list[tuple[int, int]]

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, index) -> list[tuple[list[int], list[int]]]:
        by_query = groupby(range(*self.spans[index]), key=self.query_rows.__getitem__)
        return [
            one
            for query_row, some in by_query
            for one in self.pairs.ids(query_row, self.rows[list(some)])
        ]


def score(args: Args, accelerator, pairs: Pairs, model: CrossEncoder, facts: dict):
    rank, W, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    queries, corpus, out = pairs.queries, pairs.corpus, Path(args.output_dir)
    budget = args.tokens_per_batch or (2048 if device.type == "cpu" else 65536)
    query_rows, rows, notes = read_pairs(args, queries, corpus)
    spans = [
        (s, min(s + args.shard_pairs, len(rows))) for s in range(0, len(rows), args.shard_pairs)
    ]
    meta = {
        "model_hash": model_hash(checkpoint_folder(args.model)),
        **asdict(model.format),
        "corpus_fingerprint": corpus.fingerprint,
        "queries_fingerprint": queries.fingerprint,
        "pairs_fingerprint": xxhash.xxh3_128_hexdigest(query_rows.tobytes() + rows.tobytes()),
        "count": len(rows),
        "precision": accelerator.mixed_precision.replace("no", "fp32"),
        "shard_pairs": args.shard_pairs,
        "tokens_per_batch": budget,
    }
    facts |= {
        **pairs.preview(Shards(pairs, query_rows, rows, [(0, min(256, len(rows)))])[0]),
        **notes,
        "pairs": f"{len(rows)}: {'' if args.run else 'the positives, and '}the first {args.depth} of each query in "
        f"{args.run or args.negatives}; {len(spans)} shard(s) of {args.shard_pairs}",
    }
    if args.dry_run:
        return launch.echo(accelerator, "dry run: scoring", facts)

    # ---- the folder: new, complete, or left by a run that died with the same model, texts and settings
    ignore = "num_workers", "override", "dry_run"
    complete = launch.claim_output(args, accelerator, last_file="meta.json", ignore=ignore)
    progress = out / ("meta.json" if complete else "progress.json")
    if accelerator.is_main_process and not progress.is_file():
        write_json(progress, meta)
    accelerator.wait_for_everyone()
    for key, value in read_json(progress).items():
        if meta.get(key) != value:
            raise UserError(
                f"{out}: made with {key} {value}, now {meta.get(key)} — remove it or choose another"
            )
    if complete:
        return accelerator.print(f"{out} is complete")
    launch.echo(accelerator, "scoring", facts)

    # ---- score
    speed_up_attention(model.to(device).classifier)
    missing = [s for s in range(len(spans)) if not (out / f"{shard_name(s)}.npy").is_file()]
    accelerator.wait_for_everyone()  # all have listed what is missing before the first adds to it
    mine = missing[rank::W]
    shards = Shards(pairs, query_rows, rows, [spans[s] for s in mine])
    how = {"num_workers": args.num_workers, "worker_init_fn": launch.end_with_parent}
    loader = DataLoader(shards, batch_size=None, collate_fn=list, **how)
    total = sum(spans[s][1] - spans[s][0] for s in mine)
    bar = tqdm(total=total, unit=" pairs", disable=not accelerator.is_main_process)
    with (
        torch.inference_mode(),
        accelerator.autocast(),
    ):  # one context for all batches: weights are cast once
        for shard, found in zip(mine, loader, strict=True):
            scores, lengths = (
                torch.empty(len(found), device=device),
                np.array([len(ids) for ids, _ in found]),
            )
            for some, width in token_batches(lengths, budget, model.format.max_length):
                batch = pairs.pad([found[row] for row in some], width)
                scores[torch.from_numpy(some).to(device)] = model([send_to_device(batch, device)])
                bar.update(len(some))
            scores = scores.cpu().numpy()
            if not np.isfinite(scores).all():
                wrong = spans[shard][0] + int(np.argmin(np.isfinite(scores)))
                named = (
                    f"query {queries.id(query_rows[wrong])} and passage {corpus.id(rows[wrong])}"
                )
                raise UserError(
                    f"{args.model}: the score of {named} is not finite — check it, or use fp32"
                )
            with (
                atomic(out / f"{shard_name(shard)}.npy") as temporary,
                open(temporary, "wb") as stream,
            ):
                np.save(stream, scores)
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        scores = np.concatenate([np.load(out / f"{shard_name(s)}.npy") for s in range(len(spans))])

        places = zip(query_rows, rows, scores, strict=True)
        write_scores(
            out / "scores.tsv",
            ((queries.id(query), corpus.id(row), one) for query, row, one in places),
        )
        if (
            args.run
        ):  # of --qrels there is none: a run to be evaluated must not hold what was judged
            first = np.flatnonzero(np.diff(query_rows, prepend=-1))  # the first pair of each query
            lists = [
                first[at] + np.argsort(-part, kind="stable")
                for at, part in enumerate(np.split(scores, first[1:]))
            ]
            ranked = (
                (queries.id(query_rows[best[0]]), corpus.ids(rows[best]), scores[best])
                for best in lists
            )
            write_run(out / "run.trec", ranked, "cross-encoder")
        write_json(out / "meta.json", meta)
        for leftover in [out / "progress.json", *out.glob("shard-*.npy")]:
            leftover.unlink()
        print(
            f"{len(rows)} scores, mean {scores.mean():.3f}, standard deviation {scores.std():.3f} -> {out}"
        )


def main():
    args = launch.parse_args(Args)
    training = args.task == "train"
    if (training and args.run) or not (args.run or (args.qrels and args.negatives)):
        raise UserError(
            f"--task {args.task}: of what? — give --qrels and --negatives{', or --run' * (not training)}"
        )
    if args.run and (args.qrels or args.negatives):
        raise UserError(
            "--run and --qrels or --negatives: which pairs? — give --run alone, or the two without it"
        )
    counts = (
        "per_device_batch_size",
        "gradient_accumulation_steps",
        "log_every",
        "save_every",
        "depth",
        "shard_pairs",
    )
    for name in counts:
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: counts from 1 — give a larger number")
    if args.passages_per_query < 2:
        raise UserError(
            "--passages_per_query 1: no negatives, nothing to learn from — give 2 or more"
        )
    tracked = (args.report_to, args.output_dir, args.deterministic) if training else ()
    accelerator = launch.make_accelerator(args.gradient_accumulation_steps, *tracked)
    if (
        args.num_workers
    ):  # they are the parallelism; threads of the tokenizer's own would only contend
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with accelerator.main_process_first():
        corpus, queries = open_texts(args.corpus, args.titles), open_texts(args.queries)
    torch.manual_seed(args.seed)  # of a new head
    overrides = {name: getattr(args, name) for name in asdict(PairFormat())}
    model = load_cross_encoder(
        args.model, overrides, training, strict=not training and not args.override
    )
    kind, weights = (
        model.classifier.config.model_type,
        sum(p.numel() for p in model.parameters()) / 1e6,
    )
    facts = {
        "model": f"{args.model}, {kind}, {weights:.1f} M weights{', new head' if model.new_head else ''}",
        "running on": launch.describe(accelerator),
    }
    (train if training else score)(args, accelerator, Pairs(queries, corpus, model), model, facts)


if __name__ == "__main__":
    launch.run(main)
