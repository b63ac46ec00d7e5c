"""Fine-tune a bi-encoder: one encoder for queries and passages, scores are dot products.

    info_nce   softmax over the passages of the batch: DPR (arXiv 2004.04906), RetroMAE (2205.12035)
    triplet    -log softmax over pairs of positive and negative: ANCE (2007.00808)
    distilled  --kl_weight (RetroMAE, LexMAE) or --margin_mse_weight (SPLADE) on a teacher's scores
    sparse     --head sparse, regularised by FLOPS: SPLADE-max (2109.10086), LexMAE (2208.14754)
    MaxP       --max_chunks: the best chunk of a document is its score: ANCE
    robust     --dro: the clusters in the training file are weighted: COCO-DR (2210.15212)

Deliberate deviations from the papers' official code (those of --dro are in lib/dro.py):
  1. Passages of other processes carry gradient, so W processes are one of W·B (RetroMAE: 1/W).
  2. Positives of a query and exact copies of them are never its negatives, drawn or in the batch.
  3. Short lists are filled with masked columns (RetroMAE: random passages; LexMAE: repeats).
  4. Each positive is an example, shuffled over the epoch (ANCE: one per query, triplets in a row).
  5. FLOPS is of all passages of all processes together (SPLADE: of each GPU, positives apart).
  6. Lines without teacher scores stop the run (RetroMAE switches distillation off silently).
  7. Each chunk of MaxP begins with [CLS] (ANCE: the first).

Reads   checkpoint; corpus; queries; training file, judgments, or folder that a miner fills (ANCE)
Writes  --output_dir: the checkpoint, and best/ by MRR@10 on the development set; log.jsonl,
        args.json, state/ for --resume; for a miner checkpoints/, generations.tsv; `done` last

CPU toy   python finetune_biencoder.py --model M --corpus C --queries Q --train T --output_dir O
1 GPU     accelerate launch --mixed_precision bf16 finetune_biencoder.py ...
N GPUs    accelerate launch --multi_gpu --num_processes 8 finetune_biencoder.py ...
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import send_to_device

from lib import checkpoint, launch, losses
from lib.arguments import arg, identity, parse_args
from lib.cpu import speed_up_attention
from lib.dev import DevSet, describe_best
from lib.dro import GroupGradients, GroupWeights, groups_of_rows
from lib.encoder import Head
from lib.files import UserError
from lib.generations import Generations, checkpoint_path, remove_old_checkpoints
from lib.gradcache import contrastive_backward
from lib.groups import GroupCollator, Groups, TrainingFile
from lib.loader import load, step_batches
from lib.masking import DROPOUT
from lib.optim import descend, lr_at, make_optimizer, recompute_activations, steps_of
from lib.query_table import use_query_table
from lib.text import TextFormat, step_seed
from lib.texts import open_texts


@dataclass(kw_only=True)
class Args:
    model: str = arg(group="data", help="checkpoint to start from")
    train: str = arg(help="training file, judgments (in-batch negatives), or folder of generations")
    corpus: str = arg(help="the passages that the training file names")
    queries: str = arg(help="the queries that the training file names")
    output_dir: str = arg(help="folder for the checkpoint")
    passages_per_query: int = arg(None, least=1, help="1 positive, the rest negatives (default: 8)")
    negatives_depth: int = arg(200, least=1, help="draw from the first N negatives of a query")
    batch_by: Literal["chance", "cluster"] = arg("chance", help="cluster: one per batch (TAS-B)")
    dev: tuple[str, str, str] = arg(None, help="development queries, judgments, run to re-rank")
    eval_every: int = arg(None, least=1, help="MRR@10 of --dev every N steps (default: ten times)")
    query_prompt: str = arg(None, group="texts (default: as --model)", help="text before a query")
    passage_prompt: str = arg(None, help="text put before every passage")
    title: Literal["none", "space", "sep"] = arg(None, help="how title and text are joined")
    max_query_length: int = arg(None, least=3, help="tokens of a query (RetroMAE 32, ANCE 64)")
    max_passage_length: int = arg(None, least=3, help="tokens of a passage (ANCE 512)")
    max_chunks: int = arg(None, least=1, help="maximum number of chunks per passage (MaxP 4)")
    max_characters: int = arg(None, least=0, help="cut passages to N characters first (ANCE 10000)")
    pooling: str = arg(None, group="model", help="cls, mean, last_token, if the model states none")
    head: Literal["dense", "sparse", "new_sparse"] = arg(
        "dense", help="sparse: with the LM head of --model; new_sparse: with a new one"
    )
    normalize: bool = arg(False, help="make unit vectors; a checkpoint that has them keeps them")
    projection: int = arg(0, least=0, most=65536, help="size of an added projection (ANCE 768)")
    exclude_special_tokens: bool = arg(False, help="sparse: pool over no special tokens (LexMAE)")
    contrastive_weight: float = arg(1.0, least=0, group="objective", help="weight of --loss")
    loss: Literal["info_nce", "triplet"] = arg("info_nce", help="the contrastive loss")
    temperature: float = arg(None, above=0, help="divides scores (default: 1, unit vectors 0.05)")
    kl_weight: float = arg(0.0, least=0, help="weight of KL(teacher, student) per query (LexMAE 1)")
    margin_mse_weight: float = arg(0.0, least=0, help="weight of the margin-MSE (SPLADE 1)")
    query_encoder: Literal["table", "idf"] = arg(
        None, help="sparse: queries by a weight per term, learned or IDF; --flops_queries is 0"
    )
    flops_passages: float = arg(0.002, least=0, help="sparse: FLOPS weight of passages (as LexMAE)")
    flops_queries: float = arg(None, least=0, help="sparse: weight of queries (0.75 x passages)")
    flops_warmup_steps: int = arg(0, least=0, help="sparse: steps in which the FLOPS weights grow")
    dro: bool = arg(False, help="weight the clusters of the training file")
    dro_alpha: float = arg(0.25, above=0, most=1, help="--dro: power of the losses (as COCO-DR)")
    dro_ema: float = arg(0.1, least=0, most=1, help="--dro: power of the last weight (COCO-DR)")
    dro_rho: float = arg(0.05, least=0, help="--dro: step size of the weights (as COCO-DR)")
    dro_eps: float = arg(0.01, least=0, most=1, help="--dro: least weight of a cluster (COCO-DR)")
    per_device_batch_size: int = arg(16, least=1, group="optimisation", help="queries per process")
    gradient_accumulation_steps: int = arg(1, least=1, help="micro-steps per optimizer step")
    chunk_size: int = arg(0, least=0, help="texts encoded at a time (GradCache); 0 is all")
    gradient_checkpointing: bool = arg(False, help="recompute activations: 20% slower, less memory")
    optimizer: Literal["adamw", "lamb"] = arg("adamw", help="betas 0.9 and 0.999, eps 1e-8")
    learning_rate: float = arg(2e-5, above=0, help="peak learning rate (RetroMAE 2e-5)")
    weight_decay: float = arg(0.01, least=0, help="weight decay, except of biases and norms")
    max_grad_norm: float = arg(1.0, least=0, help="clip gradients to this norm; 0 = do not")
    num_epochs: float = arg(4.0, above=0, help="passes over the examples (RetroMAE 4)")
    max_steps: int = arg(0, least=0, help="optimizer steps; if given, --num_epochs is not used")
    warmup_steps: float = arg(0.05, least=0, help="steps of warm-up; below 1, a share of all steps")
    seed: int = arg(42, least=0, help="seed of data order, negatives, dropout and new weights")
    deterministic: bool = arg(False, help="make reruns on CUDA bit-identical")
    resume: bool = arg(False, group="runtime", help="continue from the last saved state")
    save_every: int = arg(1000, least=1, help="save a state for --resume every N steps")
    log_every: int = arg(20, least=1, help="write a log line, look for a generation every N steps")
    num_workers: int = arg(2, least=0, most=256, help="loader processes that turn text into ids")
    report_to: Literal["none", "tensorboard", "wandb"] = arg("none", help="also log to a tracker")
    dry_run: bool = arg(False, help="show the first inputs, batch, steps and disk space, then stop")


def contrastive_loss(scores, positives, mask):
    """The loss of each query (B,): put your own here. scores (B, N), divided by the temperature;
    positives (B,), the column of each query's positive; mask (B, N), True = the column counts."""
    return losses.info_nce(scores, positives, mask)


def check(args: Args, passages_per_query: int, processes: int) -> None:
    """UserError where arguments do not fit together."""
    own_group = args.loss != "info_nce" or args.kl_weight or args.margin_mse_weight
    if passages_per_query * (1 if own_group else processes * args.per_device_batch_size) < 2:
        raise UserError(f"--loss {args.loss} has no negatives — raise --passages_per_query")
    in_batch = args.loss == "info_nce" or args.head != "dense" or args.chunk_size
    if args.dro and (in_batch or args.gradient_checkpointing):
        remedy = "give --loss triplet, no --chunk_size, no --gradient_checkpointing"
        raise UserError(f"--dro needs a loss of each query alone, of a whole batch — {remedy}")
    if args.eval_every and not args.dev:
        raise UserError("--eval_every: there is no development set — give --dev")
    if Path(args.train).is_dir() and not args.max_steps:
        raise UserError("--train with generations has no number of examples — give --max_steps")


def main():
    # ---- setup
    args = parse_args(Args)
    accumulation = args.gradient_accumulation_steps
    out = Path(args.output_dir)
    accelerator = launch.make_accelerator(accumulation, args.report_to, out, args.deterministic)
    W = accelerator.num_processes
    B = args.per_device_batch_size

    # ---- data
    corpus = open_texts(args.corpus)
    queries = open_texts(args.queries)
    dev = DevSet(*args.dev, corpus) if args.dev else None
    distilled = bool(args.kl_weight or args.margin_mse_weight)
    one_cluster = W * B if args.batch_by == "cluster" else 0

    def read(train):
        file = TrainingFile(train, queries, corpus, distilled, args.dro or one_cluster > 0)
        return Groups(file, args.passages_per_query, args.negatives_depth, args.seed, one_cluster)

    data = Generations(args.train, out / "generations.tsv", read)
    groups, P = data.groups, data.groups.passages_per_query
    check(args, P, W)
    batch_size = W * B * accumulation
    max_steps = args.max_steps or math.ceil(args.num_epochs * len(groups) / batch_size)
    warmup_steps = steps_of(args.warmup_steps, max_steps)
    eval_every = args.eval_every or math.ceil(max_steps / 10)

    # ---- model
    torch.manual_seed(args.seed)  # of new weights
    flags = ("pooling", "projection", "normalize", "exclude_special_tokens")
    head = Head(kind=args.head, **{name: getattr(args, name) for name in flags})
    texts = {name: getattr(args, name) for name in TextFormat.__dataclass_fields__}
    model = checkpoint.load_encoder(args.model, head, texts)
    form, dim = model.format, model.dim
    if args.query_encoder:
        use_query_table(model, args.query_encoder, corpus)
    flops_p, flops_q = args.flops_passages, args.flops_queries
    if flops_q is None:
        flops_q = 0.0 if model.query_table is not None else 0.75 * flops_p
    temperature = args.temperature or (0.05 if model.normalized else 1.0)
    speed_up_attention(model.backbone)
    if args.gradient_checkpointing:
        recompute_activations(model.backbone)
    if args.dro:
        clusters = int(groups.file.clusters.max()) + 1
        dro = GroupWeights(clusters, args.dro_alpha, args.dro_ema, args.dro_rho, args.dro_eps)
        gradients = GroupGradients(model.backbone)
    chunked = 0 < args.chunk_size < B * P * form.max_chunks
    at_a_time = args.chunk_size if chunked else 16 if accelerator.device.type == "cpu" else 64
    collate = GroupCollator(groups, model.tokenizer, form, at_a_time)
    weights = sum(p.numel() for p in model.parameters())
    facts = {
        "model": f"{args.model}, {weights / 1e6:.1f} M weights, {dim} dimensions",
        "texts": form,
        "running on": launch.describe(accelerator),
        "batch": f"{B} queries x {W} process(es) x {accumulation} accumulated = {batch_size}",
        "scores": f"{model.pooling}, {'cosine' if model.normalized else 'dot'} / {temperature}",
        **groups.notes,
        **(dev.notes(groups.file) if dev else {}),
        "steps": f"{max_steps}, {warmup_steps} of warm-up",
        "epochs": f"{max_steps * batch_size / len(groups):.2f}",
        "disk": f"{(4 + bool(dev) + 2 * data.is_folder) * weights * 4 / 1e9:.2f} GB",  # 3 in state/
    }
    if args.dry_run:
        return launch.echo(accelerator, "dry run: fine-tuning", facts | collate.preview())
    inputs = {"corpus": corpus.fingerprint, "queries": queries.fingerprint}
    inputs["model"] = checkpoint.model_hash(checkpoint.checkpoint_folder(args.model))
    inputs |= {"train": data.fingerprint, "dev": dev and dev.fingerprint}
    if launch.claim_output(accelerator, out, identity(args, inputs), resume=args.resume):
        return
    launch.echo(accelerator, "fine-tuning", facts)
    checkpoint.check_checkpoint(out, lambda path: checkpoint.save_encoder(model, path, {}))
    optimizer = make_optimizer(args.optimizer, model, args.learning_rate, args.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)

    # ---- resume
    step, extra = launch.load_state(out, accelerator, model, optimizer)
    micro_step = step * accumulation
    dev_scores = extra.setdefault("dev_scores", {})  # from here on filled in place
    if args.dro:
        dro.h = extra.setdefault("group_weights", dro.h)
    log = launch.RunLog(accelerator, out, step, max_steps)
    means = launch.Means()

    # ---- the loss of a batch, and evaluation
    def loss_of(batch, q_reps, p_reps):
        """q_reps (B, D), p_reps (B·P·M, D) query-major -> (loss, numbers for the log)."""
        scores, positives, mask = losses.score_batch(batch, q_reps, p_reps, temperature)
        if args.loss != "info_nce":
            mask = mask & losses.own_group(positives, scores.shape[1], P)
        function = losses.triplet_nll if args.loss == "triplet" else contrastive_loss
        stats = {"contrastive": function(scores, positives, mask), "candidates": mask.sum(1)}
        loss = args.contrastive_weight * stats["contrastive"]
        if distilled:
            stats |= losses.distillation(scores, positives, mask, batch["teacher_scores"])
            loss = loss + args.kl_weight * stats["kl"]
            loss = loss + args.margin_mse_weight * stats["margin_mse"]
        loss = dro.loss(loss, batch["clusters"]) if args.dro else loss.mean()
        if args.head != "dense":
            stats |= losses.sparsity(q_reps, p_reps, batch["passage_rows"] >= 0)
            growth = min((step + 1) / max(args.flops_warmup_steps, 1), 1) ** 2
            loss = loss + growth * (flops_q * stats["q_flops"] + flops_p * stats["p_flops"])
        stats["accuracy"] = losses.in_batch_accuracy(scores, positives, mask)
        stats |= losses.spreads(q_reps, p_reps, batch["passage_rows"] >= 0)
        return loss, {name: value.detach().float().mean() for name, value in stats.items()}

    def save(folder, again=True):
        if accelerator.is_main_process and (again or not folder.is_dir()):
            card = {"base": args.model, "data": [args.corpus, args.queries, args.train]}
            card["metrics"] = {"steps": step, "dev MRR@10": dev_scores.get(step)}
            checkpoint.save_encoder(launch.unwrap(model), folder, card)
            remove_old_checkpoints(out)

    def evaluate():
        dev_scores[step] = dev.mrr(accelerator, model, collate)
        log.write(step, {"dev_mrr@10": dev_scores[step]})
        if max(dev_scores, key=dev_scores.get) == step:  # of equals the first
            save(out / "best")

    # ---- train
    if data.is_folder and step:  # the run may have been killed after the state of this step
        save(checkpoint_path(out, step), again=False)
    if dev and not dev_scores:
        evaluate()
    batches = None
    model.train()
    while step < max_steps:
        if batches is None or (micro_step % accumulation == 0 and step % args.log_every == 0):
            renewed = data.renew(step - step % args.log_every, accelerator)
            if batches is None or renewed:  # optimizer and schedule go on
                collate.groups = data.groups
                sampler = step_batches(data.groups, B, accelerator.process_index, W, micro_step)
                batches = load(data.groups, collate, sampler, args.num_workers, accelerator.device)
        # ------------------------------------------------------------------- one training step
        batch = send_to_device(means.next(batches), accelerator.device, non_blocking=True)
        dropout = step_seed(args.seed, DROPOUT, micro_step, accelerator.process_index)
        with accelerator.accumulate(model):
            if chunked:
                loss, stats = contrastive_backward(accelerator, model, batch, loss_of, dropout)
            else:
                torch.manual_seed(step_seed(dropout))
                loss, stats = loss_of(batch, *model(batch["query"], batch["passage"]))
                accelerator.backward(loss)
            if args.dro:
                dro.update(gradients.products(groups_of_rows(batch), dro.present))
            lr = lr_at(step, args.learning_rate, warmup_steps, max_steps)
            norm, finite = descend(accelerator, model, optimizer, loss, lr, args.max_grad_norm)
            if not finite:
                launch.stop_not_finite(step + 1, queries.ids(batch["query_rows"].tolist()))
        # ------------------------------------------------- log, evaluate, save: once per step
        micro_step += 1
        means.add({"loss": loss, **stats})
        if not accelerator.sync_gradients:
            continue
        step += 1
        last_step = step == max_steps
        log.bar.update()
        if step % args.log_every == 0 or last_step:
            values, seconds = means.take()
            values |= {"lr": lr, "grad_norm": norm.item(), "queries/s": W * B / seconds}
            values |= data.log(step)
            if args.dro:
                values["group_weights"] = dro.h.tolist()
            log.write(step, values)
            settled = max(warmup_steps, args.flops_warmup_steps) + max(max_steps // 4, 100)
            losses.stop_on_collapse(step, values, dim, settled=step > settled)
        if dev and (last_step or step % eval_every == 0):
            with means.paused():
                evaluate()
        if step % args.save_every == 0 and not last_step:
            launch.save_state(out, step, accelerator, model, optimizer, extra)
            if data.is_folder:  # after the state: a resume never begins before a checkpoint
                save(checkpoint_path(out, step))

    # ---- save
    save(out)
    note = describe_best(out / "best", dev_scores) if dev else ""
    log.finish(f"python encode.py --model {out / 'best' if dev else out} --kind passage", note)


if __name__ == "__main__":
    launch.run(main)
