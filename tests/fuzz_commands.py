"""Command lines without sense, again and again: flags of the five scripts get extreme numbers,
wrong files, folders in the place of files, nothing, or are given twice, and the script runs in this
process on tiny data. It must succeed and leave a complete output, or say one line, exit with status
1 and leave no last file; after an error of arguments it leaves nothing. What it reads it must not
change.

    python -m tests.fuzz_commands --seconds 60 --seed 0 [--scripts evaluate mine_negatives]
"""

import argparse
import contextlib
import dataclasses
import gzip
import importlib
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Literal, get_args, get_origin

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from accelerate.state import AcceleratorState
from scipy.sparse import csr_matrix

from lib import files, launch
from lib.bm25 import open_bm25
from lib.embeddings import finish_embeddings, write_shard
from lib.texts import open_texts

LAST_FILES = {
    "evaluate": "metrics.json",
    "mine_negatives": "audit.json",
    "encode": "meta.json",
    "finetune_biencoder": "done",
    "pretrain_mae": "done",
}
QUICK = "--num_workers 0 --max_steps 2".split()
COMMANDS = {  # names of files of the ground stand for their paths
    "evaluate": [
        "--bm25 --queries queries.tsv --corpus corpus.jsonl --qrels qrels.tsv",
        "--queries_embeddings dense_q --corpus_embeddings dense_p --qrels qrels.tsv",
        "--queries_embeddings sparse_q --corpus_embeddings sparse_p --qrels qrels.tsv",
        "--run run.trec lists.tsv --compare lists.tsv --qrels qrels.tsv",
        "--queries_embeddings dense_q --corpus_embeddings dense_p",
        "--bm25 --queries queries.tsv --corpus corpus.jsonl --qrels qrels.tsv "
        "--candidates lists.tsv",
    ],
    "mine_negatives": [
        "--bm25 --queries queries.tsv --corpus corpus.jsonl --qrels qrels.tsv",
        "--queries_embeddings dense_q --corpus_embeddings dense_p --corpus corpus.jsonl "
        "--qrels qrels.tsv",
        "--queries_embeddings sparse_q --corpus_embeddings sparse_p --corpus corpus.jsonl "
        "--qrels qrels.tsv",
        "--run run.trec --corpus corpus.jsonl --qrels qrels.tsv",
        "--run train.jsonl --corpus corpus.jsonl --qrels qrels.tsv",
    ],
    "encode": ["--model model --pooling cls --input corpus.jsonl --kind passage --num_workers 0"],
    "finetune_biencoder": [
        "--model model --pooling cls --train train.jsonl --corpus corpus.jsonl "
        "--queries queries.tsv --passages_per_query 2 --per_device_batch_size 2",
        "--model model --head sparse --train qrels.tsv --corpus corpus.jsonl "
        "--queries queries.tsv --passages_per_query 1 --dev queries.tsv qrels.tsv run.trec",
    ],
    "pretrain_mae": [
        "--model model --corpus corpus.jsonl --max_length 16 --per_device_batch_size 2",
        "--model model --corpus corpus.jsonl --max_length 16 --objective cocondenser",
    ],
}
WHOLE = "0 -1 1 2 7 3000000000 9223372036854775808 -99999999999999999999 nan inf 1e3 1.5".split()
WHOLE += ["", "\u0661", " 3", "0x10", "9" * 5000]
REAL = "0 -0.0 -1 0.5 1 2 1e-320 1e-30 1e30 1e308 -1e308 nan inf -inf 1,5 1e999".split() + [""]
WORDS = ["", "x", "nowhere/to/be/found", "R@0", "nDCG@-1", "AP", "R@" + "9" * 20]
WORDS += [".", "nothing", "/dev/null", "cls", "n\u00fcll", "*"]
# a large number of these is no mistake, but takes long
SMALL = ["num_workers", "max_steps", "num_epochs", "gradient_accumulation_steps", "probe_every"]


class TooSlow(BaseException):
    """Raised by the alarm: it is no Exception, so that nobody takes it for an error."""


def make_ground(folder: Path) -> None:
    """Tiny data of every kind, a model of one layer, and files that are something else."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    from recipes.train_tokenizer import train

    folder.mkdir()
    draw = np.random.default_rng(0)
    words = "ants bees wasps lava ash snow ice bread".split()
    texts = {f"p{number}": " ".join(draw.choice(words, 9)) for number in range(12)}
    rows = [{"_id": name, "title": "", "text": text} for name, text in texts.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.tsv").write_text("".join(f"q{n}\t{words[n]}\n" for n in range(6)))
    files.write_qrels(
        folder / "qrels.tsv", {f"q{n}": {f"p{n}": 1, f"p{n + 1}": 0} for n in range(6)}
    )
    listed = [(f"q{n}", [f"p{n + 2}", f"p{n}"], [2.0, 1.0]) for n in range(6)]
    files.write_run(folder / "run.trec", listed)
    (folder / "lists.tsv").write_text("".join(f"q{n}\tp{n + 1},p{n + 3}\n" for n in range(6)))
    training = [files.TrainingRow(f"q{n}", [f"p{n}"], [f"p{n + 2}", "p9"]) for n in range(6)]
    files.write_training_file(folder / "train.jsonl", training)
    (folder / "empty").touch()
    (folder / "noise.bin").write_bytes(draw.bytes(300))
    (folder / "cut.gz").write_bytes(gzip.compress(draw.bytes(300))[:-20])
    tokenizer = BertTokenizerFast(vocab=train(lambda: list(texts.values()), 60))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertForMaskedLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    fingerprint = open_texts(folder / "corpus.jsonl").fingerprint
    for kind, ids in (("query", [f"q{n}" for n in range(6)]), ("passage", list(texts))):
        meta = {"model": "m", "model_hash": "1", "dim": 8, "kind": kind, "count": len(ids)}
        meta["input_fingerprint"] = fingerprint
        vectors = draw.random((len(ids), 8), np.float32)
        for head, array in (("dense", vectors), ("sparse", csr_matrix(vectors * (vectors > 0.6)))):
            write_shard(folder / f"{head}_{kind[0]}", 0, array, ids)
            finish_embeddings(folder / f"{head}_{kind[0]}", {**meta, "head": head})
    write_shard(folder / "unfinished", 0, vectors, list(texts))
    vectors[3, 3] = np.nan
    write_shard(folder / "not_finite", 0, vectors, list(texts))
    finish_embeddings(folder / "not_finite", {**meta, "head": "dense"})
    open_bm25(open_texts(folder / "queries.tsv"), folder / "other_index")


def stamps(folder: Path) -> dict:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def wrong_value(draw: random.Random, field: dataclasses.Field, ground: Path) -> list[str]:
    """Words after the flag of a field, which may even have sense."""
    kinds = get_args(field.type) or (field.type,)
    if field.type is bool:
        return []
    if field.name in SMALL:
        return [draw.choice(["0", "-1", "1", "nan", "inf", "x", ""])]
    if int in kinds and get_origin(field.type) is not Literal:
        return [draw.choice(WHOLE)]
    if float in kinds:
        return [draw.choice(REAL)]
    if get_origin(field.type) is Literal:
        return [str(draw.choice([*kinds, "x", "", -1, 7]))]
    pool = [*WORDS, *map(str, ground.iterdir())]
    if get_origin(field.type) in (list, tuple):
        return [draw.choice(pool) for _ in range(draw.randint(0, 3))]
    return [draw.choice(pool)]


def command_line(draw: random.Random, name: str, ground: Path) -> list[str]:
    """A command that works, with one to three flags changed, added, left out or given twice."""
    base = draw.choice(COMMANDS[name]).split()
    base = [str(ground / word) if (ground / word).exists() else word for word in base]
    if name in ("finetune_biencoder", "pretrain_mae"):
        base += QUICK
    flags = {}  # flag -> its words
    for word in [*base, "--output_dir", "out"]:
        if word.startswith("--"):
            flags[word] = []
        else:
            flags[[*flags][-1]].append(word)
    fields = dataclasses.fields(importlib.import_module(name).Args)
    twice = []
    for field in draw.choices(fields, k=draw.randint(1, 3)):
        flag = f"--no_{field.name}" if field.default is True else f"--{field.name}"
        how = draw.random()
        if how < 0.1:
            flags.pop(flag, None)
        elif how < 0.15:
            flag = flag[:-1] if draw.random() < 0.5 else flag + "s"
            flags[flag] = wrong_value(draw, field, ground)
        elif how < 0.25 and flag in flags:
            twice += [flag, *wrong_value(draw, field, ground)]
        else:
            flags[flag] = wrong_value(draw, field, ground)
    return [word for flag, words in flags.items() for word in (flag, *words)] + twice


def problem_of(name: str, words: list[str], ground: Path, seconds: float) -> str | None:
    """Run a command in the current folder, which has no files; what is wrong with what it did."""
    before = stamps(ground)
    out, err = io.StringIO(), io.StringIO()
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.argv = [f"{name}.py", *words]
    status = 0
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            launch.run(importlib.import_module(name).main)
    except SystemExit as stop:
        status = stop.code
    except TooSlow:
        return None
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        torch.use_deterministic_algorithms(False)
    said = err.getvalue()
    line = said[max(said.find(f"{name}.py: "), 0) :].rstrip()  # all from the message on
    if stamps(ground) != before:
        return f"it changed what it was given\n{said}"
    last = [LAST_FILES[name]]
    if name == "evaluate" and "--qrels" not in words:
        last.append("run.trec")
    found = (path for file in last for path in Path().rglob(file))
    finished = [path for path in found if path.parent.name != "best"]
    if status == 0:
        nothing = "--dry_run" in words or "--help" in words or "is complete" in out.getvalue()
        return None if finished or nothing else f"status 0 without its last file\n{said}"
    is_line = re.fullmatch(rf"{name}\.py: .*( — |give ).*", line)
    if status != 1 or not is_line or "Traceback" in said:
        return f"status {status}, and not one line with a remedy:\n{said}"
    if finished:
        return f"a last file after an error\n{said}"
    of_arguments = re.match(rf"{name}\.py: ((argument )?--|unknown|the following)", line)
    if of_arguments and [path for path in Path().rglob("*") if path.is_file()]:
        return f"files after an error of arguments: {sorted(Path().rglob('*'))}\n{said}"
    return None


def fuzz(seed: int, scripts=tuple(LAST_FILES), count: int | None = None, seconds: float = 1e9):
    """Run `count` commands, or as many as `seconds` allow; [(command, problem)] of those with a
    problem, and how many were run."""
    draw, found, number = random.Random(seed), [], 0
    here, argv, handler = os.getcwd(), sys.argv, signal.getsignal(signal.SIGALRM)
    root = Path(tempfile.mkdtemp(prefix="fuzz-commands-"))
    cache, os.environ["ISTHMUS_CACHE"] = os.environ.get("ISTHMUS_CACHE"), str(root / "cache")

    def ring(*_):
        raise TooSlow

    signal.signal(signal.SIGALRM, ring)
    end = time.monotonic() + seconds
    try:
        make_ground(root / "ground")
        while number != count and time.monotonic() < end:
            name = scripts[number % len(scripts)]
            words = command_line(draw, name, root / "ground")
            (root / "work" / "nothing").mkdir(parents=True)
            os.chdir(root / "work")
            problem = problem_of(name, words, root / "ground", 20)
            os.chdir(root)
            shutil.rmtree(root / "work")
            number += 1
            if problem:
                shown = shlex.join(word[:60] for word in words).replace(str(root / "ground"), "G")
                found.append((f"{name}.py {shown}", problem))
    finally:
        os.chdir(here)
        sys.argv = argv
        signal.signal(signal.SIGALRM, handler)
        os.environ.pop("ISTHMUS_CACHE") if cache is None else os.environ.update(ISTHMUS_CACHE=cache)
        shutil.rmtree(root)
    return found, number


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scripts", nargs="+", choices=[*LAST_FILES], default=[*LAST_FILES])
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # a bug may want all memory
    torch.set_num_threads(1)
    found, number = fuzz(args.seed, args.scripts, seconds=args.seconds)
    for command, problem in found:
        print(f"== {command}\n{problem.rstrip()}\n")
    print(f"{number} commands of seed {args.seed}, {len(found)} with a problem")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
