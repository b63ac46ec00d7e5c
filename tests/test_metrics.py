"""Metrics against pytrec_eval, scipy and worked examples. Run: python -m pytest
tests/test_metrics.py"""

import math

import numpy as np
import pytest
import pytrec_eval
import scipy.stats

from lib.files import RunList, UserError
from lib.metrics import (
    bootstrap_interval,
    metric_name,
    mrr_at_k,
    order,
    p_text,
    randomisation_test,
    reciprocal_rank_fusion,
    score_run,
)


def listed(pids, scores):
    return RunList(list(pids), np.array(scores, dtype=np.float32))


@pytest.fixture(scope="module")
def random_run():
    draw = np.random.default_rng(0)
    qrels = {
        f"q{q}": {f"d{d}": int(draw.integers(-1, 4)) for d in draw.choice(80, 12, replace=False)}
        for q in range(30)
    }
    run = {}
    for q in range(2, 32):  # q0 and q1 have no result, q30 and q31 no judgment
        pids = [f"d{d}" for d in draw.permutation(80)[:60]]
        run[f"q{q}"] = listed(pids, draw.integers(0, 20, 60))  # ties
    return run, qrels


@pytest.mark.parametrize("level", [1, 2])
def test_agreement_with_pytrec_eval(random_run, level):
    run, qrels = random_run
    plain = {qid: dict(zip(e.pids, e.scores.tolist(), strict=True)) for qid, e in run.items()}
    names = {
        "nDCG@10": "ndcg_cut_10",
        "AP": "map",
        "R@20": "recall_20",
        "P@5": "P_5",
        "RR": "recip_rank",
        "Success@5": "success_5",
    }
    measures = {"ndcg_cut.10", "map", "recall.20", "P.5", "recip_rank", "success.5"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, measures, relevance_level=level).evaluate(plain)
    ours = score_run(run, qrels, [*names, "RR@3"], level)
    for name, key in names.items():
        assert ours[name].keys() == qrels.keys()
        assert all(ours[name][qid] == pytest.approx(theirs[qid][key]) for qid in theirs), name
        assert ours[name]["q0"] == 0, "a query without a result counts"
    for qid in theirs:  # RR@3 has a cut, pytrec_eval's recip_rank has none
        rank = theirs[qid]["recip_rank"]
        assert ours["RR@3"][qid] == (rank if rank > 0.3 else 0)


@pytest.mark.parametrize("level", [1, 2])
def test_rr_is_the_official_mrr(random_run, level):
    run, qrels = random_run
    ranking = {qid: [entry.pids[i] for i in order(entry)] for qid, entry in run.items()}
    for k in (1, 3, 10, 100):
        values = score_run(run, qrels, [f"RR@{k}"], level)[f"RR@{k}"]
        assert np.mean([*values.values()]) == pytest.approx(mrr_at_k(ranking, qrels, k, level))


def test_ties_as_trec_eval():
    entry = listed(["a", "c", "b", "d"], [1, 1, 1, 2])
    assert [entry.pids[i] for i in order(entry)] == ["d", "c", "b", "a"]
    qrels = {"q": {"a": 1}}
    assert score_run({"q": entry}, qrels, ["RR@10", "nDCG@10"])["RR@10"]["q"] == 0.25


def test_graded_example_by_hand():
    entry, qrels = listed("abcd", [4, 3, 2, 1]), {"q": {"b": 3, "d": 1, "z": 2, "a": 0}}
    values = score_run(
        {"q": entry}, qrels, ["nDCG@3", "RR@10", "Hole@2", "Hole@4", "R@10"], level=2
    )
    best = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert values["nDCG@3"]["q"] == pytest.approx(3 / math.log2(3) / best)
    assert values["RR@10"]["q"] == 0.5 and values["R@10"]["q"] == 0.5
    assert values["Hole@2"]["q"] == 0 and values["Hole@4"]["q"] == 0.25, (
        "a passage judged 0 is no hole, c is one"
    )


def test_mrr_is_divided_by_all_judged_queries():
    qrels = {"q1": {"a": 1}, "q2": {"b": 1}, "q3": {"c": 1}, "q4": {"d": 1}}
    ranking = {"q1": ["x", "a"], "q2": [*"xyzuvw", "b"], "q3": ["c"], "q9": ["d"]}
    assert mrr_at_k(ranking, qrels, 5) == (1 / 2 + 0 + 1 + 0) / 4
    assert mrr_at_k(ranking, qrels, 7) == pytest.approx((1 / 2 + 1 / 7 + 1) / 4)
    assert mrr_at_k({"q": ["a", "b"]}, {"q": {"a": 1, "b": 2}}, 10, level=2) == 0.5


def test_names():
    assert [metric_name(n) for n in ("MRR@10", "ndcg@5", "Recall@100", "map", "success@1")] == [
        "RR@10",
        "nDCG@5",
        "R@100",
        "AP",
        "Success@1",
    ]
    long = "R@" + 20 * "9"
    for wrong in ("R", "nDCG@0", "bleu@3", "nDCG@ten", "Hole", "R@-1", "P@1.5", long, "@", ""):
        with pytest.raises(UserError, match=f"--metrics {wrong}: unknown"):
            metric_name(wrong)


def test_fusion_by_hand():
    runs = [{"q": listed("ab", [2, 1])}, {"q": listed("bc", [2, 1]), "p": listed("x", [1])}]
    fused = reciprocal_rank_fusion(runs)
    assert fused["q"].pids == ["b", "a", "c"] and fused["p"].pids == ["x"]
    assert fused["q"].scores == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])


@pytest.mark.parametrize("n", [9, 60])
def test_randomisation_test_against_scipy(n):
    gap = np.random.default_rng(n).normal(0.15, 0.5, n)
    samples, how = (
        (gap, np.zeros(n)),
        {"permutation_type": "samples", "n_resamples": 10_000, "rng": 0},
    )
    reference = scipy.stats.permutation_test(samples, lambda a, b: np.mean(a - b), **how).pvalue
    assert randomisation_test(gap) == pytest.approx(reference, abs=1e-9 if n == 9 else 0.02)
    assert randomisation_test(np.zeros(n)) == 1 and randomisation_test(np.ones(20)) < 1e-3
    assert randomisation_test(gap, seed=1) == randomisation_test(gap, seed=1)


def test_a_p_is_no_smaller_than_its_draws_can_tell():
    assert p_text(randomisation_test(np.ones(13))) == "p 0.0002", "2 of all 8192 flips"
    assert randomisation_test(np.ones(40)) == 1 / 10_001, "of 10,000 flips none"
    assert p_text(1 / 10_001) == "p < 0.0002"
    assert p_text(2 / 10_001) == "p 0.0002" and p_text(1.0) == "p 1.0000"


def test_bootstrap_interval_against_the_normal_one():
    values = np.random.default_rng(3).normal(0.4, 0.2, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.003) and high == pytest.approx(
        values.mean() + half, abs=0.003
    )
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
