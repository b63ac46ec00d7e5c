"""Fine-tune a bi-encoder: queries and passages share one encoder, a score is the dot product of their vectors.

    info_nce   softmax over the passages of the batch on all processes: DPR (arXiv 2004.04906), RetroMAE (2205.12035)
    triplet    -log softmax over (positive, negative) pairs, no in-batch negatives: ANCE (2007.00808)
    distilled  --teacher_scores with --kl_weight (RetroMAE, LexMAE) or --margin_mse_weight (SPLADE) on the own group
    sparse     --head sparse: a weight per term of the vocabulary, and the FLOPS regulariser: SPLADE-max (2109.10086),
               LexMAE (2208.14754)

A group is 1 positive + n negatives, drawn anew each epoch from the first --negatives_depth of each query's list in a
file that mine_negatives.py writes. Deliberate deviations from the official code of these papers:
  1. Passages of other processes carry gradient: W processes of batch B train like one of W·B (RetroMAE has 1/W of it).
  2. Judged positives of a query and exact copies of them are never its negatives, neither drawn nor, where they stand
     in the batch for another query, in the softmax; --no_mask_positives restores the papers' softmax.
  3. A list shorter than the group is filled with masked columns (RetroMAE: random passages, LexMAE: repeats).
  4. Each judged positive is an example, shuffled over the epoch (ANCE: one per query, its triplets in a row).
  5. FLOPS is of the batch of all processes (LexMAE, SPLADE: of each GPU's own); of one micro-step if accumulated.
  6. A pair without a teacher score stops the run (RetroMAE: a missing file silently switches distillation off).

Reads   --model (ours, sentence-transformers, or Hugging Face with --pooling) and the files of lib/files.py
Writes  --output_dir: the checkpoint, and best/ by MRR@10 on the development set, each also a sentence-transformers
        folder; log.jsonl, args.json, state/ to --resume from, `done` last

CPU toy   python finetune_biencoder.py --model M --corpus C --queries Q --qrels R --passages_per_query 1 --output_dir O
1 GPU     accelerate launch --mixed_precision bf16 finetune_biencoder.py ... --negatives negatives.tsv
N GPUs    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 finetune_biencoder.py ...
"""

import math
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from lib import launch, losses
from lib.attention import economize
from lib.data import GroupCollator, Groups, StepSampler, preview, read_dev, rerank
from lib.dist import all_gather, all_gather_with_grad
from lib.encoder import load_encoder, save_encoder
from lib.files import UserError, open_texts, write_lines
from lib.gradcache import contrastive_backward
from lib.metrics import mrr_at_k
from lib.optim import lr_at, parameter_groups
from lib.text import step_seed


@dataclass
class Args:
    # data
    model: str = HfArg(help="checkpoint to start from")
    corpus: str = HfArg(help="passages")
    queries: str = HfArg(help="queries")
    qrels: str = HfArg(help="training judgments: each line with grade > 0 is an example")
    output_dir: str = HfArg(help="where the checkpoint goes")
    titles: str = HfArg(default=None, help="`pid TAB title` file to join to the corpus")
    negatives: str = HfArg(default=None, help="`qid TAB pid,pid,...`, best first, or a TREC run")
    passages_per_query: int = HfArg(default=8, help="1 positive + n negatives (RetroMAE 16); 1 = in-batch only")
    negatives_depth: int = HfArg(default=200, help="draw from the first so many per query (RetroMAE, ANCE 200)")
    teacher_scores: str = HfArg(
        default=None, help="`qid TAB pid TAB score` of all that may be drawn (recipes/rerank.py)"
    )
    allow_overlap: bool = HfArg(default=False, help="drop negatives that are judged positives instead of stopping")
    allow_unused_negatives: bool = HfArg(default=False, help="go on although the negatives serve no example")
    title: Literal["none", "space", "sep"] | None = HfArg(default=None, help="how to join; else the checkpoint's")
    query_prompt: str = HfArg(default=None, help="before every query; else the checkpoint's")
    passage_prompt: str = HfArg(default=None, help="before every passage; else the checkpoint's")
    max_query_length: int = HfArg(default=None, help="tokens (RetroMAE 32, ANCE 64); else the checkpoint's")
    max_passage_length: int = HfArg(default=None, help="tokens (RetroMAE 140, ANCE 512); else the checkpoint's")
    # development set
    dev_queries: str = HfArg(default=None, help="queries of the development set")
    dev_qrels: str = HfArg(default=None, help="judgments of the development set")
    dev_candidates: str = HfArg(default=None, help="top1000.dev or a run: passages to re-rank for MRR@10")
    eval_every: int = HfArg(
        default=0, help="steps between re-rankings, the best goes to best/; 0 = first and last only"
    )
    # model and objective
    head: Literal["dense", "sparse"] = HfArg(default="dense", help="sparse: LM logits, so the LM head is needed")
    allow_new_head: bool = HfArg(default=False, help="sparse: make an LM head where the checkpoint has none")
    exclude_special_tokens: bool = HfArg(default=False, help="sparse: no maximum over [CLS] and [SEP] (LexMAE)")
    flops_passages: float = HfArg(default=0.002, help="sparse: weight (LexMAE 0.002, with mined negatives 0.008)")
    flops_queries: float = HfArg(default=None, help="sparse: weight; default 0.75 x --flops_passages (LexMAE)")
    flops_warmup_steps: int = HfArg(default=0, help="sparse: steps of quadratic growth (LexMAE 0, SPLADE 50000)")
    pooling: Literal["cls", "mean"] | None = HfArg(default=None, help="needed where the checkpoint states none")
    normalize: bool = HfArg(default=False, help="unit vectors; a checkpoint that has them keeps them")
    projection: int = HfArg(default=0, help="new Linear + LayerNorm of this size on top (ANCE 768); 0 = none")
    loss: Literal["info_nce", "triplet"] = HfArg(default="info_nce", help="see above")
    temperature: float = HfArg(default=1.0, help="scores are q·p / it (RetroMAE 1; unit vectors 0.01 to 0.05)")
    contrastive_weight: float = HfArg(default=1.0, help="of --loss (LexMAE's stage 3 0.2, RetroMAE's KL 1e-4)")
    kl_weight: float = HfArg(default=0.0, help="of the teacher's KL per query (LexMAE 1, RetroMAE 1 / passages)")
    margin_mse_weight: float = HfArg(default=0.0, help="of the teacher's margin-MSE (SPLADE 1)")
    student_temperature: float = HfArg(default=None, help="of q·p in these two; default --temperature")
    teacher_temperature: float = HfArg(default=1.0, help="of the teacher's scores in these two")
    mask_positives: bool = HfArg(default=True, help="judged positives are no in-batch negatives of their query")
    # optimisation
    per_device_batch_size: int = HfArg(default=16, help="queries per process and micro-step (RetroMAE 16)")
    chunk_size: int = HfArg(default=0, help="GradCache: texts encoded at a time, so that any batch fits; 0 = all")
    gradient_checkpointing: bool = HfArg(default=False, help="encode twice to keep less: a fifth more time")
    gradient_accumulation_steps: int = HfArg(default=1, help="adds no in-batch negatives; --chunk_size makes room")
    optimizer: Literal["adamw"] = HfArg(default="adamw", help="betas 0.9 and 0.999, eps 1e-8")
    learning_rate: float = HfArg(default=2e-5, help="peak (RetroMAE 2e-5)")
    weight_decay: float = HfArg(default=0.01, help="not on biases and norms (RetroMAE 0, LexMAE 0.01)")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping (RetroMAE 1); 0 = none")
    num_epochs: float = HfArg(default=4.0, help="passes over the examples (RetroMAE 4)")
    max_steps: int = HfArg(default=0, help="optimizer steps; wins over --num_epochs")
    warmup_ratio: float = HfArg(default=0.05, help="share of linear warm-up before the linear decay")
    warmup_steps: int = HfArg(default=None, help="wins over --warmup_ratio")
    # runtime
    seed: int = HfArg(default=42, help="data order, negatives, dropout")
    save_every: int = HfArg(default=1000, help="steps between states to --resume from")
    log_every: int = HfArg(default=20, help="steps between log lines")
    resume: bool = HfArg(default=False, help="go on from the last state")
    num_workers: int = HfArg(default=2, help="loader processes that turn text into ids")
    report_to: Literal["none", "tensorboard", "wandb"] = HfArg(default="none", help="tracker beside log.jsonl")
    deterministic: bool = HfArg(default=False, help="bit-identical reruns on CUDA")
    dry_run: bool = HfArg(default=False, help="show the first inputs, truncation, batch, steps and disk, and stop")


def main():
    # ---- setup
    args = launch.parse_args(Args)
    accumulation = args.gradient_accumulation_steps
    accelerator = launch.make_accelerator(accumulation, args.report_to, args.output_dir, args.deterministic)
    rank, W, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    B, P = args.per_device_batch_size, args.passages_per_query
    for name in ("per_device_batch_size", "gradient_accumulation_steps", "log_every", "save_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: counts from 1 — give a larger number")
    dev_files = (args.dev_queries, args.dev_qrels, args.dev_candidates)
    if any(dev_files) != all(dev_files) or (args.eval_every and not all(dev_files)):
        raise UserError("the development set is incomplete — give --dev_queries, --dev_qrels and --dev_candidates")
    distilled, sparse = bool(args.kl_weight or args.margin_mse_weight), args.head == "sparse"
    if bool(args.teacher_scores) != distilled or (distilled and P < 2):
        raise UserError(
            "to distil, give --teacher_scores, --negatives and --kl_weight or --margin_mse_weight — or none"
        )
    if (W * B * P if args.loss == "info_nce" else P) < 2:
        raise UserError(f"--loss {args.loss}: no negatives — raise --passages_per_query or --per_device_batch_size")

    # ---- data
    with accelerator.main_process_first():
        corpus, queries = open_texts(args.corpus, args.titles), open_texts(args.queries)
        dev_queries = open_texts(args.dev_queries) if args.dev_queries else None
    how = args.negatives_depth, args.seed, args.allow_overlap, args.allow_unused_negatives, args.teacher_scores
    groups = Groups(queries, corpus, args.qrels, args.negatives, P, *how)
    if dev_queries:
        dev_qrels, dev_candidates = read_dev(dev_queries, corpus, args.dev_qrels, args.dev_candidates)
    max_steps = args.max_steps or math.ceil(args.num_epochs * len(groups) / (W * B * accumulation))
    lambda_p, flops_steps = args.flops_passages, args.flops_warmup_steps
    lambda_q = 0.75 * lambda_p if args.flops_queries is None else args.flops_queries
    warmup_steps = round(args.warmup_ratio * max_steps) if args.warmup_steps is None else args.warmup_steps

    # ---- model, optimizer, prepare
    torch.manual_seed(args.seed)  # of a new projection
    texts = "title", "query_prompt", "passage_prompt", "max_query_length", "max_passage_length"
    overrides = {name: getattr(args, name) for name in texts}
    head = {name: getattr(args, name) for name in ("head", "exclude_special_tokens", "allow_new_head")}
    head = {"projection": args.projection, "normalize": args.normalize, **head}
    model = load_encoder(args.model, args.pooling, overrides, **head)
    dim = model.dim
    economize(model.backbone, args.gradient_checkpointing)
    chunked = 0 < args.chunk_size < B * P
    chunk_rows = args.chunk_size if chunked else 16 if device.type == "cpu" else 64  # short chunks pad less
    collate = GroupCollator(groups, model.tokenizer, model.format, chunk_rows)
    weights = sum(p.numel() for p in model.parameters())
    facts = {
        "model": f"{args.model}, {weights / 1e6:.1f} M weights, {model.pooling} pooling, {dim} dimensions",
        "texts": ", ".join(f"{name} {getattr(model.format, name)!r}" for name in texts),
        "running on": launch.describe(accelerator),
        "batch": f"{B} queries x {W} process(es) x {accumulation} accumulated = {W * B * accumulation} per step",
        "encoded at a time": f"{args.chunk_size} texts (GradCache)" if chunked else "the whole batch",
        "scores": f"{'cosine (usually / 0.01 to 0.05)' if model.normalized else 'dot product'} / {args.temperature}",
        "candidates per query": W * B * P if args.loss == "info_nce" else P,
        **groups.notes,
        **({"FLOPS": f"{lambda_p} of passages, {lambda_q} of queries, after {flops_steps} steps"} if sparse else {}),
        "steps": f"{max_steps}, {len(groups) / (W * B * accumulation):.2f} per epoch, {warmup_steps} of warm-up",
        "versions": ", ".join(f"{name} {version}" for name, version in launch.versions().items()),
    }
    if args.dry_run:
        disk = f"{weights * 4 * (4 + bool(dev_queries)) / 1e9:.2f} GB"  # checkpoint, state with two moments, best/
        return launch.echo(accelerator, "dry run: fine-tuning", {**facts, **preview(collate), "disk": disk})
    ignore = "log_every", "save_every", "num_workers", "report_to"
    if launch.claim_output(args, accelerator, resume=args.resume, ignore=ignore):
        return accelerator.print(f"{args.output_dir} is complete")
    launch.echo(accelerator, "fine-tuning", facts)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)

    # ---- resume
    step, extra = launch.load_state(args.output_dir, accelerator, model, optimizer)
    launched = f"{W} process(es), precision {accelerator.mixed_precision}"
    if extra and extra["launched"] != launched:
        raise UserError(f"{args.output_dir}: the run had {extra['launched']}, now {launched} — resume it as it was")
    micro_step, dev_scores = step * accumulation, extra.get("dev_scores", {})
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns at every fork of a worker
    sampler = StepSampler(len(groups), B, rank, W, args.seed, start=micro_step)
    how = {"num_workers": args.num_workers, "pin_memory": device.type == "cuda"}
    batches = iter(DataLoader(groups, batch_sampler=sampler, collate_fn=collate, **how))

    # ---- loss and evaluation
    def contrast(batch, q_reps, p_reps):
        """Local queries against the passages of all processes: (loss, numbers for the log)."""
        q_reps, p_reps = q_reps[batch["query_order"]], p_reps[batch["passage_order"]]  # (B, D), (B·P, D) query-major
        rows, keys = all_gather(torch.stack([batch["passage_rows"], batch["passage_keys"]], 1)).unbind(1)  # (N,) each
        positives = (rank * B + torch.arange(B, device=device)) * P
        if not totals:  # the first batch of the run and of each log line
            assert torch.equal(rows[positives], batch["positive_rows"]), "a label does not point at its positive"
        scores = q_reps @ all_gather_with_grad(p_reps).T / args.temperature  # (B, N)
        judged = batch["positive_keys"] if args.mask_positives else None
        mask = losses.candidate_mask(positives, rows < 0, keys, judged)
        stats = {"masked": ((rows >= 0) & ~mask).sum() / B}
        if args.loss == "info_nce":
            loss = losses.info_nce(scores, positives, mask).mean()
        else:
            mask = mask & losses.own_group(positives, len(rows), P)
            loss = losses.triplet_nll(scores, positives, mask).mean()
        stats["accuracy"] = losses.in_batch_accuracy(scores.detach(), positives, mask)
        if distilled or sparse:
            stats["contrastive"] = loss
        loss = args.contrastive_weight * loss
        if distilled:
            own = losses.group_columns(positives, P)
            student = scores.gather(1, own) * (args.temperature / (args.student_temperature or args.temperature))
            pair = student, batch["teacher_scores"] / args.teacher_temperature, mask.gather(1, own)
            stats["kl"], stats["margin_mse"] = losses.kl_divergence(*pair).mean(), losses.margin_mse(*pair).mean()
            loss = loss + args.kl_weight * stats["kl"] + args.margin_mse_weight * stats["margin_mse"]
        real = batch["passage_rows"] >= 0
        if sparse:
            growth = min((step + 1) / flops_steps, 1) ** 2 if flops_steps else 1
            stats["q_flops"] = losses.flops(q_reps, torch.ones_like(real[:B]))
            stats["p_flops"] = losses.flops(p_reps, real)
            loss = loss + growth * (lambda_q * stats["q_flops"] + lambda_p * stats["p_flops"])
            stats |= losses.count_terms(q_reps, p_reps[::P], p_reps[real])
        stats["q_std"], stats["q_cosine"] = losses.spread(q_reps)
        stats["p_std"], stats["p_cosine"] = losses.spread(p_reps[real])
        return loss, {name: value.detach() for name, value in stats.items()}

    def save(folder):
        if accelerator.is_main_process:
            card = {"base": args.model, "data": [args.corpus, args.queries, args.qrels], "command": sys.argv}
            card["metrics"] = {"steps": step, "dev MRR@10": dev_scores.get(step)}
            save_encoder(accelerator.unwrap_model(model), folder, card)
        accelerator.wait_for_everyone()

    def develop():
        """Re-rank the candidates with the model as it stands; judged queries without candidates count 0."""
        mine = {qid: dev_candidates[qid] for qid in sorted(dev_candidates)[rank::W]}
        encoder, at_once = accelerator.unwrap_model(model).eval(), 2**25 // dim  # 128 MB of vectors
        parts = gather_object([rerank(encoder, device, collate, dev_queries, mine, 10, at_once)])
        model.train()
        dev_scores[step] = mrr_at_k({qid: pids for part in parts for qid, pids in part.items()}, dev_qrels, 10)
        log.write(step, {"dev_mrr@10": dev_scores[step]}, bar)
        if max(dev_scores, key=dev_scores.get) == step:  # of equals the first
            save(Path(args.output_dir) / "best")

    # ---- train
    log, totals, summed = launch.RunLog(accelerator, args.output_dir, step if extra else -1), {}, 0
    bar = tqdm(total=max_steps, initial=step, disable=not accelerator.is_main_process)
    if dev_queries and not dev_scores:
        develop()
    model.train()
    clock = time.perf_counter()
    while step < max_steps:
        # ---------------------------------------------------------------------------------------- one training step
        batch = send_to_device(next(batches), device, non_blocking=True)
        with accelerator.accumulate(model):
            seed = step_seed(args.seed, 2, micro_step, rank)  # of dropout; 0 and 1 are permutations and negatives
            loss, stats = contrastive_backward(
                accelerator, model, batch["query"], batch["passage"], partial(contrast, batch), seed, chunked
            )
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(step, args.learning_rate, warmup_steps, max_steps)
            checked = loss + norm if accelerator.sync_gradients and not accelerator.scaler else loss
            if not torch.isfinite(checked):  # fp16: the scaler itself passes over a step whose gradient overflows
                qids = ", ".join(queries.ids(batch["query_rows"].tolist()))
                raise UserError(
                    f"step {step + 1}: loss or gradient not finite for queries {qids} — lower --learning_rate"
                )
            optimizer.step()
            optimizer.zero_grad()
        # ---------------------------------------------------------------------- log, evaluate, save: once per step
        micro_step, summed = micro_step + 1, summed + 1
        for name, value in {"loss": loss, **stats}.items():  # sums stay on the device until they are logged
            totals[name] = totals.get(name, 0) + value
        if not accelerator.sync_gradients:
            continue
        step += 1
        last_step = step == max_steps
        bar.update()
        if step % args.log_every == 0 or last_step:
            means = all_gather(torch.stack([*totals.values()])[None]).mean(0) / summed
            values = dict(zip(totals, means.tolist(), strict=True))
            speed = summed * W * B / (time.perf_counter() - clock)
            log.write(step, {**values, "lr": group["lr"], "grad_norm": norm.item(), "queries/s": speed}, bar)
            settled = step > max(warmup_steps, flops_steps) + max(max_steps // 4, 100)
            if sparse and (wrong := losses.collapse(values["q_terms"], values["p_terms"], dim, settled)):
                raise UserError(f"step {step}: {wrong}")
            if max(values["q_cosine"], values["p_cosine"]) > 0.95 and step > warmup_steps:
                bar.write("warning: different texts have nearly the same vector (cosine > 0.95): a collapsing encoder")
            totals, summed, clock = {}, 0, time.perf_counter()
        if dev_queries and (last_step or (args.eval_every and step % args.eval_every == 0)):
            pause = time.perf_counter()
            develop()
            clock += time.perf_counter() - pause
        if step % args.save_every == 0 and not last_step:
            extra = {"launched": launched, "dev_scores": dev_scores}
            launch.save_state(args.output_dir, step, accelerator, model, optimizer, extra)
    bar.close()

    # ---- save
    save(args.output_dir)
    if accelerator.is_main_process:
        write_lines(Path(args.output_dir) / "done", [])
    accelerator.end_training()


if __name__ == "__main__":
    launch.run(main)
