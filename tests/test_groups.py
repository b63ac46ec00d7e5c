"""pytest tests/test_groups.py — groups of a query, a positive and negatives: what is drawn,
refused, filled."""

import json

import numpy as np
import pytest
import torch

from lib.dev import DevSet
from lib.files import UserError, read_qrels, read_training_file
from lib.groups import GroupCollator, Groups, TrainingFile
from lib.loader import step_batches
from lib.optim import parameter_groups
from lib.text import TextFormat
from lib.texts import open_texts


@pytest.fixture
def texts(tmp_path):
    """Three queries, ten passages; p9 has the text of p0; the id of the last has a comma."""
    (tmp_path / "queries.tsv").write_text("q0\tfirst\nq1\tsecond\nq2\tthird\n")
    bodies = [f"passage number {number}" for number in range(9)] + ["passage number 0"]
    rows = [f"p{number}\t{body}\n" for number, body in enumerate(bodies)]
    (tmp_path / "corpus.tsv").write_text("".join([*rows, "p,10\tanother\n"]))
    return open_texts(tmp_path / "queries.tsv"), open_texts(tmp_path / "corpus.tsv")


def write(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def row(qid, pos, neg=(), **more):
    return {"qid": qid, "pos": pos.split(), "neg": list(neg.split() if neg else ()), **more}


@pytest.fixture
def tiny(tiny_collection, tiny_model_dir):
    from transformers import AutoTokenizer

    queries, corpus = open_texts(tiny_collection.queries), open_texts(tiny_collection.corpus)
    file = TrainingFile(tiny_collection.train, queries, corpus)
    groups = Groups(file, 4, depth=200, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    form = TextFormat(max_query_length=16, max_passage_length=32)
    return groups, GroupCollator(groups, tokenizer, form, 5)


def draws(groups, steps, start=0, seed=3):
    groups.seed, sampler = seed, step_batches(groups, 6, 0, 1, start)
    return [
        [(q, rows.tolist()) for q, rows, _ in map(groups.__getitem__, next(sampler))]
        for _ in range(steps)
    ]


def test_every_positive_is_an_example_and_never_a_negative(tiny, tiny_collection):
    groups, _ = tiny
    qrels = {qid: set(pids) for qid, pids in read_qrels(tiny_collection.qrels).items()}
    listed = {one.qid: one.neg for _, one in read_training_file(tiny_collection.train)}
    assert len(groups) == sum(map(len, qrels.values())) == 30
    seen = set()
    for batch in draws(groups, 40):
        for query, rows in batch:
            qid = groups.file.queries.id(groups.file.query_rows[query])
            positive, *negatives = groups.file.corpus.ids(rows)
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


def test_short_lists_are_filled_cut_and_counted(texts, tmp_path):
    rows = [row("q0", "p0 p1", "p4 p5"), row("q1", "p1", "p4 p5 p6 p7 p,10"), row("q2", "p3")]
    groups = Groups(TrainingFile(write(tmp_path / "t", *rows), *texts), 4, depth=3, seed=0)
    query, found, _ = groups[0, 0, 0]
    assert (query, found.tolist()) == (0, [0, 4, 5, -1])
    assert groups[3, 0, 0][1].tolist() == [3, -1, -1, -1]
    assert {r for step in range(30) for r in groups[2, step, 0][1][1:]} == {4, 5, 6}  # depth 3
    # q0 has two examples that lack one, q2 has one that lacks three
    assert groups.notes["short lists"].startswith("2 queries have fewer than 3 negatives: 5 col")


def test_ids_with_commas_and_judgments_alone(texts, tmp_path):
    file = TrainingFile(write(tmp_path / "t", row("q0", "p,10", "p4")), *texts)
    assert file.rows.tolist() == [10, 4] and file.bounds.tolist() == [0, 1, 2]
    (tmp_path / "qrels").write_text("q0 0 p0 1\nq0 0 p1 2\nq0 0 p2 0\nq1 0 p,10 1\n")
    file = TrainingFile(tmp_path / "qrels", *texts)
    assert file.rows.tolist() == [0, 1, 10] and file.bounds.tolist() == [0, 2, 2, 3, 3]
    assert Groups(file, None, 200, 0).passages_per_query == 1
    with pytest.raises(UserError, match="it has no negatives for --passages_per_query 2"):
        Groups(file, 2, 200, 0)


@pytest.mark.parametrize(
    "content, what",
    [
        ([row("q2", "p3"), row("q0", "p0 p1", "p5 p1")], "p1 is a negative of query q0"),
        ([row("q2", "p3"), row("q0", "p0", "p5 p9")], "p9 is a negative of query q0"),  # a copy
        ([row("q2", "p3"), row("q0", "p0", "p77")], ":2: passage p77 is not in"),
        ([row("q9", "p3")], ":1: query q9 is not in"),
        ([row("q0", "p1"), row("q0", "p2")], ":2: query q0 has a line already"),
        ([{"qid": "q0", "pos": []}], ":1: .*not empty"),
        ([{"qid": "q0", "pos": "p1"}], ":1: ids must be strings"),
        ([row("q0", "p1", "p2", neg_scores=[])], ":1: .* one finite score per id"),
        ([row("q0", "p1", cluster=-1)], ":1: .* cluster from 0"),
        ([row("q0", "p1", cluster=1), row("q1", "p1")], "lines without clusters"),
        ([row("q0", "p1", pos_scores=[1]), row("q1", "p1")], "lines without scores"),
        ([{"query": "a", "pos": ["b"], "neg": ["c"]}], "this is flagembedding data — convert it"),
        ([{"query_id": "1", "query": "a", "positive_passages": []}], "this is tevatron data"),
        ([{"anchor": "a", "positive": "b", "negative": "c"}], "is sentence-transformers data"),
    ],
)
def test_bad_lines_stop_with_place_and_remedy(texts, tmp_path, content, what):
    with pytest.raises(UserError, match=what) as error:
        TrainingFile(write(tmp_path / "bad.jsonl", *content), *texts)
    assert " — " in str(error.value)


@pytest.mark.parametrize(
    "content, what",
    [
        ("q0 0 p0 1\nq9 0 p1 1\n", ":2: query q9"),
        ("q0 0 p0 1\nq1 0 p99 1\n", ":2: passage p99"),
        ("q0 0 p0 0\n", "no query has a positive"),
        ("q0\tp4,p5\n", "lists of negatives without positives — join them"),
        ("q0\tp4\tp5,p6\n", "this is ance data — convert it"),
        ("what is it\tit is this\tit is that\n", "this is text-triples data — convert it"),
        ("nothing\n", "1 columns"),
    ],
)
def test_other_files_stop_with_place_and_remedy(texts, tmp_path, content, what):
    (tmp_path / "bad.tsv").write_text(content)
    with pytest.raises(UserError, match=what):
        TrainingFile(tmp_path / "bad.tsv", *texts)


def test_scores_and_clusters_follow_their_lines(texts, tmp_path):
    lists = {0: ([0, 1], [4, 5, 6]), 1: ([1], [4, 7]), 2: ([3], [])}
    rows = []
    for q, (pos, neg) in lists.items():
        score = [[10.0 * q + p for p in some] for some in (pos, neg)]
        ids = [" ".join(f"p{p}" for p in some) for some in (pos, neg)]
        rows.append(row(f"q{q}", *ids, pos_scores=score[0], neg_scores=score[1], cluster=q % 2))
    file = TrainingFile(write(tmp_path / "t", *rows), *texts)
    assert file.clusters.tolist() == [0, 1, 0]
    groups = Groups(file, 3, depth=200, seed=0)
    for step in range(10):
        for example in range(len(groups)):
            query, found, scores = groups[example, step, example]
            expected = [10 * query + r if r >= 0 else 0 for r in found]
            assert scores.tolist() == expected and scores.dtype == np.float32


def test_batch_agrees_with_the_groups(tiny):
    groups, collate = tiny
    items = [groups[place] for place in next(step_batches(groups, 6, 0, 1))]
    items[2][1][-1] = -1
    batch = collate(items)
    chunks = batch["passage"]["chunks"]
    assert [len(c["input_ids"]) for c in chunks] == [5, 5, 5, 5, 4]
    ids = [
        ids[mask == 1]
        for c in chunks
        for ids, mask in zip(c["input_ids"], c["attention_mask"], strict=True)
    ]
    for number, place in zip(batch["passage_rows"], batch["passage"]["order"], strict=True):
        titles, text = groups.file.corpus[number] if number >= 0 else ((), "")
        string = " ".join([*titles, text]).strip()
        expected = collate.tokenizer(string, truncation=True, max_length=32)["input_ids"]
        assert ids[place].tolist() == expected
    assert torch.equal(batch["positive_rows"], batch["passage_rows"][::4])
    assert batch["teacher_scores"].shape == (6, 4) and not batch["teacher_scores"].any()
    assert batch["passage_keys"][11] == 0 and batch["passage_rows"][11] == -1
    for (query, *_), keys in zip(items, batch["positive_keys"], strict=True):
        assert set(keys.tolist()) == set(groups.file.positive_keys(query).tolist())
    for chunk in chunks:
        assert chunk["attention_mask"].sum(1).max() == chunk["input_ids"].shape[1]


class Length(torch.nn.Module):
    """The vector of a text is its length."""

    dim = 1

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def encode(self, batch, kind="passage"):
        return batch["attention_mask"].sum(1, keepdim=True).float()


def test_the_development_set_is_ranked_by_score(tiny, tiny_collection, monkeypatch):
    groups, collate = tiny
    corpus = groups.file.corpus
    paths = tiny_collection
    dev = DevSet(paths.queries, paths.qrels, paths.candidates, corpus)
    qids = sorted(dev.candidates)
    ranked = dev.rerank(Length(), collate, qids, 4)
    monkeypatch.setattr("lib.dev.NUMBERS", 1)  # one query at a time
    assert ranked == dev.rerank(Length(), collate, qids, 4)
    for qid, pids in ranked.items():
        own = dev.candidates[qid]
        strings = [" ".join([*t, x]) for t, x in (corpus[r] for r in corpus.rows(own))]
        longest = [len(collate.tokenizer(string)["input_ids"]) for string in strings]
        order = np.argsort([-min(length, 32) for length in longest], kind="stable")[:4]
        assert pids == [own[i] for i in order]


def test_preview_shows_the_first_group_and_the_truncation(tiny):
    facts = tiny[1].preview()
    assert "what about" in facts["query 1"] and facts["passage tokens"].endswith("cut at 32")
    assert facts["passage 1"].startswith("[CLS] nest")
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


@pytest.mark.parametrize("world", [1, 2])
def test_batches_of_one_cluster(texts, tmp_path, world):
    """Over several epochs: every example once an epoch; whole batches of one cluster while it
    lasts, whatever the number of processes and although the epochs are no multiple of a batch."""
    queries = "".join(f"q{n}\ttext {n}\n" for n in range(23))
    (tmp_path / "many.tsv").write_text(queries)
    sizes = [11, 7, 4, 1]
    clusters = np.repeat(np.arange(4), sizes)
    rows = [row(f"q{n}", f"p{n % 9}", cluster=int(clusters[n])) for n in range(23)]
    file = TrainingFile(
        write(tmp_path / "t.jsonl", *rows), open_texts(tmp_path / "many.tsv"), texts[1]
    )
    groups = Groups(file, 1, depth=9, seed=5, one_cluster=4)
    samplers = [step_batches(groups, 4 // world, rank, world) for rank in range(world)]
    batches = [
        [example for sampler in samplers for example, _, _ in next(sampler)] for _ in range(46)
    ]
    seen = [example for batch in batches for example in batch]
    for epoch in range(8):
        assert sorted(seen[23 * epoch : 23 * (epoch + 1)]) == list(range(23))
    pure = [len({int(clusters[example]) for example in batch}) == 1 for batch in batches]
    assert np.mean(pure) > 0.6  # of 5.75 batches an epoch, 2 + 1 + 1 can be
    firsts = {int(clusters[batch[0]]) for batch, one in zip(batches, pure, strict=True) if one}
    assert firsts == {0, 1, 2}
    assert groups.notes["batches"].startswith("4 of 5.8 batches of an epoch are of one cluster")
