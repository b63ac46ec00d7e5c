"""Peak memory of encode.py for corpora of different size: it must not grow with them.

    python -m bench.encode_memory --passages 50000 500000

The model is a small random BERT, so that half a million passages take minutes. Measured is the sum
over the process and its loader workers of what each has for itself (USS: pages of files that are
merely mapped do not count), sampled ten times a second, in runs that read their corpus for the
first time and write its memory-mapped copy too.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
WORDS = [f"w{number}" for number in range(20_000)]


def make_model(folder: Path) -> None:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizerFast(vocab={word: at for at, word in enumerate(vocabulary)}).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    size = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }
    config = BertConfig(vocab_size=len(vocabulary), **size)
    BertModel(config).save_pretrained(folder)


def own_memory(process: psutil.Process) -> float:
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().uss
        except psutil.Error:  # it has ended
            pass
    return total / 2**20


def peak(command: list) -> tuple[float, float]:
    """(MB, seconds) of a Python process that must succeed."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "ISTHMUS_CACHE": str(command[-1].parent / "cache"),
    }
    began, most = time.perf_counter(), 0.0
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                most = max(most, own_memory(watched))
            except psutil.Error:
                break
            time.sleep(0.1)
    if process.returncode:
        sys.exit(f"exit status {process.returncode}: {' '.join(map(str, command))}")
    return most, time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passages", type=int, nargs="+", default=[50_000, 500_000])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder, draw = Path(folder), random.Random(0)
        make_model(folder / "model")
        for count in args.passages:
            with open(folder / f"{count}.tsv", "w") as out:
                for number in range(count):
                    out.write(
                        f"p{number}\t{' '.join(draw.choices(WORDS, k=draw.randint(10, 60)))}\n"
                    )
            flags = ["--model", folder / "model", "--pooling", "cls", "--kind", "passage"]
            flags += [
                "--input",
                folder / f"{count}.tsv",
                "--output_dir",
                folder / f"vectors{count}",
            ]
            memory, seconds = peak([ROOT / "encode.py", *flags])
            print(f"{count} passages: peak {memory:.0f} MB, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
