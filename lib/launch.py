"""How every script starts, speaks, stops and goes on: arguments, Accelerator, output folder, log, resume state."""

import argparse
import contextlib
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
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from lib.cpu import onednn
from lib.dist import all_gather
from lib.files import UserError, lines, read_json, write_json, write_lines

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "faiss-cpu",
    "faiss-gpu",
    "numpy",
)


class _Parser(transformers.HfArgumentParser):
    def error(self, message):
        raise UserError(f"{message} — see --help")


COUNTS = (
    "per_device_batch_size",
    "gradient_accumulation_steps",
    "log_every",
    "save_every",
    "refresh_every",
)


def parse_args(cls):
    """The dataclass of a script's arguments from the command line. Unknown and abbreviated flags are errors, and so is
    less than 1 for COUNTS; --help shows the script's docstring."""
    script = sys.modules["__main__"]
    parser = _Parser(
        cls,
        description=script.__doc__,
        allow_abbrev=False,
        formatter_class=lambda prog: _Help(prog, max_help_position=36, width=140),
    )
    args, unknown = parser.parse_args_into_dataclasses(
        return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise UserError(f"unknown argument {unknown[0]} — see --help")
    for name in COUNTS:
        if getattr(args, name, 1) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: counts from 1 — give a larger number")
    return args


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def run(main) -> None:
    """Call main(); a UserError becomes one line on stderr and exit status 1."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        main()
        # What main() held is gone by now, DDP's reducer above all. Were that the last to hold the process group, it
        # would wait for gloo's thread while it has the GIL, which the thread may need to drop its last tensor: a run
        # that hangs at its end, now and then. A gloo process that just ends may abort in that thread
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        place = Path(sys.argv[0]).name + (f" [process {rank}]" if rank else "")
        bars = list(getattr(tqdm, "_instances", ()))
        for bar in bars:  # the last one drawn may stand lines below the first
            bar.close()
        message = (
            str(error).rstrip().rpartition("lib.files.UserError: ")[2]
        )  # a loader worker's has its traceback
        print(
            ("\r" if bars else "") + f"{place}: {message}", file=sys.stderr
        )  # on a line of its own
        sys.exit(1)


def end_with_parent(_worker: int = 0) -> None:
    """The first act of a loader's or pool's worker: to end as soon as the process it works for has, by kill -9 too.
    torch's workers watch their parent: another process under forkserver, by which Python 3.14 starts them, and already
    another one if the kill came right after the fork. Those of an executor watch nothing."""
    died = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([died]), os._exit(1)), daemon=True).start()


def make_accelerator(
    gradient_accumulation_steps: int = 1,
    report_to: str = "none",
    output_dir=None,
    deterministic: bool = False,
) -> Accelerator:
    """The Accelerator, after refusing what would be silently something else: FSDP, DeepSpeed, fp16 on a CPU, processes
    that do not see each other, a tracker that is not there."""
    if (
        deterministic
    ):  # bit-identity on CUDA; the workspace setting must be there before CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=None if report_to == "none" else report_to,
        project_dir=output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )
    if report_to != "none" and not accelerator.log_with:  # Accelerate warns and goes on
        raise UserError(
            f"--report_to {report_to}: not installed — pip install {report_to}, or leave it out"
        )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_GPU,
        DistributedType.MULTI_CPU,
    ):
        raise UserError(
            f"{accelerator.distributed_type.value} is not supported — run `accelerate config` and choose plain "
            "data parallelism"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but Accelerate runs {accelerator.num_processes} process — "
            "on a CPU use `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`"
        )
    if accelerator.device.type == "cpu" and "fp16" in (
        accelerator.mixed_precision,
        os.environ.get("ACCELERATE_MIXED_PRECISION"),
    ):
        raise UserError("fp16 on a CPU would silently be fp32 — use --mixed_precision bf16 or no")
    if (
        accelerator.device.type == "cpu"
        and accelerator.mixed_precision == "bf16"
        and not onednn(torch.bfloat16)
    ):
        accelerator.print(
            "note: this CPU has no bf16 — --mixed_precision no is several times faster", flush=True
        )
    if accelerator.num_processes == 1 and torch.cuda.device_count() > 1:
        print(
            f"note: one of {torch.cuda.device_count()} GPUs is used — `accelerate launch --num_processes N` uses more",
            flush=True,
        )
    return accelerator


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
    args, accelerator, last_file: str = "done", resume: bool | None = None, ignore: tuple = ()
) -> bool:
    """Make args.output_dir this run's own; True if an equal run has already completed it.

    A folder is complete when `last_file` exists. `resume`: None for stages that go on by the same command, else the
    --resume flag.
    `ignore`: arguments that do not change the result. A folder that holds anything else, or a run with other
    arguments, is refused."""
    folder, verdict = Path(args.output_dir), [None, False]
    arguments = {
        k: v
        for k, v in json.loads(json.dumps(asdict(args))).items()
        if k not in ("output_dir", "resume", *ignore)
    }
    if accelerator.is_main_process:
        verdict = [*_claim(folder, arguments, last_file, resume)]
        if not any(verdict):
            write_json(
                folder / "args.json",
                {
                    "arguments": arguments,
                    "versions": versions(),
                    "command": [sys.executable, *sys.argv],
                },
            )
    broadcast_object_list(verdict)
    if verdict[0]:
        raise UserError(verdict[0])
    return verdict[1]


def _claim(
    folder: Path, arguments: dict, last_file: str, resume: bool | None
) -> tuple[str | None, bool]:
    if folder.is_file():
        return f"{folder}: is a file — choose another --output_dir", False
    if not folder.is_dir() or not any(folder.iterdir()):
        return None, False
    if not (folder / "args.json").is_file():
        leftovers = [p for p in folder.iterdir() if not p.name.startswith((".tmp-", ".old-"))]
        if not leftovers:
            return None, False
        return (
            f"{folder}: holds something else ({leftovers[0].name}, ...) — choose another --output_dir or empty it",
            False,
        )
    for leftover in [*folder.glob(".tmp-*"), *folder.glob(".old-*")]:  # of a killed run
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if [p.name for p in folder.iterdir()] == [
        "args.json"
    ]:  # a run that stopped before it had made anything
        return None, False
    before = read_json(folder / "args.json")["arguments"]
    for key in sorted({*before, *arguments}):
        if before.get(key) != arguments.get(key):
            return (
                f"{folder}: made with --{key} {before.get(key)}, now {arguments.get(key)} — choose another "
                "--output_dir or remove the folder"
            ), False
    if (folder / last_file).is_file():
        return None, True
    if resume is False:
        return (
            f"{folder}: holds an unfinished run — add --resume to go on, or remove the folder",
            False,
        )
    return None, False


def echo(accelerator, heading: str, facts: dict) -> None:
    """The block printed before any work: what is about to run, in the user's words."""
    accelerator.print(f"== {heading}")
    for name, value in facts.items():
        accelerator.print(f"   {name:<24} {value}")
    accelerator.print(end="", flush=True)


def begin(
    accelerator,
    args,
    heading: str,
    facts: dict,
    preview: Callable,
    numbers: int,
    ignore: tuple = (),
) -> bool:
    """The last thing before a training run: claim its folder and echo the facts. False if it is complete, or if this
    is a dry run, which shows preview() too.

    numbers: how many, in fp32, the run will leave on disk   ignore: arguments that do not change the result, beside
    those that every training script has"""
    facts = {
        **facts,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    if args.dry_run:
        echo(
            accelerator,
            f"dry run: {heading}",
            {**facts, **preview(), "disk": f"{numbers * 4 / 1e9:.2f} GB"},
        )
        return False
    ignore = "log_every", "save_every", "num_workers", "report_to", *ignore
    if claim_output(args, accelerator, resume=args.resume, ignore=ignore):
        accelerator.print(f"{args.output_dir} is complete")
        return False
    echo(accelerator, heading, facts)
    return True


def describe(accelerator) -> str:
    """Device, processes and precision really in use."""
    device = (
        torch.cuda.get_device_name()
        if accelerator.device.type == "cuda"
        else f"{accelerator.device.type}, {torch.get_num_threads()} threads"
    )
    precision = accelerator.mixed_precision.replace("no", "fp32")
    return f"{accelerator.num_processes} process(es) on {device}, precision {precision}"


def loss_scale(accelerator) -> float:
    """What accelerator.backward multiplies a loss by."""
    scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
    return scale / accelerator.gradient_accumulation_steps


class RunLog:
    """One line per logged step, the same on the console, in log.jsonl and in the tracker; main process only."""

    def __init__(self, accelerator, output_dir, step: int = 0):
        self.accelerator, self.path = accelerator, Path(output_dir) / "log.jsonl"
        if (
            accelerator.is_main_process and self.path.is_file()
        ):  # lines of steps that a resumed run does again are dropped
            write_lines(
                self.path,
                [line for _, line in lines(self.path) if json.loads(line)["step"] <= step],
            )
        if accelerator.log_with:
            accelerator.init_trackers("isthmus")

    def write(self, step: int, values: dict, bar=None) -> None:
        """A value may be a list, which the console leaves out and a tracker gets as name/0, name/1, ..."""
        lists = {k: v for k, v in values.items() if isinstance(v, list)}
        flat = {f"{k}/{i}": v for k, numbers in lists.items() for i, v in enumerate(numbers)}
        self.accelerator.log({k: v for k, v in values.items() if k not in lists} | flat, step=step)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as stream:
                stream.write(json.dumps({"step": step, **values}) + "\n")
            shown = {
                k: f"{v:.4g}" if isinstance(v, float) else v
                for k, v in values.items()
                if k not in lists
            }
            shown = "  ".join(f"{k} {v}" for k, v in shown.items())
            (bar.write if bar is not None else print)(f"step {step:>6}  {shown}")


class Means:
    """Running means between two log lines, over micro-steps and processes, and the time they took. Numbers stay on the
    device until they are taken."""

    def __init__(self):
        self.totals, self.count, self.clock = {}, 0, time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        self.count += 1
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0) + value

    def take(self) -> tuple[dict[str, float], float]:
        """(means, seconds per micro-step) since the last call; on all processes."""
        means = all_gather(torch.stack([*self.totals.values()])[None]).mean(0) / self.count
        found = (
            dict(zip(self.totals, means.tolist(), strict=True)),
            (time.perf_counter() - self.clock) / self.count,
        )
        self.__init__()
        return found

    @contextlib.contextmanager
    def paused(self):
        """What happens inside takes no time."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start


def save_state(output_dir, step: int, accelerator, model, optimizer, extra: dict) -> None:
    """state/state.pt: all a resume needs. No generator state: every random choice is a function of (seed, step).
    Atomic, main process only."""
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
    """(step, extra) of the last save_state, put into model, optimizer and scaler; (0, {}) if there is none yet.
    UserError: the run had other processes or another precision."""
    path = Path(output_dir) / "state" / "state.pt"
    if not path.is_file():
        return 0, {}
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["launched"] != _launched(accelerator):
        raise UserError(
            f"{output_dir}: the run had {state['launched']}, now {_launched(accelerator)} — resume it as it was"
        )
    accelerator.unwrap_model(model).load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state["step"], state["extra"]


def finish(accelerator, output_dir) -> None:
    """The last thing of a training run: `done`, trackers closed. (Not end_training(), which would destroy the process
    group under the model: see run.)"""
    if accelerator.is_main_process:
        write_lines(Path(output_dir) / "done", [])
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()


def _launched(accelerator) -> str:
    return f"{accelerator.num_processes} process(es), precision {accelerator.mixed_precision}"
