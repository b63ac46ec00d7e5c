"""Pre-train an encoder through a bottleneck: a weak decoder rebuilds a text from one vector.

    mlm          masked language modelling alone, the control: BERT (arXiv 1810.04805)
    bow          + the bag of words from [CLS], without a decoder: BoW prediction (2401.11248)
    retromae     + a one-layer decoder of the clean text, each row with its own mask: RetroMAE
                 (2205.12035)
    dupmae       retromae + the bag of words from the max-pooled LM logits: DupMAE (2305.02564)
    lexmae       + a two-layer decoder of a masked text behind a lexicon bottleneck: LexMAE
                 (2208.14754)
    seed         + a causal decoder that sees a few tokens back: SEED-Encoder (2102.09206)
    condenser    + a head over the late [CLS] and the states of a middle layer: Condenser
                 (2104.08253)
    cocondenser  condenser + a contrastive loss over two spans of a document: coCondenser
                 (2108.05540), and on the target corpora COCO-DR (2210.15212)

Deliberate deviations from the official code:
  1. Each loss term is a mean over the labels of all processes (SEED: too; others: mean of the means
     per device). Under gradient accumulation every micro-batch weighs the same.
  2. A corrupted token becomes [MASK], an ordinary token or itself, 80/10/10; never a special token.
  3. Blocks end with a sentence and fit --max_length (RetroMAE cuts off up to a sentence of each).
     Sentences longer than a block or span are cut, and no text is lost.
  4. The decoder is saved; the next stage of the same objective continues it (RetroMAE: a new one).
  5. Special tokens in a text, such as the [SEP] of --title sep, are neither masked nor predicted;
     only SEED's decoder predicts them, because [SEP] ends its text.
  6. Token masks hide exactly their share of a text, as BERT's and fairseq's do (transformers'
     collator hides each token independently). A word of more than 16 tokens counts as several.
  7. SEED's cross-attention has no query and key projections: with one key they change nothing.
  8. coCondenser's spans are cut by COCO-DR's rule, and a span is never paired with itself.
  9. COCO-DR has no dropout in the encoder but in the head, maybe by mistake: --no_encoder_dropout.
 10. With --chunk_size, MLM weighs as much as without (coCondenser's GradCache counts it twice).
 11. The first step of the warm-up has 1 / warm-up of the learning rate (transformers: 0).
 12. bow keeps the weight 1 (its authors lower it to 0.1 during the training).
 13. ModernBERT's positions are rotary, so that the inputs of a decoder would not show their order:
     the decoders of retromae, dupmae and lexmae have learned positions of their own there.
Masks and spans are functions of (seed, micro-step, row in the batch of all processes).

Reads   --model (Hugging Face), or --model_config and --tokenizer to start from scratch; corpora
Writes  --output_dir: the checkpoint with its LM head (AutoModel, AutoModelForMaskedLM), the decoder
        (decoder.safetensors, decoder.json), log.jsonl, args.json, state/ for --resume; `done` last

CPU toy   python pretrain_mae.py --model ckpt --corpus corpus.jsonl --max_steps 20 --output_dir out
1 GPU     accelerate launch --mixed_precision bf16 pretrain_mae.py ... --per_device_batch_size 128
N GPUs    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 pretrain_mae.py ...
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import send_to_device

from lib import checkpoint, launch
from lib.arguments import arg, identity, parse_args
from lib.blocks import Blocks, Corpora, Cut
from lib.cpu import speed_up_attention
from lib.encoder import positions
from lib.files import UserError, read_json
from lib.loader import load, step_batches
from lib.masking import DROPOUT
from lib.objectives import OBJECTIVES, OPTIONS
from lib.optim import descend, lr_at, parameter_groups, recompute_activations, steps_of
from lib.probe import Probe
from lib.spans import span_backward
from lib.text import step_seed
from lib.texts import open_texts


@dataclass(kw_only=True)
class Args:
    corpus: list[str] = arg(group="data", help="texts to learn from, one or more files")
    output_dir: str = arg(help="folder for the checkpoint")
    balance: float = arg(1.0, least=1, help="mix corpora by size (1) to equally (large values)")
    title: Literal["none", "space", "sep"] | None = arg(
        None, help="how titles join their texts (default: as in the checkpoint, else a space)"
    )
    max_length: int = arg(512, least=4, help="tokens of a block (RetroMAE 150, LexMAE 144)")
    model: str | None = arg(None, group="model", help="checkpoint to start from")
    model_config: str | None = arg(None, help="JSON of a new model (model_type and sizes)")
    tokenizer: str | None = arg(None, help="tokenizer of --model_config")
    encoder_dropout: bool = arg(True, help="switch dropout in the encoder off, as COCO-DR does")
    objective: Literal[tuple(OPTIONS)] = arg("retromae", group="objective", help="the method")
    encoder_mask_ratio: float | None = arg(
        None, above=0, below=1, help="share hidden from the encoder (0.3; seed, [co]condenser 0.15)"
    )
    mask: Literal["whole_word", "token"] | None = arg(
        None, help="what is hidden from the encoder at a time (whole_word; lexmae and seed token)"
    )
    decoder_mask_ratio: float | None = arg(
        None, above=0, below=1, help="retromae, dupmae, lexmae: share hidden from the decoder (0.5)"
    )
    decoder_layers: int | None = arg(
        None, least=1, most=99, help="lexmae, [co]condenser (2), seed (3; 1 for a window above 7)"
    )
    attention_window: int | None = arg(None, least=1, help="seed: tokens the decoder sees (2)")
    span_tokens: int | None = arg(None, least=1, help="cocondenser: maximum tokens of a span (30)")
    chunk_size: int | None = arg(None, least=0, help="cocondenser: documents encoded at once (all)")
    per_device_batch_size: int = arg(
        32, least=1, group="optimisation", help="blocks, or documents, per process and micro-step"
    )
    gradient_accumulation_steps: int = arg(1, least=1, help="micro-steps per optimizer step")
    gradient_checkpointing: bool = arg(
        False, help="recompute activations in the backward pass: 20% slower, a third less memory"
    )
    learning_rate: float = arg(1e-4, above=0, help="peak learning rate of AdamW")
    weight_decay: float = arg(0.01, least=0, help="weight decay, except of biases and norms")
    max_grad_norm: float = arg(1.0, least=0, help="clip gradients to this norm; 0 = do not")
    num_epochs: float = arg(8.0, above=0, help="passes over the corpus (RetroMAE on MS MARCO 20)")
    max_steps: int = arg(0, least=0, help="optimizer steps; if given, --num_epochs is not used")
    warmup_steps: float = arg(0.1, least=0, help="steps of warm-up; below 1, a share of all steps")
    seed: int = arg(42, least=0, help="seed of data order, masks, dropout and new weights")
    deterministic: bool = arg(False, help="make reruns on CUDA bit-identical")
    resume: bool = arg(False, group="runtime", help="continue from the last saved state")
    probe_every: int = arg(0, least=0, help="probe the bottleneck every N steps; 0 is never")
    probe_queries: str | None = arg(None, help="queries for the probe's recall@100")
    probe_qrels: str | None = arg(None, help="judgments of --probe_queries")
    save_every: int = arg(1000, least=1, help="save a state for --resume every N steps")
    log_every: int = arg(20, least=1, help="write a log line every N steps")
    num_workers: int = arg(2, least=0, most=256, help="loader processes that turn text into ids")
    report_to: Literal["none", "tensorboard", "wandb"] = arg("none", help="also log to a tracker")
    dry_run: bool = arg(False, help="show the first inputs, batch, steps and disk space, then stop")


def objective_options(args: Args) -> dict:
    """The options that are given; the others have the defaults of OPTIONS."""
    names = {name for options in OPTIONS.values() for name in options}
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in given.keys() - OPTIONS[args.objective].keys():
        raise UserError(f"--{name}: {args.objective} has no such option — leave it out")
    return given


def check(args: Args, positions: int, processes: int) -> None:
    """UserError where arguments do not fit together."""
    files = [args.probe_queries, args.probe_qrels]
    if args.max_length > positions:
        raise UserError(f"--max_length: the model has {positions} positions — lower it")
    if any(files) and not (all(files) and args.probe_every):
        raise UserError("give all of --probe_every, --probe_queries and --probe_qrels, or no files")
    if args.objective == "cocondenser" and processes * args.per_device_batch_size < 2:
        wrong = "--per_device_batch_size 1: the contrast needs another document"
        raise UserError(f"{wrong} — raise it")


def mean_loss(accelerator, terms):
    """(loss to backpropagate, numbers for the log). DDP averages the gradients of W processes. So W
    times the local sum, divided by the labels of all processes, gives the gradient of the mean over
    the whole batch."""
    own = [torch.stack([t.loss, t.loss.new_tensor(t.labels), t.correct]) for t in terms.values()]
    sums = accelerator.reduce(torch.stack(own).detach(), "sum")  # (terms, 3)
    loss = 0.0
    stats = {"loss": 0.0}
    for (name, term), (total, labels, correct) in zip(terms.items(), sums, strict=True):
        labels = labels.clamp(min=1)  # texts without ordinary tokens have no label
        loss = loss + term.weight * accelerator.num_processes * term.loss / labels
        stats[f"{name}_loss"] = total.double() / labels
        stats[f"{name}_accuracy"] = correct.double() / labels
        stats["loss"] = stats["loss"] + term.weight * stats[f"{name}_loss"]
    return loss, stats


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
    torch.manual_seed(args.seed)  # of new weights
    lm, tokenizer, origin = checkpoint.load_lm(args.model, args.model_config, args.tokenizer)
    check(args, positions(lm), W)
    speed_up_attention(lm)
    if args.gradient_checkpointing:
        recompute_activations(lm)
    # here, as cutting a corpus that is new draws from torch's generator
    objective = OBJECTIVES[args.objective](lm, tokenizer, **objective_options(args))
    chunk_size = objective.options.get("chunk_size", 0)
    chunked = 0 < chunk_size < B

    # ---- data
    stated = checkpoint.private_settings(args.model) if args.model else {}
    title = args.title or stated.get("title", "space")
    cut = Cut(tokenizer, args.max_length, title, objective.options.get("span_tokens", 0))
    parts = [Blocks(open_texts(path), cut) for path in args.corpus]
    blocks = Corpora(parts, args.seed, args.balance)
    probe = None
    if args.probe_every and accelerator.is_main_process:
        probe = Probe(blocks, cut.collate, args.probe_queries, args.probe_qrels)
    batch_size = W * B * accumulation
    max_steps = args.max_steps or math.ceil(args.num_epochs * len(blocks) / batch_size)
    warmup_steps = steps_of(args.warmup_steps, max_steps)

    # ---- model
    weights = sum(p.numel() for p in objective.parameters())
    unit = "documents" if args.objective == "cocondenser" else "blocks"
    facts = {
        "model": f"{origin}, {lm.config.model_type}, {weights / 1e6:.1f} M weights",
        "decoder": checkpoint.load_decoder(objective, args.model),
        "objective": f"{args.objective}, {objective.options}",
        "running on": launch.describe(accelerator),
        "batch": f"{B} {unit} x {W} process(es) x {accumulation} accumulated = {batch_size}",
        unit: f"{len(blocks)} of at most {args.max_length} tokens, title: {title}",
        **blocks.shares(),
        "steps": f"{max_steps}, {warmup_steps} of warm-up",
        "epochs": f"{max_steps * batch_size / len(blocks):.2f}",
    }

    def preview():
        first = cut.collate([blocks[index, 0, index] for index in range(min(B, len(blocks)))])
        length = int(first["attention_mask"][0].sum())
        shown = objective.preview(first, args.seed)
        return {name: tokenizer.decode(ids[0, :length]) for name, ids in shown.items()}

    facts["disk"] = f"{4 * weights * 4 / 1e9:.2f} GB"  # 4 copies of the weights, 3 in state/
    if args.dry_run:
        return launch.echo(accelerator, "dry run: pre-training", facts | preview())
    texts = zip(args.corpus, parts, strict=True)
    inputs = {path: part.texts.fingerprint for path, part in texts}
    inputs["tokenizer"] = checkpoint.fingerprint(tokenizer)
    if args.model:
        inputs["model"] = checkpoint.model_hash(checkpoint.checkpoint_folder(args.model))
    else:
        inputs["model_config"] = read_json(args.model_config)
    if launch.claim_output(accelerator, out, identity(args, inputs), resume=args.resume):
        return
    launch.echo(accelerator, "pre-training", facts)
    save = partial(checkpoint.save_checkpoint, objective, tokenizer, title=title, card={})
    checkpoint.check_checkpoint(out, save)
    parameters = parameter_groups(objective, args.weight_decay)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, fused=True)
    model, optimizer = accelerator.prepare(objective, optimizer)

    # ---- resume
    step, _ = launch.load_state(out, accelerator, model, optimizer)
    micro_step = step * accumulation

    def write_probe():
        with accelerator.autocast():
            log.write(step, probe(objective, device))

    # ---- train
    log = launch.RunLog(accelerator, out, step, max_steps)
    means = launch.Means()
    model.train()
    lm.train(args.encoder_dropout)
    if probe and not step:
        write_probe()
    sampler = step_batches(blocks, B, rank, W, micro_step)
    batches = load(blocks, cut.collate, sampler, args.num_workers, device)
    while step < max_steps:
        # ------------------------------------------------------------------- one training step
        batch = send_to_device(means.next(batches), device, non_blocking=True)
        with accelerator.accumulate(model):
            if chunked:
                terms = span_backward(accelerator, model, batch, args.seed, 2 * chunk_size)
                loss, stats = mean_loss(accelerator, terms)
            else:
                torch.manual_seed(step_seed(args.seed, DROPOUT, micro_step, rank))
                loss, stats = mean_loss(accelerator, model(batch, args.seed))
                accelerator.backward(loss)
            lr = lr_at(step, args.learning_rate, warmup_steps, max_steps)
            norm, finite = descend(accelerator, model, optimizer, loss, lr, args.max_grad_norm)
            if not finite:
                launch.stop_not_finite(step + 1, blocks.ids(batch["examples"].tolist()))
        # ------------------------------------------------- log, probe, save: once per step
        micro_step += 1
        means.add({**stats, "tokens/s": batch["attention_mask"].sum()})
        if not accelerator.sync_gradients:
            continue
        step += 1
        last_step = step == max_steps
        log.bar.update()
        if step % args.log_every == 0 or last_step:
            values, seconds = means.take()
            values |= {"lr": lr, "grad_norm": norm.item()}
            values["tokens/s"] *= W / seconds
            log.write(step, values)
        if probe and (step % args.probe_every == 0 or last_step):
            with means.paused():
                write_probe()
        if step % args.save_every == 0 and not last_step:
            launch.save_state(out, step, accelerator, model, optimizer, {})

    # ---- save
    if accelerator.is_main_process:
        base = args.model or args.model_config
        card = {"base": base, "data": args.corpus, "metrics": {"steps": step, **values}}
        checkpoint.save_checkpoint(objective, tokenizer, out, title, card)
    log.finish(f"python finetune_biencoder.py --model {out}")


if __name__ == "__main__":
    launch.run(main)
