"""How every script starts, speaks, stops and goes on: Accelerator, output folder, log, resume
state."""

import contextlib
import errno
import functools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import wait
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    extract_model_from_parallel,
)
from torch import Tensor
from tqdm import tqdm

from lib.cpu import onednn
from lib.dist import all_gather, from_main
from lib.files import UserError, atomic, lines, lock, read_json, unlock, write_json, write_lines
from lib.lines import one_line

PACKAGES = "torch transformers tokenizers accelerate datasets faiss-cpu faiss-gpu numpy".split()
PATIENCE = 3  # seconds in which a launcher ends the other processes of a run that failed
GO_ON = "to go on, give the same command again (a trainer also needs --resume)"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), f"free some space; {GO_ON}"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a path you may write to"),
}
owned = []  # the open lock file of the output folder that this process writes to


def run(main) -> None:
    """Call main(). A UserError becomes one line on stderr and exit status 1, and so does an error
    of the system, such as a full disk. Ctrl-C becomes one line and exit status 130."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        main()
        # Only now, when DDP's reducer is gone with main's variables: as the last to hold the group
        # it would wait with the GIL for a thread of gloo that may need the GIL, and hang. A gloo
        # process that just ends may abort in that thread.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as error:
        # the error of a loader worker comes with its traceback in front
        _stop(str(error).rstrip().rpartition("lib.lines.UserError: ")[2], status=1)
    except OSError as error:
        place = error.filename or (owned[0].name.removesuffix("/.lock") if owned else "the system")
        reason = error.strerror or str(error).rstrip().rpartition("\n")[2]
        remedy = REMEDIES.get(error.errno, f"check the path and the disk; {GO_ON}")
        _stop(f"{place}: {reason} — {remedy}", status=1)
    except KeyboardInterrupt:
        _stop(f"interrupted — {GO_ON}", status=130)
    except Exception:
        if several:  # mostly another process has stopped, and says why
            time.sleep(PATIENCE)
        raise
    finally:
        release_output()


def _stop(message: str, status: int) -> None:
    """End the process with one line, once for a run: mostly process 0 says it too."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(PATIENCE)
    place = Path(sys.argv[0]).name + (f" [process {rank}]" if rank else "")
    bars = list(getattr(tqdm, "_instances", ()))
    for bar in bars:  # the last one drawn may stand lines below the first
        bar.close()
    print(("\r" if bars else "") + f"{place}: {message}", file=sys.stderr)
    sys.exit(status)


def end_with_parent(_worker: int = 0) -> None:
    """Make a worker of a loader or pool end when its parent process has ended, by kill -9 too, and
    leave Ctrl-C to the parent. (Under forkserver torch's own watchdog watches another process.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    died = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([died]), os._exit(1)), daemon=True).start()


def make_accelerator(
    accumulation: int = 1, report_to: str = "none", output_dir=None, deterministic: bool = False
) -> Accelerator:
    """UserError for what would silently be something else: FSDP, DeepSpeed, fp16 on a CPU,
    processes that do not see each other, a tracker that is not installed."""
    if deterministic:  # the variable must be set before CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        gradient_accumulation_steps=accumulation,
        log_with=None if report_to == "none" else report_to,
        project_dir=output_dir,
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
    """Of Python, of the packages that decide numbers, and of this code (its commit)."""
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
    accelerator, output_dir, identity: dict, last_file: str = "done", resume: bool = True
) -> bool:
    """Make output_dir the folder of this run alone; True if an equal run has already completed it.

    identity    what decides the result, see lib/arguments.identity
    last_file   what only a complete folder has
    resume      whether the run may go on with an unfinished folder
    UserError: the folder holds anything else, or a run with other arguments or inputs; or another
    process is writing to it. The lock ends with the process, however that ends."""
    folder = Path(output_dir)
    made = json.loads(json.dumps(identity))
    complete = from_main(accelerator, lambda: _claim(folder, made, last_file, resume))
    if complete:
        accelerator.print(f"{folder} is complete")
    return complete


def _claim(folder: Path, made: dict, last_file: str, resume: bool) -> bool:
    if folder.is_file():
        raise UserError(f"{folder}: this is a file — choose another --output_dir")
    leftovers = [*folder.rglob(".tmp-*"), *folder.rglob(".old-*")]  # of a killed run
    names = {path.name for path in folder.glob("*") if path not in leftovers} - {".lock"}
    if names and "args.json" not in names:
        wrong = f"{folder}: it holds something else ({min(names)}, ...)"
        raise UserError(f"{wrong} — choose another --output_dir or empty it")
    remedy = "choose another --output_dir or remove the folder"
    if names - {"args.json"}:  # without others, the run before stopped before it made anything
        before = read_json(folder / "args.json")
        for kind, flag in (("arguments", "--"), ("inputs", "")):
            old = before.get(kind) if isinstance(before, dict) else None
            new = made[kind]
            if not isinstance(old, dict):
                raise UserError(f"{folder}/args.json: it is damaged — {remedy}")
            for key in sorted({*old, *new}):
                if old.get(key) != new.get(key):
                    wrong = f"{folder}: it was made with {flag}{key} {old.get(key)}"
                    raise UserError(f"{wrong}, now {new.get(key)} — {remedy}")
        if (folder / last_file).is_file():
            return True
        if not resume:
            wrong = f"{folder}: it holds an unfinished run"
            raise UserError(f"{wrong} — add --resume to continue, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    owned.append(lock(folder / ".lock", wait=False))
    for leftover in leftovers:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    command = [sys.executable, *sys.argv]
    write_json(folder / "args.json", {**made, "versions": versions(), "command": command})
    return False


def release_output() -> None:
    """Give up the lock of this process, and remove its file."""
    while owned:
        unlock(owned.pop())


def echo(accelerator, heading: str, facts: dict) -> None:
    """Print what is about to run."""
    rows = (f"   {name:<24} {value}" for name, value in facts.items())
    accelerator.print(f"== {heading}", *rows, sep="\n", flush=True)


def describe(accelerator) -> str:
    device = f"{accelerator.device.type}, {torch.get_num_threads()} threads"
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name()
    precision = accelerator.mixed_precision.replace("no", "fp32")
    return f"{accelerator.num_processes} process(es) on {device}, precision {precision}"


class RunLog:
    """What a training run says, on the main process: a progress bar, and one line per logged step,
    the same on the console, in log.jsonl and in the tracker. A run that goes on from `step` does
    later steps again, so their lines go."""

    def __init__(self, accelerator, output_dir, step: int = 0, max_steps: int | None = None):
        self.accelerator = accelerator
        self.path = Path(output_dir) / "log.jsonl"
        if accelerator.is_main_process and self.path.is_file():
            kept = []
            for _, line in lines(self.path):
                # a killed run or a full disk left half a line
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if step and json.loads(line)["step"] <= step:
                        kept.append(line)
            write_lines(self.path, kept)
        if accelerator.log_with:
            accelerator.init_trackers("isthmus")
        hidden = not accelerator.is_main_process
        self.bar = tqdm(total=max_steps, initial=step, disable=hidden)

    def write(self, step: int, values: dict) -> None:
        """A value may be a list, which only log.jsonl gets."""
        numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
        self.accelerator.log(numbers, step=step)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as stream:
                stream.write(json.dumps({"step": step, **values}) + "\n")
            texts = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in numbers.items()}
            shown = (f"{name} {text}" for name, text in texts.items())
            self.bar.write(f"step {step:>6}  {'  '.join(shown)}")

    def finish(self, command: str, note: str = "") -> None:
        """The last thing of a run: the note, the command that uses the model, `done`, trackers
        closed. (Not end_training(), which would destroy the process group under the model: see
        run.)"""
        self.bar.close()
        if self.accelerator.is_main_process:
            print(note, end="\n" if note else "")
            print(f"{self.path.parent} is complete; next: {command} ...")
            write_lines(self.path.with_name("done"), [])
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()


def stop_not_finite(step: int, ids: list[str]) -> None:
    """UserError: the loss or the gradient of these texts is not finite."""
    wrong = f"step {step}: the loss or gradient is not finite for {', '.join(ids)}"
    raise UserError(f"{wrong} — lower --learning_rate")


class Means:
    """Running means between two log lines, over micro-steps and processes, and the time they took.
    Numbers stay on the device until they are taken."""

    def __init__(self):
        self._clear()

    def _clear(self) -> None:
        self.totals, self.count = {}, 0
        self.start, self.waited = time.perf_counter(), 0.0

    def next(self, batches: Iterator):
        """The next batch; the time it takes to come counts as `waited`."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def add(self, values: dict[str, Tensor]) -> None:
        self.count += 1
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0) + value.detach()

    def take(self) -> tuple[dict[str, float], float]:
        """(means, seconds per micro-step) since the last call; on all processes. Among the means is
        `waited`, the share of this process's time in which it waited for data."""
        means = all_gather(torch.stack([*self.totals.values()])[None]).mean(0) / self.count
        seconds = time.perf_counter() - self.start
        found = dict(zip(self.totals, means.tolist(), strict=True))
        found["waited"] = self.waited / seconds
        seconds /= self.count
        self._clear()
        return found, seconds

    @contextlib.contextmanager
    def paused(self):
        """What happens inside takes no time."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start


def unwrap(model):
    """The module without the wrappers of DDP and torch.compile, so that its class and the names of
    its weights are the same with them and without."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def save_state(output_dir, step: int, accelerator, model, optimizer, extra: dict) -> None:
    """state/state.pt: all a resume needs. No generator state: every random choice is a function of
    (seed, step). Atomic, main process only."""
    if accelerator.is_main_process:
        state = {
            "step": step,
            "model": unwrap(model).state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
            "extra": extra,
            "launched": _launched(accelerator),
        }
        path = Path(output_dir) / "state" / "state.pt"
        with atomic(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # so it says that the disk is full
                raise OSError(f"{path}: cannot be written ({error})") from error
    accelerator.wait_for_everyone()


def load_state(output_dir, accelerator, model, optimizer) -> tuple[int, dict]:
    """(step, extra) of the last save_state, put into model, optimizer and scaler; (0, {}) if there
    is none yet. UserError: a damaged file; the run had other processes or another precision."""
    path = Path(output_dir) / "state" / "state.pt"
    if not path.is_file():
        return 0, {}
    wrong = f"{path}: damaged, or of another model"
    with one_line(wrong, "remove it to train from the first step"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["launched"] != _launched(accelerator):
            wrong = f"{output_dir}: the run had {state['launched']}, now {_launched(accelerator)}"
            raise UserError(f"{wrong} — resume it as it was")
        unwrap(model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        return state["step"], state["extra"]


def _launched(accelerator) -> str:
    return f"{accelerator.num_processes} process(es), precision {accelerator.mixed_precision}"
