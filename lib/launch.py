"""How every script starts, speaks, stops and goes on: arguments, Accelerator, output folder, log,
resume state."""

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
WITHOUT_EFFECT = (
    "log_every",
    "save_every",
    "num_workers",
    "report_to",
    "probe_every",
    "probe_queries",
    "probe_qrels",
)


def run(main) -> None:
    """Call main(); a UserError becomes one line on stderr and exit status 1."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        main()
        # What main() held is gone by now, DDP's reducer above all. If that were the last to hold
        # the process group, it would wait for a thread of gloo while it has the GIL, which the
        # thread may need: a run that hangs at its end, now and then. A gloo process that just ends
        # may abort in that thread.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        place = Path(sys.argv[0]).name + (f" [process {rank}]" if rank else "")
        bars = list(getattr(tqdm, "_instances", ()))
        for bar in bars:  # the last one drawn may stand lines below the first
            bar.close()
        # the error of a loader worker comes with its traceback in front
        message = str(error).rstrip().rpartition("lib.files.UserError: ")[2]
        print(("\r" if bars else "") + f"{place}: {message}", file=sys.stderr)
        sys.exit(1)


def end_with_parent(_worker: int = 0) -> None:
    """The first act of a worker of a loader or pool: to end as soon as the process it works for has
    ended, by kill -9 too. The watchdog of torch's workers watches another process under forkserver,
    by which Python 3.14 starts them."""
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
        raise UserError(
            f"--report_to {report_to}: not installed — pip install {report_to}, or leave it out"
        )
    plain = DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU
    if accelerator.distributed_type not in plain:
        raise UserError(
            f"{accelerator.distributed_type.value} is not supported — run `accelerate config` and "
            "choose plain data parallelism"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but Accelerate runs "
            f"{accelerator.num_processes} process — on a CPU use "
            "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`"
        )
    on_cpu = accelerator.device.type == "cpu"
    wanted = {accelerator.mixed_precision, os.environ.get("ACCELERATE_MIXED_PRECISION")}
    if on_cpu and "fp16" in wanted:
        raise UserError("fp16 on a CPU would silently be fp32 — use --mixed_precision bf16 or no")
    if on_cpu and accelerator.mixed_precision == "bf16" and not onednn(torch.bfloat16):
        accelerator.print(
            "note: this CPU has no bf16 — --mixed_precision no is several times faster"
        )
    gpus = torch.cuda.device_count()
    if accelerator.num_processes == 1 and gpus > 1:
        print(f"note: one of {gpus} GPUs is used — `accelerate launch --num_processes N` uses more")
    return accelerator


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers, and the commit of this code."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    found["commit"] = git.stdout.strip() or "unknown"
    return found


def claim_output(
    args,
    accelerator,
    last_file: str = "done",
    ignore: tuple[str, ...] = (),
    inputs: dict | None = None,
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

    def claim() -> bool:
        folder = Path(args.output_dir)
        complete = _is_complete(folder, made, last_file, getattr(args, "resume", None))
        if not complete:
            command = [sys.executable, *sys.argv]
            write_json(folder / "args.json", {**made, "versions": versions(), "command": command})
        return complete

    complete = from_main(accelerator, claim)
    if complete:
        accelerator.print(f"{args.output_dir} is complete")
    return complete


def _is_complete(folder: Path, made: dict, last_file: str, resume: bool | None) -> bool:
    """Whether an equal run has completed the folder; otherwise this run may begin or continue it.
    UserError: see claim_output."""
    if folder.is_file():
        raise UserError(f"{folder}: this is a file — choose another --output_dir")
    if not folder.is_dir():
        return False
    unfinished = [p for p in folder.iterdir() if p.name.startswith((".tmp-", ".old-"))]
    others = [p for p in folder.iterdir() if p not in unfinished]
    if others and not (folder / "args.json").is_file():
        raise UserError(
            f"{folder}: it holds something else ({others[0].name}, ...) — choose another "
            "--output_dir or empty it"
        )
    for leftover in unfinished:  # of a killed run
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if {p.name for p in others} <= {"args.json"}:  # a run that stopped before it made anything
        return False
    before = read_json(folder / "args.json")
    for kind, shown in (("arguments", "--{}"), ("inputs", "{}")):
        old, new = before.get(kind, {}), made[kind]
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                raise UserError(
                    f"{folder}: it was made with {shown.format(key)} {old.get(key)}, now "
                    f"{new.get(key)} — choose another --output_dir or remove the folder"
                )
    if (folder / last_file).is_file():
        return True
    if resume is False:
        raise UserError(
            f"{folder}: it holds an unfinished run — add --resume to continue, or remove it"
        )
    return False


def echo(accelerator, heading: str, facts: dict) -> None:
    """The block that is printed before any work: what is about to run."""
    accelerator.print(f"== {heading}")
    for name, value in facts.items():
        accelerator.print(f"   {name:<24} {value}")
    accelerator.print(end="", flush=True)


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
    if claim_output(args, accelerator, ignore=WITHOUT_EFFECT, inputs=inputs):
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
    process only."""

    def __init__(self, accelerator, output_dir, step: int = 0):
        self.accelerator, self.path = accelerator, Path(output_dir) / "log.jsonl"
        if accelerator.is_main_process and self.path.is_file():
            write_lines(self.path, self._lines_up_to(step) if step else [])
        if accelerator.log_with:
            accelerator.init_trackers("isthmus")

    def _lines_up_to(self, step: int) -> list[str]:
        """A resumed run does later steps again; without a state, all of them. The last line may be
        half written, by a run that was killed."""
        kept = []
        for _, line in lines(self.path):
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        return kept

    def write(self, step: int, values: dict, bar=None) -> None:
        """A value may be a list, which the console leaves out and a tracker gets as name/0, name/1,
        ..."""
        numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
        lists = {name: value for name, value in values.items() if isinstance(value, list)}
        flat = {f"{name}/{i}": v for name, some in lists.items() for i, v in enumerate(some)}
        self.accelerator.log(numbers | flat, step=step)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as stream:
                stream.write(json.dumps({"step": step, **values}) + "\n")
            shown = [
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items()
            ]
            (bar.write if bar is not None else print)(f"step {step:>6}  {'  '.join(shown)}")


class Means:
    """Running means between two log lines, over micro-steps and processes, and the time they took.
    Numbers stay on the device until they are taken."""

    def __init__(self):
        self._reset()

    def _reset(self) -> None:
        self.totals, self.count = {}, 0
        self.clock = time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        self.count += 1
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0) + value

    def take(self) -> tuple[dict[str, float], float]:
        """(means, seconds per micro-step) since the last call; on all processes."""
        means = all_gather(torch.stack([*self.totals.values()])[None]).mean(0) / self.count
        seconds = (time.perf_counter() - self.clock) / self.count
        found = dict(zip(self.totals, means.tolist(), strict=True))
        self._reset()
        return found, seconds

    @contextlib.contextmanager
    def paused(self):
        """What happens inside takes no time."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start


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
        raise UserError(
            f"{output_dir}: the run had {state['launched']}, now {_launched(accelerator)} — resume "
            "it as it was"
        )
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
