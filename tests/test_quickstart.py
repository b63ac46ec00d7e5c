"""The quickstart: the collection it builds, and all of it on a small one.

Run: python -m pytest tests/test_quickstart.py
"""

import json
import random
from pathlib import Path

import pytest

from lib.files import read_qrels, read_run
from lib.texts import open_texts
from recipes.python_docs import fault, split_docstring, words

ROOT = Path(__file__).parents[1]


def function(name, docstring):
    return f'def {name}():\n    """{docstring}"""\n\n'


@pytest.fixture
def package(tmp_path):
    """A package of 30 modules with 12 functions each, and the planted cases of the test below."""
    draw, words = (
        random.Random(0),
        [f"{a}{b}" for a in "bdfgklmnprst" for b in ("ato", "ilu", "erra", "onsi", "umba")],
    )
    for module in range(30):
        code = ""
        for number in range(12):
            query = f"{' '.join(draw.sample(words, 5))} of the first paragraph."
            code += function(f"f{number}", f"{query}\n\n    {' '.join(draw.choices(words, k=30))}.")
        path = tmp_path / "pack" / f"part{module}" / "__init__.py"
        path.parent.mkdir(parents=True)
        path.write_text(code)
    text = (
        "The same long explanation stands in two places, "
        "word for word and to the last dot of its last sentence."
    )
    near = text.replace("word for word and", "word for word, and") + " Indeed."
    other = (
        "An entirely different explanation that only this function has, "
        "and that is long enough to be kept here."
    )
    third = (
        "Yet something else is explained in this place, "
        "at a length that suffices to become a passage of its own."
    )
    planted = {
        "kept": f"The one that comes first stays.\n\n    {text}",
        "copied": f"An exact copy of it goes away.\n\n    {text.upper()}",
        "similar": f"So does a near copy of it.\n\n    {near}",
        "twin": f"Convert the given strings to numbers.\n\n    {other}",
        "twins": f"Convert the given string to a number.\n\n    {third}",
        "bare": "Only a first paragraph here, without a rest.",
    }
    (tmp_path / "pack" / "zplanted.py").write_text(
        "".join(function(name, text) for name, text in planted.items())
    )
    (tmp_path / "pack" / "broken.py").write_text("def f(:\n")
    return tmp_path / "pack"


def test_the_collection(package, script, tmp_path):
    for out in ("one", "two"):
        flags = ["--roots", package, "--output_dir", tmp_path / out, "--eval_queries", 60]
        status, _, errors = script("recipes.python_docs", *flags)
        assert status == 0, errors
    files = sorted(
        p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()
    )
    files.remove(Path("args.json"))  # it names the output folder
    assert len(files) == 9
    assert all(
        (tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files
    )

    corpus, queries = (
        open_texts(tmp_path / "one" / f"{name}.jsonl") for name in ("corpus", "queries")
    )
    planted = ("kept", "copied", "similar", "twin", "twins", "bare")
    found = dict(
        zip(planted, corpus.rows([f"zplanted.{name}" for name in planted]) >= 0, strict=True)
    )
    assert found == {
        "kept": True,
        "copied": False,
        "similar": False,
        "twin": True,
        "twins": True,
        "bare": False,
    }
    assert (
        queries.rows(["q:zplanted.kept", "q:zplanted.twin", "q:zplanted.twins"]) >= 0
    ).tolist() == [True, 0, 0]
    titles, text = corpus[corpus.rows(["zplanted.kept"])[0]]
    assert titles == ("zplanted.kept",) and text.startswith("The same long explanation")

    counts = json.loads((tmp_path / "one" / "stats.json").read_text())["counts"]
    assert (
        counts["files that do not parse"]
        == counts["exact duplicates"]
        == counts["near duplicates"]
        == 1
    )
    assert counts["ambiguous queries"] == 2 and counts["passages"] == len(corpus) == 363
    modules = {}
    for split in ("train", "dev", "test"):
        qrels = read_qrels(tmp_path / "one" / "qrels" / f"{split}.tsv")
        assert len(qrels) == counts[f"{split} queries"] > 0
        for qid, judged in qrels.items():
            assert judged == {qid[2:]: 1}
            modules.setdefault(qid[2:].rsplit(".", 1)[0], set()).add(split)
    assert all(len(splits) == 1 for splits in modules.values())


def test_docstrings_are_taken_apart():
    assert split_docstring(
        "f(x) -> y\n\nReturn :class:`~a.B` of x.\n\nMore ``here``.\n----\nEnd."
    ) == ("Return a.B of x.", "More here. End.")
    assert fault("Only this", "") == "without a rest"
    assert words("A_b c'd 3") == ["a", "b", "c", "d", "3"]


@pytest.mark.slow
def test_all_of_it_on_a_small_collection(recipe, script, tmp_path):
    done = recipe("quickstart.sh", tmp_path / "out", SCALE="tiny")
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("test queries against 400 passages\n")[1].splitlines()
    assert table[0].split() == ["MRR@10", "nDCG@10", "Recall@100"]
    names = ("BM25", "stage 1", "stage 2", "stage 2 + BM25")
    for name, line in zip(names, table[1:5], strict=True):
        assert line.startswith(name) and all(
            0 < float(value) <= 1 for value in line[len(name) :].split()
        )
    assert all(line.startswith("stage 2 ") for line in table[5:8])
    judged = read_qrels(tmp_path / "out/collection/qrels/test.tsv")
    assert read_run(tmp_path / "out/evaluation-fused/run.trec").keys() == judged.keys()
    command = done.stdout.rstrip().splitlines()[-1].split()
    assert command[0].endswith("python")
    assert command[1:] == ["-m", "recipes.search", str(tmp_path / "out"), "--bm25"]
    status, shown, error = script(*command[2:], "--query", "read a file", "--top", 3)
    assert status == 0 and "3 of 400 passages" in shown, error
    assert (tmp_path / "out" / "stage2" / "modules.json").is_file()
