"""pytest tests/test_triples.py — streamed triples: each once an epoch, by process, by worker, from any step on."""

import gzip
import itertools

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lib.files import UserError
from lib.loader import load
from lib.text import TextFormat
from lib.texts import open_texts, text_key
from lib.triples import TripleCollator, Triples

LINES = 23


@pytest.fixture
def path(tmp_path):
    rows = [f"query {n}\tthe positive {n}\tthe negative {n}\n" for n in range(1, LINES + 1)]
    with gzip.open(tmp_path / "triples.tsv.gz", "wt") as stream:
        stream.write("".join(rows))
    return tmp_path / "triples.tsv.gz"


def batches(path, count, batch=4, rank=0, world=1, start=0, workers=0, seed=3, buffer=8):
    triples = Triples(path, None, None, seed, buffer)
    triples.sampler(batch, rank, world, start)
    stream = DataLoader(triples, batch_size=None, num_workers=workers, collate_fn=list)
    return [[line for line, *_ in items] for items in itertools.islice(stream, count)]


def test_every_line_once_an_epoch_in_another_order_each_time(path):
    lines = list(itertools.chain(*batches(path, 23)))  # four epochs of 23
    epochs = [lines[at : at + LINES] for at in range(0, len(lines), LINES)]
    assert all(sorted(epoch) == list(range(1, LINES + 1)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and epochs[0] != sorted(epochs[0])
    assert sorted(epochs[0][:8]) == list(range(1, 9)), "no more than the buffer is mixed"
    assert batches(path, 23, seed=4) != batches(path, 23)


def test_processes_workers_and_a_resume_see_the_same(path):
    whole = batches(path, 17)
    parts = [batches(path, 17, batch=2, rank=rank, world=2) for rank in (0, 1)]
    assert [one + two for one, two in zip(*parts, strict=True)] == whole
    assert batches(path, 17, workers=3) == whole
    for start in (1, 5, 6, 13):  # within a buffer, over the end of an epoch, two epochs on
        assert batches(path, 4, start=start) == whole[start : start + 4]
        assert batches(path, 4, start=start, workers=2) == whole[start : start + 4]


def test_texts_become_a_batch_of_groups(path, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    triples = Triples(path, None, None, 0)
    collate = TripleCollator(
        triples, tokenizer, TextFormat(max_query_length=16, max_passage_length=16), 3
    )
    batch = next(load(triples, collate, triples.sampler(4, 0, 1, 0), 0, torch.device("cpu")))
    lines = batch["query_rows"].tolist()
    assert batch["passage_rows"].tolist() == [row for n in lines for row in (2 * n, 2 * n + 1)]
    assert batch["positive_rows"].tolist() == [2 * n for n in lines]
    keys = [text_key("", f"the {kind} {n}") for n in lines for kind in ("positive", "negative")]
    assert (
        batch["passage_keys"].tolist() == keys
        and batch["positive_keys"][:, 0].tolist() == keys[::2]
    )
    rows = torch.cat(
        [
            torch.nn.functional.pad(c["input_ids"], (0, 16 - c["input_ids"].shape[1]))
            for c in batch["passage"]
        ]
    )
    read = tokenizer.batch_decode(rows[batch["passage_order"]], skip_special_tokens=True)
    assert [text.replace(" ", "") for text in read] == [
        f"the{kind}{n}" for n in lines for kind in ("positive", "negative")
    ]
    assert triples.names(batch["query_rows"][:2].tolist()) == f"in triples {lines[0]}, {lines[1]}"
    assert len(triples.sample(3)) == 3 and triples.sample(1)[0][0].startswith("query ")


def test_ids_are_those_of_queries_and_corpus(tiny_collection, tmp_path):
    queries, corpus = open_texts(tiny_collection.queries), open_texts(tiny_collection.corpus)
    (tmp_path / "ids.tsv").write_text("q0\tp0\tp9\nq1\tp2\tp7\n")
    triples = Triples(tmp_path / "ids.tsv", queries, corpus, 0)
    expected = {(queries[0][1], corpus[0], corpus[9]), (queries[1][1], corpus[2], corpus[7])}
    assert {(query, *passages) for query, passages in triples.sample(2)} == expected
    with pytest.raises(
        UserError, match="ids.tsv:1: three ids, not texts — give --queries and --corpus"
    ):
        Triples(tmp_path / "ids.tsv", None, None, 0)
    (tmp_path / "ids.tsv").write_text("q0\tp0\tp9\nq1\tp2\tp77\n")
    with pytest.raises(UserError, match="ids.tsv:2: passage p77 is not in"):
        Triples(tmp_path / "ids.tsv", queries, corpus, 0).sample(2)
    (tmp_path / "empty.tsv").write_text("\n")
    with pytest.raises(UserError, match="no triple in it"):
        Triples(tmp_path / "empty.tsv", None, None, 0)


def test_a_bad_line_is_named_from_within_a_worker(script, tiny_model_dir, tmp_path):
    rows = [f"query {n}\tthe positive {n}\tthe negative {n}" for n in range(9)] + [
        "query 10\tthe positive"
    ]
    (tmp_path / "triples.tsv").write_text("\n".join(rows) + "\n")
    flags = [
        "--model",
        tiny_model_dir,
        "--pooling",
        "cls",
        "--triples",
        tmp_path / "triples.tsv",
        "--max_steps",
        9,
    ]
    flags += [
        "--per_device_batch_size",
        4,
        "--num_workers",
        1,
        "--output_dir",
        tmp_path / "out",
        "--max_query_length",
        16,
    ]
    status, _, errors = script("finetune_biencoder", *flags, "--max_passage_length", 16)
    last = errors.strip().splitlines()[-1]
    assert status == 1 and "triples.tsv:10: 2 columns where a file of text triples has 3" in last, (
        errors
    )
    assert last.lstrip("\r").startswith("finetune_biencoder.py: ")
