"""Metrics: trec_eval's through pytrec_eval, and what it lacks: RR@k by the MS MARCO definition, hole rate, tests.

Names are those of ir_measures: nDCG@10  RR@10 (MRR@10)  R@100 (Recall@100)  AP (MAP)  P@10  Success@5  Hole@10.
A value belongs to a judged query. Queries that the run lacks, or that have no relevant passage, count 0, as under
trec_eval -c.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from lib.files import RunList, UserError

ALIASES = {
    "mrr": "RR",
    "rr": "RR",
    "recall": "R",
    "r": "R",
    "map": "AP",
    "ap": "AP",
    "ndcg": "nDCG",
    "p": "P",
}
ALIASES |= {"precision": "P", "success": "Success", "hole": "Hole"}
PYTREC = {
    "nDCG": ("ndcg", "ndcg_cut"),
    "AP": ("map", "map_cut"),
    "R": (None, "recall"),
    "P": (None, "P"),
    "RR": ("recip_rank", None),
}


def parse_metric(name: str) -> tuple[str, int | None]:
    """("nDCG", 10) from "nDCG@10" or "ndcg@10"; None for no cut."""
    match = re.fullmatch(r"([A-Za-z]+)(?:@([1-9]\d*))?", name)
    kind, cut = (
        (ALIASES.get(match[1].lower()), match[2] and int(match[2])) if match else (None, None)
    )
    if kind is None or (cut is None and kind in ("R", "P", "Success", "Hole")):
        raise UserError(
            f"--metrics {name}: unknown — take nDCG@k, RR@k, R@k, AP, P@k, Success@k, Hole@k"
        )
    return kind, cut


def metric_name(name: str) -> str:
    kind, cut = parse_metric(name)
    return kind if cut is None else f"{kind}@{cut}"


# ---------------------------------------------------------------------------------------------------------------------
# orders


def order(entry: RunList, ties: str = "score") -> list[int]:
    """Positions of a query's list in evaluation order. "score": as trec_eval, which ignores the rank column: score (as
    float32) descending, id descending. "rank": by the rank column, as the MS MARCO script does."""
    if ties == "rank":
        return np.argsort(entry.ranks, kind="stable").tolist()
    by_score = np.argsort(-entry.scores, kind="stable")
    ordered = entry.scores[by_score]
    if not (ordered[1:] == ordered[:-1]).any():
        return by_score.tolist()
    by_id = sorted(range(len(entry.pids)), key=entry.pids.__getitem__, reverse=True)
    return sorted(by_id, key=lambda i: -entry.scores[i])


def reciprocal_rank_fusion(
    runs: Sequence[dict[str, RunList]], ties: str = "score", k: int = 60
) -> dict[str, RunList]:
    """One run from several: score = sum over runs of 1 / (k + rank). Cormack et al., SIGIR 2009; k = 60 is theirs."""
    fused = {}
    for qid in dict.fromkeys(qid for run in runs for qid in run):
        scores = {}
        for run in runs:
            if qid in run:
                for rank, at in enumerate(order(run[qid], ties), 1):
                    pid = run[qid].pids[at]
                    scores[pid] = scores.get(pid, 0.0) + 1.0 / (k + rank)
        pids = sorted(scores, key=lambda pid: (-scores[pid], pid))
        values = np.array([scores[pid] for pid in pids], dtype=np.float32)
        fused[qid] = RunList(pids, values, np.arange(1, len(pids) + 1, dtype=np.int32))
    return fused


# ---------------------------------------------------------------------------------------------------------------------
# values per query


def mrr_at_k(
    ranking: dict[str, Sequence[str]], qrels: dict[str, dict[str, int]], k: int, level: int = 1
) -> float:
    """Mean over ALL queries of the qrels of 1 / rank of the first relevant passage among the first k, else 0: the
    official MS MARCO definition (ms_marco_eval.py). ranking[qid] = passages, best first."""
    return float(
        np.mean(
            [
                _reciprocal_rank(ranking.get(qid, ())[:k], judged, level)
                for qid, judged in qrels.items()
            ]
        )
    )


def _reciprocal_rank(pids: Sequence[str], judged: dict[str, int], level: int) -> float:
    return next(
        (1.0 / rank for rank, pid in enumerate(pids, 1) if judged.get(pid, 0) >= level), 0.0
    )


def score_run(
    run: dict[str, RunList],
    qrels: dict[str, dict[str, int]],
    metrics: Iterable[str],
    level: int = 1,
    ties: str = "score",
) -> dict[str, dict[str, float]]:
    """values[metric][qid] for every query of the qrels. `level`: lowest grade that the binary metrics (all but nDCG)
    count as relevant; 2 for the passage tasks of TREC DL. nDCG uses every grade (gain = grade, negative grades 0).

    RR@k and Success@k look at the first k alone (pytrec_eval ignores a cut on recip_rank). Hole@k: the share of the
    first k retrieved that nobody judged, 0 for an empty list; its mean is over queries."""
    import pytrec_eval

    wanted = {metric_name(name): parse_metric(name) for name in metrics}
    rankings = {
        qid: [run[qid].pids[at] for at in order(run[qid], ties)] for qid in qrels if qid in run
    }
    theirs = {}  # our name -> pytrec_eval's
    for name, (kind, cut) in wanted.items():
        plain, with_cut = PYTREC.get(kind, (None, None))
        if cut and with_cut:
            theirs[name] = f"{with_cut}.{cut}"
        elif not cut and plain:
            theirs[name] = plain
    # pytrec_eval sorts by itself, exactly as order(): scores that fall strictly hand it the order of the rank column
    lists = {
        qid: dict(zip(pids, range(len(pids), 0, -1), strict=True))
        if ties == "rank"
        else _scores(run[qid])
        for qid, pids in rankings.items()
    }
    measured = pytrec_eval.RelevanceEvaluator(
        qrels, set(theirs.values()), relevance_level=level
    ).evaluate(lists)
    values = {}
    for name, (kind, cut) in wanted.items():
        if name in theirs:
            key = theirs[name].replace(".", "_")
            values[name] = {qid: measured[qid][key] if qid in measured else 0.0 for qid in qrels}
            continue
        values[name] = {}
        for qid, judged in qrels.items():
            pids = rankings.get(qid, [])[:cut]
            if kind == "Hole":
                values[name][qid] = (
                    sum(pid not in judged for pid in pids) / len(pids) if pids else 0.0
                )
            else:
                rank = _reciprocal_rank(pids, judged, level)
                values[name][qid] = rank if kind == "RR" else float(rank > 0)
    return values


def _scores(entry: RunList) -> dict[str, float]:
    return dict(zip(entry.pids, entry.scores.astype(float).tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# chance


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, trials: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean, queries drawn with replacement. For a paired comparison pass differences."""
    values, draw, means = np.asarray(values, dtype=np.float64), np.random.default_rng(seed), []
    for _ in range(0, trials, 1000):
        means.append(values[draw.integers(0, len(values), (1000, len(values)))].mean(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def randomisation_test(differences: Sequence[float], seed: int = 0, trials: int = 10_000) -> float:
    """Two-sided p of a paired randomisation (permutation) test that the mean difference is 0: the share of sign flips
    whose mean is at least as far from 0. All 2^n flips for up to 13 queries, else random ones, the observed one
    counted in (Smucker et al., CIKM 2007)."""
    differences = np.asarray(differences, dtype=np.float64)
    n, observed = len(differences), abs(differences.sum())
    reach = observed * (1 - 1e-12) - 1e-12  # sums in another order differ in the last bits
    if n <= 13:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ differences) >= reach).mean())
    draw, further = np.random.default_rng(seed), 0
    for _ in range(0, trials, 1000):
        signs = draw.integers(0, 2, (1000, n), dtype=np.int8) * 2.0 - 1.0
        further += int((np.abs(signs @ differences) >= reach).sum())
    return (further + 1) / (-(-trials // 1000) * 1000 + 1)
