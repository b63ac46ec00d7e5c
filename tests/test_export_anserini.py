"""pytest tests/test_export_anserini.py — sparse embeddings become the lines that Anserini reads,
weight by weight."""

import json

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from transformers import AutoTokenizer

from lib.embeddings import Embeddings, finish_embeddings, write_shard
from recipes import export_anserini
from recipes.export_anserini import quantise, terms


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def embeddings(tmp_path, tiny_model_dir):
    """embeddings("name", kind, rows) -> a folder as encode.py leaves it, in shards of three rows; a
    row is {column: x} or an array."""

    def make(name, kind, rows, ids, dim, **meta):
        weights = np.zeros((len(rows), dim), dtype=np.float32)
        for row, content in enumerate(rows):
            weights[row, list(content)] = list(content.values())
        folder = tmp_path / name
        for shard, start in enumerate(range(0, len(rows), 3)):
            write_shard(
                folder, shard, csr_matrix(weights[start : start + 3]), ids[start : start + 3]
            )
        stated = {
            "model": str(tiny_model_dir),
            "model_hash": "m",
            "input_fingerprint": "i",
            "head": "sparse",
        }
        finish_embeddings(folder, {**stated, "kind": kind, "count": len(rows), "dim": dim, **meta})
        return folder

    return make


@pytest.fixture(scope="module")
def pieces(tokenizer):
    """[(column, token)] of two whole words and, last, of a "##" piece."""
    words = [
        (v, token)
        for token, v in sorted(tokenizer.get_vocab().items())
        if len(token) > 3 and token.isalpha()
    ]
    return [
        *words[:2],
        next((v, t) for t, v in sorted(tokenizer.get_vocab().items()) if t.startswith("##")),
    ]


def test_every_line_of_a_collection(tokenizer, pieces, embeddings, script, tmp_path):
    (ant, ants), (bread, loaf), (part, piece) = pieces
    rows = [
        {part: 0.205, ant: 1.13},
        {ant: 0.125, bread: 0.375},  # 12.5 and 37.5, which float32 holds: to the even 12 and 38
        {ant: 0.00499, bread: 0.0051},
        {ant: 0.00499},
        {},
        {bread: 3.0, len(tokenizer): 0.5},  # a column that the model has and the tokenizer has not
        {bread: 0.01},
    ]
    folder = embeddings("corpus", "passage", rows, [*"abcdef", "ö"], len(tokenizer) + 1)
    status, shown, errors = script(
        "recipes.export_anserini",
        "--embeddings",
        folder,
        "--output_dir",
        tmp_path / "out",
        "--files",
        2,
    )
    assert status == 0, errors
    assert "7 passages, 1.4 terms each of 1.4 with a weight, the largest impact 300" in shown
    both = [
        {t: w for _, t, w in sorted(row)}
        for row in ([(part, piece, 20), (ant, ants, 113)], [(ant, ants, 12), (bread, loaf, 38)])
    ]
    first = [*both, {loaf: 1}]
    second = [{"[UNK]": 1}, {"[UNK]": 1}, {loaf: 300, f"[v{len(tokenizer)}]": 50}, {loaf: 1}]
    collection = tmp_path / "out/collection"
    assert sorted(path.name for path in collection.iterdir()) == [
        "vectors-00.jsonl",
        "vectors-01.jsonl",
    ]
    for name, ids, vectors in (("00", "abc", first), ("01", "defö", second)):
        lines = (collection / f"vectors-{name}.jsonl").read_text().splitlines()
        assert lines == [
            json.dumps({"id": i, "vector": v}) for i, v in zip(ids, vectors, strict=True)
        ]
    assert json.loads((tmp_path / "out/meta.json").read_text())["impacts"] == 10


def test_every_line_of_queries(tokenizer, pieces, embeddings, script, tmp_path):
    (ant, ants), _, (part, piece) = pieces
    rows = [{ant: 0.03, part: 0.02}, {}, {ant: 0.01}]
    folder = embeddings("queries", "query", rows, ["12", "7", "0"], len(tokenizer))
    flags = ["--embeddings", folder, "--output_dir"]
    status, shown, errors = script("recipes.export_anserini", *flags, tmp_path / "out")
    assert status == 0 and "note" not in shown, errors
    first = " ".join(
        repeated
        for _, repeated in sorted([(ant, f"{ants} {ants} {ants}"), (part, f"{piece} {piece}")])
    )
    assert (tmp_path / "out/queries.tsv").read_text() == f"12\t{first}\n7\t[UNK]\n0\t{ants}\n"
    assert json.loads((tmp_path / "out/meta.json").read_text())["topic_reader"] == "TsvInt"
    status, _, errors = script(
        "recipes.export_anserini", *flags, tmp_path / "double", "--factor", 200
    )
    assert (tmp_path / "double/queries.tsv").read_text().splitlines()[2] == f"0\t{ants} {ants}", (
        errors
    )


@pytest.mark.parametrize("name", ["q1", "007", "-1", "4294967296", "1_0", "٣"])
def test_ids_that_are_no_integers_need_the_other_reader(
    name, tokenizer, embeddings, script, tmp_path
):
    folder = embeddings("queries", "query", [{9: 1.0}] * 2, ["5", name], len(tokenizer))
    status, shown, errors = script(
        "recipes.export_anserini", "--embeddings", folder, "--output_dir", tmp_path / "out"
    )
    assert status == 0 and f"{name} is none — search with -topicReader TsvString" in shown, errors
    assert json.loads((tmp_path / "out/meta.json").read_text())["topic_reader"] == "TsvString"


def test_dot_products_of_the_files_are_those_of_the_rounded_matrix(
    tokenizer, embeddings, script, monkeypatch, tmp_path
):
    monkeypatch.setattr(export_anserini, "ROWS_AT_A_TIME", 2)
    monkeypatch.setattr(export_anserini, "CLAUSES", 40)
    draw, dim = np.random.default_rng(0), len(tokenizer)
    read = {}
    for name, kind, count in (("q", "query", 5), ("p", "passage", 11)):
        rows = [
            dict.fromkeys(draw.choice(dim, draw.integers(1, 40), replace=False).tolist())
            for _ in range(count)
        ]
        rows = [{v: 3 * draw.random() ** 4 for v in row} for row in rows]
        rows[1] = {v: 1.0 for v in range(50)}
        folder = embeddings(name, kind, rows, [str(i) for i in range(count)], dim)
        flags = ["--embeddings", folder, "--output_dir", tmp_path / f"out-{name}", "--files", 4]
        status, shown, errors = script("recipes.export_anserini", *flags)
        assert status == 0, errors
        assert ("more than 40 terms (1, ...)" in shown) == (kind == "query")
        read[name] = np.rint(
            np.float32(100) * Embeddings(folder).take(range(count)).toarray()
        ).astype(int)
        assert (read[name].sum(1) > 0).all()
    passages = {}
    for path in sorted((tmp_path / "out-p/collection").iterdir()):
        for line in path.read_text().splitlines():
            passages[json.loads(line)["id"]] = json.loads(line)["vector"]
    assert list(passages) == [str(i) for i in range(11)]
    for query, line in zip(
        read["q"], (tmp_path / "out-q/queries.tsv").read_text().splitlines(), strict=True
    ):
        tokens = line.split("\t")[1].split()  # a term that stands w times counts w times
        scores = [sum(vector.get(token, 0) for token in tokens) for vector in passages.values()]
        assert scores == (read["p"] @ query).tolist()


def test_quantise_leaves_its_input_and_sorts_columns():
    given = csr_matrix(
        (np.float32([0.1, 0.2, 0.15, 0.001, -5]), np.int32([1, 4, 3, 2, 0]), [0, 4, 4, 5]),
        shape=(3, 6),
    )
    before = [part.copy() for part in (given.data, given.indices, given.indptr)]
    found = quantise(given, 100.0, 5)
    assert found.indices.tolist() == [1, 3, 4, 5, 5] and found.dtype == np.int32
    assert found.data.tolist() == [10, 15, 20, 1, 1]
    for part, other in zip(before, (given.data, given.indices, given.indptr), strict=True):
        assert (part == other).all()


class Tokens(list):
    """As much of a tokenizer as `terms` looks at."""

    name_or_path = "tokens"

    def convert_ids_to_tokens(self, ids):
        return [self[i] for i in ids]


def test_terms_are_whole_words_to_a_whitespace_analyser():
    tokens = [
        "Ġword",
        "▁word",
        "##s",
        "Word",
        "word",
        "ß\u200d",
        "  ",
        "a\u3000b",
        "\x01",
        None,
        "",
        "x" * 128,
    ]
    names = terms(Tokens(tokens), 14).tolist()
    assert names == [*tokens[:6], *(f"[v{column}]" for column in range(6, 14))]
    with pytest.raises(export_anserini.UserError, match="two columns share the term"):
        terms(Tokens(["a", "[v2]", " "]), 3)


def test_what_is_refused(tokenizer, embeddings, script, tmp_path):
    V = len(tokenizer)

    def refused(*flags):
        status, _, errors = script(
            "recipes.export_anserini", "--output_dir", tmp_path / "out", *flags
        )
        assert status == 1 and len(errors.strip().splitlines()) == 1, errors
        assert not (tmp_path / "out").exists()
        return errors

    rows, ids = [{9: 1.0}], ["a"]
    good = embeddings("good", "passage", rows, ids, V)
    for name, dim in (("narrow", V - 1), ("wide", V + 129)):
        errors = refused("--embeddings", embeddings(name, "passage", rows, ids, dim))
        assert f"{V} tokens where vectors have {dim} columns" in errors and "--model" in errors
    assert "no tokenizer" in refused("--embeddings", good, "--model", tmp_path)
    moved = embeddings("moved", "passage", rows, ids, V, model=str(tmp_path / "gone"))
    assert "give the folder of the checkpoint with --model" in refused("--embeddings", moved)
    assert "--factor" in refused("--embeddings", good, "--factor", 0)
    (good / "meta.json").unlink()
    assert "no meta.json" in refused("--embeddings", good)
    write_shard(tmp_path / "dense", 0, np.ones((1, V), dtype=np.float32), ids)
    finish_embeddings(
        tmp_path / "dense", {"count": 1, "dim": V, "head": "dense", "kind": "passage"}
    )
    assert "dense vectors" in refused("--embeddings", tmp_path / "dense")


def test_a_run_that_stops_leaves_nothing_half(tokenizer, embeddings, script, monkeypatch, tmp_path):
    folder = embeddings("corpus", "passage", [{9: 1.0}] * 9, list("abcdefghi"), len(tokenizer))
    out = tmp_path / "out"
    flags = ["--embeddings", folder, "--output_dir", out, "--files", 3]
    calls = []

    def fails(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return quantise(*given)

    monkeypatch.setattr(export_anserini, "quantise", fails)
    assert script("recipes.export_anserini", *flags)[0] == 130
    assert len(calls) == 3 and [path.name for path in out.iterdir()] == ["args.json"]
    monkeypatch.setattr(export_anserini, "quantise", quantise)
    (out / ".tmp-1-collection").mkdir()  # of a run that was killed outright
    assert script("recipes.export_anserini", *flags)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["args.json", "collection", "meta.json"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "is complete" in script("recipes.export_anserini", *flags)[1]
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "made with --files 3, now 4" in script("recipes.export_anserini", *flags[:-1], 4)[2]
    finish_embeddings(folder, {**Embeddings(folder).meta, "model_hash": "another"})
    assert "made with embeddings" in script("recipes.export_anserini", *flags)[2]
