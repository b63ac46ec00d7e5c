"""Metrics of a run, fusion of runs, and two statistics: a bootstrap interval, a randomisation test.

Metrics are trec_eval's (through pytrec_eval), and names those of ir_measures. Every judged query
has a value: 0 if it has no result or no relevant passage, as under `trec_eval -c`.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import bootstrap

from lib.files import RunList, UserError

KINDS = {"ndcg": "nDCG", "rr": "RR", "mrr": "RR", "r": "R", "recall": "R", "ap": "AP", "map": "AP"}
KINDS |= {"p": "P", "precision": "P", "success": "Success", "hole": "Hole"}
# trec_eval's names; Hole is not one of its metrics, and its recip_rank knows no cut
WITH_CUT = {"nDCG": "ndcg_cut", "R": "recall", "AP": "map_cut", "P": "P", "Success": "success"}
WITHOUT_CUT = {"nDCG": "ndcg", "AP": "map", "RR": "recip_rank"}


def metric_name(name: str) -> str:
    """ "nDCG@10" from "ndcg@10", "AP" from "map". UserError: an unknown metric."""
    match = re.fullmatch(r"([A-Za-z]+)(@[1-9][0-9]{0,6})?", name)
    kind = KINDS.get(match[1].lower()) if match else None
    if kind is None or (match[2] is None and kind not in WITHOUT_CUT):
        known = "nDCG@k, RR@k, R@k, AP, P@k, Success@k or Hole@k"
        raise UserError(f"--metrics {name}: unknown metric — give {known}, k from 1 to 9999999")
    return kind + (match[2] or "")


def order(entry: RunList) -> list[int]:
    """Positions of a list in trec_eval's order: score (float32) descending, then id descending."""
    pairs = [*zip(entry.scores.tolist(), entry.pids, strict=True)]
    return sorted(range(len(pairs)), key=pairs.__getitem__, reverse=True)


def in_order(entry: RunList) -> RunList:
    """The list in that order."""
    places = order(entry)
    return RunList([entry.pids[at] for at in places], entry.scores[places])


def reciprocal_rank_fusion(runs: Sequence[dict[str, RunList]], k: int = 60) -> dict[str, RunList]:
    """One run from several: a score is the sum over the runs of 1 / (k + rank). Cormack et al.,
    SIGIR 2009, with their k."""
    fused = {}
    for qid in dict.fromkeys(qid for run in runs for qid in run):
        scores = {}
        for entry in (run[qid] for run in runs if qid in run):
            for rank, pid in enumerate(in_order(entry).pids, 1):
                scores[pid] = scores.get(pid, 0.0) + 1.0 / (k + rank)
        pids = sorted(scores, key=lambda pid: (-scores[pid], pid))
        fused[qid] = RunList(pids, np.array([scores[pid] for pid in pids], dtype=np.float32))
    return fused


def mrr_at_k(ranking: dict[str, Sequence[str]], qrels: dict, k: int, level: int = 1) -> float:
    """The official MS MARCO definition (ms_marco_eval.py): the mean over ALL queries of the qrels
    of 1 / rank of the first relevant passage in ranking[qid][:k], best first, or 0."""
    values = []
    for qid, judged in qrels.items():
        hits = [judged.get(pid, 0) >= level for pid in ranking.get(qid, ())[:k]]
        values.append(1.0 / (hits.index(True) + 1) if any(hits) else 0.0)
    return float(np.mean(values))


def score_run(
    run: dict[str, RunList], qrels: dict[str, dict], metrics: Iterable[str], level: int = 1
) -> dict[str, dict[str, float]]:
    """values[metric][qid] for every query of the qrels; metrics: what metric_name returns.

    level: the lowest grade that all metrics but nDCG take as relevant; 2 for passages of TREC DL.
    nDCG uses every grade (gain = grade; a negative grade gains nothing). Hole@k is the share of
    the first k passages that nobody judged, 0 for an empty list."""
    import pytrec_eval

    parsed = {name: name.partition("@")[::2] for name in metrics}  # kind, cut or ""
    measures = {}
    for name, (kind, cut) in parsed.items():
        if kind != "Hole":
            has_cut = cut and kind != "RR"
            measures[name] = f"{WITH_CUT[kind]}.{cut}" if has_cut else WITHOUT_CUT[kind]
    lists = {qid: run[qid] for qid in qrels if qid in run}
    scores = {qid: dict(zip(e.pids, e.scores.tolist(), strict=True)) for qid, e in lists.items()}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, set(measures.values()), relevance_level=level)
    measured = evaluator.evaluate(scores)
    values = {name: dict.fromkeys(qrels, 0.0) for name in parsed}
    for name, (kind, cut) in parsed.items():
        for qid, entry in lists.items():
            if kind == "Hole":
                first = in_order(entry).pids[: int(cut)]
                value = sum(pid not in qrels[qid] for pid in first) / max(len(first), 1)
            else:
                value = measured.get(qid, {}).get(measures[name].replace(".", "_"), 0.0)
            too_late = kind == "RR" and cut and value < 1.0 / int(cut)
            values[name][qid] = 0.0 if too_late else value
    return values


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean over queries, from 10,000 samples. For a paired
    comparison pass the differences. (scipy refuses a single value.)"""
    if len(values) == 1:
        return float(values[0]), float(values[0])
    settings = {"n_resamples": 10_000, "batch": 1000, "method": "percentile"}
    found = bootstrap((values,), np.mean, rng=np.random.default_rng(seed), **settings)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


DRAWS = 10_000


def p_text(p: float) -> str:
    """A p of randomisation_test in four digits. The least that it can find by drawing, where no
    draw is as far from 0 as what was observed, is an upper bound and no estimate."""
    return "p < 0.0002" if p <= 1 / (DRAWS + 1) else f"p {p:.4f}"


def randomisation_test(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of a paired randomisation test that the mean difference is 0: the share of sign
    flips whose mean is at least as far from 0 (Smucker et al., CIKM 2007). All 2^n flips for up to
    13 queries, else 10,000 random ones and the observed one. scipy's permutation_test draws other
    flips and takes nine times as long."""
    differences = np.asarray(differences, dtype=np.float64)
    n = len(differences)
    reach = abs(differences.sum()) * (1 - 1e-12) - 1e-12  # the order of addition changes last bits
    if n <= 13:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ differences) >= reach).mean())
    draw, further = np.random.default_rng(seed), 0
    for _ in range(DRAWS // 1000):
        signs = draw.integers(0, 2, (1000, n), dtype=np.int8) * 2.0 - 1.0
        further += int((np.abs(signs @ differences) >= reach).sum())
    return (further + 1) / (DRAWS + 1)
