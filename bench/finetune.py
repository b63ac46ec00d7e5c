"""Speed and memory of a fine-tuning step: finetune_biencoder.py against the trainer of
sentence-transformers.

    python -m bench.finetune --model DIR --corpus FILE --queries FILE --qrels FILE \\
        [--train FILE] [--sparse]

Both train on the same queries, positives and negatives (drawn from the corpus at random if no file
is given): real texts and lengths, InfoNCE over the passages of the batch (theirs:
MultipleNegativesRankingLoss), unit vectors, temperature 0.05, fused AdamW, clipping, no loader
processes. Each run is a process of its own, in turns. Printed: the median time of a step without
the first two, data loading included, and the peak of resident memory, also less what the imports
alone take. --sparse: of a SparseEncoder folder, theirs by SparseEncoderTrainer with SpladeLoss over
SparseMultipleNegativesRankingLoss, temperature 1, both with the same weights of FLOPS. On two CPU
cores a step takes half a minute: lower --batch or --group to be done sooner.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib.files import TrainingRow, read_qrels, read_training_file, write_json, write_training_file
from lib.texts import open_texts

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = {
    "ours": "import finetune_biencoder",
    "theirs": "import datasets; "
    "from sentence_transformers import SentenceTransformerTrainer, SparseEncoderTrainer",
}
DENSE = "--normalize --temperature 0.05"
SPARSE = "--head sparse --flops_passages 0.002 --flops_queries 0.0015 --flops_warmup_steps 0"


def peak_of(*command) -> float:
    """Peak resident MB of a Python process, which must succeed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=output, stderr=output, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        if status:
            sys.exit(f"{' '.join(map(str, command))}\n{output.read()}")
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def prepare(args, folder: Path) -> None:
    """One epoch of groups: our files, and the same texts as columns for the peer."""
    corpus, queries, draw = open_texts(args.corpus), open_texts(args.queries), random.Random(0)
    positive = {qid: max(grades, key=grades.get) for qid, grades in read_qrels(args.qrels).items()}
    rows = read_training_file(args.train) if args.train else ()
    listed = {row.qid: row.neg for _, row in rows}
    groups = {}
    for qid in draw.sample(sorted(positive), len(positive)):
        pool = (
            listed.get(qid, [])
            if listed
            else corpus.ids(draw.sample(range(len(corpus)), 2 * args.group))
        )
        keys = dict(zip(pool, corpus.text_keys[corpus.rows(pool)], strict=True))
        pool = [
            pid for pid in pool if keys[pid] != corpus.text_keys[corpus.rows([positive[qid]])[0]]
        ]
        if len(pool) >= args.group - 1 and len(groups) < args.steps * args.batch:
            groups[qid] = [positive[qid], *draw.sample(pool, args.group - 1)]
    if len(groups) < args.steps * args.batch:
        sys.exit(f"only {len(groups)} queries with {args.group - 1} negatives — lower --steps")
    rows = (TrainingRow(qid, pids[:1], pids[1:]) for qid, pids in groups.items())
    write_training_file(folder / "train.jsonl", rows)
    texts = [queries[row][1] for row in queries.rows(groups)]
    columns = {"query": texts}
    for number in range(args.group):
        rows = [corpus[row] for row in corpus.rows([pids[number] for pids in groups.values()])]
        columns[f"passage{number}"] = [" ".join([*titles, text]) for titles, text in rows]
    write_json(folder / "columns.json", columns)


def train(args, folder: Path, *flags: str) -> tuple[list[float], float]:
    """(seconds of each step, peak MB) of finetune_biencoder.py on what `prepare` wrote."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = f"""--model {args.model} --corpus {args.corpus} --queries {args.queries}
        --train {folder}/train.jsonl
        --passages_per_query {args.group} --per_device_batch_size {args.batch}
        --max_steps {args.steps} --max_passage_length {args.max_length} --learning_rate 2e-5
        --num_workers 0 --log_every 1 --output_dir {folder}/out"""
    peak = peak_of(ROOT / "finetune_biencoder.py", *command.split(), *flags)
    log = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    return [args.batch / line["queries/s"] for line in log], peak


def ours(args, folder: Path) -> tuple[list[float], float]:
    """(seconds of each step, peak MB)"""
    kind = SPARSE if args.sparse else DENSE
    sizes = f"--max_query_length {args.max_length} --chunk_size {args.chunk_size}"
    return train(args, folder, *sizes.split(), *kind.split())


def theirs(args, folder: Path) -> tuple[list[float], float]:
    """(seconds of each step, peak MB)"""
    shape = ["--steps", args.steps, "--batch", args.batch, "--max_length", args.max_length]
    peak = peak_of(
        __file__, "--peer", folder, "--model", args.model, *shape, *["--sparse"] * args.sparse
    )
    return json.loads((folder / "theirs.json").read_text()), peak


def run_peer(args, folder: Path) -> None:
    """In the child process: their trainer on the columns."""
    import sentence_transformers as st
    from datasets import Dataset
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sparse_encoder.losses import (
        SparseMultipleNegativesRankingLoss,
        SpladeLoss,
    )
    from transformers import TrainerCallback

    ends = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            ends.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    model = (st.SparseEncoder if args.sparse else st.SentenceTransformer)(args.model, device="cpu")
    model.max_seq_length = args.max_length
    data = Dataset.from_dict(json.loads((folder / "columns.json").read_text()))
    settings = {
        "output_dir": folder / "scratch",
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
    }
    settings |= {
        "learning_rate": 2e-5,
        "weight_decay": 0.01,
        "optim": "adamw_torch_fused",
        "use_cpu": True,
    }
    settings |= {
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if args.sparse:
        settings = st.SparseEncoderTrainingArguments(**settings)
        weights = {"document_regularizer_weight": 0.002, "query_regularizer_weight": 0.0015}
        loss = SpladeLoss(model, SparseMultipleNegativesRankingLoss(model), **weights)
        trainer = st.SparseEncoderTrainer
    else:
        settings = st.SentenceTransformerTrainingArguments(**settings)
        loss, trainer = (
            MultipleNegativesRankingLoss(model, scale=20.0),
            st.SentenceTransformerTrainer,
        )
    trainer(model, settings, train_dataset=data, loss=loss, callbacks=[Clock()]).train()
    seconds = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    (folder / "theirs.json").write_text(json.dumps(seconds))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "corpus", "queries", "qrels", "train", "peer"):
        parser.add_argument(f"--{name}")
    for name, default in {
        "batch": 16,
        "group": 8,
        "max_length": 256,
        "steps": 8,
        "rounds": 3,
        "chunk_size": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sparse", action="store_true", help="--model is a SparseEncoder folder")
    args = parser.parse_args()
    if args.peer:
        return run_peer(args, Path(args.peer))
    baseline = {name: peak_of("-c", imports) for name, imports in IMPORTS.items()}
    seconds, peaks = {"ours": [], "theirs": []}, {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, Path(folder))
        for _ in range(args.rounds):
            for name, runner in (("ours", ours), ("theirs", theirs)):
                times, peak = runner(args, Path(folder))
                seconds[name] += times[2:]
                peaks[name].append(peak)
    step, peak = ({k: statistics.median(v) for k, v in found.items()} for found in (seconds, peaks))
    print(
        f"{args.batch} queries x {args.group} passages, "
        f"{args.rounds} rounds of {args.steps} steps, median"
    )
    for name in ("ours", "theirs"):
        alone = peak[name] - baseline[name]
        print(
            f"{name:<7} {step[name]:.3f} s/step, peak {peak[name]:.0f} MB, "
            f"{alone:.0f} MB without the imports"
        )
    without = (peak["ours"] - baseline["ours"]) / (peak["theirs"] - baseline["theirs"])
    ratio = peak["ours"] / peak["theirs"]
    print(
        f"speed {step['theirs'] / step['ours']:.2f}x   "
        f"peak memory {ratio:.2f}x, {without:.2f}x without imports"
    )


if __name__ == "__main__":
    main()
