"""What the tests share: a small random BERT, and a collection with four passages on each of ten
subjects."""

import json
import os
import random
from types import SimpleNamespace

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items):
    """The slow ones first: with several workers, what is left for the end is then short."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Memory-mapped copies of collections go to a folder of this session."""
    os.environ["ISTHMUS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_collection(tmp_path_factory):
    """Paths of 40 passages (JSONL; every fourth has no title, 7 to 62 words), 20 queries (TSV),
    qrels (BEIR, one or two positives per query), negatives (`qid TAB pid,...`, five or six each,
    none judged) and candidates (a TREC run of the positives and the negatives)."""
    from recipes.tiny_data import SUBJECTS  # not before the environment is set, see above

    folder, draw = tmp_path_factory.mktemp("collection"), random.Random(0)
    passages, queries, qrels, negatives, candidates = [], [], [], [], []
    for number, (name, words) in enumerate(SUBJECTS.items()):
        words = words.split()
        for part in range(4):
            text = " ".join(draw.choices(words, k=draw.randint(5, 60))) + f" and {name}."
            title = f"{name.title()}, part {part}" if part else ""
            passages.append({"_id": f"p{4 * number + part}", "title": title, "text": text})
        for half in range(2):
            qid, others = f"q{2 * number + half}", [n for n in range(10) if n != number]
            queries.append((qid, f"what about {words[half]} and {words[half + 2]} of {name}?"))
            positives = [f"p{4 * number + 2 * half + extra}" for extra in range(1 + half)]
            mined = [f"p{4 * draw.choice(others) + part}" for part in (0, 1, 2, 3)]
            mined = [
                *dict.fromkeys(mined),
                *(f"p{4 * draw.choice(others[:-1]) + 1}" for _ in range(2)),
            ]
            negatives.append((qid, list(dict.fromkeys(mined))))
            qrels += [(qid, pid) for pid in positives]
            for rank, pid in enumerate([*negatives[-1][1], *positives], 1):
                candidates.append(f"{qid} Q0 {pid} {rank} {1 / rank:.6f} first")
    (folder / "corpus.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages))
    (folder / "queries.tsv").write_text("".join(f"{qid}\t{text}\n" for qid, text in queries))
    (folder / "qrels.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"{qid}\t{pid}\t1\n" for qid, pid in qrels)
    )
    (folder / "negatives.tsv").write_text(
        "".join(f"{qid}\t{','.join(pids)}\n" for qid, pids in negatives)
    )
    positives = {qid: [pid for q, pid in qrels if q == qid] for qid, _ in queries}
    rows = [{"qid": qid, "pos": positives[qid], "neg": pids} for qid, pids in negatives]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "candidates.trec").write_text("\n".join(candidates) + "\n")
    return SimpleNamespace(
        folder=folder,
        corpus=folder / "corpus.jsonl",
        queries=folder / "queries.tsv",
        qrels=folder / "qrels.tsv",
        negatives=folder / "negatives.tsv",
        train=folder / "train.jsonl",
        candidates=folder / "candidates.trec",
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_collection):
    """Plain Hugging Face folder: a random BertForMaskedLM (2 layers of 32, 128 positions) and a
    WordPiece tokenizer trained on the collection."""
    from recipes.tiny_data import write_model

    folder = tmp_path_factory.mktemp("model")
    texts = [tiny_collection.corpus.read_text(), tiny_collection.queries.read_text()]
    write_model(folder, texts, vocab_size=300, max_length=128)
    return folder


@pytest.fixture
def script(monkeypatch, capfd):
    """script("encode", "--model", folder, ...) -> (exit status, stdout, stderr): a script run in
    this process, which saves the seconds that imports take. Paths and numbers may be given as they
    are."""
    import importlib
    import sys

    from accelerate.state import AcceleratorState

    from lib import launch

    def call(name, *flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        capfd.readouterr()
        try:
            launch.run(importlib.import_module(name).main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def two_processes(tmp_path):
    """two_processes("encode.py", "--model", folder, ...) -> stdout of a run on two gloo processes,
    as the README starts it; with fails=True, stderr of one that ends with status 1. This launcher
    takes localhost by its address; torchrun's c10d rendezvous asks for the name of the machine, and
    hangs where no hosts file has it."""
    import subprocess
    import sys
    from pathlib import Path

    def call(name, *flags, fails=False):
        launcher = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
        ]
        launcher += ["--num_machines", "1", "--main_process_port", "0"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        command = [*launcher, str(Path(__file__).parents[1] / name), *map(str, flags)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert done.returncode == int(fails), done.stderr
        assert "2 process(es)" in done.stdout, done.stdout
        return done.stderr if fails else done.stdout

    return call


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory):
    """A folder with a `python` that starts in no time, see forked_python.py."""
    import subprocess
    import sys
    import time
    from pathlib import Path

    folder, script = tmp_path_factory.mktemp("python"), Path(__file__).with_name("forked_python.py")
    socket = folder / "socket"
    server = subprocess.Popen([sys.executable, script, "serve", socket], cwd=script.parents[1])
    while not socket.exists():
        assert server.poll() is None
        time.sleep(0.1)
    (folder / "python").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -S -E "{script}" call "{socket}" "$@"\n'
    )
    (folder / "python").chmod(0o755)
    yield folder
    server.kill()


@pytest.fixture
def recipe(forked_python):
    """recipe("beir.sh", *arguments, SCALE="tiny", ...) -> the finished process of a recipe called
    in the folder `cwd`, with this Python first in the PATH and the scripts started by `python`."""
    import subprocess
    import sys
    from pathlib import Path

    def call(name, *arguments, cwd=None, **environment):
        path = f"{forked_python}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        command = ["bash", Path(__file__).parents[1] / "recipes" / name, *map(str, arguments)]
        environment = {**os.environ, "LAUNCH": "python", "PATH": path, **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)

    return call


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """What recipes/tiny_data.py writes; read only."""
    from recipes import tiny_data

    folder = tmp_path_factory.mktemp("tiny")
    tiny_data.write(folder)
    return folder


@pytest.fixture
def tiny_msmarco(tiny_data, tmp_path):
    """A copy of its MS MARCO without the candidates, which tests of pipelines do without."""
    import shutil

    without = shutil.ignore_patterns("top1000.*", "top100.*", "documents")
    return shutil.copytree(tiny_data / "msmarco", tmp_path / "msmarco", ignore=without)
