"""Arguments, output folders, resume state, sampler. Run: python -m pytest tests/test_launch.py"""

import contextlib
import multiprocessing
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from tqdm import tqdm

from lib import files, launch
from lib.arguments import arg, identity
from lib.checkpoint import load_encoder, save_encoder
from lib.encoder import Head
from lib.files import UserError
from lib.loader import permutation, step_batches
from lib.text import step_seed

ROOT = Path(__file__).parents[1]
SCRIPT = """
from dataclasses import dataclass
from typing import Literal
from lib.arguments import arg, identity, parse_args
from lib.launch import claim_output, make_accelerator, run
@dataclass(kw_only=True)
class Args:
    output_dir: str = arg(group="data", help="folder for the output")
    depth: int = arg(3, least=1, help="ranks to look at")
    rate: float = arg(None, above=0, below=1, help="a share of 100%")
    keep: bool = arg(True, help="throw away")
    bits: Literal[32, 16, 8] = arg(32, help="of a number")
    cuts: list[float] = arg([], least=0, help="places")
    size: float = arg(1.0, help="of anything")
def main():
    args = parse_args(Args)
    accelerator = make_accelerator()
    made = identity(args, {})
    print("complete", claim_output(accelerator, args.output_dir, made), args.depth)
if __name__ == "__main__":
    run(main)
"""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir", "out", "--dept", "4"], "unknown argument --dept — did you mean --depth?"),
        (["--output_dir", "out", "--depth", "0"], "--depth 0 — give a finite number at least 1"),
        (["--output_dir", "out", "--rate", "nan"], "finite number above 0 and below 1"),
        (["--output_dir", "out", "--rate", "inf"], "finite number above 0 and below 1"),
        (["--output_dir", "out", "--depth", "many"], "invalid int value: 'many'"),
        (["--output_dir", "out", "--depth", "3000000000"], "--depth 3000000000 — give a finite"),
        (["--output_dir", "out", "--depth", "9" * 4000], f"--depth {'9' * 30} — give a finite"),
        (["--output_dir", "out", "--depth", "9" * 9000], "invalid int value: '99999"),
        (["--output_dir", "out", "--bits", "7"], "argument --bits: invalid choice: 7"),
        (["--output_dir", "out", "--bits", "8", "--cuts", "1", "-2"], "--cuts -2.0 — give a"),
        (["--output_dir", "out", "--cuts", "1e999"], "--cuts inf — give a finite number at least"),
        (["--output_dir", "out", "--size=-1e99"], "--size -1e+99 — give a finite number up to 1"),
        ([], "the following arguments are required: --output_dir"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_1(tmp_path, monkeypatch, capfd, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    Path("script.py").write_text(SCRIPT)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path("script.py", run_name="__main__")
    error = capfd.readouterr().err
    assert stopped.value.code == 1 and message in error and error.count("\n") == 1
    assert not Path("out").exists()


def test_help_has_groups_and_each_flag_once(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "--help"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    shown = done.stdout
    assert done.returncode == 0 and "data:" in shown and "None" not in shown
    assert "folder for the output (required)" in shown and "(default: 3)" in shown
    assert shown.count("--no_keep") == 1 and "--keep" not in shown


def test_the_process_group_outlives_what_main_holds(tmp_path, two_processes, monkeypatch):
    """Or a run on gloo may hang at its end: see launch.run."""
    (tmp_path / "script.py").write_text(
        """
from torch.distributed import is_initialized
from lib.launch import RunLog, make_accelerator, run
class Held:
    def __del__(self):
        print(f"freed, group: {is_initialized()}\\n", end="")
def main():
    held, accelerator = Held(), make_accelerator()
    accelerator.print(f"{accelerator.num_processes} process(es)")
    RunLog(accelerator, ".").finish("next")
run(main)
print(f"ended, group: {is_initialized()}\\n", end="")
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    printed = two_processes(tmp_path / "script.py")
    assert printed.count("freed, group: True") == 2 and printed.count("ended, group: False") == 2
    assert (tmp_path / "done").is_file()


def test_several_processes_say_an_error_once(tmp_path, two_processes, monkeypatch):
    (tmp_path / "script.py").write_text(
        """
from lib.dist import from_main
from lib.files import UserError
from lib.launch import make_accelerator, run
def fail():
    raise UserError("a.tsv:1: wrong — correct it")
def main():
    accelerator = make_accelerator()
    accelerator.print(f"{accelerator.num_processes} process(es)", flush=True)
    from_main(accelerator, fail)
run(main)
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    error = two_processes(tmp_path / "script.py", fails=True)
    assert error.count("a.tsv:1: wrong") == 1 and "\nscript.py: a.tsv:1: wrong" in f"\n{error}"


def test_an_error_under_progress_bars_is_a_line_of_its_own(capfd):
    def main():
        bar = tqdm(total=9)  # as in training, left open by the error
        bar.update()
        for _ in tqdm(range(3), "dev", leave=False):
            raise UserError("a.tsv:1: wrong — mend it")

    with pytest.raises(SystemExit):
        launch.run(main)
    line = re.split("[\r\n]", capfd.readouterr().err)[-2]
    assert line.endswith(": a.tsv:1: wrong — mend it") and "\x1b" not in line


@dataclass
class Args:
    output_dir: str = arg(group="data", help="")
    depth: int = arg(3, help="")
    num_workers: int = arg(0, group="runtime", help="")


def test_what_decides_a_result_is_no_argument_of_the_runtime():
    assert identity(Args("out"), {"m": "1"}) == {"arguments": {"depth": 3}, "inputs": {"m": "1"}}


def test_output_folders_are_never_shared(tmp_path):
    accelerator, out = Accelerator(cpu=True), tmp_path / "out"

    def claim(depth=3, inputs=None, resume=True, folder=out):
        made = {"arguments": {"depth": depth}, "inputs": inputs or {}}
        return launch.claim_output(accelerator, folder, made, resume=resume)

    assert claim() is False and (out / "args.json").is_file()
    assert claim(4) is False, "nothing made yet: free for other arguments"
    assert claim() is False
    (out / "log.jsonl").touch()
    assert claim() is False, "a stage without --resume goes on by the same command"
    with pytest.raises(UserError, match="unfinished run — add --resume"):
        claim(resume=False)
    assert claim(resume=True) is False
    with pytest.raises(UserError, match="made with --depth 3, now 4"):
        claim(4)
    (out / "done").touch()
    assert claim() is True and claim(resume=False) is True
    with pytest.raises(UserError, match="made with --depth 3, now 4"):
        claim(4)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="it was made with qrels None, now b — choose another"):
        claim(inputs={"qrels": "b"})
    with pytest.raises(UserError, match="holds something else"):
        claim(folder=tmp_path / "other")
    for damaged in ("[]", '{"arguments": 3}', "{"):
        (out / "args.json").write_text(damaged)
        with pytest.raises(UserError, match="args.json"):
            claim()
    launch.release_output()
    assert not (out / ".lock").exists()


def test_a_folder_has_one_owner_whose_lock_dies_with_it(tmp_path):
    out = tmp_path / "out"

    def own(said, seconds):
        sys.stderr = open(said, "w", buffering=1)

        def main():
            made = {"arguments": {}, "inputs": {}}
            launch.claim_output(Accelerator(cpu=True), out, made)
            print("owned", file=sys.stderr)
            time.sleep(seconds)

        launch.run(main)

    def start(name, seconds):
        said = tmp_path / name
        owner = multiprocessing.get_context("fork").Process(target=own, args=(said, seconds))
        owner.start()
        while not (said.exists() and said.read_text()):
            time.sleep(0.01)
        return owner, said

    first, said = start("first", 600)
    assert said.read_text() == "owned\n"
    second, said = start("second", 0)
    second.join()
    holder = f"{out}: process {first.pid} on .* is writing to it — wait for its end, or stop it"
    assert second.exitcode == 1 and re.search(f": {holder}\n$", said.read_text())
    (out / ".tmp-1-shard").touch()
    first.kill()
    first.join()
    third, said = start("third", 600)
    assert said.read_text() == "owned\n"
    os.kill(third.pid, signal.SIGINT)
    third.join()
    line = "interrupted — to go on, give the same command again \\(a trainer also needs --resume\\)"
    assert third.exitcode == 130 and re.fullmatch(f"owned\n.*: {line}\n", said.read_text())
    assert [path.name for path in out.iterdir()] == ["args.json"]


@contextlib.contextmanager
def no_file_above(size):
    """As on a full disk: what writes on gets an error of the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, capfd, tiny_model_dir):
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.SGD(model.parameters())
    encoder = load_encoder(tiny_model_dir, Head("mean"))
    encoder.tokenizer.add_tokens([f"word{number}" for number in range(500)])

    def state():
        launch.save_state(tmp_path / "out", 1, accelerator, model, optimizer, {})

    def checkpoint():
        save_encoder(encoder, tmp_path / "out" / "weights", {})

    def array():
        with files.atomic(tmp_path / "out" / "x.npy") as temporary:
            np.save(temporary, np.zeros(10_000))

    for size in (10_000, 1_000):  # the second stops the tokenizer's files and JSON too
        for write in (
            state,
            checkpoint,
            array,
            lambda: launch.RunLog(accelerator, tmp_path).write(1, {"loss": [0.5] * 5_000}),
        ):
            with no_file_above(size), pytest.raises(SystemExit) as stopped:
                launch.run(write)
            error = capfd.readouterr().err
            assert stopped.value.code == 1 and error.count(" — ") == 1, error
            assert "give the same command again" in error and "Traceback" not in error
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_path_that_cannot_be_written_is_one_line(tmp_path, capfd):
    (tmp_path / "file").touch()

    def main():
        made = {"arguments": {}, "inputs": {}}
        launch.claim_output(Accelerator(cpu=True), tmp_path / "file" / "out", made)

    with pytest.raises(SystemExit):
        launch.run(main)
    error = capfd.readouterr().err
    assert "file/out: Not a directory — " in error and error.count("\n") == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "bytes", "keys", "shapes"])
def test_a_damaged_state_is_one_line(tmp_path, damage):
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters())
    launch.save_state(tmp_path, 1, accelerator, model, optimizer, {})
    path = tmp_path / "state" / "state.pt"
    content = path.read_bytes()
    if damage == "keys":
        torch.save({"step": 1}, path)
    elif damage == "shapes":
        launch.save_state(tmp_path, 1, accelerator, torch.nn.Linear(3, 5), optimizer, {})
    else:
        spoilt = {"empty": b"", "cut": content[:-100], "bytes": b"x" * 99}
        path.write_bytes(spoilt[damage])
    with pytest.raises(UserError, match="state.pt: damaged.* — remove it to train from"):
        launch.load_state(tmp_path, accelerator, model, optimizer)


def test_state_comes_back_and_the_log_is_cut(tmp_path):
    accelerator = Accelerator(cpu=True)

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))

    def step(model, optimizer, number):
        torch.manual_seed(step_seed(1, number))
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = fresh()
    log = launch.RunLog(accelerator, tmp_path)
    assert launch.load_state(tmp_path, accelerator, model, optimizer) == (0, {})
    for number in range(1, 5):
        step(model, optimizer, number)
        log.write(number, {"loss": 1.0})
        if number == 2:
            launch.save_state(tmp_path, number, accelerator, model, optimizer, {"best": 0.5})
    again, optimizer_again = fresh()
    assert launch.load_state(tmp_path, accelerator, again, optimizer_again) == (2, {"best": 0.5})
    launch.RunLog(accelerator, tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 2
    for number in (3, 4):
        step(again, optimizer_again, number)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


class Ten:
    """Ten examples in the order of a seed."""

    def __init__(self, seed):
        self.order = partial(permutation, 10, seed)

    def __len__(self):
        return 10


def test_sampler_epochs_are_permutations_whatever_the_number_of_processes():
    one = step_batches(Ten(3), 4, 0, 1)
    pair = [step_batches(Ten(3), 2, rank, 2) for rank in range(2)]
    whole = [next(one) for _ in range(5)]
    assert whole == [next(pair[0]) + next(pair[1]) for _ in range(5)]
    examples = [example for batch in whole for example, _, _ in batch]
    assert sorted(examples[:10]) == sorted(examples[10:]) == list(range(10))
    assert examples[:10] != examples[10:]
    assert [row for _, _, row in whole[1]] == [0, 1, 2, 3] and {m for _, m, _ in whole[3]} == {3}
    assert next(step_batches(Ten(3), 4, 0, 1, start=3)) == whole[3], "a resume in the middle"
    assert next(step_batches(Ten(4), 4, 0, 1)) != whole[0]
    seeds = [step_seed(0, *parts) for parts in ((0,), (1,), (0, 0), (1, 0), (0, 1))]
    assert len(set(seeds)) == 5


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2 but Accelerate runs 1 process"):
        launch.make_accelerator()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16 on a CPU"):
        launch.make_accelerator()


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch, tmp_path):
    """And a tracker gets numbers alone, no lists."""
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(
        UserError, match="--report_to tensorboard: not installed — pip install tensorboard"
    ):
        launch.make_accelerator(report_to="tensorboard", output_dir=tmp_path)
    accelerator, sent = Accelerator(cpu=True), []
    monkeypatch.setattr(accelerator, "log", lambda values, step: sent.append((step, values)))
    launch.RunLog(accelerator, tmp_path).write(3, {"loss": 0.5, "group_weights": [0.25, 0.75]})
    assert sent == [(3, {"loss": 0.5})]
    assert '"group_weights": [0.25, 0.75]' in (tmp_path / "log.jsonl").read_text()


@pytest.mark.parametrize(
    "method", sorted({"fork", "forkserver"} & set(multiprocessing.get_all_start_methods()))
)
def test_workers_end_with_a_killed_trainer(method, tmp_path):
    (tmp_path / "trainer.py").write_text(
        """
import multiprocessing, os, sys, time, torch
from concurrent.futures import ProcessPoolExecutor
from torch.utils.data import Dataset
from lib.loader import load
from lib.launch import end_with_parent
class Rows(Dataset):
    def __len__(self): return 3
    def __getitem__(self, row): return os.getpid()
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    batches = load(Rows(), int, None, 2, torch.device("cpu"))
    pool = ProcessPoolExecutor(1, initializer=end_with_parent)
    print(next(batches), next(batches), pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""
    )
    command = [sys.executable, tmp_path / "trainer.py", method]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as trainer:
        workers = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
        states = [Path(f"/proc/{worker.pid}/status").read_text() for worker in workers]
        trainer.kill()
    assert len(set(workers)) == 3
    for state in states:  # Ctrl-C is left to the trainer: bit 1 is SIGINT
        assert int(re.search(r"SigIgn:\t(\w+)", state)[1], 16) & 2
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            while worker.status() != psutil.STATUS_ZOMBIE:  # pytest's timeout ends a wait in vain
                time.sleep(0.05)
