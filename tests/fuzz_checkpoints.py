"""Damage small checkpoints at random and load them by lib/checkpoint.py, and a run's state by
lib/launch.py. Anything but success or a UserError of one line is a failure, and is printed with the
seed that repeats it. (Nothing here makes a number large: a model of 10^9 layers is built for ever.)

    python -m tests.fuzz_checkpoints --seconds 60 --seed 0
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from accelerate import Accelerator
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from lib import checkpoint, launch
from lib.encoder import Head
from lib.files import UserError
from lib.objectives import OBJECTIVES, OPTIONS
from lib.text import TextFormat, pad, to_ids

VALUES = [None, True, -1, 0, 7, 2.5, "", "x", [], {}, [1], ["x"], {"a": 1}, [[]], "../..", "\ud83d"]
PATIENCE = 60  # seconds that a load may take


def originals(folder: Path) -> dict:
    """Write one checkpoint of each kind -> {name of its folder: function that loads a copy}."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = BertTokenizerFast(vocab=vocabulary, model_max_length=16)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "max_position_embeddings": 16, "num_labels": 1}
    config = BertConfig(vocab_size=len(words), **sizes)
    BertForMaskedLM(config).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    BertForSequenceClassification(config).save_pretrained(folder / "cross")
    tokenizer.save_pretrained(folder / "cross")
    lengths = {"max_query_length": 8, "max_passage_length": 12}
    heads = {"dense": Head("mean", projection=4, normalize=True), "sparse": Head(kind="sparse")}
    for name, head in heads.items():
        model = checkpoint.load_encoder(folder / "plain", head, lengths)
        checkpoint.save_encoder(model, folder / name, {})

    def objective(source: Path):
        lm, _, _ = checkpoint.load_lm(source)
        return OBJECTIVES["retromae"](lm, tokenizer, **OPTIONS["retromae"])

    checkpoint.save_checkpoint(objective(folder / "plain"), tokenizer, folder / "lm", "space", {})
    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    launch.save_state(folder / "run", 1, accelerator, layer, optimizer, {})
    made = {"arguments": {"depth": 3}, "inputs": {}}
    (folder / "run" / "args.json").write_text(json.dumps(made))

    def encoder(copy: Path) -> None:
        model = checkpoint.load_encoder(copy)
        with torch.no_grad():
            model.encode(pad(to_ids(["a b c", ""], model.tokenizer, 8), model.tokenizer))

    def masked_lm(copy: Path) -> None:
        checkpoint.private_settings(copy)
        checkpoint.load_decoder(objective(copy), copy)

    def cross_encoder(copy: Path) -> None:
        form = TextFormat(title="sep", max_query_length=4, max_passage_length=12)
        checkpoint.load_cross_encoder(copy, form)

    def run(copy: Path) -> None:
        launch.claim_output(accelerator, copy, made)
        launch.load_state(copy, accelerator, layer, optimizer)

    return {
        "dense": encoder,
        "sparse": encoder,
        "lm": masked_lm,
        "cross": cross_encoder,
        "run": run,
    }


def replaced(draw: random.Random, value):
    """A JSON value with one of its parts replaced or removed."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw.choice(keys)
        copy = dict(value) if isinstance(value, dict) else list(value)
        if draw.random() < 0.2:
            del copy[key]
        else:
            copy[key] = replaced(draw, value[key])
        return copy
    return draw.choice(VALUES)


def damage(draw: random.Random, folder: Path) -> str:
    """Spoil one file -> what was done."""
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = path.read_bytes()
    ways = ["cut", "flip", "remove", "zero"]
    with contextlib.suppress(ValueError):  # not JSON, or no longer
        value = json.loads(content)
        ways += 4 * ["replace"]
    how = draw.choice(ways)
    if how == "replace":
        path.write_text(json.dumps(replaced(draw, value)))
    elif how == "cut":
        path.write_bytes(content[: draw.randrange(len(content) + 1)])
    elif how == "flip":
        spoilt = bytearray(content or b"x")
        for _ in range(draw.choice([1, 1, 8])):
            # the head of a file holds its structure
            end = draw.choice([64, 2048, len(spoilt)])
            spoilt[draw.randrange(min(end, len(spoilt)))] ^= 1 << draw.randrange(8)
        path.write_bytes(spoilt)
    elif how == "zero":
        path.write_bytes(bytes(len(content)))
    else:
        path.unlink()
    return f"{how} {path.relative_to(folder)}"


def fuzz(seed: int, seconds: float = float("inf"), times: float = float("inf")) -> SimpleNamespace:
    """Counts of what was loaded, and texts of the failures."""
    found = SimpleNamespace(counts=Counter(), failures=[])
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        loads = originals(folder)
        start, number = time.monotonic(), 0
        while number < times and time.monotonic() - start < seconds:
            draw = random.Random(f"{seed} {number}")
            name = draw.choice(list(loads))
            copy = folder / "copy"
            shutil.copytree(folder / name, copy)
            done = ", ".join(damage(draw, copy) for _ in range(draw.choice([1, 1, 2])))
            try:
                signal.alarm(PATIENCE)
                loads[name](copy)
                found.counts["loaded"] += 1
            except UserError as error:
                found.counts["refused"] += 1
                if "\n" in str(error) or " — " not in str(error):
                    found.failures.append(f"seed {seed}, number {number}, {name}: {done}: {error}")
            except BaseException:
                place = f"seed {seed}, number {number}, {name}: {done}"
                found.failures.append(f"{place}\n{traceback.format_exc()}")
            finally:
                signal.alarm(0)
            shutil.rmtree(copy)
            number += 1
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    result = fuzz(given.seed, given.seconds)
    print(*result.failures, dict(result.counts), sep="\n\n")
    raise SystemExit(bool(result.failures))
