"""recipes/plot.py: the numbers that are drawn. Run: python -m pytest tests/test_plot.py"""

import json
import re

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from lib.embeddings import finish_embeddings, write_shard
from lib.files import read_run, write_qrels, write_run
from lib.metrics import score_run
from recipes import plot

QRELS = {"q1": {"a": 1, "b": 2}, "q2": {"c": 1, "d": 0}, "q3": {"e": 0}}
RUNS = {
    "bm25": {"q1": (["x", "a", "b"], [3, 2, 1]), "q2": (["x", "y"], [2, 1])},
    # trec_eval's order of the tie is b before a; a query that nobody judged does not count
    "dense": {"q1": (["a", "b"], [1, 1]), "q2": (["c"], [1]), "q9": (["x"], [1])},
}


@pytest.fixture
def draw(script, tmp_path):
    """draw(kind, *flags) -> the panels in the file of numbers."""

    def call(kind, *flags):
        out = tmp_path / "numbers.json"
        status, _, errors = script("recipes.plot", "--kind", kind, "--output", out, *flags)
        assert status == 0, errors
        return json.loads(out.read_text())

    return call


def log(folder, *rows):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def logs(tmp_path):
    """Two pre-training logs, as pretrain_mae.py --probe_every writes them."""
    own = [{"step": 0, "probe_cosine": 1.0}]
    for step in (20, 40):
        own.append(
            {"step": step, "loss": 200 / step, "encoder_loss": 9.0, "waited": 0.1, "lr": 1e-3}
        )
    bow = [own[0], {**own[1], "bow_loss": 7.0}]
    return log(tmp_path / "runs/mlm-0/pretrained", *own), log(
        tmp_path / "runs/bow-0/pretrained", *bow
    )


@pytest.fixture
def evaluations(script, tmp_path):
    """Two folders of evaluate.py, and the judgments."""
    qrels = tmp_path / "test.tsv"
    write_qrels(qrels, QRELS)
    for name, lists in RUNS.items():
        path = tmp_path / f"{name}.trec"
        write_run(path, ((qid, *entry) for qid, entry in lists.items()))
        flags = ["--run", path, "--qrels", qrels, "--metrics", "RR@10", "R@2", "R@3"]
        status, _, errors = script("evaluate", *flags, "--output_dir", tmp_path / "eval" / name)
        assert status == 0, errors
    return [tmp_path / "eval" / name for name in RUNS], qrels


def points(panel):
    return {line["name"]: (line["x"], line["y"]) for line in panel["lines"]}


def test_curves_have_a_panel_for_each_quantity_and_a_line_for_each_run(draw, logs):
    panels = draw("curves", "--input", *logs)
    assert [panel["title"] for panel in panels] == [
        "loss",
        "bow_loss",
        "encoder_loss",
        "probe_cosine",
        "lr",
    ]
    assert points(panels[0]) == {"mlm-0": ([20, 40], [10.0, 5.0]), "bow-0": ([20], [10.0])}
    assert points(panels[1]) == {"bow-0": ([20], [7.0])}  # with the colour of bow-0 elsewhere
    assert [line["style"] for panel in panels[:2] for line in panel["lines"]] == [0, 1, 1]
    assert [panel["y"] for panel in panels[2:]] == ["nats", "cosine of two texts", "learning rate"]
    flags = ["--names", "MLM", "BoW", "--quantities", "waited"]
    (panel,) = draw("curves", "--input", *logs, *flags)
    assert points(panel) == {"MLM": ([20, 40], [0.1, 0.1]), "BoW": ([20], [0.1])}


def test_the_largest_groups_have_names(draw, tmp_path):
    weights = [0.02 * group for group in range(10)]
    rows = [{"step": 0, "dev_mrr@10": 0.1}]
    rows += [{"step": step, "group_weights": weights[::-1]} for step in (1, 2)]
    (panel,) = draw("groups", "--input", log(tmp_path / "run", *rows))
    found = points(panel)
    assert len(found) == 10 and found["group 0"] == ([1, 2], [0.18, 0.18])
    named = [line["name"] for line in panel["lines"] if line["style"] != plot.GREY]
    assert named == [f"group {group}" for group in range(plot.NAMED_GROUPS)]


def test_metrics_have_the_intervals_of_evaluate(draw, evaluations):
    folders, _ = evaluations
    panels = draw("metrics", "--input", *folders, "--quantities", "RR@10", "R@3")
    assert [panel["title"] for panel in panels] == ["test: RR@10", "test: R@3"]
    for name, folder, line in zip(RUNS, folders, panels[1]["lines"], strict=True):
        part = json.loads((folder / "metrics.json").read_text())["splits"]["test"]
        assert (line["name"], line["x"]) == (name, [part["metrics"]["R@3"]])
        assert line["interval"] == part["intervals"]["R@3"]


def test_differences_are_sorted_and_counted(draw, evaluations):
    (first, second), _ = evaluations
    (panel,) = draw("difference", "--input", first, second, "--quantities", "R@2")
    # q1: 1 less 0.5, q2: 1 less 0, q3: nothing is relevant
    expected = {"better: 2": ([0, 1], [1.0, 0.5]), "equal: 1": ([2], [0.0]), "worse: 0": ([], [])}
    assert points(panel) == expected
    assert panel["title"] == "test: dense less bm25, mean +0.5000"
    (panel,) = draw("difference", "--input", second, first, "--quantities", "R@2")
    assert points(panel)["worse: 2"] == ([1, 2], [-0.5, -1.0])


def test_recall_is_that_of_evaluate_at_every_depth(draw, evaluations):
    folders, qrels = evaluations
    (panel,) = draw("recall", "--input", *folders, "--qrels", qrels)
    for name, folder in zip(RUNS, folders, strict=True):
        found = read_run(folder / "run.trec")
        depths, recalls = points(panel)[name]
        assert depths == [*range(1, 4 if name == "bm25" else 3)]
        for depth, recall in zip(depths, recalls, strict=True):
            values = score_run(found, QRELS, [f"R@{depth}"])[f"R@{depth}"].values()
            assert recall == pytest.approx(np.mean([*values]), abs=1e-12), (name, depth)


def test_terms_are_counted_by_kind(draw, tmp_path):
    for kind, counts in (("passage", [3, 1, 3, 0]), ("query", [2])):
        matrix = csr_matrix(np.arange(5) < np.array(counts)[:, None], dtype=np.float32)
        write_shard(tmp_path / kind, 0, matrix, [f"t{row}" for row in range(len(counts))])
        meta = {"count": len(counts), "dim": 5, "head": "sparse", "kind": kind}
        finish_embeddings(tmp_path / kind, meta)
    panels = draw("terms", "--input", tmp_path / "passage", tmp_path / "query")
    assert [panel["title"] for panel in panels] == ["passage", "query"]
    assert points(panels[0]) == {"passage: mean 1.8, median 2": ([0, 1, 3], [0.25, 0.5, 1.0])}
    assert points(panels[1]) == {"query: mean 2.0, median 2": ([2], [1.0])}


@pytest.fixture
def growing(tmp_path):
    """Costs as bench/growth.py writes them: one in proportion to the size, one to its root, and no
    disk space."""
    rows = []
    for size in (100, 10_000):
        rows.append({"stage": "encode", "passages": size, "seconds": size / 50, "disk_mb": size})
        rows.append({"stage": "search", "passages": size, "seconds": size**0.5, "disk_mb": 0.0})
    (tmp_path / "growth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_growth_states_the_exponents(draw, growing):
    seconds, disk = draw("growth", "--input", growing)
    assert points(seconds) == {
        "encode: exponent 1.00": ([100, 10_000], [2.0, 200.0]),
        "search: exponent 0.50": ([100, 10_000], [10.0, 100.0]),
    }
    assert points(disk) == {"encode: exponent 1.00": ([100, 10_000], [100.0, 10_000.0])}
    assert seconds["log"] == disk["log"] == "xy"


def test_names_are_what_tells_paths_apart(tmp_path):
    def names(*paths):
        return plot.run_names([tmp_path / path for path in paths], "log.jsonl")

    assert names("run/log.jsonl") == ["run"]
    assert names("other.jsonl") == ["other.jsonl"]
    assert names("a/x/log.jsonl", "b/x/log.jsonl") == ["a", "b"]
    assert names("a/log.jsonl", "a/b/log.jsonl") == ["a", "a/b"]


def test_what_cannot_be_drawn_is_refused(script, logs, evaluations, growing, tmp_path):
    (first, second), qrels = evaluations
    run = logs[0]
    empty = log(tmp_path / "empty")
    wrong = log(tmp_path / "wrong", {"step": 1, "loss": 1.0}, {"loss": 1.0})
    (tmp_path / "half.jsonl").write_text('{"stage": "encode", "seconds": 1}\n')
    (tmp_path / "bare.json").write_text('{"splits": {"test": {"metrics": {"AP": 1}}}}')
    lines = (second / "per_query.tsv").read_text().splitlines()
    (tmp_path / "short.tsv").write_text("\n".join(lines[:-1]) + "\n")
    finish_embeddings(tmp_path / "dense", {"count": 1, "dim": 2, "kind": "query"})
    write_shard(tmp_path / "dense", 0, np.ones((1, 2), dtype=np.float32), ["q"])
    missing = tmp_path / "missing"
    for kind, flags, message in (
        ("curves", [empty], "empty/log.jsonl: the log is empty — "),
        ("curves", [wrong], "wrong/log.jsonl:2: no step — "),
        ("curves", [missing], "missing: no such file — "),
        (
            "curves",
            [run, "--quantities", "los"],
            "no los in it — --quantities are probe_cosine, loss",
        ),
        ("curves", [run, "--qrels", qrels], "--qrels: --kind curves has no such flag — "),
        ("curves", [run, run], "--names: not one for each input, or one twice — "),
        ("groups", [run], "mlm-0/pretrained/log.jsonl: no group_weights — "),
        ("metrics", [tmp_path / "bare.json"], "bare.json: not as the scripts write it (KeyError: "),
        ("difference", [first], "--kind difference — give two"),
        (
            "difference",
            [first / "per_query.tsv", tmp_path / "short.tsv"],
            "short.tsv: other queries",
        ),
        ("difference", [first, qrels], "test.tsv: not as the scripts write it ("),
        ("recall", [first], "--kind recall needs judgments — "),
        ("terms", [tmp_path / "dense"], "dense: dense vectors have no terms — "),
        (
            "growth",
            [tmp_path / "half.jsonl"],
            "half.jsonl:1: not as the scripts write it (KeyError",
        ),
    ):
        out = tmp_path / "out.json"
        status, _, errors = script(
            "recipes.plot", "--kind", kind, "--output", out, "--input", *flags
        )
        assert status == 1 and message in errors and errors.count("\n") == 1, (message, errors)
        assert not out.exists()
    flags = ["--kind", "curves", "--input", run, "--output", tmp_path / "curves.pdf"]
    status, _, errors = script("recipes.plot", *flags)
    assert status == 1 and "curves.pdf: unknown ending — give .png, .svg or .json" in errors


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn."""
    pytest.importorskip("matplotlib")
    kept, original = [], plot.draw
    monkeypatch.setattr(plot, "draw", lambda *a, **k: kept.append(original(*a, **k)) or kept[-1])
    return kept


def test_the_axes_hold_these_numbers(script, figures, logs, evaluations, growing, tmp_path):
    folders, qrels = evaluations
    for kind, flags in (
        ("curves", logs),
        ("metrics", folders),
        ("difference", folders),
        ("recall", [*folders, "--qrels", qrels]),
        ("growth", [growing]),
    ):
        for ending in ("json", "svg"):
            out = tmp_path / f"{kind}.{ending}"
            status, _, errors = script(
                "recipes.plot", "--kind", kind, "--output", out, "--input", *flags
            )
            assert status == 0, errors
        panels = json.loads((tmp_path / f"{kind}.json").read_text())
        text = (tmp_path / f"{kind}.svg").read_text()
        assert len(figures[-1].axes) == len(panels)
        for axes, panel in zip(figures[-1].axes, panels, strict=True):
            assert axes.get_title() == panel["title"] and f">{panel['title']}<" in text
            if panel["form"] == "bars":
                for patch, line in zip(axes.patches, panel["lines"], strict=True):
                    values, edges, _ = patch.get_data()
                    assert np.repeat(values, np.diff(edges).astype(int)).tolist() == line["y"]
                    assert not line["x"] or edges[0] == line["x"][0] - 0.5
                continue
            drawn = [[*map(list, line.get_data())] for line in axes.get_lines()]
            for line in panel["lines"]:
                assert [line["x"], line["y"]] in drawn, (kind, line["name"])
        lengths = {axes.get_xscale() for axes in figures[-1].axes}
        assert lengths == {"log" if kind in ("recall", "growth") else "linear"}


def test_a_picture_is_the_same_each_time(script, figures, logs, tmp_path):
    texts = []
    for number in range(2):
        out = tmp_path / f"{number}.svg"
        status, _, errors = script(
            "recipes.plot", "--kind", "curves", "--output", out, "--input", *logs
        )
        assert status == 0, errors
        texts.append(out.read_bytes())
    assert texts[0] == texts[1]
    assert not re.search(rb"\d{4}-\d\d-\d\dT", texts[0])  # no date
    legend = [text.get_text() for text in figures[-1].legends[0].get_texts()]
    assert legend == ["mlm-0", "bow-0"]
    png = tmp_path / "curves.png"
    assert script("recipes.plot", "--kind", "curves", "--output", png, "--input", *logs)[0] == 0
    assert png.read_bytes().startswith(b"\x89PNG")


def test_an_interval_of_equal_values_is_drawn():
    """The mean of a sample of them may differ from theirs in the last bit."""
    pytest.importorskip("matplotlib")
    line = plot.Line("run", [0.1], [0], 0, (0.1 + 2e-17, 0.1))
    (axes,) = plot.draw([plot.Panel("AP", "", "", [line], "points")], shared=False).axes
    assert axes.get_yticklabels()[0].get_text() == "run: 0.1000"


def test_runs_differ_in_more_than_colour():
    looks = [
        (n % len(plot.DASHES), n % len(plot.MARKERS))
        for n in range(len(plot.DASHES) * len(plot.MARKERS))
    ]
    assert len(set(looks)) == len(looks) == 36
