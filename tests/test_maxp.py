"""pytest tests/test_maxp.py — documents: url, title and body joined and cut; MaxP against plain
loops, in training, encoding, search, mining and evaluation."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lib import files, search
from lib.checkpoint import load_encoder, save_encoder
from lib.dev import DevSet
from lib.embeddings import Embeddings, finish_embeddings, write_shard
from lib.encoder import Head
from lib.files import UserError, read_json
from lib.groups import GroupCollator, Groups, TrainingFile
from lib.search import DenseIndex, unpack
from lib.text import TextFormat, chunk_ids, format_texts, join_title, to_ids
from lib.texts import open_texts

LENGTH, M = 10, 9  # tokens of a chunk, of which 8 are of the text
WORDS = (
    "colony queen worker nest lava crater string snow oven tail orbit milk pod song goat".split()
)  # a token each
SMALL = "--shard_rows 3 --tokens_per_batch 60 --num_workers 0 --dtype float32".split()


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """msmarco-docs.tsv of 12 documents, 1 to 9 chunks and more than 9; D7 has the body of D3."""
    folder, draw = tmp_path_factory.mktemp("documents"), np.random.default_rng(0)
    rows = []
    for number, words in enumerate([1, 9, 90, 19, 27, 33, 41, 19, 57, 60, 150, 6]):
        body = rows[3][3] if number == 7 else " ".join(draw.choice(WORDS, words))
        rows.append(
            (f"D{number}", "ash" if number % 4 else "", "ice snow" if number % 3 else "", body)
        )
    (folder / "docs.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    queries = [(f"q{number}", " ".join(draw.choice(WORDS, 3))) for number in range(5)]
    (folder / "queries.tsv").write_text("".join(f"{qid}\t{text}\n" for qid, text in queries))
    files.write_qrels(
        folder / "qrels.tsv", {f"q{number}": {f"D{2 * number + 1}": 1} for number in range(5)}
    )
    return SimpleNamespace(
        rows=rows,
        corpus=folder / "docs.tsv",
        queries=folder / "queries.tsv",
        qrels=folder / "qrels.tsv",
    )


@pytest.fixture(scope="module")
def checkpoint(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    how = {
        "title": "sep",
        "max_query_length": 8,
        "max_passage_length": LENGTH,
        "max_chunks": M,
        "max_characters": 700,
    }
    save_encoder(load_encoder(tiny_model_dir, Head("cls"), how), folder, {})
    return folder


@pytest.fixture(scope="module")
def naive(documents, tiny_model_dir):
    """For each document the vectors of its chunks, each encoded alone by plain transformers."""
    model, tokenizer = (
        AutoModel.from_pretrained(tiny_model_dir).eval(),
        AutoTokenizer.from_pretrained(tiny_model_dir),
    )
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    vectors = []
    for _, *parts in documents.rows:
        string = "[SEP]".join(part for part in parts if part)[:700]
        ids = tokenizer(string, add_special_tokens=False)["input_ids"]
        chunks = [ids[at : at + LENGTH - 2] for at in range(0, len(ids), LENGTH - 2)][:M]
        with torch.no_grad():
            hidden = [
                model(torch.tensor([[cls, *chunk, sep]])).last_hidden_state[0, 0]
                for chunk in chunks
            ]
        vectors.append(torch.stack(hidden).numpy())
    assert {len(part) for part in vectors} >= {1, 2, 3, 4, 5, 8, 9}
    return vectors


@pytest.fixture
def encode(script, checkpoint, documents):
    def call(output, *flags, source=documents.corpus, kind="passage", model=checkpoint):
        return script(
            "encode",
            "--model",
            model,
            "--input",
            source,
            "--kind",
            kind,
            "--output_dir",
            output,
            *SMALL,
            *flags,
        )

    return call


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


# ------------------------------------------------------------------------------------------------
# texts


def test_url_title_and_body(documents, tokenizer):
    texts = open_texts(documents.corpus)
    assert [texts[row] for row in range(12)] == [
        (tuple(part for part in (url, title) if part), body)
        for _, url, title, body in documents.rows
    ]
    assert join_title(["u", "t"], "b", "space", None) == "u t b"
    assert join_title(["u", "t"], "b", "sep", tokenizer) == "u[SEP]t[SEP]b"
    assert join_title(["t"], "b", "sep", tokenizer) == "t[SEP]b"
    assert join_title(["u"], " ", "sep", tokenizer) == "u"
    assert join_title([], "b", "sep", tokenizer) == "b"
    assert join_title(["u", "t"], "b", "none", tokenizer) == "b"
    assert join_title(["u", "t"], "", "none", tokenizer) == "u t"
    form = TextFormat("sep", passage_prompt="oven: ", max_characters=12)
    strings = format_texts([(("ash", "bow"), "ice snow")], "passage", form, tokenizer)
    assert strings == ["oven: ash[SEP]bow["]  # 12 characters behind the prompt
    url, title, body = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in ("ash", "ice snow", "pod")
    )
    cls, sep = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    strings = format_texts([(("ash", "ice snow"), "pod")], "passage", TextFormat("sep"), tokenizer)
    assert to_ids(strings, tokenizer, 99) == [cls + url + sep + title + sep + body + sep]
    assert format_texts([((), "x" * 20)], "query", form, tokenizer) == ["x" * 20]


@pytest.mark.parametrize("chunks", [1, 2, 9])
def test_chunks_are_the_tokens_in_order(tokenizer, chunks):
    strings = [" ".join(WORDS[:2] * n)[: 9 * n] for n in range(12)] + [
        "ash " * n for n in (8, 16, 17, 80)
    ]
    whole = tokenizer(strings, add_special_tokens=False)["input_ids"]
    found = chunk_ids(strings, tokenizer, LENGTH, chunks)
    for ids, some in zip(whole, found, strict=True):
        assert len(some) == min(max(-(-len(ids) // 8), 1), chunks) and all(
            len(one) == LENGTH for one in some[:-1]
        )
        assert sum((one[1:-1] for one in some), []) == ids[: 8 * chunks]
        assert {(one[0], one[-1]) for one in some} == {
            (tokenizer.cls_token_id, tokenizer.sep_token_id)
        }
    assert [some[0] for some in found] == to_ids(strings, tokenizer, LENGTH) and chunk_ids(
        [], tokenizer, 9, 2
    ) == []


# ------------------------------------------------------------------------------------------------
# training


def test_order_repeats_the_first_chunk_where_one_lacks(documents, tokenizer):
    texts = open_texts(documents.corpus)
    rows = [texts[row] for row in (10, 0, 4, 3)] + [((), "")]  # the last: a filler
    for most in (1, 3, 9):
        form = TextFormat("sep", max_passage_length=LENGTH, max_chunks=most)
        side = GroupCollator(None, tokenizer, form, 4).encoder_input("passage", rows)
        batches, order = side["chunks"], side["order"]
        read = [
            ids[mask == 1].tolist()
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        expected = chunk_ids(
            format_texts(rows, "passage", form, tokenizer), tokenizer, LENGTH, most
        )
        assert len(read) == sum(map(len, expected)) and all(
            len(batch["input_ids"]) <= 4 for batch in batches
        )
        wanted = [ids for some in expected for ids in some + some[:1] * (most - len(some))]
        assert [read[place] for place in order] == wanted and order.dtype == torch.int64
        assert sorted(set(order.tolist())) == list(range(len(read)))
        side = GroupCollator(None, tokenizer, form, 4).encoder_input("query", rows)
        assert side["order"].shape == (5,)


def test_gradient_of_a_maximum_reaches_the_best_chunk_alone(documents, checkpoint):
    model, texts = load_encoder(checkpoint), open_texts(documents.corpus)
    rows = [texts[row] for row in range(12)]
    side = GroupCollator(None, model.tokenizer, model.format, 5).encoder_input("passage", rows)
    order = side["order"]
    reps = torch.cat([model.encode(chunk) for chunk in side["chunks"]]).detach().requires_grad_()
    query = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    (query @ reps[order].T).unflatten(1, (-1, M)).amax(2).sum().backward()
    scores = (reps.detach() @ query[0]).tolist()
    best = [max(set(one), key=scores.__getitem__) for one in order.view(12, M).tolist()]
    expected = torch.zeros(len(reps), 32)
    expected[best] = query[0]
    torch.testing.assert_close(reps.grad, expected)


def test_groups_preview_and_rerank(documents, naive, checkpoint, tmp_path):
    model, queries, corpus = (
        load_encoder(checkpoint),
        open_texts(documents.queries),
        open_texts(documents.corpus),
    )
    groups = Groups(TrainingFile(documents.qrels, queries, corpus), 1, 200, 0)
    collate = GroupCollator(groups, model.tokenizer, model.format, 4)
    batch = collate([collate.groups[example, 0, example] for example in range(3)])
    assert batch["passage"]["order"].shape == (3 * M,) and batch["query"]["order"].shape == (3,)
    with torch.no_grad():
        p_reps = model(None, batch["passage"])[1].unflatten(0, (3, M))
    for row, reps in zip(batch["passage_rows"], p_reps, strict=True):
        own = naive[row]
        np.testing.assert_allclose(reps[: len(own)], own, atol=2e-5)
        np.testing.assert_allclose(reps[len(own) :], np.tile(own[0], (M - len(own), 1)), atol=2e-5)
    facts = collate.preview()
    assert "| [CLS]" in facts["passage 1"] and facts["passage tokens"].endswith(
        f"0.0% of texts cut at {M} x 10"
    )
    model.format.max_chunks = 3  # of D1, D3, D5, D7, D9
    longer = sum(len(naive[row]) > 3 for row in range(1, 11, 2)) / 5
    assert collate.preview()["passage tokens"].endswith(f"{longer:.1%} of texts cut at 3 x 10")
    model.format.max_chunks = M
    candidates = {f"q{number}": [f"D{row}" for row in (5, 3, 7, 0, 10)] for number in range(5)}
    lists = "".join(f"{qid}\t{','.join(pids)}\n" for qid, pids in candidates.items())
    (tmp_path / "lists.tsv").write_text(lists)
    dev = DevSet(documents.queries, documents.qrels, tmp_path / "lists.tsv", corpus)
    ranked = dev.rerank(model, collate, sorted(candidates), 4)
    with torch.no_grad():
        side = collate.encoder_input("query", [queries[row] for row in range(5)])
        q_reps = model.encode(side).numpy()
    for number, (qid, pids) in enumerate(ranked.items()):
        scores = {pid: max(naive[int(pid[1:])] @ q_reps[number]) for pid in candidates[qid]}
        assert pids == sorted(scores, key=scores.get, reverse=True)[:4]


# ------------------------------------------------------------------------------------------------
# checkpoints


def test_a_checkpoint_states_how_passages_are_cut(
    checkpoint, tiny_model_dir, tmp_path, monkeypatch
):
    model = load_encoder(
        checkpoint, strict=True, overrides={"max_chunks": M, "max_characters": 700}
    )
    assert (model.format.max_chunks, model.format.max_characters) == (M, 700) and not model.portable
    for name, value in (("max_chunks", 1), ("max_chunks", 4), ("max_characters", 0)):
        with pytest.raises(UserError, match=f"its {name} is"):
            load_encoder(checkpoint, overrides={name: value}, strict=True)
        assert getattr(load_encoder(checkpoint, overrides={name: value}).format, name) == value

    save_encoder(load_encoder(tiny_model_dir, Head("cls")), tmp_path / "plain", {})
    with pytest.raises(UserError, match="its max_chunks is 1, not 4"):
        load_encoder(tmp_path / "plain", overrides={"max_chunks": 4}, strict=True)
    assert (
        load_encoder(tmp_path / "plain").portable
        and load_encoder(tmp_path / "plain").format.max_chunks == 1
    )
    for change in ({"max_chunks": 2}, {"max_characters": 5}):
        assert not load_encoder(tmp_path / "plain", overrides=change).portable
    with pytest.raises(UserError, match="a sparse vector is one per text"):
        load_encoder(tiny_model_dir, Head(kind="sparse"), {"max_chunks": 2})
    private = read_json(checkpoint / "isthmus.json")
    (tmp_path / "plain" / "isthmus.json").write_text(json.dumps({**private, "version": 3}))
    with pytest.raises(UserError, match="a newer version"):
        load_encoder(tmp_path / "plain")
    monkeypatch.setattr(type(model.tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="the tokenizer is slow"):
        load_encoder(checkpoint)


# ------------------------------------------------------------------------------------------------
# encoding


def content(folder):
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name != "args.json"
    }


def test_encode_gives_a_vector_to_each_chunk(encode, documents, naive, tmp_path, monkeypatch):
    monkeypatch.setattr("encode.WINDOW", 2)
    status, printed, error = encode(tmp_path / "a")
    assert status == 0, error
    counts = [len(part) for part in naive]
    assert "12 texts" in printed and f"{sum(counts) / 12:.2f} per text, 9 at most" in printed
    found = Embeddings(tmp_path / "a")
    assert (len(found), found.num_vectors, found.max_chunks) == (12, sum(counts), M)
    assert (found.meta["count"], found.meta["vectors"], found.meta["max_chunks"]) == (
        12,
        sum(counts),
        M,
    )
    np.testing.assert_allclose(found.take(range(sum(counts))), np.concatenate(naive), atol=2e-5)
    lines = [
        line
        for path in sorted((tmp_path / "a").glob("*.ids.txt"))
        for line in path.read_text().split()
    ]
    assert lines == [f"D{row}" for row, count in enumerate(counts) for _ in range(count)]
    assert found.ids([11, 0, 7]) == ["D11", "D0", "D7"] and found.rows(
        ["D10", "?", "D0"]
    ).tolist() == [10, -1, 0]
    assert found.first.tolist() == np.cumsum([0, *counts]).tolist()
    assert (
        found.text_of.tolist() == np.repeat(np.arange(12), counts).tolist()
        and found.text_of.dtype == np.int32
    )

    (tmp_path / "b").mkdir()  # died: a shard and the end are missing
    for name, data in content(tmp_path / "a").items():
        (tmp_path / "b" / name).write_bytes(data)
    (tmp_path / "b" / "args.json").write_bytes((tmp_path / "a" / "args.json").read_bytes())
    for name in ("meta.json", "shard-00002.npy"):
        (tmp_path / "b" / name).unlink()
    status, printed, error = encode(tmp_path / "b")
    assert status == 0 and "3 texts in" in printed, error
    assert content(tmp_path / "b") == content(tmp_path / "a")
    assert "is complete" in encode(tmp_path / "b")[1]
    assert "its max_chunks is 9, not 2" in encode(tmp_path / "c", "--max_chunks", 2)[2]
    encode(tmp_path / "c", "--max_chunks", 2, "--override")
    np.testing.assert_allclose(
        Embeddings(tmp_path / "c").take([0, 1, 2]), found.take([0, 1, 2]), atol=2e-5
    )
    assert np.diff(Embeddings(tmp_path / "c").first).tolist() == [min(count, 2) for count in counts]
    assert "per text" in encode(tmp_path / "d", "--dry_run")[1] and not (tmp_path / "d").exists()

    path = tmp_path / "a" / "shard-00001.ids.txt"
    path.write_text(path.read_text().replace("D4\n", "", 1))
    with pytest.raises(UserError, match="shard-00001.ids.txt: .* ids of .* vectors"):
        Embeddings(tmp_path / "a")


def test_two_processes_write_the_same_bytes(encode, checkpoint, documents, two_processes, tmp_path):
    encode(tmp_path / "one")
    flags = ["--model", checkpoint, "--input", documents.corpus, "--kind", "passage"]
    flags += ["--output_dir", tmp_path / "two", *SMALL]
    two_processes("encode.py", *flags)
    assert content(tmp_path / "one") == content(tmp_path / "two")


# ------------------------------------------------------------------------------------------------
# search

COUNTS = [1, 4, 2, 9, 3, 1, 5, 7, 6, 8, 2, 9, 1, 1, 4]


@pytest.fixture
def stored(tmp_path):
    """(folder of 15 texts with 1 to 9 chunks, the chunks of each, 8 queries); small whole numbers,
    so that there are ties within and between texts."""
    draw = np.random.default_rng(0)
    chunks = [draw.integers(-2, 3, (count, 4)).astype(np.float32) for count in COUNTS]
    chunks[8][:4] = chunks[3][:4] = 2.0  # ties that run over the cut
    for shard in range(3):
        rows = range(5 * shard, 5 * shard + 5)
        ids = [f"d{row}" for row in rows for _ in chunks[row]]
        write_shard(tmp_path / "p", shard, np.concatenate([chunks[row] for row in rows]), ids)
    total = sum(COUNTS)
    finish_embeddings(tmp_path / "p", {"count": 15, "dim": 4, "max_chunks": 9, "vectors": total})
    return Embeddings(tmp_path / "p"), chunks, draw.integers(-2, 3, (8, 4)).astype(np.float32)


def best(chunks, query, k):
    """Every text by its best chunk, sorted in Python: score descending, then row; filled up to
    k."""
    scores = [max(float(chunk @ query) for chunk in some) for some in chunks]
    rows = sorted(range(len(chunks)), key=lambda row: (-scores[row], row))[:k]
    missing = k - len(rows)
    return [scores[row] for row in rows] + [-np.inf] * missing, rows + [-1] * missing


@pytest.mark.parametrize("k", [1, 2, 5, 14, 15, 20])
@pytest.mark.parametrize("path", ["_search_cpu", "_search_device"])
def test_search_gives_distinct_texts_by_their_best_chunk(stored, monkeypatch, path, k):
    corpus, chunks, queries = stored
    monkeypatch.setattr(DenseIndex, "_search_cpu", getattr(DenseIndex, path))
    monkeypatch.setattr(search, "QUERY_TILE", 3)
    monkeypatch.setattr(search, "ROW_TILE", 4)
    monkeypatch.setattr(search, "QUERIES_AT_A_TIME", (5, 5))
    scores, rows = DenseIndex(corpus).search(queries, k)
    expected = [best(chunks, query, k) for query in queries]
    assert scores.tolist() == [one for one, _ in expected] and rows.tolist() == [
        one for _, one in expected
    ]


def test_search_goes_as_deep_as_it_must(tmp_path):
    """All chunks of a text score higher than those of the next: k texts lie (k - 1)·M + 1 deep."""
    ids = [f"d{row}" for row in range(10) for _ in range(9)]
    write_shard(tmp_path, 0, -np.arange(90, dtype=np.float32)[:, None], ids)
    finish_embeddings(tmp_path, {"count": 10, "dim": 1, "max_chunks": 9, "vectors": 90})
    corpus = Embeddings(tmp_path)
    for k in range(1, 11):
        scores, rows = DenseIndex(corpus).search(np.ones((1, 1), np.float32), k)
        assert rows.tolist() == [list(range(k))]
        assert scores.tolist() == [[-9.0 * row for row in range(k)]]


@pytest.mark.parametrize("world", [2, 4, 20])
@pytest.mark.parametrize("k", [3, 15, 20])
def test_any_number_of_processes_finds_the_same(stored, monkeypatch, world, k):
    corpus, chunks, queries = stored
    parts = []
    with monkeypatch.context() as patch:
        patch.setattr(search, "merge", lambda keys, k: parts.append(keys) or keys)
        for rank in range(world):
            patch.setattr(search, "world", lambda rank=rank: (rank, world))
            DenseIndex(corpus).search(queries, k)
    monkeypatch.setattr(search, "world", lambda: (0, world))
    monkeypatch.setattr(search, "all_gather", lambda keys: torch.cat(parts))
    monkeypatch.setattr(search.dist, "get_backend", lambda: "gloo")
    scores, rows = unpack(search.merge(parts[0], k))
    expected = [best(chunks, query, k) for query in queries]
    assert scores.tolist() == [one for one, _ in expected] and rows.tolist() == [
        one for _, one in expected
    ]


def test_scores_of_given_texts(stored):
    corpus, chunks, _ = stored
    queries = np.random.default_rng(1).standard_normal((8, 4), np.float32)
    given = [
        np.array(rows, dtype=np.int64)
        for rows in ([3, 0, 14], [], [7, 7], [11], range(15), [0], [13], [6])
    ]
    for query, rows, scores in zip(
        queries, given, DenseIndex(corpus).score(queries, given), strict=True
    ):
        expected = [max(chunk @ query for chunk in chunks[row]) for row in rows]
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
        assert scores.dtype == np.float32


# ------------------------------------------------------------------------------------------------
# mining and evaluation


def test_mining_and_evaluation_see_documents(
    encode, script, documents, naive, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert encode("p")[0] == 0 and encode("q", source=documents.queries, kind="query")[0] == 0
    queries = Embeddings("q")
    assert (
        queries.max_chunks == 1
        and queries.first is None
        and len(queries) == queries.num_vectors == 5
    )
    vectors = queries.take(range(5))
    pairs = ["--queries_embeddings", "q", "--corpus_embeddings", "p", "--qrels", documents.qrels]
    how = ["--corpus", documents.corpus, "--depth", 6, "--output_dir", "n"]
    status, _, error = script("mine_negatives", *pairs, *how)
    assert status == 0, error
    status, _, error = script("evaluate", *pairs, "--depth", 20, "--output_dir", "e")
    assert status == 0, error
    (tmp_path / "some.tsv").write_text(
        "".join(f"q{q}\tD{d}\t{d}\n" for q in range(5) for d in (1, 4, 10))
    )
    assert script("evaluate", *pairs, "--candidates", "some.tsv", "--output_dir", "r")[0] == 0
    mined = {row.qid: row.neg for _, row in files.read_training_file("n/train.jsonl")}
    run = files.read_run("e/run.trec")
    reranked = files.read_run("r/run.trec")
    for number, query in enumerate(vectors):
        scores = np.array([max(part @ query) for part in naive], dtype=np.float32)
        qid, positive = f"q{number}", {f"D{2 * number + 1}"}
        entry = run[qid]
        assert sorted(entry.pids) == sorted(f"D{row}" for row in range(12))
        np.testing.assert_allclose(
            entry.scores, [scores[int(pid[1:])] for pid in entry.pids], atol=2e-4
        )
        copies = {"D3", "D7"} if positive & {"D3", "D7"} else positive  # by their body
        assert mined[qid] == [pid for pid in entry.pids[:6] if pid not in copies]
        np.testing.assert_allclose(
            reranked[qid].scores, sorted(scores[[1, 4, 10]], reverse=True), atol=2e-4
        )
