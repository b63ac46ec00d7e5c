"""How every script starts, speaks, stops and goes on: Accelerator, output folder, log, resume
state."""

import contextlib
import functools
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import wait
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor
from tqdm import tqdm

from lib.cpu import onednn
from lib.dist import all_gather, from_main
from lib.files import UserError, lines, read_json, write_json, write_lines

PACKAGES = "torch transformers tokenizers accelerate datasets faiss-cpu faiss-gpu numpy".split()
# arguments of training scripts that do not change their result
WITHOUT_EFFECT = "log_every save_every num_workers report_to probe_every probe_queries probe_qrels"


def run(main) -> None:
    """Call main(); a UserError becomes one line on stderr and exit status 1."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        main()
        # Only now, when DDP's reducer is gone with main's variables: if that were the last to hold
        # the group, it would wait with the GIL for a thread of gloo that may need the GIL, and the
        # run would hang at its end. A gloo process that just ends may abort in that thread.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        place = Path(sys.argv[0]).name + (f" [process {rank}]" if rank else "")
        bars = list(getattr(tqdm, "_instances", ()))
        for bar in bars:  # the last one drawn may stand lines below the first
            bar.close()
        # the error of a loader worker comes with its traceback in front
        message = str(error).rstrip().rpartition("lib.lines.UserError: ")[2]
        print(("\r" if bars else "") + f"{place}: {message}", file=sys.stderr)
        sys.exit(1)


def end_with_parent(_worker: int = 0) -> None:
    """Make a worker of a loader or pool end as soon as its parent process has ended, by kill -9
    too. (Torch's own watchdog watches another process under forkserver, Python 3.14's default.)"""
    died = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([died]), os._exit(1)), daemon=True).start()


def make_accelerator(
    gradient_accumulation_steps: int = 1,
    report_to: str = "none",
    output_dir=None,
    deterministic: bool = False,
) -> Accelerator:
    """The Accelerator. UserError for what would silently be something else: FSDP, DeepSpeed, fp16
    on a CPU, processes that do not see each other, a tracker that is not installed."""
    if deterministic:  # bit-identity on CUDA; the variable must be set before CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=None if report_to == "none" else report_to,
        project_dir=output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[ddp],
    )
    if report_to != "none" and not accelerator.log_with:  # Accelerate warns and goes on
        raise UserError(f"--report_to {report_to}: not installed — pip install {report_to}")
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        wrong = f"{kind.value} is not supported"
        raise UserError(f"{wrong} — choose plain data parallelism in `accelerate config`")
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if asked != accelerator.num_processes:
        wrong = f"WORLD_SIZE is {asked} but Accelerate runs {accelerator.num_processes} process"
        command = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        raise UserError(f"{wrong} — on a CPU use `{command}`")
    if accelerator.device.type == "cpu":
        precision = accelerator.mixed_precision
        if "fp16" in (precision, os.environ.get("ACCELERATE_MIXED_PRECISION")):
            raise UserError("fp16 on a CPU would be fp32 — use --mixed_precision bf16 or no")
        if precision == "bf16" and not onednn(torch.bfloat16):
            accelerator.print("note: this CPU has no bf16 — --mixed_precision no is faster")
    return accelerator


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers, and the commit of this code."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    git = subprocess.run(
        "git describe --always --dirty", shell=True, cwd=Path(__file__).parent, capture_output=True
    )
    found["commit"] = git.stdout.decode().strip() or "unknown"
    return found


def claim_output(
    args, accelerator, last_file: str = "done", ignore=(), inputs: dict | None = None
) -> bool:
    """Make args.output_dir the folder of this run; True if an equal run has already completed it.

    A folder is complete when `last_file` exists. A script with --resume goes on with an unfinished
    folder only by that flag, others by the same command.

    ignore   arguments that do not change the result
    inputs   fingerprints of what the run reads; other inputs make another run
    UserError: the folder holds anything else, or a run with other arguments or inputs."""
    skipped = {"output_dir", "resume", "dry_run", *ignore}
    arguments = {name: value for name, value in asdict(args).items() if name not in skipped}
    made = json.loads(json.dumps({"arguments": arguments, "inputs": inputs or {}}))
    folder = Path(args.output_dir)
    resume = getattr(args, "resume", True)
    complete = from_main(accelerator, lambda: _claim(folder, made, last_file, resume))
    if complete:
        accelerator.print(f"{folder} is complete")
    return complete


def _claim(folder: Path, made: dict, last_file: str, resume: bool) -> bool:
    if folder.is_file():
        raise UserError(f"{folder}: this is a file — choose another --output_dir")
    leftovers = [*folder.glob(".tmp-*"), *folder.glob(".old-*")]  # of a killed run
    names = {path.name for path in folder.glob("*") if path not in leftovers}
    if names and "args.json" not in names:
        wrong = f"{folder}: it holds something else ({min(names)}, ...)"
        raise UserError(f"{wrong} — choose another --output_dir or empty it")
    for leftover in leftovers:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if names - {"args.json"}:  # without others, the run before stopped before it made anything
        before = read_json(folder / "args.json")
        for kind, flag in (("arguments", "--"), ("inputs", "")):
            old, new = before.get(kind, {}), made[kind]
            for key in sorted({*old, *new}):
                if old.get(key) != new.get(key):
                    wrong = f"{folder}: it was made with {flag}{key} {old.get(key)}"
                    remedy = "choose another --output_dir or remove the folder"
                    raise UserError(f"{wrong}, now {new.get(key)} — {remedy}")
        if (folder / last_file).is_file():
            return True
        if not resume:
            wrong = f"{folder}: it holds an unfinished run"
            raise UserError(f"{wrong} — add --resume to continue, or remove it")
    command = [sys.executable, *sys.argv]
    write_json(folder / "args.json", {**made, "versions": versions(), "command": command})
    return False


def echo(accelerator, heading: str, facts: dict) -> None:
    """The block that is printed before any work: what is about to run."""
    rows = (f"   {name:<24} {value}" for name, value in facts.items())
    accelerator.print(f"== {heading}", *rows, sep="\n", flush=True)


def begin(accelerator, args, heading: str, facts: dict, preview: Callable[[], dict]) -> bool:
    """The last thing before a training run: claim its folder and print the facts. False if the
    folder is complete, or if this is a dry run, which shows preview() too. facts may have "inputs",
    see claim_output; they are not printed."""
    inputs = facts.get("inputs", {})
    facts = {name: value for name, value in facts.items() if name != "inputs"}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions().items())
    if args.dry_run:
        echo(accelerator, f"dry run: {heading}", facts | preview())
        return False
    if claim_output(args, accelerator, ignore=WITHOUT_EFFECT.split(), inputs=inputs):
        return False
    echo(accelerator, heading, facts)
    return True


def describe(accelerator) -> str:
    """Device, processes and precision really in use."""
    device = f"{accelerator.device.type}, {torch.get_num_threads()} threads"
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name()
    precision = accelerator.mixed_precision.replace("no", "fp32")
    return f"{accelerator.num_processes} process(es) on {device}, precision {precision}"


class RunLog:
    """One line per logged step, the same on the console, in log.jsonl and in the tracker; main
    process only. A run that goes on from `step` does later steps again, so their lines go."""

    def __init__(self, accelerator, output_dir, step: int = 0):
        self.accelerator, self.path = accelerator, Path(output_dir) / "log.jsonl"
        if accelerator.is_main_process and self.path.is_file():
            kept = []
            for _, line in lines(self.path):
                with contextlib.suppress(json.JSONDecodeError):  # a killed run wrote half a line
                    if step and json.loads(line)["step"] <= step:
                        kept.append(line)
            write_lines(self.path, kept)
        if accelerator.log_with:
            accelerator.init_trackers("isthmus")

    def write(self, step: int, values: dict, bar=None) -> None:
        """A value may be a list, which the console leaves out and a tracker gets as name/0, name/1,
        ..."""
        numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
        parts = {
            f"{name}/{i}": part
            for name in values.keys() - numbers.keys()
            for i, part in enumerate(values[name])
        }
        self.accelerator.log(numbers | parts, step=step)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as stream:
                stream.write(json.dumps({"step": step, **values}) + "\n")
            texts = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in numbers.items()}
            shown = (f"{name} {text}" for name, text in texts.items())
            (bar.write if bar is not None else print)(f"step {step:>6}  {'  '.join(shown)}")


class Means:
    """Running means between two log lines, over micro-steps and processes, and the time they took.
    Numbers stay on the device until they are taken."""

    def __init__(self):
        self.totals, self.count, self.start = {}, 0, time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        self.count += 1
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0) + value

    def take(self) -> tuple[dict[str, float], float]:
        """(means, seconds per micro-step) since the last call; on all processes."""
        means = all_gather(torch.stack([*self.totals.values()])[None]).mean(0) / self.count
        seconds = (time.perf_counter() - self.start) / self.count
        found = dict(zip(self.totals, means.tolist(), strict=True))
        self.totals, self.count, self.start = {}, 0, time.perf_counter()
        return found, seconds

    @contextlib.contextmanager
    def paused(self):
        """What happens inside takes no time."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start


def save_state(output_dir, step: int, accelerator, model, optimizer, extra: dict) -> None:
    """state/state.pt: all a resume needs. No generator state: every random choice is a function of
    (seed, step). Atomic, main process only."""
    if accelerator.is_main_process:
        folder = Path(output_dir) / "state"
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": step,
            "model": accelerator.unwrap_model(model).state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
            "extra": extra,
            "launched": _launched(accelerator),
        }
        torch.save(state, folder / ".tmp-state.pt")
        os.replace(folder / ".tmp-state.pt", folder / "state.pt")
    accelerator.wait_for_everyone()


def load_state(output_dir, accelerator, model, optimizer) -> tuple[int, dict]:
    """(step, extra) of the last save_state, put into model, optimizer and scaler; (0, {}) if there
    is none yet. UserError: the run had other processes or another precision."""
    path = Path(output_dir) / "state" / "state.pt"
    if not path.is_file():
        return 0, {}
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["launched"] != _launched(accelerator):
        wrong = f"{output_dir}: the run had {state['launched']}, now {_launched(accelerator)}"
        raise UserError(f"{wrong} — resume it as it was")
    accelerator.unwrap_model(model).load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state["step"], state["extra"]


def finish(accelerator, output_dir) -> None:
    """The last thing of a training run: `done`, trackers closed. (Not end_training(), which would
    destroy the process group under the model: see run.)"""
    if accelerator.is_main_process:
        write_lines(Path(output_dir) / "done", [])
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()


def _launched(accelerator) -> str:
    return f"{accelerator.num_processes} process(es), precision {accelerator.mixed_precision}"
