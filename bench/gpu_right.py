"""The first half of bench/gpu.py: are the numbers of a device those of the CPU?

The scripts run in this process with the same flags on the CPU and on the device. What Accelerate
is given between the backward pass and the optimizer's step is recorded and compared."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.sparse import csr_matrix
from torch import Tensor

from bench.gpu_data import Collection, write_collection, write_model
from bench.gpu_scripts import Recorded, call, environment_of, fp16_from, log_of, recording, words_of
from lib.embeddings import Embeddings, finish_embeddings, write_shard
from lib.objectives import OBJECTIVES
from lib.optim import Lamb

ROOT = Path(__file__).resolve().parents[1]
DEPTH = 10  # of a list
# The greatest relative difference from the CPU in float32: of the loss, of the gradient (the norm
# of the difference by the norm, all weights together), and of the gradient where it goes through
# maxima: rounding may give another position the highest logit.
BOUNDS = {"no": (1e-4, 1e-4, 1e-4), "bf16": (5e-2, 2e-1, 5e-1), "fp16": (5e-3, 3e-2, 2e-1)}
MAXIMA = ("sparse", "cls, MaxP")
PRECISION = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # vectors that differ clearly from text to text
    # what dropout draws depends on the device
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TOY = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
SPARSE = {"head": "sparse"}
# name: flags of finetune_biencoder.py. Each pooling, head and loss is in one of them.
FINETUNING = {
    "cls, InfoNCE": {"pooling": "cls"},
    "mean, projection, unit vectors": {"pooling": "mean", "projection": 32, "normalize": True},
    "last token, triplets": {"pooling": "last_token", "loss": "triplet"},
    "cls, KL": {"pooling": "cls", "kl_weight": 1, "contrastive_weight": 0.2},
    "cls, margin-MSE": {"pooling": "cls", "margin_mse_weight": 1, "contrastive_weight": 0},
    "cls, GradCache": {"pooling": "cls", "chunk_size": 8},
    "cls, MaxP": {"pooling": "cls", "max_chunks": 3, "max_passage_length": 12},
    "cls, DRO": {"pooling": "cls", "loss": "triplet", "dro": True, "dro_rho": 50},
    "sparse, FLOPS": SPARSE | {"flops_passages": 0.01},
    "sparse, without special tokens": SPARSE | {"exclude_special_tokens": True},
    "sparse, GradCache": SPARSE | {"chunk_size": 8},
    "sparse, table of queries": SPARSE | {"query_encoder": "table"},
    "sparse, IDF of queries": SPARSE | {"query_encoder": "idf"},
}
KILLED = """
import os, runpy, signal, sys
from lib import launch
save = launch.save_state
def save_and_die(*args):
    save(*args)
    os.kill(os.getpid(), signal.SIGKILL)
launch.save_state = save_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Check:
    """One line of the table."""

    name: str
    found: str
    bound: str
    right: bool


def failed(name: str, error: Exception) -> Check:
    """What takes the place of a check that stopped with an error."""
    last = str(error).strip().rpartition("\n")[2].replace("|", "/")
    return Check(name, f"{type(error).__name__}: {last}", "no error", False)


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """The norm of the difference by the norm, of all tensors together; a NaN stays one."""
    found, expected = (torch.cat([part.flatten() for part in parts]) for parts in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


class Right:
    """The checks. `folder` takes their files."""

    def __init__(self, folder: Path, device: str, tiny: bool):
        self.folder = folder
        self.device = device
        self.tiny = tiny
        self.precisions = [*BOUNDS]
        self.number = 0
        sizes = SIZES | (TOY if tiny else {})
        words = write_model(folder / "model", 400, **sizes)
        write_model(folder / "dropout", 400, **sizes | {"hidden_dropout_prob": 0.1})
        write_collection(folder / "data", words, Collection(64, 48, 40, 10, vary=True))

    def out(self) -> Path:
        """A new folder."""
        self.number += 1
        return self.folder / f"out{self.number}"

    def pretraining(self, objective: str, **more) -> dict:
        flags = {
            "model": self.folder / "model",
            "corpus": self.folder / "data" / "corpus.jsonl",
            "objective": objective,
            "max_length": 48,
            "per_device_batch_size": 8,
            "max_steps": 6,
            "max_grad_norm": 0,
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "log_every": 1,
            "num_workers": 0,
            "output_dir": self.out(),
        }
        return flags | more

    def finetuning(self, **more) -> dict:
        data = self.folder / "data"
        flags = {
            "model": self.folder / "model",
            "corpus": data / "corpus.jsonl",
            "queries": data / "queries.jsonl",
            "train": data / "train.jsonl",
            "passages_per_query": 4,
            "max_query_length": 16,
            "max_passage_length": 48,
            "per_device_batch_size": 6,
            "max_steps": 6,
            "max_grad_norm": 0,
            "learning_rate": 1e-6,
            "warmup_steps": 0,
            "log_every": 1,
            "num_workers": 0,
            "output_dir": self.out(),
        }
        return flags | more

    def step(self, script: str, flags: dict, device: str, precision: str, steps: int) -> Recorded:
        """`steps` optimizer steps on a device. What is recorded of an fp16 step is not scaled."""
        flags = flags | {"output_dir": self.out()}
        if precision != "fp16":
            with recording(steps) as found:
                call(script, flags, device, precision)
            return found
        with fp16_from(device, 2.0**12), recording(steps) as found:
            call(script, flags, device, "fp16" if device != "cpu" else "no")
        return found

    def compare(self, name: str, script: str, flags: dict, steps: int = 1) -> Iterator[Check]:
        """A training step on the CPU in fp32, and on the device in every precision."""
        expected = self.step(script, flags, "cpu", "no", steps)
        for precision in self.precisions:
            title = f"{name}, {PRECISION[precision]}"
            try:
                found = self.step(script, flags, self.device, precision, steps)
            except Exception as error:
                yield failed(title, error)
                continue
            loss_bound, gradient_bound, bound_of_maxima = BOUNDS[precision]
            if name.startswith(MAXIMA):
                gradient_bound = bound_of_maxima
            loss = max(abs(np.array(found.losses) / np.array(expected.losses) - 1))
            gradient = relative(found.gradients[-1], expected.gradients[-1])
            compared = len(expected.losses) == steps  # GradCache has a surrogate for each chunk
            texts = [f"loss {loss:.1e}"] * compared + [f"gradient {gradient:.1e}"]
            bounds = [f"{loss_bound:.0e}"] * compared + [f"{gradient_bound:.0e}"]
            right = gradient <= gradient_bound and (loss <= loss_bound or not compared)
            yield Check(title, ", ".join(texts), ", ".join(bounds), bool(right))

    def objectives(self) -> Iterator[Check]:
        for objective in OBJECTIVES:
            yield from self.compare(objective, "pretrain_mae", self.pretraining(objective))
        flags = self.pretraining("cocondenser", chunk_size=3)
        yield from self.compare("cocondenser, GradCache", "pretrain_mae", flags)

    def heads_and_losses(self) -> Iterator[Check]:
        for name, flags in FINETUNING.items():
            # the weights of groups count from the second step on
            steps = 2 if "dro" in flags else 1
            flags = self.finetuning(**flags)
            yield from self.compare(name, "finetune_biencoder", flags, steps)
        same = self.step("finetune_biencoder", self.finetuning(pooling="cls"), self.device, "no", 1)
        flags = self.finetuning(**FINETUNING["cls, GradCache"])
        chunked = self.step("finetune_biencoder", flags, self.device, "no", 1)
        error = relative(chunked.gradients[0], same.gradients[0])
        yield Check("GradCache against the plain step", f"{error:.1e}", "1e-04", error <= 1e-4)

    def lamb(self) -> Iterator[Check]:
        """Some steps of LAMB with given gradients."""
        found = {}
        for device in ("cpu", self.device):
            draw = torch.Generator().manual_seed(0)
            shapes = ((30, 20), (20,), (5, 5, 2))
            params = [torch.randn(*shape, generator=draw).to(device) for shape in shapes]
            optimizer = Lamb(params, lr=0.02, weight_decay=0.01)
            for _ in range(10):
                for p in params:
                    p.grad = torch.randn(*p.shape, generator=draw).to(device)
                optimizer.step()
            found[device] = [p.cpu() for p in params]
        error = relative(found[self.device], found["cpu"])
        yield Check("LAMB, weights after ten steps", f"{error:.1e}", "1e-04", error <= 1e-4)

    def overflow(self) -> Iterator[Check]:
        """Training in fp16 that begins with a loss scale too large for it."""
        scripts = {
            "pretrain_mae": self.pretraining("retromae"),
            "finetune_biencoder": self.finetuning(**FINETUNING["sparse, GradCache"]),
        }
        for script, flags in scripts.items():
            with fp16_from(self.device, 2.0**40) as made:
                call(script, flags, self.device, "fp16" if self.device != "cpu" else "no")
            norms = [line["grad_norm"] for line in log_of(flags["output_dir"])]
            weights = load_file(flags["output_dir"] / "model.safetensors").values()
            scale = made.accelerator.scaler.get_scale()
            skipped = sum(not np.isfinite(norm) for norm in norms)
            right = skipped == 1 and scale == 2.0**10
            right &= all(bool(weight.isfinite().all()) for weight in weights)
            text = f"{skipped} of {len(norms)} steps skipped, scale {scale:.0f}"
            bound = "one, 1024; finite weights"
            yield Check(f"{script}.py with an overflow of fp16", text, bound, bool(right))

    def encoding(self) -> Iterator[Check]:
        """Shards of encode.py, in fp32 and in fp16."""
        heads = {"dense": {"pooling": "mean", "normalize": True}, "sparse": SPARSE}
        for head, more in heads.items():
            flags = {"model": self.folder / "model", "kind": "passage", "num_workers": 0} | more
            flags |= {"input": self.folder / "data" / "corpus.jsonl", "max_length": 48}
            vectors = {}
            for device, precision in (("cpu", "no"), (self.device, "no"), (self.device, "fp16")):
                if precision == "fp16" and device == "cpu":
                    continue
                out = self.out()
                call("encode", flags | {"output_dir": out}, device, precision)
                rows = Embeddings(out).take(np.arange(64))
                dense = rows if head == "dense" else rows.toarray()
                vectors[device != "cpu", precision] = dense
            expected = vectors.pop((False, "no"))
            for (_, precision), rows in (vectors or {(False, "no"): expected}).items():
                # two units in the last place of the largest number in fp16
                bound = 2**-9 * abs(expected).max() * (4 if precision == "fp16" else 1)
                error = abs(rows - expected).max()
                name = f"encode.py, {head}, {PRECISION[precision]}"
                yield Check(name, f"{error:.1e}", f"{bound:.1e}", bool(error <= bound))

    def searching(self) -> Iterator[Check]:
        """Lists of evaluate.py, of vectors of small whole numbers, so that many scores are equal
        and none is rounded; and of BM25."""
        data = self.folder / "data"
        draw = np.random.default_rng(0)
        vectors = {}
        for kind, letter, count in (("query", "q", 48), ("passage", "p", 64)):
            rows = draw.integers(-2, 3, (count, 16)).astype(np.float16)
            vectors[kind] = rows
            ids = [f"{letter}{number}" for number in range(count)]
            facts = {"model_hash": "none", "kind": kind, "count": count, "dim": 16}
            positive = csr_matrix(abs(rows).astype(np.float32))
            for head, array in (("dense", rows), ("sparse", positive)):
                write_shard(self.folder / head / kind, 0, array, ids)
                finish_embeddings(self.folder / head / kind, facts | {"head": head})
        texts = {"bm25": True, "queries": data / "queries.jsonl", "corpus": data / "corpus.jsonl"}
        for name in ("dense", "sparse", "BM25"):
            pair = [f"{self.folder}/{name}/{kind}" for kind in vectors]
            source = dict(zip(("queries_embeddings", "corpus_embeddings"), pair, strict=True))
            source = texts if name == "BM25" else source
            found = self.run_of(source, self.device)
            right = bool(found) and found == self.run_of(source, "cpu")
            yield self.same(f"search, {name}, run.trec", right, "the same bytes")
            if name == "dense":
                scores = [float(line.split()[4]) for line in found.splitlines()]
                exact = -np.sort(-(vectors["query"] @ vectors["passage"].T), axis=1)[:, :DEPTH]
                right = scores == exact.ravel().tolist()
                yield self.same("search, dense, scores by rank", right, "numpy's")

    @staticmethod
    def same(name: str, right: bool, expected: str) -> Check:
        return Check(name, "the same" if right else "not the same", expected, right)

    def run_of(self, source: dict, device: str) -> str:
        """The run.trec of evaluate.py."""
        more = {"qrels": self.folder / "data" / "qrels.tsv", "depth": DEPTH, "metrics": "RR@10"}
        flags = source | more | {"output_dir": self.out()}
        call("evaluate", flags, device)
        return (flags["output_dir"] / "run.trec").read_text()

    def start(self, script: str, flags: dict, killed: bool) -> subprocess.Popen:
        """A script in a process of its own; `killed`: by kill -9, when it has saved a state."""
        code = ["-c", KILLED] if killed else []
        command = [sys.executable, *code, str(ROOT / f"{script}.py"), *words_of(flags)]
        precision = "fp16" if self.device != "cpu" else "no"
        environment = os.environ | environment_of(self.device, precision)
        environment["PYTHONPATH"] = str(ROOT)
        log = open(flags["output_dir"].with_suffix(".txt"), "a")
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def start_killed(self) -> list[tuple[str, dict, subprocess.Popen]]:
        """Runs that are killed in their third step, for `resumed`."""
        same = {"model": self.folder / "dropout", "save_every": 3, "deterministic": True}
        runs = {"pretrain_mae": self.pretraining("retromae", **same)}
        if not self.tiny:
            runs["finetune_biencoder"] = self.finetuning(**same, pooling="cls")
        return [(script, flags, self.start(script, flags, True)) for script, flags in runs.items()]

    def resumed(self, killed: list[tuple[str, dict, subprocess.Popen]]) -> Iterator[Check]:
        """Runs after kill -9 and --resume have the files of runs that were left alone."""
        for script, flags, process in killed:
            out, whole = flags["output_dir"], self.out()
            if process.wait(300) != -signal.SIGKILL:
                raise RuntimeError(out.with_suffix(".txt").read_text())
            self.finish(script, [flags | {"resume": True}, flags | {"output_dir": whole}])
            names = [path.name for path in whole.glob("*.safetensors")]
            same = [(out / name).read_bytes() == (whole / name).read_bytes() for name in names]
            text = f"{sum(same)} of {len(same)} files are the same"
            right = all(same) and bool(same)
            yield Check(f"{script}.py, kill -9 and --resume", text, "the same bytes", right)

    def finish(self, script: str, runs: list[dict]) -> None:
        """Run a script to its end with each of these flags, side by side; at toy sizes in this
        process. RuntimeError: it failed."""
        if self.tiny:
            for flags in runs:
                call(script, flags, self.device)
            return torch.use_deterministic_algorithms(False)
        processes = [self.start(script, flags, killed=False) for flags in runs]
        for flags, process in zip(runs, processes, strict=True):
            if process.wait(300):
                raise RuntimeError(flags["output_dir"].with_suffix(".txt").read_text())

    def checks(self) -> Iterator[Check]:
        """All of them, as they are done. What stops with an error is wrong; the rest goes on."""
        killed = self.start_killed()
        parts = [self.objectives, self.heads_and_losses, self.lamb, self.overflow, self.encoding]
        for part in (*parts, self.searching, partial(self.resumed, killed)):
            try:
                yield from part()
            except Exception as error:
                yield failed(getattr(part, "__name__", "resumed"), error)
