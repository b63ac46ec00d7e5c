"""pytest tests/test_adapt.py — recipes/adapt.sh from unlabelled texts to a comparison."""

import pytest

from recipes.probe_report import verdict


def test_a_model_is_adapted_and_compared(recipe, tiny_collection, tiny_model_dir, tmp_path):
    flags = ["--max_steps", 6, "--probe_every", 3, "--max_length", 32, "--num_workers", 0]
    judged = {"QUERIES": str(tiny_collection.queries), "QRELS": str(tiny_collection.qrels)}
    command = ["adapt.sh", tiny_collection.corpus, tiny_model_dir, tmp_path / "out", *flags]
    done = recipe(*command, **judged)
    assert done.returncode == 0, done.stderr
    *_, rebuild, _cosine, last = done.stdout.splitlines()
    assert rebuild.startswith("probe_rebuild") and last.startswith("the bottleneck has")
    rows = [line for line in done.stdout.splitlines() if line.startswith("   RR@10")]
    assert " against " not in rows[0] and " against " in rows[1] and len(rows) == 2
    assert (tmp_path / "out/adapted/decoder.json").is_file()
    half = recipe(*command, QUERIES=str(tiny_collection.queries))
    assert half.returncode == 1 and "both QUERIES and QRELS" in half.stderr


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [(0.01, 0.3, "has learned"), (0.01, 0.06, "has not learned"), (0.5, 0.4, "and 40.0% now")],
)
def test_the_verdict(first, last, words):
    assert words in verdict({"probe_rebuild": first}, {"probe_rebuild": last})
