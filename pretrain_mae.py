"""Pre-train an encoder through a bottleneck: a weak decoder rebuilds a text from one vector.

    mlm          masked language modelling alone, the control: BERT (arXiv 1810.04805)
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
  6. Token masks hide exactly their share of a text (BERT, RoBERTa: each token independently).
  7. SEED's cross-attention has no query and key projections: with one key they change nothing.
  8. coCondenser's spans are cut by COCO-DR's rule, and a span is never paired with itself.
  9. COCO-DR has no dropout in the encoder but in the head, maybe by mistake: --no_encoder_dropout.
Masks and spans are functions of (seed, micro-step, row in the batch of all processes).

Reads   --model (Hugging Face), or --model_config and --tokenizer to start from scratch; corpora
Writes  --output_dir: the checkpoint with its LM head (AutoModel, AutoModelForMaskedLM), the decoder
        (decoder.safetensors, decoder.json), log.jsonl, args.json, state/ for --resume; `done` last

CPU toy   python pretrain_mae.py --model ckpt --corpus corpus.jsonl --max_steps 20 --output_dir out
1 GPU     accelerate launch --mixed_precision bf16 pretrain_mae.py ... --per_device_batch_size 128
N GPUs    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 pretrain_mae.py ...
"""

import math
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate.utils import send_to_device
from tqdm import tqdm

from lib import checkpoint, launch
from lib.arguments import arg, parse_args
from lib.blocks import BlockCollator, Cut, open_corpora
from lib.cpu import speed_up_attention
from lib.files import UserError
from lib.loader import StepSampler, load
from lib.masking import DROPOUT
from lib.objectives import OBJECTIVES, OPTIONS
from lib.optim import descend, lr_at, parameter_groups, recompute_activations, steps_of
from lib.probe import Probe
from lib.spans import span_backward
from lib.text import step_seed


@dataclass(kw_only=True)
class Args:
    corpus: list[str] = arg(
        group="data", help="texts to learn from: FILE or NAME=FILE, one or more"
    )
    output_dir: str = arg(help="folder for the checkpoint")
    balance: float = arg(
        1.0, least=1, help="mix corpora by their size (1) to equally (large values)"
    )
    title: Literal["none", "space", "sep"] | None = arg(
        None, help="how title and text are joined (default: as in the checkpoint, else a space)"
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
        None, least=1, help="lexmae, [co]condenser (2), seed (3, or 1 with a window of 8 or more)"
    )
    attention_window: int | None = arg(
        None, least=1, help="seed: tokens that the decoder sees, the current one included (2)"
    )
    span_tokens: int | None = arg(None, least=1, help="cocondenser: maximum tokens of a span (30)")
    chunk_size: int | None = arg(
        None, least=0, help="cocondenser: documents encoded at a time (GradCache); 0 is all (0)"
    )
    per_device_batch_size: int = arg(
        32, least=1, group="optimisation", help="blocks, or documents, per process and micro-step"
    )
    gradient_accumulation_steps: int = arg(1, least=1, help="micro-steps per optimizer step")
    gradient_checkpointing: bool = arg(
        False, help="recompute activations in the backward pass: 20% slower, a third less memory"
    )
    learning_rate: float = arg(1e-4, above=0, help="peak learning rate of AdamW")
    weight_decay: float = arg(0.01, least=0, help="weight decay, except of biases and norms")
    max_grad_norm: float = arg(
        1.0, least=0, help="clip the gradient to this norm; 0 is no clipping"
    )
    num_epochs: float = arg(8.0, above=0, help="passes over the corpus (RetroMAE on MS MARCO 20)")
    max_steps: int = arg(0, least=0, help="optimizer steps; if given, --num_epochs is not used")
    warmup_steps: float = arg(0.1, least=0, help="steps of warm-up; below 1, a share of all steps")
    seed: int = arg(42, group="runtime", help="seed of data order, masks, dropout and new weights")
    probe_every: int = arg(0, least=0, help="probe the bottleneck every N steps; 0 is never")
    probe_queries: str | None = arg(None, help="queries for the probe's recall@100")
    probe_qrels: str | None = arg(None, help="judgments of --probe_queries")
    save_every: int = arg(1000, least=1, help="save a state for --resume every N steps")
    log_every: int = arg(20, least=1, help="write a log line every N steps")
    resume: bool = arg(False, help="continue from the last saved state")
    num_workers: int = arg(2, least=0, help="loader processes that turn text into ids")
    report_to: Literal["none", "tensorboard", "wandb"] = arg("none", help="also log to a tracker")
    deterministic: bool = arg(False, help="make reruns on CUDA bit-identical")
    dry_run: bool = arg(False, help="show the first inputs, batch, steps and disk space, then stop")


def objective_options(args: Args) -> dict:
    """The options of the objective, by default those of OPTIONS."""
    names = {name for options in OPTIONS.values() for name in options}
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in given.keys() - OPTIONS[args.objective].keys():
        raise UserError(f"--{name}: {args.objective} has no such option — leave it out")
    return OPTIONS[args.objective] | given


def check(args: Args, positions: int, processes: int) -> None:
    """UserError where arguments do not fit together."""
    files = args.probe_queries, args.probe_qrels
    if args.max_length > positions:
        raise UserError(
            f"--max_length {args.max_length}: the model has {positions} positions — lower it"
        )
    if any(files) and not (all(files) and args.probe_every):
        raise UserError("give all of --probe_every, --probe_queries and --probe_qrels, or no files")
    if args.objective == "cocondenser" and processes * args.per_device_batch_size < 2:
        raise UserError("--per_device_batch_size 1: the contrast needs another document — raise it")


def mean_loss(accelerator, terms):
    """(loss to backpropagate, sums over all processes: a row of loss, labels, correct for each
    term). DDP averages the gradients of W processes. So W times the local sum, divided by the
    labels of all processes, gives the gradient of the mean over the whole batch."""
    rows = [
        torch.stack([t.loss.detach(), t.loss.new_tensor(t.labels), t.correct.float()])
        for t in terms.values()
    ]
    sums = accelerator.reduce(torch.stack(rows), "sum")  # (terms, 3)
    labels = sums[:, 1].clamp(min=1)  # texts without ordinary tokens have no label
    W = accelerator.num_processes
    loss = sum(t.weight * W * t.loss / n for t, n in zip(terms.values(), labels, strict=True))
    return loss, sums


def term_means(terms, totals) -> dict[str, float]:
    """The numbers of a log line. totals: `sums` of mean_loss, added up since the last line."""
    values = {"loss": 0.0}
    for (name, term), (loss, labels, correct) in zip(terms.items(), totals.tolist(), strict=True):
        values[f"{name}_loss"] = loss / max(labels, 1)
        values[f"{name}_accuracy"] = correct / max(labels, 1)
        values["loss"] += term.weight * values[f"{name}_loss"]
    return values


def main():
    # ---- setup
    args = parse_args(Args)
    accumulation = args.gradient_accumulation_steps
    accelerator = launch.make_accelerator(
        accumulation, args.report_to, args.output_dir, args.deterministic
    )
    rank, W, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    B = args.per_device_batch_size
    config, tokenizer = checkpoint.read_architecture(args.model, args.model_config, args.tokenizer)
    check(args, checkpoint.max_positions(config), W)
    options = objective_options(args)
    chunk_size = options.get("chunk_size", 0)

    # ---- data
    title = args.title or checkpoint.stated_title(args.model) or "space"
    cut = Cut(tokenizer, args.max_length, title, options.get("span_tokens", 0))
    with accelerator.main_process_first():
        blocks = open_corpora(args.corpus, cut, args.seed, args.balance)
        collate = BlockCollator(cut)
        probe = None
        if args.probe_every and accelerator.is_main_process:
            probe = Probe(blocks, collate, args.probe_queries, args.probe_qrels)
    texts_per_step = W * B * accumulation
    max_steps = args.max_steps or math.ceil(args.num_epochs * len(blocks) / texts_per_step)
    warmup_steps = steps_of(args.warmup_steps, max_steps)

    # ---- model
    torch.manual_seed(args.seed)  # of new weights
    lm, origin = checkpoint.load_lm(config, args.model)
    speed_up_attention(lm)
    if args.gradient_checkpointing:
        recompute_activations(lm)
    model = OBJECTIVES[args.objective](lm, tokenizer, **options)
    weights = sum(p.numel() for p in model.parameters())
    unit = "documents" if args.objective == "cocondenser" else "blocks"
    facts = {
        "model": f"{origin}, {config.model_type}, {weights / 1e6:.1f} M weights",
        "decoder": checkpoint.load_decoder(model, args.model),
        "objective": f"{args.objective}, {model.options}",
        "running on": launch.describe(accelerator),
        "batch": f"{B} {unit} x {W} process(es) x {accumulation} accumulated = {texts_per_step}",
        unit: f"{len(blocks)} of at most {args.max_length} tokens, title: {title}",
        **blocks.shares(),
        "steps": f"{max_steps}, {warmup_steps} of warm-up",
        "epochs": f"{max_steps * texts_per_step / len(blocks):.2f}",
    }

    def preview():
        first = collate([blocks[index, 0, index] for index in range(min(B, len(blocks)))])
        length = int(first["attention_mask"][0].sum())
        shown = model.preview(first, args.seed)
        return {name: tokenizer.decode(ids[0, :length]) for name, ids in shown.items()}

    # the checkpoint, and a state with two moments
    facts["disk"] = f"{4 * weights * 4 / 1e9:.2f} GB"
    facts["inputs"] = {name: part.texts.fingerprint for name, part in blocks.parts.items()}
    if not launch.begin(accelerator, args, "pre-training", facts, preview):
        return
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    objective = accelerator.unwrap_model(model)

    # ---- resume
    step, _ = launch.load_state(args.output_dir, accelerator, model, optimizer)
    micro_step = step * accumulation
    sampler = StepSampler(len(blocks), B, rank, W, args.seed, micro_step, blocks.order)
    batches = load(blocks, collate, sampler, args.num_workers, device)
    log = launch.RunLog(accelerator, args.output_dir, step)
    bar = tqdm(total=max_steps, initial=step, disable=not accelerator.is_main_process)

    def write_probe():
        with accelerator.autocast():
            log.write(step, probe(objective, device), bar)

    # ---- train
    model.train()
    objective.lm.train(args.encoder_dropout)
    if probe and not step:
        write_probe()
    totals, tokens, waited, clock = 0, 0, 0.0, time.perf_counter()  # since the last log line
    while step < max_steps:
        # ---- one training step
        asked = time.perf_counter()
        batch = send_to_device(next(batches), device, non_blocking=True)
        waited += time.perf_counter() - asked
        with accelerator.accumulate(model):
            if 0 < chunk_size < B:
                terms = span_backward(accelerator, model, batch, args.seed, 2 * chunk_size)
                loss, sums = mean_loss(accelerator, terms)
            else:
                torch.manual_seed(step_seed(args.seed, DROPOUT, micro_step, rank))
                terms = model(batch, args.seed)
                loss, sums = mean_loss(accelerator, terms)
                accelerator.backward(loss)
            lr = lr_at(step, args.learning_rate, warmup_steps, max_steps)
            loss = loss.detach()
            norm, finite = descend(accelerator, model, optimizer, loss, lr, args.max_grad_norm)
            if not finite:
                pids = ", ".join(blocks.ids(batch["examples"].tolist()))
                wrong = f"step {step + 1}: loss or gradient not finite for texts {pids}"
                raise UserError(f"{wrong} — lower --learning_rate")
        # ---- log and save, once per optimizer step
        micro_step += 1
        totals = totals + sums.double()  # on the device until it is logged
        tokens += batch["tokens"]
        if not accelerator.sync_gradients:
            continue
        step += 1
        last_step = step == max_steps
        bar.update()
        if step % args.log_every == 0 or last_step:
            values = term_means(terms, totals) | {"lr": lr, "grad_norm": norm.item()}
            spent = time.perf_counter() - clock
            speed = {"tokens/s": W * tokens / spent, "waited": waited / spent}  # of this process
            log.write(step, values | speed, bar)
            totals, tokens, waited, clock = 0, 0, 0.0, time.perf_counter()
        if probe and (step % args.probe_every == 0 or last_step):
            paused = time.perf_counter()
            write_probe()
            clock += time.perf_counter() - paused
        if step % args.save_every == 0 and not last_step:
            launch.save_state(args.output_dir, step, accelerator, model, optimizer, {})
    bar.close()

    # ---- save
    if accelerator.is_main_process:
        card = {"base": origin, "data": ", ".join(args.corpus), "command": " ".join(sys.argv)}
        card["metrics"] = {"steps": step, **values}
        checkpoint.save_checkpoint(objective, tokenizer, args.output_dir, title, card)
    launch.finish(accelerator, args.output_dir)


if __name__ == "__main__":
    launch.run(main)
