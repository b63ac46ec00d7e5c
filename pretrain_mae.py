"""Pre-train an encoder through a bottleneck: a text passes through one vector, from which a weak decoder rebuilds it.

    mlm          masked language modelling alone, the control: BERT (arXiv 1810.04805), whole-word masks
    retromae     + a one-layer decoder with position-specific masks over the clean text: RetroMAE (2205.12035)
    dupmae       retromae + the bag of words from the max-pooled LM logits: DupMAE (2305.02564)
    lexmae       + a two-layer decoder of a masked text behind a lexicon bottleneck: LexMAE (2208.14754)
    seed         + a causal decoder that sees a few tokens back: SEED-Encoder (2102.09206)
    condenser    + a head over the late [CLS] and the states of a middle layer: Condenser (2104.08253)
    cocondenser  condenser + a contrastive loss over two spans of a document: coCondenser (2108.05540), and on the
                 target corpora COCO-DR (2210.15212)

Deliberate deviations from the official code:
  1. Each loss term is a mean over the labels of all processes (SEED does so too; the others: mean of the means per
     device). Under gradient accumulation every micro-batch weighs the same.
  2. A corrupted token is replaced by [MASK], an ordinary token or itself, 80/10/10; never by a special token.
  3. Blocks end with a sentence and fit --max_length (RetroMAE's exceed it by up to a sentence, which is cut off;
     Condenser makes one in ten shorter). Sentences longer than a block or span are cut, and nothing of them is lost.
  4. The decoder is saved, and picked up by the next stage of the same objective (RetroMAE starts it anew).
  5. Special tokens inside a text, such as the [SEP] of --title sep, are neither masked nor predicted; SEED's decoder
     alone predicts them, [SEP] ending its text.
  6. Token masks hide exactly their share of each text (BERT and RoBERTa flip a coin per token).
  7. SEED's cross-attention to its one key has no query and key projections: over one key they change nothing.
  8. DupMAE's --bow paper keeps the LM head where the paper has a linear layer of its own.
  9. COCO-DR pre-trains with dropout off in the encoder, on in the head, perhaps by mistake: --no_encoder_dropout.
Masks and spans are functions of (seed, micro-step, row in the batch of all processes), whatever their number.

Reads   --model (Hugging Face), or --model_config FILE.json and --tokenizer DIR to start from scratch; corpora
Writes  --output_dir: the checkpoint with its LM head (AutoModel, AutoModelForMaskedLM), the decoder beside it
        (decoder.safetensors, decoder.json); log.jsonl, args.json, state/ for --resume; `done` last

CPU toy   python pretrain_mae.py --objective retromae --model ckpt --corpus corpus.jsonl --max_length 64 \\
              --max_steps 20 --output_dir out
1 GPU     accelerate launch --mixed_precision bf16 pretrain_mae.py ... --per_device_batch_size 128 --max_length 150
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
from transformers.hf_argparser import HfArg

from lib.blocks import BlockCollator, open_corpora
from lib.checkpoint import (
    load_decoder,
    load_lm,
    max_positions,
    read_architecture,
    save_checkpoint,
    stated_title,
)
from lib.cpu import economize
from lib.files import UserError
from lib.launch import (
    RunLog,
    begin,
    describe,
    finish,
    load_state,
    make_accelerator,
    parse_args,
    run,
    save_state,
)
from lib.loader import StepSampler, load
from lib.objectives import (
    MLM,
    SEED,
    CoCondenser,
    Condenser,
    DupMAE,
    LexMAE,
    RetroMAE,
    span_backward,
)
from lib.optim import descend, lr_at, parameter_groups
from lib.probe import Probe
from lib.text import step_seed


@dataclass
class Args:
    # data
    corpus: list[str] = HfArg(help="texts to learn from: one or several of FILE or NAME=FILE")
    output_dir: str = HfArg(help="where the checkpoint goes")
    model: str = HfArg(
        default=None, help="checkpoint to start from; its decoder too, if of the same objective"
    )
    model_config: str = HfArg(
        default=None, help="instead: JSON of a model to start from scratch (model_type and sizes)"
    )
    tokenizer: str = HfArg(default=None, help="tokenizer of --model_config")
    balance: float = HfArg(
        default=1.0, help="temperature between corpora: 1 = by their size, large = equal shares"
    )
    titles: str = HfArg(default=None, help="`pid TAB title` file to join to the only corpus")
    title: Literal["none", "space", "sep"] | None = HfArg(
        default=None, help="how to join; else as the checkpoint does, else by a space"
    )
    max_length: int = HfArg(
        default=512, help="tokens of a block (RetroMAE 512, on MS MARCO 150; LexMAE 144)"
    )
    # objective
    objective: Literal[
        "mlm", "retromae", "dupmae", "lexmae", "seed", "condenser", "cocondenser"
    ] = HfArg(
        default="retromae",
        help="see above. Options that only some of them have, their defaults in brackets:",
    )
    encoder_mask_ratio: float | None = HfArg(
        default=None,
        help="share of tokens hidden from the encoder (0.3; seed, condenser, cocondenser 0.15)",
    )
    mask: Literal["whole_word", "token"] | None = HfArg(
        default=None,
        help="what the encoder's mask hides at a time (whole_word; lexmae, seed token)",
    )
    decoder_mask_ratio: float | None = HfArg(
        default=None, help="retromae, dupmae, lexmae: share hidden there (0.5)"
    )
    decoder_masks: int | None = HfArg(
        default=None, help="retromae, dupmae: masks per text (256; FlagEmbedding 128)"
    )
    query_stream: Literal["raw", "normed"] | None = HfArg(
        default=None,
        help="retromae (raw), dupmae (normed): decoder queries as RetroMAE's code or FlagEmbedding's",
    )
    bow: Literal["official", "paper"] | None = HfArg(
        default=None, help="dupmae: loss of the code (official) or paper"
    )
    bow_weight: float | None = HfArg(
        default=None, help="dupmae: weight of that loss (0.1; paper 1)"
    )
    decoder_layers: int | None = HfArg(
        default=None, help="lexmae, [co]condenser (2), seed (3; 1 with a window of 8)"
    )
    attention_window: int | None = HfArg(
        default=None, help="seed: tokens the decoder reads, its input counted (2)"
    )
    skip_from: int | None = HfArg(
        default=None, help="[co]condenser: layer whose states the head reads (half way)"
    )
    late_mlm: bool | None = HfArg(
        default=None, help="[co]condenser: MLM loss of the last layer too (true)"
    )
    spans: Literal["coco", "cocondenser"] | None = HfArg(
        default=None, help="cocondenser: whose rule cuts documents that do not come in spans (coco)"
    )
    span_tokens: int | None = HfArg(
        default=None, help="cocondenser: tokens of a span by COCO-DR's rule (30)"
    )
    chunk_size: int | None = HfArg(
        default=None, help="cocondenser: GradCache, documents at a time; 0 = all (0)"
    )
    encoder_dropout: bool = HfArg(
        default=True, help="dropout in the encoder; COCO-DR's code has it off"
    )
    # optimisation
    per_device_batch_size: int = HfArg(
        default=32,
        help="blocks, or documents of two spans, per process and micro-step (RetroMAE 32, on MS MARCO 128)",
    )
    gradient_checkpointing: bool = HfArg(
        default=False, help="encode twice to keep less: a fifth more time"
    )
    gradient_accumulation_steps: int = HfArg(default=1, help="micro-steps per optimizer step")
    optimizer: Literal["adamw"] = HfArg(default="adamw", help="betas 0.9 and 0.999, eps 1e-8")
    learning_rate: float = HfArg(default=1e-4, help="peak (RetroMAE 1e-4)")
    weight_decay: float = HfArg(default=0.01, help="not on biases and norms (RetroMAE 0.01)")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping (RetroMAE 1); 0 = none")
    num_epochs: float = HfArg(
        default=8.0, help="passes over the blocks (RetroMAE 8, on MS MARCO 20)"
    )
    max_steps: int = HfArg(default=0, help="optimizer steps; wins over --num_epochs")
    warmup_ratio: float = HfArg(
        default=0.1, help="share of linear warm-up before the linear decay (RetroMAE 0.1)"
    )
    warmup_steps: int = HfArg(default=None, help="wins over --warmup_ratio")
    # runtime
    seed: int = HfArg(default=42, help="data order, masks, dropout, new weights")
    probe_every: int = HfArg(
        default=0, help="steps between probes of the bottleneck (lib/probe.py); 0 = none"
    )
    probe_queries: str = HfArg(default=None, help="queries for its zero-shot recall@100")
    probe_qrels: str = HfArg(default=None, help="their judgments in the corpus")
    save_every: int = HfArg(default=1000, help="steps between states to --resume from")
    log_every: int = HfArg(default=20, help="steps between log lines")
    resume: bool = HfArg(default=False, help="go on from the last state")
    num_workers: int = HfArg(default=2, help="loader processes that turn text into ids")
    report_to: Literal["none", "tensorboard", "wandb"] = HfArg(
        default="none", help="tracker beside log.jsonl"
    )
    deterministic: bool = HfArg(default=False, help="bit-identical reruns on CUDA")
    dry_run: bool = HfArg(
        default=False, help="show the first inputs, blocks, batch, steps and disk, and stop"
    )


OBJECTIVES = {
    cls.objective: cls for cls in (MLM, RetroMAE, DupMAE, LexMAE, SEED, Condenser, CoCondenser)
}
PAIR_OPTIONS = {"spans", "span_tokens", "chunk_size"}  # of cocondenser's data and step
OPTIONS = PAIR_OPTIONS.union(
    *(cls.options() for cls in OBJECTIVES.values())
)  # None is the objective's default


def mean_loss(accelerator, terms):
    """(loss to backpropagate here, numbers of all processes: a row of loss, labels, correct for each term).
    DDP takes the mean of the gradients of W processes, so W times the local sum, divided by the labels of all, is the
    mean over the batch of the world."""
    sums = torch.stack(
        [
            torch.stack([t.loss.detach(), t.loss.new_tensor(t.labels), t.correct.float()])
            for t in terms.values()
        ]
    )
    sums = accelerator.reduce(sums, "sum")  # (terms, 3)
    labels = sums[:, 1].clamp(min=1)  # a batch of texts without ordinary tokens has no label
    W = accelerator.num_processes
    loss = sum(t.weight * W * t.loss / n for t, n in zip(terms.values(), labels, strict=True))
    return loss, sums


def main():
    # ---- setup
    args = parse_args(Args)
    accumulation = args.gradient_accumulation_steps
    accelerator = make_accelerator(
        accumulation, args.report_to, args.output_dir, args.deterministic
    )
    rank, W, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    B = args.per_device_batch_size
    config, tokenizer = read_architecture(args.model, args.model_config, args.tokenizer)
    if not 4 <= args.max_length <= max_positions(config):
        raise UserError(
            f"--max_length {args.max_length}: the model has {max_positions(config)} positions — choose 4 to that"
        )
    if bool(args.probe_queries) != bool(args.probe_qrels) or (
        args.probe_queries and not args.probe_every
    ):
        raise UserError(
            "the probe is incomplete — give --probe_queries and --probe_qrels together, and --probe_every"
        )
    for name in ("encoder_mask_ratio", "decoder_mask_ratio"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < 1:
            raise UserError(
                f"--{name} {getattr(args, name)}: a share of the tokens — choose it between 0 and 1"
            )
    for name in ("decoder_masks", "decoder_layers", "attention_window", "span_tokens"):
        if (1 if getattr(args, name) is None else getattr(args, name)) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: counts from 1 — give a larger number")
    objective, pairs = OBJECTIVES[args.objective], args.objective == "cocondenser"
    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    for name in sorted(options.keys() - objective.options() - (PAIR_OPTIONS if pairs else set())):
        raise UserError(f"--{name}: {args.objective} has no such option — leave it out")

    if pairs and W * B < 2:
        raise UserError(
            "--per_device_batch_size 1: the other spans of a contrast are of other documents — raise it"
        )

    # ---- data
    title = args.title or stated_title(args.model) or "space"
    rule = options.pop("spans", "coco") if pairs else None
    cut = tokenizer, args.max_length, title, rule, options.pop("span_tokens", 30)
    chunk_size = options.pop("chunk_size", 0)
    with accelerator.main_process_first():
        blocks = open_corpora(
            args.corpus, args.titles, cut, args.seed, args.balance, accelerator.is_main_process
        )
        collate = BlockCollator(tokenizer, args.max_length)
        probe = (
            Probe(blocks, collate, args.probe_queries, args.probe_qrels)
            if args.probe_every
            else None
        )
    max_steps = args.max_steps or math.ceil(args.num_epochs * len(blocks) / (W * B * accumulation))
    warmup_steps = (
        round(args.warmup_ratio * max_steps) if args.warmup_steps is None else args.warmup_steps
    )

    # ---- model, optimizer, prepare
    torch.manual_seed(args.seed)  # of new weights
    lm, origin = load_lm(config, args.model)
    economize(lm, args.gradient_checkpointing)
    model = objective(lm, tokenizer, **options)
    decoder = load_decoder(model, args.model)
    weights, unit = sum(p.numel() for p in model.parameters()), "documents" if pairs else "blocks"
    facts = {
        "model": f"{origin}, {config.model_type}, {weights / 1e6:.1f} M weights; decoder: {decoder}",
        "objective": ", ".join(
            [args.objective, *(f"{name} {value}" for name, value in [*model.settings.items()][2:])]
        ),
        "running on": describe(accelerator),
        "batch": f"{B} {unit} x {W} process(es) x {accumulation} accumulated = {W * B * accumulation} per step",
        unit: f"{len(blocks)} of at most {args.max_length} tokens, title: {title}",
        **blocks.shares(),
        "steps": f"{max_steps}, {len(blocks) / (W * B * accumulation):.2f} per epoch, {warmup_steps} of warm-up",
    }

    def preview():
        first = collate([blocks[index, 0, index] for index in range(min(B, len(blocks)))])
        lengths = first["attention_mask"].sum(1)
        tokens = {"tokens": f"median {int(lengths.median())} of the first {len(lengths)}"}
        return model.preview(first, args.seed, tokenizer) | tokens

    numbers = weights * 4  # checkpoint, and state with two moments
    ignore = "probe_every", "probe_queries", "probe_qrels"
    if not begin(accelerator, args, "pre-training", facts, preview, numbers, ignore):
        return
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay), lr=args.learning_rate, fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)

    # ---- resume
    step, _ = load_state(args.output_dir, accelerator, model, optimizer)
    micro_step = step * accumulation
    sampler = StepSampler(
        len(blocks), B, rank, W, args.seed, start=micro_step, epoch_order=blocks.order
    )
    batches = load(blocks, collate, sampler, args.num_workers, device)

    # ---- train
    log, totals, tokens, waited = RunLog(accelerator, args.output_dir, step), 0, 0, 0.0
    bar = tqdm(total=max_steps, initial=step, disable=not accelerator.is_main_process)
    model.train()
    accelerator.unwrap_model(model).lm.train(args.encoder_dropout)
    if probe and not step and accelerator.is_main_process:
        with accelerator.autocast():
            log.write(0, probe(accelerator.unwrap_model(model), device), bar)
    clock = time.perf_counter()
    while step < max_steps:
        # ---------------------------------------------------------------------------------------- one training step
        asked = time.perf_counter()
        batch = send_to_device(next(batches), device, non_blocking=True)
        waited += time.perf_counter() - asked
        with accelerator.accumulate(model):
            dropout = step_seed(args.seed, 2, micro_step, rank)  # 0 is the data order
            if 0 < chunk_size < B:
                terms = span_backward(accelerator, model, batch, args.seed, 2 * chunk_size, dropout)
                loss, sums = mean_loss(accelerator, terms)
            else:
                torch.manual_seed(dropout)
                terms = model(batch, args.seed)
                loss, sums = mean_loss(accelerator, terms)
                accelerator.backward(loss)
            lr = lr_at(step, args.learning_rate, warmup_steps, max_steps)
            norm, finite = descend(
                accelerator, model, optimizer, loss.detach(), lr, args.max_grad_norm
            )
            if not finite:
                pids = ", ".join(blocks.ids(batch["examples"].tolist()))
                raise UserError(
                    f"step {step + 1}: loss or gradient not finite for texts {pids} — lower --learning_rate"
                )
        # -------------------------------------------------------------------------------- log, save: once per step
        micro_step += 1
        totals, tokens = (
            totals + sums.double(),
            tokens + batch["tokens"],
        )  # stay on the device until they are logged
        if not accelerator.sync_gradients:
            continue
        step += 1
        last_step = step == max_steps
        bar.update()
        if step % args.log_every == 0 or last_step:
            values = {}
            for name, (loss_sum, labels, correct) in zip(terms, totals.tolist(), strict=True):
                values |= {
                    f"{name}_loss": loss_sum / max(labels, 1),
                    f"{name}_accuracy": correct / max(labels, 1),
                }
            values = {
                "loss": sum(t.weight * values[f"{name}_loss"] for name, t in terms.items()),
                **values,
            }
            values |= {"lr": lr, "grad_norm": norm.item()}
            spent = (
                time.perf_counter() - clock
            )  # of this process, as are its tokens and how long it waited for data
            log.write(
                step, {**values, "tokens/s": W * tokens / spent, "waited": waited / spent}, bar
            )
            totals, tokens, waited, clock = 0, 0, 0.0, time.perf_counter()
        if probe and accelerator.is_main_process and (step % args.probe_every == 0 or last_step):
            pause = time.perf_counter()
            with accelerator.autocast():
                log.write(step, probe(accelerator.unwrap_model(model), device), bar)
            clock += time.perf_counter() - pause
        if step % args.save_every == 0 and not last_step:
            save_state(args.output_dir, step, accelerator, model, optimizer, {})
    bar.close()

    # ---- save
    if accelerator.is_main_process:
        metrics = {"steps": step, **values}
        card = {
            "base": origin,
            "data": ", ".join(args.corpus),
            "command": " ".join(sys.argv),
            "metrics": metrics,
        }
        save_checkpoint(accelerator.unwrap_model(model), tokenizer, args.output_dir, title, card)
    finish(accelerator, args.output_dir)


if __name__ == "__main__":
    run(main)
