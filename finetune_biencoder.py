"""Fine-tune a bi-encoder: queries and passages share one encoder, a score is the dot product of
their vectors.

    info_nce   softmax over the passages of the batch on all processes: DPR (arXiv 2004.04906),
               RetroMAE (2205.12035)
    own_group  the same over the passages of the query's own group alone
    triplet    -log softmax over (positive, negative) pairs, no in-batch negatives: ANCE
               (2007.00808)
    distilled  --kl_weight (RetroMAE, LexMAE) or --margin_mse_weight (SPLADE) on teacher scores in
               the training file
    sparse     --head sparse: a weight per term of the vocabulary, and the FLOPS regulariser:
               SPLADE-max (2109.10086), LexMAE (2208.14754)
    MaxP       --max_chunks: the best chunk of a document is its score: ANCE
    robust     --dro: the clusters in the training file are weighted: COCO-DR (2210.15212),
               lib/dro.py

A group is 1 positive + n negatives, drawn anew at each visit from the first --negatives_depth of
the query's list in the training file; or in the newest generation of it, if --train is a folder
that a miner fills meanwhile (ANCE, lib/generations.py). Deliberate deviations from the papers'
official code:
  1. Passages of other processes carry gradient: W processes of batch B train like one of W·B
     (RetroMAE has 1/W of it).
  2. Positives of a query and exact copies of them are never its negatives, neither drawn nor, where
     they stand in the batch for another query, in the softmax.
  3. A list shorter than the group is filled with masked columns (RetroMAE: random passages, LexMAE:
     repeats).
  4. Each positive is an example, shuffled over the epoch (ANCE: one per query, its triplets in a
     row).
  5. FLOPS is of the batch of all processes (LexMAE, SPLADE: of each GPU's own). If steps are
     accumulated, it is of one micro-step.
  6. A file in which only some lines have teacher scores stops the run (RetroMAE switches
     distillation off silently).
  7. Each chunk of MaxP begins with [CLS] (ANCE: the first). lib/dro.py lists the deviations of DRO.

Reads   --model (ours, sentence-transformers, or Hugging Face with --pooling); --train: a training
        file (mine_negatives.py, recipes/import_training_data.py), judgments, or a folder of
        generations; corpus and queries
Writes  --output_dir: the checkpoint, and best/ by MRR@10 on the development set, each also a
        sentence-transformers folder; log.jsonl, args.json, state/ to --resume from, `done` last;
        for a miner also checkpoints/ and generations.tsv

CPU toy   python finetune_biencoder.py --model M --corpus C --queries Q --train qrels.tsv \\
              --output_dir O
1 GPU     accelerate launch --mixed_precision bf16 finetune_biencoder.py ... \\
              --train negatives/train.jsonl
N GPUs    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
              finetune_biencoder.py ...
"""

import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import send_to_device
from tqdm import tqdm

from lib import launch, losses
from lib.arguments import arg, parse_args
from lib.checkpoint import (
    check_checkpoint,
    checkpoint_folder,
    load_encoder,
    model_hash,
    save_encoder,
)
from lib.cpu import speed_up_attention
from lib.dev import DevSet
from lib.dro import GroupGradients, GroupWeights, Robustness, groups_of_rows
from lib.files import UserError
from lib.generations import Generation, Refresh, checkpoint_path, remove_old_checkpoints
from lib.gradcache import contrastive_backward
from lib.groups import GroupCollator, Groups, TrainingFile, preview
from lib.loader import StepSampler, load
from lib.masking import DROPOUT
from lib.optim import (
    descend,
    lr_at,
    make_optimizer,
    parameter_groups,
    recompute_activations,
    steps_of,
)
from lib.text import TextFormat, step_seed
from lib.texts import open_texts

KEPT_CHECKPOINTS = 2  # for the miner, if --train is a folder of generations


@dataclass(kw_only=True)
class Args:
    model: str = arg(group="data", help="checkpoint to start from")
    train: str = arg(help="training file, judgments (in-batch negatives), or folder of generations")
    corpus: str = arg(help="the passages that the training file names")
    queries: str = arg(help="the queries that the training file names")
    output_dir: str = arg(help="folder for the checkpoint")
    passages_per_query: int = arg(None, least=1, help="1 positive, the rest negatives (default: 8)")
    negatives_depth: int = arg(200, least=1, help="draw from the first N negatives of a query")
    dev_queries: str = arg(None, group="development set", help="its queries")
    dev_qrels: str = arg(None, help="its judgments")
    dev_candidates: str = arg(None, help="passages to re-rank for MRR@10: a run or top1000.dev")
    eval_every: int = arg(None, least=1, help="steps between evaluations (default: ten in all)")
    title: Literal["none", "space", "sep"] | None = arg(
        None, group="texts (default: as the checkpoint states)", help="how titles join their texts"
    )
    query_prompt: str = arg(None, help="text put before every query")
    passage_prompt: str = arg(None, help="text put before every passage")
    max_query_length: int = arg(None, least=3, help="tokens of a query (RetroMAE 32, ANCE 64)")
    max_passage_length: int = arg(
        None, least=3, help="tokens of a passage (RetroMAE 140, ANCE 512)"
    )
    max_chunks: int = arg(None, least=1, help="maximum number of chunks per passage (MaxP 4)")
    max_characters: int = arg(None, least=0, help="cut passages to N characters first (ANCE 10000)")
    head: Literal["dense", "sparse", "new_sparse"] = arg(
        "dense", group="model", help="sparse: with the LM head; new_sparse: make a new LM head"
    )
    pooling: str = arg(None, help="cls, mean or last_token, if the checkpoint states none")
    normalize: bool = arg(False, help="make unit vectors; a checkpoint that has them keeps them")
    projection: int = arg(
        0, least=0, help="add Linear + LayerNorm of this size (ANCE 768); 0: none"
    )
    exclude_special_tokens: bool = arg(False, help="sparse: pool over no special tokens (LexMAE)")
    loss: Literal["info_nce", "triplet", "own_group"] = arg(
        "info_nce", group="objective", help="the contrastive loss, see above"
    )
    temperature: float = arg(
        None, above=0, help="divides scores (default: unit vectors 0.05, else 1)"
    )
    contrastive_weight: float = arg(1.0, least=0, help="weight of --loss (LexMAE's stage 3: 0.2)")
    kl_weight: float = arg(0.0, least=0, help="weight of KL(teacher, student) per query (LexMAE 1)")
    margin_mse_weight: float = arg(
        0.0, least=0, help="weight of the teacher's margin-MSE (SPLADE 1)"
    )
    flops_passages: float = arg(
        0.002, least=0, help="sparse: FLOPS weight of passages (LexMAE 0.002)"
    )
    flops_queries: float = arg(None, least=0, help="sparse: of queries (default: 0.75 of passages)")
    flops_warmup_steps: int = arg(0, least=0, help="sparse: steps in which the FLOPS weights grow")
    dro: Literal["idro", "greedy"] | None = arg(
        None, help="weight the clusters of the training file"
    )
    dro_alpha: float = arg(0.25, above=0, most=1, help="idro: power of losses; greedy: worst share")
    dro_ema: float = arg(
        0.1, least=0, most=1, help="idro: power of the previous weight; greedy: rate"
    )
    dro_rho: float = arg(0.05, least=0, help="idro: step size of the weights (COCO-DR 0.05)")
    dro_eps: float = arg(0.01, least=0, most=1, help="least weight of a cluster (COCO-DR 0.01)")
    per_device_batch_size: int = arg(
        16, group="optimisation", least=1, help="queries per process and micro-step (RetroMAE 16)"
    )
    chunk_size: int = arg(0, least=0, help="GradCache: texts encoded at a time; 0 = all at once")
    gradient_checkpointing: bool = arg(
        False,
        help="recompute activations in the backward pass: about 20% slower, a third less memory",
    )
    gradient_accumulation_steps: int = arg(
        1, least=1, help="micro-steps per step; does not add in-batch negatives (use --chunk_size)"
    )
    optimizer: Literal["adamw", "lamb"] = arg("adamw", help="betas 0.9 and 0.999, eps 1e-8")
    learning_rate: float = arg(2e-5, above=0, help="peak learning rate (RetroMAE 2e-5)")
    weight_decay: float = arg(0.01, least=0, help="not for biases and norms (RetroMAE 0)")
    max_grad_norm: float = arg(1.0, least=0, help="clip gradients to this norm; 0 = do not")
    num_epochs: float = arg(4.0, above=0, help="passes over the examples (RetroMAE 4)")
    max_steps: int = arg(None, least=1, help="optimizer steps, in place of --num_epochs")
    warmup_steps: float = arg(0.05, least=0, help="linear warm-up: steps, or below 1 their share")
    seed: int = arg(42, group="runtime", least=0, help="decides data order, negatives and dropout")
    save_every: int = arg(1000, least=1, help="steps between states to --resume from")
    log_every: int = arg(
        20, least=1, help="steps between log lines, and looks for a new generation"
    )
    resume: bool = arg(False, help="continue from the last saved state")
    num_workers: int = arg(2, least=0, help="loader processes that turn text into ids")
    report_to: Literal["none", "tensorboard", "wandb"] = arg("none", help="tracker of the log")
    deterministic: bool = arg(False, help="bit-identical reruns on CUDA, slower")
    dry_run: bool = arg(False, help="show the first inputs, batch, steps and disk, and stop")


def contrastive_loss(scores, positives, mask):
    """The loss of each query (B,): put your own here. scores (B, N), divided by the temperature;
    positives (B,), the column of each query's positive; mask (B, N), True = the column counts."""
    return losses.info_nce(scores, positives, mask)


def check(args, passages_per_query: int, candidates: int) -> None:
    """UserError where flags contradict each other. candidates: passages that a query is compared
    with."""
    distilled = args.kl_weight or args.margin_mse_weight
    in_batch = args.loss == "info_nce" or args.head != "dense"
    by_parts = args.chunk_size or args.gradient_checkpointing
    if candidates < 2:
        raise UserError(
            f"--loss {args.loss} has no negatives — raise --passages_per_query or "
            "--per_device_batch_size"
        )
    if distilled and passages_per_query < 2:
        raise UserError(
            "distillation compares the passages of a group — give --passages_per_query 2 or more"
        )
    if args.dro and (in_batch or by_parts):
        raise UserError(
            "--dro needs a loss of each query alone, of a batch encoded at once — give --loss "
            "triplet or "
            "own_group, and leave out --head sparse, --chunk_size and --gradient_checkpointing"
        )
    if Path(args.train).is_dir() and not args.max_steps:
        raise UserError(
            "--train with generations has no fixed number of examples — give --max_steps"
        )


def main():
    # ---- setup
    args = parse_args(Args)
    accumulation = args.gradient_accumulation_steps
    accelerator = launch.make_accelerator(
        accumulation, args.report_to, args.output_dir, args.deterministic
    )
    rank = accelerator.process_index
    W = accelerator.num_processes
    device = accelerator.device
    out = Path(args.output_dir)
    B = args.per_device_batch_size
    sparse = args.head != "dense"

    # ---- data
    with accelerator.main_process_first():
        corpus = open_texts(args.corpus)
        queries = open_texts(args.queries)
        wanted = args.dev_queries or args.dev_qrels or args.dev_candidates or args.eval_every
        dev = None
        if wanted:
            dev = DevSet(args.dev_queries, args.dev_qrels, args.dev_candidates, corpus)
    refresh = Refresh(args.train, out / "generations.tsv") if Path(args.train).is_dir() else None
    used = refresh.first() if refresh else Generation(0, 0, Path(args.train))
    file = TrainingFile(used.train, queries, corpus)
    P = args.passages_per_query or (8 if len(file.negative_rows) else 1)
    check(args, P, W * B * P if args.loss == "info_nce" else P)
    groups = Groups(file, P - 1, args.negatives_depth, args.seed)
    distilled = bool(args.kl_weight or args.margin_mse_weight)
    file.require(scores=distilled, clusters=bool(args.dro))
    batch_size = W * B * accumulation
    max_steps = args.max_steps or math.ceil(args.num_epochs * len(groups) / batch_size)
    warmup_steps = steps_of(args.warmup_steps, max_steps)
    eval_every = args.eval_every or max(max_steps // 10, 1)
    lambda_p = args.flops_passages
    lambda_q = 0.75 * lambda_p if args.flops_queries is None else args.flops_queries

    # ---- model
    torch.manual_seed(args.seed)  # of a new projection
    model = load_encoder(
        args.model,
        args.pooling,
        {name: getattr(args, name) for name in TextFormat.__dataclass_fields__},
        projection=args.projection,
        normalize=args.normalize,
        head="sparse" if sparse else "dense",
        exclude_special_tokens=args.exclude_special_tokens,
        allow_new_head=args.head == "new_sparse",
    )
    form, dim = model.format, model.dim
    temperature = args.temperature or (0.05 if model.normalized else 1.0)
    speed_up_attention(model.backbone)
    if args.gradient_checkpointing:
        recompute_activations(model.backbone)
    robustness = Robustness(args.dro, args.dro_alpha, args.dro_ema, args.dro_rho, args.dro_eps)
    dro = GroupWeights(int(file.clusters.max()) + 1, robustness) if args.dro else None
    gradients = GroupGradients(model.backbone) if args.dro == "idro" else None
    chunked = 0 < args.chunk_size < B * P * form.max_chunks
    at_a_time = args.chunk_size if chunked else 16 if device.type == "cpu" else 64
    collate = GroupCollator(groups, model.tokenizer, form, at_a_time)
    weights = sum(p.numel() for p in model.parameters())
    facts = {
        "model": f"{args.model}, {weights / 1e6:.1f} M weights, "
        f"{model.pooling} pooling, {dim} dimensions",
        "texts": ", ".join(f"{name} {value!r}" for name, value in asdict(form).items()),
        "running on": launch.describe(accelerator),
        "batch": f"{B} queries x {W} process(es) x {accumulation} accumulated = "
        f"{batch_size} per step",
        "encoded at a time": f"{args.chunk_size} texts (GradCache)" if chunked else "all texts",
        "scores": f"{'cosine' if model.normalized else 'dot product'} / {temperature}",
        "training data": f"{used.train}, of step {used.step}" if refresh else args.train,
        **groups.notes,
        "steps": f"{max_steps}, {len(groups) / batch_size:.2f} per epoch, "
        f"{warmup_steps} of warm-up",
    }
    copies = 4 + bool(dev) + KEPT_CHECKPOINTS * bool(refresh)  # of the weights, 3 in state/
    facts["disk"] = f"{copies * weights * 4 / 1e9:.2f} GB"
    inputs = {"model": model_hash(checkpoint_folder(args.model)), **file.fingerprints}
    if refresh:
        del inputs["train"]  # which generation is used when stands in generations.tsv
    facts["inputs"] = inputs
    if not launch.begin(accelerator, args, "fine-tuning", facts, partial(preview, collate)):
        return
    if accelerator.is_main_process:
        check_checkpoint(model, out)
    parameters = parameter_groups(model, args.weight_decay)
    optimizer = make_optimizer(args.optimizer, parameters, args.learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)

    # ---- resume
    step, extra = launch.load_state(out, accelerator, model, optimizer)
    micro_step = step * accumulation
    dev_scores = extra.get("dev_scores", {})
    if dro and extra:
        dro.load(extra["dro"])

    # ---- the loss of a batch, and evaluation
    def loss_of(batch, q_reps, p_reps):
        """q_reps (B, D), p_reps (B·P·M, D) query-major -> (loss, numbers for the log)."""
        scores, positives, mask, filled = losses.score_batch(batch, q_reps, p_reps, temperature)
        if args.loss != "info_nce":
            mask = mask & losses.own_group(positives, scores.shape[1], P)
        function = losses.triplet_nll if args.loss == "triplet" else contrastive_loss
        loss = function(scores, positives, mask)  # (B,)
        stats = losses.batch_statistics(scores, positives, mask, filled)
        stats["contrastive"] = loss
        loss = args.contrastive_weight * loss
        if distilled:
            own = losses.group_columns(positives, P)  # (B, P)
            student, keep = scores.gather(1, own), mask.gather(1, own)
            stats["kl"] = losses.kl_divergence(student, batch["teacher_scores"], keep)
            stats["margin_mse"] = losses.margin_mse(student, batch["teacher_scores"], keep)
            loss = loss + args.kl_weight * stats["kl"]
            loss = loss + args.margin_mse_weight * stats["margin_mse"]
        loss = dro.loss(loss, batch["clusters"]) if dro else loss.mean()
        real = (batch["passage_rows"] >= 0).repeat_interleave(form.max_chunks)
        if sparse:
            growth = min((step + 1) / max(args.flops_warmup_steps, 1), 1) ** 2
            stats |= losses.sparsity(q_reps, p_reps, real, P)
            loss = loss + growth * (lambda_q * stats["q_flops"] + lambda_p * stats["p_flops"])
        stats["q_std"], stats["q_cosine"] = losses.spread(q_reps)
        stats["p_std"], stats["p_cosine"] = losses.spread(p_reps[real])
        return loss, {name: value.detach().float().mean() for name, value in stats.items()}

    def save(folder):
        if accelerator.is_main_process:
            metrics = {"steps": step, "dev MRR@10": dev_scores.get(step)}
            data = [args.corpus, args.queries, args.train]
            card = {"base": args.model, "data": data, "command": sys.argv, "metrics": metrics}
            save_encoder(accelerator.unwrap_model(model), folder, card)
        accelerator.wait_for_everyone()

    def evaluate():
        dev_scores[step] = dev.mrr(accelerator, model, collate)
        log.write(step, {"dev_mrr@10": dev_scores[step]}, bar)
        if max(dev_scores, key=dev_scores.get) == step:  # of equals the first
            save(out / "best")

    # ---- train
    log = launch.RunLog(accelerator, out, step)
    means = launch.Means()
    bar = tqdm(total=max_steps, initial=step, disable=not accelerator.is_main_process)
    if dev and not dev_scores:
        evaluate()
    batches = None
    model.train()
    while step < max_steps:
        due = micro_step % accumulation == 0 and step % args.log_every == 0
        if refresh and (due or batches is None):
            newest = refresh.at(step - step % args.log_every, accelerator)
            if newest != used:  # optimizer and schedule go on
                used, batches = newest, None
                file = TrainingFile(used.train, queries, corpus)
                collate.groups = Groups(file, P - 1, args.negatives_depth, args.seed)
        if batches is None:
            sampler = StepSampler(len(collate.groups), B, rank, W, args.seed, start=micro_step)
            batches = load(collate.groups, collate, sampler, args.num_workers, device)
        # ------------------------------------------------------------------- one training step
        batch = send_to_device(next(batches), device, non_blocking=True)
        dropout = step_seed(args.seed, DROPOUT, micro_step, rank)
        with accelerator.accumulate(model):
            if chunked:
                loss_fn = partial(loss_of, batch)
                loss, stats = contrastive_backward(accelerator, model, batch, loss_fn, dropout)
            else:
                torch.manual_seed(step_seed(dropout))
                q_reps, p_reps = model(batch["query"], batch["passage"])
                loss, stats = loss_of(batch, q_reps, p_reps)
                accelerator.backward(loss)
            if dro:
                orders = (batch[side]["order"] for side in ("query", "passage"))
                dro.update(gradients, groups_of_rows(batch["clusters"], *orders))
            lr = lr_at(step, args.learning_rate, warmup_steps, max_steps)
            norm, finite = descend(
                accelerator, model, optimizer, loss.detach(), lr, args.max_grad_norm
            )
            if not finite:
                qids = ", ".join(queries.ids(batch["query_rows"].tolist()))
                raise UserError(
                    f"step {step + 1}: the loss or gradient is not finite for queries {qids} — "
                    "lower --learning_rate"
                )
        # ------------------------------------------------- log, evaluate, save: once per step
        micro_step += 1
        means.add({"loss": loss.detach(), **stats})
        if not accelerator.sync_gradients:
            continue
        step += 1
        last_step = step == max_steps
        bar.update()
        if step % args.log_every == 0 or last_step:
            values, seconds = means.take()
            values |= {"lr": lr, "grad_norm": norm.item(), "queries/s": W * B / seconds}
            if refresh:
                values |= {"generation": used.number, "lag": step - used.step}
            if dro:
                values["group_weights"] = dro.h.tolist()
            log.write(step, values, bar)
            settled = max(warmup_steps, args.flops_warmup_steps) + max(max_steps // 4, 100)
            losses.stop_on_collapse(step, values, dim, settled=step > settled)
            if max(values["q_cosine"], values["p_cosine"]) > 0.95 and step > warmup_steps:
                bar.write(
                    "warning: the encoder collapses: different texts have a mean cosine above 0.95"
                )
        if dev and (last_step or step % eval_every == 0):
            with means.paused():
                evaluate()
        if step % args.save_every == 0 and not last_step:
            extra = {"dev_scores": dev_scores, "dro": dro.state() if dro else None}
            launch.save_state(out, step, accelerator, model, optimizer, extra)
            if refresh:  # after the state: no checkpoint is of a step that a resume begins before
                save(checkpoint_path(out, step))
                remove_old_checkpoints(out, KEPT_CHECKPOINTS)
    bar.close()

    # ---- save
    save(out)
    launch.finish(accelerator, out)


if __name__ == "__main__":
    launch.run(main)
