"""pytest tests/test_groups.py — groups of a query, a positive and negatives: what is drawn, refused, filled."""

import numpy as np
import pytest
import torch

from lib.dev import open_dev, rerank
from lib.files import UserError, read_negatives, read_qrels, write_scores
from lib.groups import GroupCollator, Groups, preview
from lib.loader import StepSampler
from lib.optim import parameter_groups
from lib.text import TextFormat
from lib.texts import open_texts


@pytest.fixture
def texts(tmp_path):
    """Three queries, ten passages; p9 has the text of p0."""
    (tmp_path / "queries.tsv").write_text("q0\tfirst\nq1\tsecond\nq2\tthird\n")
    bodies = [f"passage number {number}" for number in range(9)] + ["passage number 0"]
    (tmp_path / "corpus.tsv").write_text(
        "".join(f"p{number}\t{body}\n" for number, body in enumerate(bodies))
    )
    return open_texts(tmp_path / "queries.tsv"), open_texts(tmp_path / "corpus.tsv")


def write(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def qrels(tmp_path):
    return write(tmp_path / "qrels.tsv", "q0 0 p0 1\nq0 0 p1 2\nq0 0 p2 0\nq1 0 p1 1\nq2 0 p3 1\n")


@pytest.fixture
def tiny(tiny_collection, tiny_model_dir):
    from transformers import AutoTokenizer

    queries, corpus = open_texts(tiny_collection.queries), open_texts(tiny_collection.corpus)
    groups = Groups(
        queries,
        corpus,
        tiny_collection.qrels,
        tiny_collection.negatives,
        passages_per_query=4,
        seed=3,
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    return groups, GroupCollator(
        groups, tokenizer, TextFormat(max_query_length=16, max_passage_length=32), 5
    )


def draws(groups, steps, start=0, seed=3):
    sampler = iter(StepSampler(len(groups), 6, 0, 1, seed, start))
    return [
        [(q, rows.tolist()) for q, rows, _ in map(groups.__getitem__, next(sampler))]
        for _ in range(steps)
    ]


def test_every_judged_positive_is_an_example_and_never_a_negative(tiny, tiny_collection):
    groups, _ = tiny
    qrels = {qid: set(pids) for qid, pids in read_qrels(tiny_collection.qrels).items()}
    listed = dict(read_negatives(tiny_collection.negatives))
    assert len(groups) == sum(map(len, qrels.values())) == 30
    seen = set()
    for batch in draws(groups, 40):
        for query, rows in batch:
            qid = groups.queries.id(groups.query_rows[query])
            positive, *negatives = groups.corpus.ids(rows)
            assert positive in qrels[qid] and not qrels[qid] & set(negatives)
            assert set(negatives) <= set(listed[qid]) and len(set(negatives)) == 3
            seen.add((qid, positive))
    assert len(seen) == 30


def test_draws_differ_between_epochs_and_are_the_same_after_a_resume(tiny):
    groups, _ = tiny
    whole = draws(groups, 15)  # 5 steps an epoch
    assert draws(groups, 8, start=7) == whole[7:] and draws(groups, 15, seed=4) != whole
    epochs = [
        {(q, rows[0]): rows for batch in whole[e * 5 : e * 5 + 5] for q, rows in batch}
        for e in range(3)
    ]
    assert epochs[0].keys() == epochs[1].keys() and epochs[0] != epochs[1] != epochs[2]
    assert len({tuple(groups[0, step, 0][1]) for step in range(20)}) > 5  # same row, other steps


def test_short_lists_are_filled_cut_and_counted(texts, qrels, tmp_path):
    path = write(tmp_path / "negatives.tsv", "q0\tp4,p5\nq1\tp4,p5,p6,p7\nother\tp4\nq1\tp8\n")
    groups = Groups(*texts, qrels, path, passages_per_query=4, depth=3)
    query, rows, _ = groups[0, 0, 0]
    assert (query, rows.tolist()) == (0, [0, 4, 5, -1])
    assert groups[3, 0, 0][1].tolist() == [3, -1, -1, -1]
    assert {row for step in range(30) for row in groups[2, step, 0][1][1:]} == {
        4,
        5,
        6,
    }  # not p7 and p8: depth 3
    assert "2 queries have fewer than 3" in groups.notes["short lists"]
    assert (
        "5 empty" in groups.notes["short lists"]
    )  # q0 has two examples that lack one, q2 one that lacks three
    assert (
        "1 of 3" in groups.notes["queries not mined"]
        and "1 lines" in groups.notes["negatives ignored"]
    )


@pytest.mark.parametrize(
    "content, place, what",
    [
        ("q2\tp4\nq0\tp5,p1\n", ":2:", "p1 is a judged positive of query q0"),  # by id
        (
            "q2\tp4\nq0\tp5,p9\n",
            ":2:",
            "p9 is a judged positive of query q0 or an exact copy",
        ),  # p9 copies p0
        ("q2\tp4\nq0\tp5,p77\n", ":2:", "p77 is not in"),
        ("other\tp4\n", "negatives.tsv:", "none of its 1 queries"),
        ("q0\tp4\tp5\n", ":1:", "not `qid<TAB>pid,pid,...`"),
    ],
)
def test_bad_negatives_stop_with_place_and_remedy(texts, qrels, tmp_path, content, place, what):
    path = write(tmp_path / "negatives.tsv", content)
    with pytest.raises(UserError) as error:
        Groups(*texts, qrels, path, passages_per_query=2)
    assert place in str(error.value) and what in str(error.value) and " — " in str(error.value)


def test_overlap_is_dropped_when_told_so(texts, qrels, tmp_path):
    path = write(tmp_path / "negatives.tsv", "q0\tp1,p9,p5\nq2\tp4\nq1\tp4\n")
    groups = Groups(*texts, qrels, path, passages_per_query=2, allow_overlap=True)
    assert {groups[0, step, 0][1][1] for step in range(20)} == {5} and "2 among" in groups.notes[
        "positives dropped"
    ]


def test_unused_and_missing_negatives_stop(texts, qrels, tmp_path):
    path = write(tmp_path / "negatives.tsv", "q0\tp4\n")
    with pytest.raises(UserError, match="unused"):
        Groups(*texts, qrels, path, passages_per_query=1)
    assert len(Groups(*texts, qrels, path, passages_per_query=1, allow_unused=True)) == 4
    with pytest.raises(UserError, match="without negatives"):
        Groups(*texts, qrels, passages_per_query=2)


@pytest.mark.parametrize(
    "content, what",
    [
        ("q0 0 p0 1\nq9 0 p1 1\n", ":2: query q9"),
        ("q0 0 p0 1\nq1 0 p99 1\n", ":2: passage p99"),
        ("q0 0 p0 0\n", "no passage"),
    ],
)
def test_bad_qrels_stop_with_place_and_remedy(texts, tmp_path, content, what):
    with pytest.raises(UserError, match=what):
        Groups(*texts, write(tmp_path / "bad.tsv", content), passages_per_query=1)


def test_teacher_scores_follow_their_pairs(texts, qrels, tmp_path):
    negatives = write(tmp_path / "negatives.tsv", "q0\tp4,p5,p6\nq1\tp4,p7\n")
    pairs = [(f"q{q}", f"p{p}", float(10 * q + p)) for q in range(3) for p in range(10)]
    path = tmp_path / "scores.tsv"
    write_scores(
        path, [*reversed(pairs), ("q0", "p0", 99.0), ("q9", "p1", 0.0), ("q0", "unknown", 1.0)]
    )
    groups = Groups(*texts, qrels, negatives, passages_per_query=3, scores_path=path)
    for step in range(10):
        for example in range(len(groups)):
            query, rows, scores = groups[example, step, example]
            expected = [10 * query + row if row >= 0 else 0 for row in rows]
            assert scores.tolist() == expected and scores.dtype == np.float32
    write_scores(path, [pair for pair in pairs if pair[:2] != ("q1", "p7")])
    with pytest.raises(
        UserError, match=r"scores.tsv: no score for query q1 and passage p7 \(1 of 5 pairs"
    ):
        Groups(*texts, qrels, negatives, passages_per_query=3, scores_path=path)
    Groups(
        *texts, qrels, negatives, passages_per_query=3, depth=1, scores_path=path
    )  # p7 is never drawn


def test_batch_agrees_with_the_groups(tiny):
    groups, collate = tiny
    items = [groups[place] for place in next(iter(StepSampler(len(groups), 6, 0, 1, 0)))]
    items[2][1][-1] = -1
    batch = collate(items)
    assert [len(c["input_ids"]) for c in batch["passage"]] == [5, 5, 5, 5, 4]
    ids = [
        ids[mask == 1]
        for c in batch["passage"]
        for ids, mask in zip(c["input_ids"], c["attention_mask"], strict=True)
    ]
    for row, place in zip(batch["passage_rows"], batch["passage_order"], strict=True):
        title, text = groups.corpus[row] if row >= 0 else ("", "")
        expected = collate.tokenizer(f"{title} {text}".strip(), truncation=True, max_length=32)[
            "input_ids"
        ]
        assert ids[place].tolist() == expected
    assert torch.equal(batch["positive_rows"], batch["passage_rows"][::4])
    assert batch["teacher_scores"].shape == (6, 4) and not batch["teacher_scores"].any()
    assert batch["passage_keys"][11] == 0 and batch["passage_rows"][11] == -1
    for (query, *_), keys in zip(items, batch["positive_keys"], strict=True):
        assert set(keys.tolist()) == set(groups.positive_keys(query).tolist())
    widths = [c["attention_mask"].sum(1) for c in batch["passage"]]
    assert all(
        w.max() == c["input_ids"].shape[1] for w, c in zip(widths, batch["passage"], strict=True)
    )


def test_rerank_orders_by_score(tiny, tiny_collection):
    groups, collate = tiny
    files = tiny_collection.queries, tiny_collection.qrels, tiny_collection.candidates
    _, qrels, candidates = open_dev(groups.corpus, *files, True)

    def encoder(query, passage):  # the vector of a passage is its length, that of a query 1
        lengths = [
            None if side is None else side["attention_mask"].sum(1, keepdim=True)
            for side in (query, passage)
        ]
        return None if query is None else torch.ones(len(lengths[0]), 1), lengths[1]

    ranked = rerank(encoder, "cpu", collate, groups.queries, candidates, 4)
    assert ranked == rerank(encoder, "cpu", collate, groups.queries, candidates, 4, at_once=1)
    for qid, pids in ranked.items():
        longest = [
            len(collate.tokenizer(" ".join(groups.corpus[row]).strip())["input_ids"])
            for row in groups.corpus.rows(candidates[qid])
        ]
        order = np.argsort([-min(length, 32) for length in longest], kind="stable")[:4]
        assert pids == [candidates[qid][i] for i in order]


def test_preview_shows_the_first_group_and_the_truncation(tiny):
    facts = preview(tiny[1])
    assert "what about" in facts["first query"] and facts["passage tokens"].endswith("cut at 32")
    assert facts["first positive"].startswith("[CLS] nest")
    assert 0 < float(facts["passage tokens"].split()[2].rstrip("%")) < 100


def test_parameter_groups_decay_matrices_only():
    model = torch.nn.ModuleDict(
        {
            "words": torch.nn.Embedding(5, 4),
            "dense": torch.nn.Linear(4, 5),
            "norm": torch.nn.LayerNorm(4),
        }
    )
    model["dense"].weight = model["words"].weight  # tied
    model["frozen"] = torch.nn.Linear(2, 2).requires_grad_(False)
    decayed, others = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and [id(p) for p in decayed["params"]] == [
        id(model["words"].weight)
    ]
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in others["params"]} == {"dense.bias", "norm.weight", "norm.bias"}
    assert others["weight_decay"] == 0
