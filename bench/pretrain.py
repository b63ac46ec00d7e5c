"""Speed and memory of a pre-training step: lib/objectives.py against a straightforward form of the
official recipes.

    python -m bench.pretrain --model DIR --corpus FILE [--objectives retromae lexmae ...]
    [--precision bf16]

The other side has the same weights, blocks, optimizer and loop, but computes as the official code
does: logits of all positions, (B, L, V), for encoder and decoder, a cross-entropy that ignores
most of them, and masks drawn word by word in the collator (for RetroMAE and DupMAE up to 256 per
text). Two loader workers each. Each run is a process of its own, in turns. Printed: the median
time of a step without the first two, the share of it spent waiting for data, and the peak of
resident memory beyond what is there before the model is. MiniLM is the encoder of 6 layers of 384
meant.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from torch.utils.data import DataLoader

from lib.architectures import head_transform
from lib.blocks import Blocks, Corpora, Cut
from lib.checkpoint import load_lm
from lib.cpu import speed_up_attention
from lib.files import read_json, write_json
from lib.loader import step_batches
from lib.objectives import OBJECTIVES, View
from lib.optim import parameter_groups, recompute_activations
from lib.spans import span_contrast
from lib.text import step_seed
from lib.texts import open_texts
from pretrain_mae import mean_loss

ROOT = Path(__file__).resolve().parents[1]


def whole_words(tokens: list[str], ratio: float) -> list[bool]:
    """One mask of the usual collator: words in random order until the budget is met."""
    words = []
    for place, token in enumerate(tokens):
        if token in ("[CLS]", "[SEP]"):
            continue
        if words and token.startswith("##"):
            words[-1].append(place)
        else:
            words.append([place])
    random.shuffle(words)
    budget, hidden = max(1, round(len(tokens) * ratio)), set()
    for word in words:
        if len(hidden) + len(word) <= budget:
            hidden.update(word)
    return [place in hidden for place in range(len(tokens))]


class PlainCollator:
    """What Cut.collate gives, and the masks: input_ids corrupted, clean ids, labels, and by
    objective the decoder's (B, L, L) attention or the (B, V) bag of words."""

    def __init__(self, cut: Cut, objective: str, ratio: float):
        self.cut = cut
        self.objective = objective
        self.ratio = ratio

    def __call__(self, items):
        batch = self.cut.collate(items)
        tokenizer = self.cut.tokenizer
        ids, (B, L) = batch["input_ids"], batch["input_ids"].shape
        masks, views = torch.zeros(B, L, dtype=torch.bool), torch.zeros(B, L, L, dtype=torch.bool)
        with_bags = self.objective in ("bow", "dupmae")
        bags = torch.zeros(B, len(tokenizer)) if with_bags else torch.zeros(0)
        for b, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            tokens = tokenizer.convert_ids_to_tokens(ids[b, :length].tolist())
            masks[b, :length] = torch.tensor(whole_words(tokens, self.ratio))
            if self.objective in ("retromae", "dupmae"):
                choices = [whole_words(tokens, 0.5) for _ in range(min(length, 256))]
                rows = []
                for i in range(length):
                    row = list(random.choice(choices))
                    row[i] = True
                    rows.append([not hidden for hidden in row])
                views[b, :length, :length] = torch.tensor(rows)
            if self.objective == "dupmae":
                bags[b, ids[b, 1 : length - 1]] = 1 / max(length - 2, 1)
            if self.objective == "bow":
                words = ids[b, 1 : length - 1].unique()
                bags[b, words] = 1 / max(len(words), 1)
        fate = torch.rand(B, L)
        other = torch.randint(len(tokenizer), (B, L))
        corrupted = torch.where(masks & (fate < 0.8), tokenizer.mask_token_id, ids)
        corrupted = torch.where(masks & (fate >= 0.8) & (fate < 0.9), other, corrupted)
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        more = {
            "corrupted": corrupted,
            "masks": masks,
            "views": views,
            "bags": bags,
            "targets": ~special,
        }
        return {**batch, **more}


def plain_loss(model, batch: dict, seed: int):
    """The objective's loss with dense logits. model: the objective, for its weights."""
    ids, keep, lm = batch["input_ids"], batch["attention_mask"], model.lm
    output, everywhere = lm.get_output_embeddings(), torch.arange(ids.numel())

    def logits_of(hidden):
        return F.linear(head_transform(lm, hidden), output.weight, output.bias)  # (B, L, V)

    def cross_entropy(logits, mask):
        return F.cross_entropy(logits.flatten(0, -2), ids.masked_fill(~mask, -100).flatten())

    found = lm.base_model(
        input_ids=batch["corrupted"], attention_mask=keep, output_hidden_states=True
    )
    hidden, logits = found.last_hidden_state, logits_of(found.last_hidden_state)
    loss = cross_entropy(logits, batch["masks"])
    name = model.name
    if name in ("retromae", "dupmae"):
        rows = batch["views"] | ~batch["views"].any(-1, keepdim=True)
        states = model.states(hidden[:, 0], View(ids, everywhere, rows))
        loss = loss + cross_entropy(logits_of(states), batch["targets"])
    if name == "bow":
        loss = loss - (batch["bags"] * logits[:, 0].log_softmax(1)).sum(1).mean()
    if name == "dupmae":
        pooled = (logits[:, 1:] - 1000.0 * (1 - keep[:, 1:, None])).max(1).values
        loss = loss - 0.1 * (batch["bags"] * pooled.log_softmax(1)).sum(1).mean()
    if name == "lexmae":
        pooled = (logits - 10_000.0 * ~batch["targets"][..., None]).max(1).values
        bottleneck = pooled.softmax(1) @ lm.get_input_embeddings().weight.detach()
        view = model.view(batch, batch["masks"], seed)
        mask = torch.zeros_like(batch["masks"])
        mask.flatten()[view.places] = True
        rest = lm.base_model.embeddings(input_ids=view.ids)
        states = model.decoder["head"](model.decoder["layers"](bottleneck, rest, keep, everywhere))
        loss = loss + cross_entropy(F.linear(states, output.weight, model.decoder.bias), mask)
    if name == "seed":
        E = lm.get_input_embeddings()
        states = model.decoder(E(ids[:, :-1]), hidden[:, 0], torch.arange(ids[:, 1:].numel()))
        labels = ids[:, 1:].masked_fill(keep[:, 1:] == 0, -100)
        loss = 0.5 * loss + 0.5 * F.cross_entropy(states @ E.weight.T, labels.flatten())
    if name in ("condenser", "cocondenser"):
        states = model.decoder(hidden[:, 0], found.hidden_states[model.middle], keep, everywhere)
        loss = loss + cross_entropy(logits_of(states), batch["masks"])
    if name == "cocondenser":
        term = span_contrast(hidden[:, 0])
        loss = loss + term.loss / term.labels
    return loss


def run_one(args) -> None:
    """In the child process."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.precision)
    device = accelerator.device
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    pairs = args.run == "cocondenser"
    cut = Cut(tokenizer, args.length, span_tokens=args.length // 2 if pairs else 0)
    blocks = Corpora([Blocks(open_texts(args.corpus), cut)], seed=0)
    torch.manual_seed(0)
    collate = cut.collate
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lm, _, _ = load_lm(args.model)
    model = OBJECTIVES[args.run](lm, tokenizer)
    if not args.plain:
        speed_up_attention(lm)
        if args.gradient_checkpointing:
            recompute_activations(lm)
    else:
        collate = PlainCollator(cut, args.run, model.encoder_mask_ratio)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-4, fused=True)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    sampler = step_batches(blocks, args.batch, 0, 1)
    batches = iter(DataLoader(blocks, batch_sampler=sampler, collate_fn=collate, num_workers=2))
    seconds, waits, losses, tokens = [], [], [], []
    for step in range(args.steps):
        began = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - began)
        batch = {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()}
        torch.manual_seed(step_seed(0, 2, step))
        with accelerator.autocast():
            loss = (
                plain_loss(model, batch, 0)
                if args.plain
                else mean_loss(accelerator, model(batch, 0))[0]
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
        tokens.append(int(batch["attention_mask"].sum()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"seconds": seconds, "waits": waits, "losses": losses, "tokens": tokens}
    found["peak"] = (peak - before) / (2**20 if sys.platform == "darwin" else 2**10)
    if device.type == "cuda":
        found["peak"] = torch.cuda.max_memory_allocated() / 2**20
    write_json(args.out, found)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument(
        "--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES)
    )
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="ours only")
    for name, default in {"batch": 32, "length": 144, "steps": 6, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("run", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return run_one(args)
    for objective in args.objectives:
        found = {"ours": [], "plain": []}
        for _ in range(args.rounds):
            for side in found:
                with tempfile.TemporaryDirectory() as folder:
                    flags = [*sys.argv[1:], "--run", objective, "--out", f"{folder}/out.json"]
                    flags += ["--plain"] if side == "plain" else []
                    subprocess.run(
                        [sys.executable, "-m", "bench.pretrain", *flags], check=True, cwd=ROOT
                    )
                    found[side].append(read_json(f"{folder}/out.json"))
        step, peak, wait, loss = {}, {}, {}, {}
        for side, runs in found.items():
            step[side] = statistics.median(s for run in runs for s in run["seconds"][2:])
            wait[side] = sum(s for run in runs for s in run["waits"][2:])
            wait[side] /= sum(s for run in runs for s in run["seconds"][2:])
            peak[side], loss[side] = max(run["peak"] for run in runs), runs[0]["losses"][-1]
        tokens = statistics.mean(t for run in found["ours"] for t in run["tokens"])
        faster, smaller = step["plain"] / step["ours"], peak["ours"] / peak["plain"]
        print(
            f"{objective:<12} step {step['ours']:.2f} s, plain {step['plain']:.2f} s: {faster:.2f}x"
            f"   memory {peak['ours']:,.0f} MB, plain {peak['plain']:,.0f} MB: {smaller:.2f}"
            f"   waited {wait['ours']:.1%}, plain {wait['plain']:.1%}"
            f"   loss {loss['ours']:.3f}, {loss['plain']:.3f}"
            f"   {tokens:.0f} tokens",
            flush=True,
        )
    print(
        json.dumps(
            {
                "batch": args.batch,
                "length": args.length,
                "precision": args.precision,
                "rounds": args.rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
