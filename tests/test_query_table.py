"""pytest tests/test_query_table.py — sparse vectors of queries without a model."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse import load_npz
from transformers import AutoTokenizer

from lib.checkpoint import load_encoder, save_encoder
from lib.encoder import Head
from lib.files import UserError, read_run
from lib.query_table import inverse_document_frequency, use_query_table
from lib.text import TextFormat, format_texts, pad, to_ids
from lib.texts import open_texts

QUERIES = ["what about ants and ants", "lava", "", "what is it? " * 30, "curd & whey [SEP] ice"]


@pytest.fixture
def model(tiny_model_dir):
    """A sparse model with a table of random weights, some of them below zero."""
    found = load_encoder(tiny_model_dir, Head(kind="sparse"))
    found.format.max_query_length = 12
    torch.manual_seed(0)
    found.query_table = found.make_table(torch.randn(found.dim), learned=True)
    return found


def ids_of(model, texts=QUERIES):
    strings = format_texts([("", text) for text in texts], "query", model.format, model.tokenizer)
    return to_ids(strings, model.tokenizer, model.format.max_query_length)


@torch.no_grad()
def vectors(model):
    return model.encode(pad(ids_of(model), model.tokenizer), "query")


def test_a_query_has_the_weight_of_each_distinct_ordinary_token(model):
    weights = model.query_table.weights
    special = {model.tokenizer.cls_token_id, model.tokenizer.sep_token_id}
    expected = torch.zeros(len(QUERIES), model.dim)
    for row, ids in enumerate(ids_of(model)):
        for token in set(ids) - special:
            expected[row, token] = weights[token]
    assert (weights >= 0).all() and expected.any() and not expected[2].any()
    assert torch.equal(vectors(model), expected)
    ids = ids_of(model)
    rows = model.query_table.rows(np.concatenate(ids), np.array([*map(len, ids)]))
    assert np.array_equal(rows.toarray(), expected.detach().numpy())


def test_saved_read_back_and_in_sentence_transformers(model, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    save_encoder(model, tmp_path / "a", {})
    again = load_encoder(tmp_path / "a")
    assert again.query_table.learned
    torch.testing.assert_close(vectors(again), vectors(model))
    theirs = st.SparseEncoder(str(tmp_path / "a"), device="cpu")
    found = theirs.encode_query(QUERIES, convert_to_tensor=True).to_dense()
    torch.testing.assert_close(found, vectors(model), rtol=1e-5, atol=1e-6)
    passages = theirs.encode_document(["ants and lava"], convert_to_tensor=True).to_dense()
    ids = to_ids(["ants and lava"], model.tokenizer, 40)
    with torch.no_grad():
        ours = model.encode(pad(ids, model.tokenizer), "passage")
    torch.testing.assert_close(passages, ours, rtol=1e-4, atol=1e-5)


def test_idf_counts_passages_not_occurrences(tiny_collection, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    corpus = open_texts(tiny_collection.corpus)
    form = TextFormat(max_passage_length=20)
    found = inverse_document_frequency(corpus, form, tokenizer, len(tokenizer) + 3)
    rows = [corpus[row] for row in range(len(corpus))]
    texts = to_ids(format_texts(rows, "passage", form, tokenizer), tokenizer, 20)
    for term in (texts[0][2], texts[5][3], texts[7][1]):
        n = sum(term in ids for ids in texts)
        assert n and found[term].item() == pytest.approx(
            math.log(1 + (40 - n + 0.5) / (n + 0.5)), rel=1e-5
        )
    assert found[-3:].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["table", "idf"])
@pytest.mark.parametrize("chunk_size", [0, 3])
def test_trained_encoded_and_searched(
    script, tiny_collection, tiny_model_dir, tmp_path, kind, chunk_size
):
    c = tiny_collection
    flags = ["--model", tiny_model_dir, "--corpus", c.corpus, "--queries", c.queries]
    flags += ["--train", c.train, "--head", "sparse", "--query_encoder", kind]
    flags += ["--max_steps", 4, "--per_device_batch_size", 4, "--passages_per_query", 2]
    flags += ["--learning_rate", 1e-3, "--num_workers", 0, "--chunk_size", chunk_size]
    status, _, error = script("finetune_biencoder", *flags, "--output_dir", tmp_path / "m")
    assert status == 0, error
    table = load_encoder(tmp_path / "m").query_table
    assert table.learned == (kind == "table")
    if kind == "table":
        assert ((table.weights[table.ordinary] - 1).abs().max() > 0.01).item()
    for side, texts in (("query", c.queries), ("passage", c.corpus)):
        status, _, error = script(
            *("encode", "--model", tmp_path / "m", "--input", texts, "--kind", side),
            *("--num_workers", 0, "--output_dir", tmp_path / side),
        )
        assert status == 0, error
    stored = load_npz(tmp_path / "query" / "shard-00000.npz")
    queries = open_texts(c.queries)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    for row in range(len(queries)):
        own = {*to_ids([queries[row][1]], tokenizer, 64)[0]} - {*tokenizer.all_special_ids}
        assert {*stored[row].indices.tolist()} <= own
    status, out, error = script(
        *("evaluate", "--queries_embeddings", tmp_path / "query", "--qrels", c.qrels),
        *("--corpus_embeddings", tmp_path / "passage", "--output_dir", tmp_path / "e"),
    )
    assert status == 0, error
    scores = stored @ load_npz(tmp_path / "passage" / "shard-00000.npz").T
    for qid, entry in read_run(tmp_path / "e" / "run.trec").items():
        row = queries.rows([qid])[0]
        assert entry.scores[0] == pytest.approx(scores[row].max(), rel=1e-5)


def test_a_dense_head_has_no_table(tiny_model_dir):
    with pytest.raises(UserError, match="is for sparse vectors — add --head sparse"):
        use_query_table(load_encoder(tiny_model_dir, Head(pooling="cls")), "table", None)
