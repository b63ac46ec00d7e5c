"""Draw what the scripts have written (pip install matplotlib).

    curves       log.jsonl of trainers: losses, accuracies, probe, development set, learning rate
    groups       the weights of groups in log.jsonl of finetune_biencoder.py --dro
    metrics      metrics.json of evaluate.py: each metric with its 95% interval
    difference   per_query.tsv of evaluate.py: the others less the first, query by query, sorted
    recall       recall at every depth, from runs and --qrels; equal to R@k of evaluate.py
    terms        sparse embeddings of encode.py: the share that has at most so many terms
    growth       JSON lines of bench/growth.py: cost against number of passages, on log axes

Runs are told apart by colour (those of Okabe and Ito, for the colour-blind), line and marker.

Reads   --input: files, or the folders that hold them, as many as are to be compared
Writes  --output: a picture; or, as .json, the numbers that would be drawn. The same command writes
        the same bytes.

    python -m recipes.plot --kind curves --input runs/a runs/b --output curves.svg
    python -m recipes.plot --kind recall --input bm25 dense --qrels test.tsv --output recall.png
"""

import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lib.arguments import arg, parse_args
from lib.embeddings import Embeddings
from lib.files import UserError, atomic, positives, read_json, read_qrels, read_run, write_json
from lib.launch import run
from lib.lines import json_lines, lines, one_line
from lib.metrics import in_order

COLOURS = "#0072B2 #D55E00 #009E73 #000000 #CC79A7 #E69F00 #56B4E9".split()
DASHES = ["-", "--", ":", "-."]
MARKERS = "osD^vPX<>"  # 7 colours, 4 dashes, 9 markers: 252 runs before two look alike
GREY = -1
UNITS = {  # of a quantity by the end of its name; panels of a log stand in this order
    ("loss", "contrastive", "kl"): "nats",
    ("accuracy",): "share that is right",
    ("rebuild",): "share of tokens",
    ("recall@100",): "share of positives",
    ("cosine",): "cosine of two texts",
    ("terms",): "terms per text",
    ("lr",): "learning rate",
    ("grad_norm",): "L2 norm",
    ("seconds",): "s",
    ("memory_mb", "disk_mb"): "MB",
    ("",): "",
}
TIMING = {"waited", "tokens/s", "queries/s"}  # left out of curves, unless asked for
NAMED_GROUPS = 7  # the others are drawn in grey
STYLE = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # one is where the SVG is shown; equally wide
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.markersize": 4,
    "svg.fonttype": "none",  # letters stay letters: smaller files, and text that can be searched
    "svg.hashsalt": "isthmus",
}


@dataclass(kw_only=True)
class Args:
    kind: Literal["curves", "groups", "metrics", "difference", "recall", "terms", "growth"] = arg(
        help="what to draw"
    )
    input: list[str] = arg(help="files that the scripts have written, or their folders")
    output: str = arg(help="file to write: .png, .svg, or .json for the numbers")
    names: list[str] = arg([], help="names of the inputs (default: what tells their paths apart)")
    quantities: list[str] = arg([], help="draw these alone: names in a log, metrics, costs")
    qrels: str | None = arg(None, help="recall: the judgments")


class Line(NamedTuple):
    """What is drawn of one run. style: its number, by which it looks alike in all panels, or GREY.
    interval: low and high of a single value."""

    name: str
    x: list
    y: list
    style: int
    interval: tuple[float, float] | None = None


class Panel(NamedTuple):
    """One pair of axes. form: lines, steps (y holds until the next x), points (one value a line,
    with its interval) or bars (of width 1; equal neighbours are one bar). log: the axes that are
    logarithmic."""

    title: str
    x: str
    y: str
    lines: list[Line]
    form: str = "lines"
    log: str = ""


# ---- what is drawn of {name of a run: its path}


def check_quantities(args: Args, known, path) -> None:
    for name in args.quantities:
        if name not in known:
            raise UserError(f"{path}: no {name} in it — --quantities are {', '.join(known)}")


def damaged(path):
    return one_line(f"{path}: not as the scripts write it", "give what --help names")


def unit(quantity: str) -> tuple[str, ...]:
    """Its key in UNITS."""
    return next(ends for ends in UNITS if quantity.endswith(ends))


def place(quantity: str) -> tuple:
    """Sorts the panels of a log: by unit, then the short names first, as `loss` of all losses."""
    return [*UNITS].index(unit(quantity)), len(quantity), quantity


def read_log(path: Path) -> list[dict]:
    rows = []
    for number, row in json_lines(path):
        if type(row.get("step")) is not int:
            raise UserError(f"{path}:{number}: no step — give the log.jsonl of a trainer")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: the log is empty — wait for its first line")
    return rows


def curves(paths: dict[str, Path], args: Args) -> list[Panel]:
    found = {}  # quantity -> run -> line
    for style, (name, path) in enumerate(paths.items()):
        for row in read_log(path):
            for quantity, value in row.items():
                if quantity != "step" and type(value) in (int, float):
                    own = found.setdefault(quantity, {})
                    line = own.setdefault(name, Line(name, [], [], style))
                    line.x.append(row["step"])
                    line.y.append(value)
    check_quantities(args, found, args.input[0])
    chosen = args.quantities or sorted(found.keys() - TIMING, key=place)
    return [Panel(name, "step", UNITS[unit(name)], [*found[name].values()]) for name in chosen]


def groups(paths: dict[str, Path], args: Args) -> list[Panel]:
    panels = []
    for name, path in paths.items():
        rows = [row for row in read_log(path) if "group_weights" in row]
        if not rows:
            raise UserError(f"{path}: no group_weights — train with finetune_biencoder.py --dro")
        steps = [row["step"] for row in rows]
        with damaged(path):
            weights = np.array([row["group_weights"] for row in rows], dtype=float).T  # (K, steps)
            ranked = np.argsort(-weights[:, -1], kind="stable").tolist()
        drawn = []
        for rank, group in enumerate(ranked):
            style = rank if rank < NAMED_GROUPS else GREY
            drawn.append(Line(f"group {group}", steps, weights[group].tolist(), style))
        title = f"{name}: {len(weights)} groups"
        panels.append(Panel(title, "step", "weight of a group", drawn))
    return panels


def metrics(paths: dict[str, Path], args: Args) -> list[Panel]:
    found = {}  # (split, metric) -> lines
    for style, (name, path) in enumerate(paths.items()):
        with damaged(path):
            for split, part in read_json(path)["splits"].items():
                for metric, value in part["metrics"].items():
                    low, high = part["intervals"][metric]
                    line = Line(name, [float(value)], [style], style, (float(low), float(high)))
                    found.setdefault((split, metric), []).append(line)
    known = [*dict.fromkeys(metric for _, metric in found)]
    check_quantities(args, known, args.input[0])
    chosen = [key for key in found if key[1] in (args.quantities or known)]
    return [Panel(": ".join(key), "", "", found[key], "points") for key in chosen]


def difference(paths: dict[str, Path], args: Args) -> list[Panel]:
    if len(paths) < 2 or len(args.quantities) > 1:
        raise UserError("--kind difference — give two evaluations or more, and one metric")
    tables = {name: read_per_query(path, args) for name, path in paths.items()}
    (base, (metric, before)), *others = tables.items()
    panels = []
    for name, (other, after) in others:
        if (other, after.keys()) != (metric, before.keys()):
            wrong = f"{paths[name]}: other queries or metrics than {paths[base]}"
            raise UserError(f"{wrong} — give evaluations of the same queries")
        for split, keys in groupby(before, key=lambda key: key[0]):
            gaps = np.sort([after[key] - before[key] for key in keys])[::-1]
            parts = {"better": gaps > 0, "equal": gaps == 0, "worse": gaps < 0}
            drawn = []
            for style, (what, places) in zip((0, 3, 5), parts.items(), strict=True):
                x = np.flatnonzero(places).tolist()
                drawn.append(Line(f"{what}: {len(x)}", x, gaps[places].tolist(), style))
            title = f"{split}: {name} less {base}, mean {gaps.mean():+.4f}"
            y = f"difference in {metric}"
            panels.append(Panel(title, "queries, by difference", y, drawn, "bars"))
    return panels


def read_per_query(path: Path, args: Args) -> tuple[str, dict[tuple[str, str], float]]:
    """(metric, {(split, qid): value}), split by split; the metric asked for, or the first."""
    with damaged(path):
        head, *rows = (line.split("\t") for _, line in lines(path))
        check_quantities(args, head[2:], path)
        at = head.index(args.quantities[0]) if args.quantities else 2
        found = {(split, qid): float(values[at - 2]) for qid, split, *values in rows}
        return head[at], dict(sorted(found.items()))


def recall(paths: dict[str, Path], args: Args) -> list[Panel]:
    if not args.qrels:
        raise UserError("--kind recall needs judgments — give --qrels")
    qrels = read_qrels(args.qrels)
    relevant = positives(qrels)
    drawn = []
    for style, (name, path) in enumerate(paths.items()):
        found = read_run(path)
        judged = relevant.keys() & found.keys()
        if not judged:
            wrong = f"{path}: no query has a positive in {args.qrels}"
            raise UserError(f"{wrong} — give its judgments")
        y = np.zeros(max(len(entry.pids) for entry in found.values()))
        for qid in judged:
            wanted = set(relevant[qid])
            hits = [pid in wanted for pid in in_order(found[qid]).pids]
            y[: len(hits)] += np.array(hits) / len(wanted)
        y = y.cumsum() / len(qrels)  # a query without a result or a positive counts 0
        drawn.append(Line(name, [*range(1, len(y) + 1)], y.tolist(), style))
    title = f"{Path(args.qrels).name}: {len(qrels)} queries"
    return [Panel(title, "depth k, passages", "recall@k", drawn, log="x")]


def terms(paths: dict[str, Path], args: Args) -> list[Panel]:
    found = {}  # kind -> lines
    for style, (name, path) in enumerate(paths.items()):
        embeddings = Embeddings(path)
        if not embeddings.sparse:
            raise UserError(f"{path}: dense vectors have no terms — give sparse ones")
        blocks = embeddings.blocks(0, embeddings.num_vectors, 1 << 16)
        counts = np.concatenate([block.getnnz(axis=1) for _, block in blocks])
        x, vectors = np.unique(counts, return_counts=True)
        y = vectors.cumsum() / len(counts)
        label = f"{name}: mean {counts.mean():.1f}, median {np.median(counts):g}"
        kind = embeddings.meta.get("kind", "text")
        found.setdefault(kind, []).append(Line(label, x.tolist(), y.tolist(), style))
    y = "share with at most so many"
    return [Panel(kind, f"terms of a {kind}", y, some, "steps") for kind, some in found.items()]


def growth(paths: dict[str, Path], args: Args) -> list[Panel]:
    found, stages = {}, {}  # cost -> stage -> points; stage -> its number
    for name, path in paths.items():
        for number, row in json_lines(path):
            with damaged(f"{path}:{number}"):
                passages = int(row.pop("passages"))
                stage = row.pop("stage") if len(paths) == 1 else f"{name}, {row.pop('stage')}"
                stages.setdefault(stage, len(stages))
                for cost, value in row.items():
                    if value > 0:  # a log axis has no 0
                        points = found.setdefault(cost, {}).setdefault(stage, [])
                        points.append((passages, float(value)))
    check_quantities(args, found, args.input[0])
    panels = []
    for cost in args.quantities or found:
        drawn = []
        for stage, points in found[cost].items():
            slope = exponent(points)
            label = stage if slope is None else f"{stage}: exponent {slope:.2f}"
            drawn.append(Line(label, [p[0] for p in points], [p[1] for p in points], stages[stage]))
        panels.append(Panel(cost, "passages", UNITS[unit(cost)], drawn, log="xy"))
    return panels


def exponent(points: list[tuple[float, float]]) -> float | None:
    """The least-squares slope of log cost over log size, from (size, cost); 1 is a cost in
    proportion to the size. None: all points are of one size."""
    x, y = np.log(points).T if points else ([], [])
    return float(np.polyfit(x, y, 1)[0]) if len(set(x)) > 1 else None


KINDS = {  # what draws it, its file in the folder of a run, the flag that it has of its own
    "curves": (curves, "log.jsonl", "quantities"),
    "groups": (groups, "log.jsonl", ""),
    "metrics": (metrics, "metrics.json", "quantities"),
    "difference": (difference, "per_query.tsv", "quantities"),
    "recall": (recall, "run.trec", "qrels"),
    "terms": (terms, "", ""),
    "growth": (growth, "growth.jsonl", "quantities"),
}

# ---- how it is drawn


def run_names(paths: list[Path], file: str) -> list[str]:
    """What tells paths apart: their parts without those at both ends that all of them have."""
    parts = [path.resolve().parts for path in paths]
    if len(parts) == 1:
        return [parts[0][-2 if parts[0][-1] == file else -1]]
    for end, rest in ((-1, slice(None, -1)), (0, slice(1, None))):
        while len({names[end] for names in parts}) == 1 and min(map(len, parts)) > 1:
            parts = [names[rest] for names in parts]
    return ["/".join(names) for names in parts]


def draw(panels: list[Panel], shared: bool):
    """-> a matplotlib Figure, 8 inches wide. shared: one legend for all panels."""
    from matplotlib.figure import Figure

    crowded = not shared and max(len(panel.lines) for panel in panels) > 4
    columns = 1 if crowded else min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    height = 2.5 if columns == 2 else 3.5
    if panels[0].form == "points":
        height = 0.9 + 0.25 * max(len(panel.lines) for panel in panels)
    figure = Figure(figsize=(8, height * rows + 0.4 * shared), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False, sharex=shared)
    every = every.flatten().tolist()
    handles = {}
    for axes, panel in zip(every, panels, strict=False):
        draw_panel(axes, panel)
        artists, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, artists, strict=True))
        if not shared and panel.form != "points":
            beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if crowded else {}
            axes.legend(fontsize=8, **beside)
    for axes in every[len(panels) :]:
        axes.remove()
    if shared:
        style = {line.name: line.style for panel in panels for line in panel.lines}
        names = sorted(handles, key=style.get)
        where = {"loc": "outside upper center", "ncols": max(110 // (max(map(len, names)) + 8), 1)}
        figure.legend([handles[name] for name in names], names, **where)
    return figure


def draw_panel(axes, panel: Panel) -> None:
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.tick_params(labelbottom=True)  # where panels share an axis, only the lowest would have it
    axes.locator_params(nbins=5)
    for name, x, y, style, interval in panel.lines:
        look = {"label": name, "color": COLOURS[style % len(COLOURS)]}
        marked = look | {"marker": MARKERS[style % len(MARKERS)]}
        if style == GREY:
            axes.plot(x, y, color="#bbbbbb", linewidth=0.8, zorder=1)
        elif panel.form == "bars":
            bars = [(value, len([*same])) for value, same in groupby(y)]
            edges = np.cumsum([x[0] - 0.5 if x else 0.0, *(width for _, width in bars)])
            axes.stairs([value for value, _ in bars], edges, fill=True, **look)
        elif panel.form == "points":
            sides = [[x[0] - interval[0]], [interval[1] - x[0]]]
            sides = np.maximum(sides, 0)  # the last bits of equal values may cross
            axes.errorbar(x, y, xerr=sides, capsize=3, **marked)
        else:
            spread = np.geomspace if "x" in panel.log else np.linspace
            first = 1 + style % max(len(x) // 9, 1)  # marks of equal lines stand side by side
            at = np.unique(spread(first, len(x), 9).astype(int)) - 1
            marked |= {"linestyle": DASHES[style % len(DASHES)], "markevery": at.tolist()}
            axes.plot(x, y, drawstyle="steps-post" if panel.form == "steps" else None, **marked)
    if panel.form == "bars":
        axes.axhline(0, color="black", linewidth=0.8)
    if panel.form == "points":
        names = [f"{line.name}: {line.x[0]:.4f}" for line in panel.lines]
        axes.set_yticks([line.y[0] for line in panel.lines], names)
        axes.margins(y=0.3)
        axes.invert_yaxis()
    for letter in panel.log:
        axes.set(**{f"{letter}scale": "log"})
        axis = axes.xaxis if letter == "x" else axes.yaxis
        axis.get_major_locator().set_params(subs=(1, 2, 5))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter("")


def main():
    args = parse_args(Args)
    out = Path(args.output)
    if out.suffix not in (".png", ".svg", ".json"):
        raise UserError(f"--output {out}: unknown ending — give .png, .svg or .json")
    function, file, own = KINDS[args.kind]
    for flag in ("quantities", "qrels"):
        if getattr(args, flag) and flag != own:
            raise UserError(f"--{flag}: --kind {args.kind} has no such flag — leave it out")
    paths = [Path(name) for name in args.input]
    paths = [path / file if path.is_dir() else path for path in paths]
    names = args.names or run_names(paths, file)
    if not len(set(names)) == len(names) == len(paths):
        raise UserError("--names: not one for each input, or one twice — give other names")
    panels = function(dict(zip(names, paths, strict=True)), args)
    if not any(line.x for panel in panels for line in panel.lines):
        raise UserError(f"{paths[0]}: nothing in it can be drawn — check the path")
    if out.suffix == ".json":
        shown = [p._asdict() | {"lines": [line._asdict() for line in p.lines]} for p in panels]
        return write_json(out, shown)
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise UserError(f"{error} — pip install matplotlib") from error
    with rc_context(STYLE), atomic(out) as temporary:
        metadata = {"Date": None} if out.suffix == ".svg" else None
        figure = draw(panels, shared=args.kind == "curves")
        figure.savefig(temporary, format=out.suffix[1:], dpi=150, metadata=metadata)
    print(f"{args.kind} of {', '.join(names)} -> {out}")


if __name__ == "__main__":
    run(main)
