"""Fine-tune a bi-encoder: queries and passages share one encoder, a score is the dot product of their vectors.

    info_nce   softmax over the passages of the batch on all processes: DPR (arXiv 2004.04906), RetroMAE (2205.12035)
    own_group  the same over the passages of the query's own group alone
    triplet    -log softmax over (positive, negative) pairs, no in-batch negatives: ANCE (2007.00808)
    distilled  --teacher_scores with --kl_weight (RetroMAE, LexMAE) or --margin_mse_weight (SPLADE) on the own group
    sparse     --head sparse: a weight per term of the vocabulary, and the FLOPS regulariser: SPLADE-max (2109.10086),
               LexMAE (2208.14754)
    MaxP       --max_chunks: the best chunk of a document is its score: ANCE
    robust     --dro: groups of queries (--clusters) are weighted: COCO-DR (2210.15212), lib/dro.py

A group is 1 positive + n negatives, drawn anew each epoch from the first --negatives_depth of each query's list in a
file that mine_negatives.py writes, or in the newest generation that a miner has added to --negatives_dir meanwhile
(ANCE, lib/generations.py); --triples are groups as published (ANCE's warm-up). Deliberate deviations from the papers'
official code:
  1. Passages of other processes carry gradient: W processes of batch B train like one of W·B (RetroMAE has 1/W of it).
  2. Judged positives of a query and exact copies of them are never its negatives, neither drawn nor, where they stand
     in the batch for another query, in the softmax; --no_mask_positives restores the papers' softmax.
  3. A list shorter than the group is filled with masked columns (RetroMAE: random passages, LexMAE: repeats).
  4. Each judged positive is an example, shuffled over the epoch (ANCE: one per query, its triplets in a row).
  5. FLOPS is of the batch of all processes (LexMAE, SPLADE: of each GPU's own); of one micro-step if accumulated.
  6. A pair without a teacher score stops the run (RetroMAE: a missing file silently switches distillation off).
  7. Each chunk of MaxP begins with [CLS] (ANCE: the first); what DRO does otherwise is in lib/dro.py.

Reads   --model (ours, sentence-transformers, or Hugging Face with --pooling) and the files of lib/files.py
Writes  --output_dir: the checkpoint, and best/ by MRR@10 on the development set, each also a sentence-transformers
        folder; log.jsonl, args.json, state/ to --resume from, `done` last; checkpoints/, generations.tsv for a miner

CPU toy   python finetune_biencoder.py --model M --corpus C --queries Q --qrels R --passages_per_query 1 --output_dir O
1 GPU     accelerate launch --mixed_precision bf16 finetune_biencoder.py ... --negatives negatives.tsv
N GPUs    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 finetune_biencoder.py ...
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
from transformers.hf_argparser import HfArg

from lib import launch, losses
from lib.checkpoint import load_encoder, save_encoder
from lib.cpu import speed_up_attention
from lib.dev import dev_mrr, open_dev
from lib.dist import all_gather, all_gather_with_grad
from lib.dro import GroupGradients, GroupWeights
from lib.files import UserError
from lib.generations import Generation, Refresh, checkpoint_path, remove_old_checkpoints
from lib.gradcache import contrastive_backward
from lib.groups import GroupCollator, Groups, preview
from lib.loader import load
from lib.optim import descend, lr_at, make_optimizer, parameter_groups, recompute_activations
from lib.text import TextFormat, step_seed
from lib.texts import open_texts
from lib.triples import TripleCollator, Triples


@dataclass
class Args:
    # data
    model: str = HfArg(help="checkpoint to start from")
    output_dir: str = HfArg(help="where the checkpoint goes")
    corpus: str = HfArg(default=None, help="passages")
    queries: str = HfArg(default=None, help="queries")
    qrels: str = HfArg(
        default=None, help="training judgments: each line with grade > 0 is an example"
    )
    triples: str = HfArg(
        default=None, help="in place of --qrels: triples of texts, or of ids of --queries, --corpus"
    )
    titles: str = HfArg(default=None, help="`pid TAB title` file to join to the corpus")
    negatives: str = HfArg(default=None, help="`qid TAB pid,pid,...`, best first, or a TREC run")
    negatives_dir: str = HfArg(
        default=None, help="generations that a miner adds (recipes/ance.sh); its queries alone"
    )
    refresh_every: int = HfArg(
        default=100, help="steps between looks at --negatives_dir (ANCE 100)"
    )
    passages_per_query: int = HfArg(
        default=8, help="1 positive + n negatives (RetroMAE 16); 1 = in-batch only"
    )
    negatives_depth: int = HfArg(
        default=200, help="draw from the first so many per query (RetroMAE, ANCE 200)"
    )
    teacher_scores: str = HfArg(
        default=None, help="`qid TAB pid TAB score` of all that may be drawn (rerank.py)"
    )
    allow_overlap: bool = HfArg(
        default=False, help="drop negatives that are judged positives instead of stopping"
    )
    allow_unused_negatives: bool = HfArg(
        default=False, help="go on although the negatives serve no example"
    )
    title: Literal["none", "space", "sep"] | None = HfArg(
        default=None, help="how to join; else the checkpoint's"
    )
    query_prompt: str = HfArg(default=None, help="before every query; else the checkpoint's")
    passage_prompt: str = HfArg(default=None, help="before every passage; else the checkpoint's")
    max_query_length: int = HfArg(
        default=None, help="tokens (RetroMAE 32, ANCE 64); else the checkpoint's"
    )
    max_passage_length: int = HfArg(
        default=None, help="tokens (RetroMAE 140, ANCE 512); else the checkpoint's"
    )
    max_chunks: int = HfArg(
        default=None, help="of so many tokens in a passage (MaxP 4); else the checkpoint's"
    )
    max_characters: int = HfArg(
        default=None, help="of a passage (ANCE's documents 10000); else the checkpoint's"
    )
    # development set
    dev_queries: str = HfArg(default=None, help="queries of the development set")
    dev_qrels: str = HfArg(default=None, help="judgments of the development set")
    dev_candidates: str = HfArg(
        default=None, help="top1000.dev or a run: passages to re-rank for MRR@10"
    )
    eval_every: int = HfArg(
        default=0, help="steps between re-rankings, the best to best/; 0 = first and last only"
    )
    # model and objective
    head: Literal["dense", "sparse"] = HfArg(
        default="dense", help="sparse: LM logits, so the LM head is needed"
    )
    allow_new_head: bool = HfArg(
        default=False, help="sparse: make an LM head where the checkpoint has none"
    )
    exclude_special_tokens: bool = HfArg(
        default=False, help="sparse: no maximum over [CLS] and [SEP] (LexMAE)"
    )
    flops_passages: float = HfArg(
        default=0.002, help="sparse: weight (LexMAE 0.002, with mined negatives 0.008)"
    )
    flops_queries: float = HfArg(
        default=None, help="sparse: weight; default 0.75 x --flops_passages (LexMAE)"
    )
    flops_warmup_steps: int = HfArg(
        default=0, help="sparse: steps of quadratic growth (LexMAE 0, SPLADE 50000)"
    )
    pooling: Literal["cls", "mean"] | None = HfArg(
        default=None, help="needed where the checkpoint states none"
    )
    normalize: bool = HfArg(
        default=False, help="unit vectors; a checkpoint that has them keeps them"
    )
    projection: int = HfArg(
        default=0, help="new Linear + LayerNorm of this size on top (ANCE 768); 0 = none"
    )
    loss: Literal["info_nce", "triplet", "own_group"] = HfArg(default="info_nce", help="see above")
    temperature: float = HfArg(
        default=1.0, help="scores are q·p / it (RetroMAE 1; unit vectors 0.01 to 0.05)"
    )
    contrastive_weight: float = HfArg(
        default=1.0, help="of --loss (LexMAE's stage 3 0.2, RetroMAE's KL 1e-4)"
    )
    kl_weight: float = HfArg(
        default=0.0, help="of the teacher's KL per query (LexMAE 1, RetroMAE 1 / passages)"
    )
    margin_mse_weight: float = HfArg(default=0.0, help="of the teacher's margin-MSE (SPLADE 1)")
    student_temperature: float = HfArg(
        default=None, help="of q·p in these two; default --temperature"
    )
    teacher_temperature: float = HfArg(default=1.0, help="of the teacher's scores in these two")
    mask_positives: bool = HfArg(
        default=True, help="judged positives are no in-batch negatives of their query"
    )
    # groups of queries
    dro: Literal["idro", "greedy"] | None = HfArg(
        default=None, help="with --clusters and a loss of the own group"
    )
    clusters: str = HfArg(
        default=None, help="`qid TAB cluster` of all training queries (recipes/cluster_queries.py)"
    )
    dro_form: Literal["official", "paper"] = HfArg(
        default="official", help="of idro, see lib/dro.py"
    )
    dro_alpha: float = HfArg(
        default=0.25, help="idro: power of the losses (COCO-DR 0.25); greedy: share of queries"
    )
    dro_ema: float = HfArg(
        default=0.1, help="official idro: power of the weight before; greedy: of running means"
    )
    dro_rho: float = HfArg(default=0.05, help="idro: step size (COCO-DR 0.05)")
    dro_eps: float = HfArg(default=0.01, help="least weight (COCO-DR 0.01; the paper's form 0)")
    dro_layers: int = HfArg(
        default=3, help="idro: last layers whose gradients are compared (COCO-DR 3)"
    )
    # optimisation
    per_device_batch_size: int = HfArg(
        default=16, help="queries per process and micro-step (RetroMAE 16)"
    )
    chunk_size: int = HfArg(
        default=0, help="GradCache: texts encoded at a time, so that any batch fits; 0 = all"
    )
    gradient_checkpointing: bool = HfArg(
        default=False, help="encode twice to keep less: a fifth more time"
    )
    gradient_accumulation_steps: int = HfArg(
        default=1, help="adds no in-batch negatives; --chunk_size makes room"
    )
    optimizer: Literal["adamw", "lamb"] = HfArg(
        default="adamw", help="betas 0.9 and 0.999, eps 1e-8 (ANCE lamb)"
    )
    learning_rate: float = HfArg(default=2e-5, help="peak (RetroMAE 2e-5)")
    weight_decay: float = HfArg(
        default=0.01, help="not on biases and norms (RetroMAE 0, LexMAE 0.01)"
    )
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping (RetroMAE 1); 0 = none")
    num_epochs: float = HfArg(default=4.0, help="passes over the examples (RetroMAE 4)")
    max_steps: int = HfArg(default=0, help="optimizer steps; wins over --num_epochs")
    warmup_ratio: float = HfArg(
        default=0.05, help="share of linear warm-up before the linear decay"
    )
    warmup_steps: int = HfArg(default=None, help="wins over --warmup_ratio")
    # runtime
    seed: int = HfArg(default=42, help="data order, negatives, dropout")
    save_every: int = HfArg(default=1000, help="steps between states to --resume from")
    keep_checkpoints: int = HfArg(
        default=0, help="of these steps the last so many, in checkpoints/, for a miner"
    )
    log_every: int = HfArg(default=20, help="steps between log lines")
    resume: bool = HfArg(default=False, help="go on from the last state")
    num_workers: int = HfArg(default=2, help="loader processes that turn text into ids")
    report_to: Literal["none", "tensorboard", "wandb"] = HfArg(
        default="none", help="tracker beside log.jsonl"
    )
    deterministic: bool = HfArg(default=False, help="bit-identical reruns on CUDA")
    dry_run: bool = HfArg(
        default=False, help="show the first inputs, truncation, batch, steps and disk, and stop"
    )


def check(args, candidates: int) -> None:
    """UserError where flags contradict each other. candidates: passages that a query is compared with."""
    judged, distilled = (
        args.corpus and args.queries and args.qrels,
        bool(args.kl_weight or args.margin_mse_weight),
    )
    own = args.qrels or args.negatives or args.negatives_dir or args.teacher_scores or args.clusters
    stream = args.triples or args.negatives_dir
    shared = (
        args.loss == "info_nce"
        or args.head == "sparse"
        or args.chunk_size
        or args.gradient_checkpointing
    )
    unfit = bool(args.teacher_scores) != distilled or (distilled and args.passages_per_query < 2)
    wrong = {
        "what to train on — give --corpus, --queries and --qrels, or --triples": not (
            judged or args.triples
        ),
        "--triples come with all of --qrels, --negatives, --clusters — leave those out": args.triples
        and own,
        "triples and refreshed negatives have no epochs — give --max_steps": stream
        and not args.max_steps,
        "to distil, give --teacher_scores, --negatives and --kl_weight or --margin_mse_weight — or none": unfit,
        f"--loss {args.loss}: no negatives — raise --passages_per_query or --per_device_batch_size": candidates
        < 2,
        "--dro weights groups of queries — give it with --clusters, or neither": bool(args.dro)
        != bool(args.clusters),
        "--dro: no loss belongs to one query with in-batch negatives, FLOPS or a batch encoded in parts — give --loss "
        "triplet or own_group, no --head sparse, --chunk_size, --gradient_checkpointing": args.dro
        and shared,
    }
    if found := [message for message, holds in wrong.items() if holds]:
        raise UserError(found[0])


def main():
    # ---- setup
    args = launch.parse_args(Args)
    accumulation = args.gradient_accumulation_steps
    accelerator = launch.make_accelerator(
        accumulation, args.report_to, args.output_dir, args.deterministic
    )
    rank, W, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    B, P = args.per_device_batch_size, 2 if args.triples else args.passages_per_query
    check(args, W * B * P if args.loss == "info_nce" else P)
    sparse, out = args.head == "sparse", Path(args.output_dir)

    # ---- data
    with accelerator.main_process_first():
        corpus = open_texts(args.corpus, args.titles) if args.corpus else None
        queries = open_texts(args.queries) if args.queries else None
        dev = open_dev(
            corpus, args.dev_queries, args.dev_qrels, args.dev_candidates, args.eval_every
        )
    how = args.negatives_dir, out / "generations.tsv", args.refresh_every, args.negatives
    refresh = Refresh(*how) if args.negatives_dir else None
    used = refresh.first() if refresh else Generation(0, 0, args.negatives)

    def open_groups():
        how = (
            args.negatives_depth,
            args.seed,
            args.allow_overlap,
            args.allow_unused_negatives,
            args.teacher_scores,
        )
        return Groups(
            queries, corpus, args.qrels, used.negatives, P, *how, bool(refresh), args.clusters
        )

    groups = Triples(args.triples, queries, corpus, args.seed) if args.triples else open_groups()
    epochs = 0 if args.triples else W * B * accumulation / len(groups)  # that a step is
    max_steps = args.max_steps or math.ceil(args.num_epochs / epochs)
    lambda_p, flops_steps = args.flops_passages, args.flops_warmup_steps
    lambda_q = 0.75 * lambda_p if args.flops_queries is None else args.flops_queries
    warmup_steps = (
        round(args.warmup_ratio * max_steps) if args.warmup_steps is None else args.warmup_steps
    )

    # ---- model, optimizer, prepare
    torch.manual_seed(args.seed)  # of a new projection
    overrides = {name: getattr(args, name) for name in TextFormat.__dataclass_fields__}
    head = "projection", "normalize", "head", "exclude_special_tokens", "allow_new_head"
    head = {name: getattr(args, name) for name in head}
    model = load_encoder(args.model, args.pooling, overrides, **head)
    dim, form = model.dim, model.format
    speed_up_attention(model.backbone)
    if args.gradient_checkpointing:
        recompute_activations(model.backbone)
    how = args.dro, args.dro_form, args.dro_alpha, args.dro_ema, args.dro_rho, args.dro_eps
    dro = GroupWeights(groups.clusters, *how) if args.dro else None
    gradients = GroupGradients(model.backbone, args.dro_layers) if args.dro == "idro" else None
    chunked = 0 < args.chunk_size < B * P * form.max_chunks
    chunk_rows = (
        args.chunk_size if chunked else 16 if device.type == "cpu" else 64
    )  # short chunks pad less
    collate = (TripleCollator if args.triples else GroupCollator)(
        groups, model.tokenizer, form, chunk_rows
    )
    weights = sum(p.numel() for p in model.parameters())
    facts = {
        "model": f"{args.model}, {weights / 1e6:.1f} M weights, {model.pooling} pooling, {dim} dimensions",
        "texts": ", ".join(f"{name} {value!r}" for name, value in asdict(form).items()),
        "running on": launch.describe(accelerator),
        "batch": f"{B} queries x {W} process(es) x {accumulation} accumulated = {W * B * accumulation} per step",
        "encoded at a time": f"{args.chunk_size} texts (GradCache)"
        if chunked
        else "the whole batch",
        "scores": f"{'cosine (usually / 0.01 to 0.05)' if model.normalized else 'dot product'} / {args.temperature}",
        "candidates per query": W * B * P if args.loss == "info_nce" else P,
        **groups.notes,
        **({"negatives from": f"{used.negatives}, of step {used.step}"} if refresh else {}),
        **(
            {"FLOPS": f"{lambda_p} of passages, {lambda_q} of queries, after {flops_steps} steps"}
            if sparse
            else {}
        ),
        **({"DRO": f"{args.dro}, {args.dro_form}, {len(dro.h)} groups"} if dro else {}),
        "steps": f"{max_steps}{f', {epochs * max_steps:.2f} epochs' if epochs else ''}, {warmup_steps} of warm-up",
    }
    numbers = weights * (
        4 + bool(dev) + args.keep_checkpoints
    )  # checkpoint, state with two moments, best/
    if not launch.begin(
        accelerator, args, "fine-tuning", facts, partial(preview, collate), numbers
    ):
        return
    optimizer = make_optimizer(
        args.optimizer, parameter_groups(model, args.weight_decay), args.learning_rate
    )
    model, optimizer = accelerator.prepare(model, optimizer)

    # ---- resume
    step, extra = launch.load_state(out, accelerator, model, optimizer)
    micro_step, dev_scores = step * accumulation, extra.get("dev_scores", {})
    if dro and extra:
        dro.load(extra["dro"])

    # ---- loss and evaluation
    def contrast(batch, q_reps, p_reps):
        """Local queries against the passages of all processes: (loss, numbers for the log)."""
        q_reps, p_reps = (
            q_reps[batch["query_order"]],
            p_reps[batch["passage_order"]],
        )  # (B, D), (B·P·M, D) query-major
        rows, keys = all_gather(
            torch.stack([batch["passage_rows"], batch["passage_keys"]], 1)
        ).unbind(1)  # (N,) each
        positives = (rank * B + torch.arange(B, device=device)) * P
        if not means.count:  # the first batch of the run and of each log line
            assert torch.equal(rows[positives], batch["positive_rows"]), (
                "a label does not point at its positive"
            )
        scores = q_reps @ all_gather_with_grad(p_reps).T / args.temperature  # (B, N·M)
        scores = scores.unflatten(1, (len(rows), -1)).amax(
            2
        )  # (B, N): MaxP, the best of a passage's M chunks
        judged = batch["positive_keys"] if args.mask_positives else None
        mask = losses.candidate_mask(positives, rows < 0, keys, judged)
        stats = {"masked": ((rows >= 0) & ~mask).sum() / B}
        if args.loss != "info_nce":
            mask = mask & losses.own_group(positives, len(rows), P)
        loss = (losses.triplet_nll if args.loss == "triplet" else losses.info_nce)(
            scores, positives, mask
        )  # (B,)
        stats["accuracy"] = losses.in_batch_accuracy(scores.detach(), positives, mask)
        if args.teacher_scores or sparse or dro:
            stats["contrastive"] = loss
        loss = args.contrastive_weight * loss
        if args.teacher_scores:
            own = losses.group_columns(positives, P)
            student = scores.gather(1, own) * (
                args.temperature / (args.student_temperature or args.temperature)
            )
            pair = student, batch["teacher_scores"] / args.teacher_temperature, mask.gather(1, own)
            stats["kl"], stats["margin_mse"] = losses.kl_divergence(*pair), losses.margin_mse(*pair)
            loss = (
                loss + args.kl_weight * stats["kl"] + args.margin_mse_weight * stats["margin_mse"]
            )
        loss = dro.loss(loss, batch["clusters"]) if dro else loss.mean()
        real = (batch["passage_rows"] >= 0).repeat_interleave(form.max_chunks)
        if sparse:
            growth = min((step + 1) / flops_steps, 1) ** 2 if flops_steps else 1
            stats |= losses.sparsity(q_reps, p_reps, real, P)
            loss = loss + growth * (lambda_q * stats["q_flops"] + lambda_p * stats["p_flops"])
        stats["q_std"], stats["q_cosine"] = losses.spread(q_reps)
        stats["p_std"], stats["p_cosine"] = losses.spread(p_reps[real])
        return loss, {name: value.detach().float().mean() for name, value in stats.items()}

    def save(folder):
        if accelerator.is_main_process:
            card = {
                "base": args.model,
                "data": [args.corpus, args.queries, args.qrels or args.triples],
            }
            card |= {
                "command": sys.argv,
                "metrics": {"steps": step, "dev MRR@10": dev_scores.get(step)},
            }
            save_encoder(accelerator.unwrap_model(model), folder, card)
        accelerator.wait_for_everyone()

    def develop():
        """Re-rank the candidates with the model as it stands; judged queries without candidates count 0."""
        dev_scores[step] = dev_mrr(
            accelerator, model, collate, *dev, at_once=2**25 // dim
        )  # 128 MB of vectors
        log.write(step, {"dev_mrr@10": dev_scores[step]}, bar)
        if max(dev_scores, key=dev_scores.get) == step:  # of equals the first
            save(out / "best")

    # ---- train
    log, means = launch.RunLog(accelerator, out, step if extra else -1), launch.Means()
    bar = tqdm(total=max_steps, initial=step, disable=not accelerator.is_main_process)
    if dev and not dev_scores:
        develop()
    batches = None
    model.train()
    while step < max_steps:
        if (
            refresh
            and micro_step % accumulation == 0
            and (step % args.refresh_every == 0 or batches is None)
        ):
            if (newest := refresh.at(step, accelerator)) != used:  # optimizer and schedule go on
                used, batches = newest, None
                collate.groups = groups = open_groups()
        if batches is None:
            batches = load(
                groups, collate, groups.sampler(B, rank, W, micro_step), args.num_workers, device
            )
        # ---------------------------------------------------------------------------------------- one training step
        batch = send_to_device(next(batches), device, non_blocking=True)
        with accelerator.accumulate(model):
            seed = step_seed(
                args.seed, 2, micro_step, rank
            )  # of dropout; 0 and 1 are permutations and negatives
            loss, stats = contrastive_backward(
                accelerator,
                model,
                batch["query"],
                batch["passage"],
                partial(contrast, batch),
                seed,
                chunked,
            )
            if dro:
                dro.update(gradients, batch["text_clusters"], launch.loss_scale(accelerator))
            lr = lr_at(step, args.learning_rate, warmup_steps, max_steps)
            norm, finite = descend(accelerator, model, optimizer, loss, lr, args.max_grad_norm)
            if not finite:
                where = groups.names(batch["query_rows"].tolist())
                raise UserError(
                    f"step {step + 1}: loss or gradient not finite {where} — lower --learning_rate"
                )
        # ---------------------------------------------------------------------- log, evaluate, save: once per step
        micro_step += 1
        means.add({"loss": loss, **stats})
        if not accelerator.sync_gradients:
            continue
        step += 1
        last_step = step == max_steps
        bar.update()
        if step % args.log_every == 0 or last_step:
            values, seconds = means.take()
            values |= {"lr": lr, "grad_norm": norm.item(), "queries/s": W * B / seconds}
            values |= {"generation": used.number, "lag": step - used.step} if refresh else {}
            log.write(step, values | ({"group_weights": dro.h.tolist()} if dro else {}), bar)
            settled = step > max(warmup_steps, flops_steps) + max(max_steps // 4, 100)
            if sparse and (
                wrong := losses.collapse(values["q_terms"], values["p_terms"], dim, settled)
            ):
                raise UserError(f"step {step}: {wrong}")
            if max(values["q_cosine"], values["p_cosine"]) > 0.95 and step > warmup_steps:
                bar.write(
                    "warning: different texts have nearly the same vector (cosine > 0.95): a collapsing encoder"
                )
        if dev and (last_step or (args.eval_every and step % args.eval_every == 0)):
            with means.paused():
                develop()
        if step % args.save_every == 0 and not last_step:
            extra = {"dev_scores": dev_scores, "dro": dro.state() if dro else None}
            launch.save_state(out, step, accelerator, model, optimizer, extra)
            if (
                args.keep_checkpoints
            ):  # after the state: no checkpoint is of a step that a resume begins before
                save(checkpoint_path(out, step))
                remove_old_checkpoints(out, args.keep_checkpoints)
    bar.close()

    # ---- save
    save(out)
    launch.finish(accelerator, out)


if __name__ == "__main__":
    launch.run(main)
