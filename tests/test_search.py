"""recipes/search.py: the ranking of evaluate.py, marked terms, and mistakes.

Run: python -m pytest tests/test_search.py"""

import io
import json
import shutil
import sys

import pytest

from lib.bm25 import terms
from lib.checkpoint import load_encoder, save_encoder
from lib.embeddings import finish_embeddings
from lib.encoder import Head
from lib.files import read_json, read_run
from lib.texts import open_texts

NAMES = "dense", "chunks", "sparse"


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    """Checkpoints; `made` adds what is made of them."""
    folder = tmp_path_factory.mktemp("search")
    heads = {"dense": Head("mean", normalize=True), "chunks": Head("cls")}
    forms = {"dense": {"query_prompt": "what? ", "max_query_length": 9}}
    forms["chunks"] = {"max_passage_length": 12, "max_chunks": 3}
    for name in NAMES:
        head = heads.get(name, Head(kind="sparse"))
        save_encoder(load_encoder(tiny_model_dir, head, forms.get(name)), folder / name, {})
    return folder


@pytest.fixture
def made(folder, tiny_collection, script):
    """NAME-corpus, NAME-queries of each checkpoint, and NAME-run of each, of BM25, and of two
    fusions. Only the first test makes them."""
    runs = {name: folder / f"{name}-run" / "run.trec" for name in (*NAMES, "bm25")}
    commands = {}
    for name in NAMES:
        for kind, what in (("query", "queries"), ("passage", "corpus")):
            text = getattr(tiny_collection, what)
            flags = ["--model", folder / name, "--input", text, "--kind", kind, "--num_workers", 0]
            commands[f"{name}-{what}"] = ["encode", *flags]
        vectors = ["--queries_embeddings", folder / f"{name}-queries"]
        vectors += ["--corpus_embeddings", folder / f"{name}-corpus"]
        commands[f"{name}-run"] = ["evaluate", *vectors]
    texts = ["--queries", tiny_collection.queries, "--corpus", tiny_collection.corpus]
    commands["bm25-run"] = ["evaluate", "--bm25", *texts]
    commands["two-run"] = ["evaluate", "--run", runs["dense"], runs["bm25"]]
    commands["three-run"] = ["evaluate", "--run", runs["dense"], runs["sparse"], runs["bm25"]]
    for out, (name, *flags) in commands.items():
        if not (folder / out).exists():
            status, _, error = script(name, *flags, "--output_dir", folder / out)
            assert status == 0, error
    return folder


@pytest.fixture
def ask(script, monkeypatch):
    """ask([query, ...], flags) -> the records of --json."""

    def call(queries, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{one}\n" for one in queries)))
        status, shown, error = script("recipes.search", *flags, "--json")
        assert status == 0, error
        return [json.loads(line) for line in shown.splitlines()]

    return call


SOURCES = {
    "dense": "dense-corpus",
    "chunks": "chunks-corpus",
    "sparse": "sparse-corpus",
    "bm25": "--bm25 --corpus CORPUS",
    "two": "dense-corpus --bm25",
    "three": "dense-corpus sparse-corpus --bm25",
}


def test_a_query_has_the_ranking_of_evaluate(made, tiny_collection, ask):
    queries = open_texts(tiny_collection.queries)
    corpus = open_texts(tiny_collection.corpus)
    places = {f"{one}-corpus": str(made / f"{one}-corpus") for one in NAMES}
    places["CORPUS"] = str(tiny_collection.corpus)
    for name, words in SOURCES.items():
        run = read_run(made / f"{name}-run" / "run.trec")
        flags = [places.get(word, word) for word in words.split()]
        records = ask([queries[row][1] for row in range(20)], *flags, "--top", 30)
        for row, qid in enumerate(queries.ids(range(20))):
            found = [one for one in records if one["query"] == queries[row][1]]
            assert [one["id"] for one in found] == run[qid].pids[:30], name
            assert [one["score"] for one in found] == pytest.approx(run[qid].scores[:30], rel=1e-5)
            assert [one["rank"] for one in found] == list(range(1, len(found) + 1))
        titles, text = corpus[corpus.rows([records[0]["id"]])[0]]
        assert records[0]["text"] == text and records[0]["title"] == " ".join(titles)
        assert len(records[0]["ranks"]) == {"two": 2, "three": 3}.get(name, 1)


@pytest.mark.parametrize("name", ["sparse", "bm25"])
def test_the_terms_add_up_to_the_score(made, tiny_collection, ask, name, monkeypatch):
    monkeypatch.setattr("recipes.search.MOST_TERMS", 10_000)
    flags = ["--bm25", "--corpus", tiny_collection.corpus]
    flags = [made / "sparse-corpus"] if name == "sparse" else flags
    for one in ask(["the ants, the ants and their colony"], *flags):
        (own,) = one["terms"].values()
        assert sum(own.values()) == pytest.approx(one["score"], rel=1e-4)
        assert list(own.values()) == sorted(own.values(), reverse=True)
        assert name == "sparse" or own.keys() == {"ant", "coloni"} & {*terms(one["text"])} | (
            {"ant"} & {*terms(one["title"])}
        )


def test_words_are_marked(made, tiny_collection, script):
    flags = ["--top", 3, "--query", "colonies of an ant"]
    corpus = ["--corpus", tiny_collection.corpus]
    status, shown, error = script("recipes.search", "--bm25", *corpus, *flags)
    assert status == 0, error
    assert "**colony**" in shown and "3 of 40 passages in " in shown and "**and**" not in shown
    status, shown, error = script("recipes.search", made / "sparse-corpus", "--bm25", *flags)
    assert status == 0 and f"({made / 'sparse-corpus'} " in shown and "**" in shown, error
    status, shown, error = script("recipes.search", made / "dense-corpus", *flags)
    assert status == 0 and "**" not in shown and " of 40 passages" in shown, error
    status, shown, error = script("recipes.search", "--bm25", *corpus, "--query", "zebra")
    assert status == 0 and "0 of 40 passages" in shown, error


def test_control_characters_do_not_reach_the_terminal(tmp_path, script):
    (tmp_path / "c.jsonl").write_text(
        '{"_id": "p", "title": "\\u001b[2J", "text": "a\\u001bb ant"}\n'
    )
    flags = ["--bm25", "--corpus", tmp_path / "c.jsonl", "--query", "ant"]
    status, shown, _ = script("recipes.search", *flags)
    assert status == 0 and "a b **ant**" in shown and "\x1b" not in shown


def test_the_folder_of_the_quickstart_may_have_moved(made, tiny_collection, ask, tmp_path):
    out = tmp_path / "moved"
    shutil.copytree(made / "dense", out / "stage2")
    shutil.copytree(made / "dense-corpus", out / "stage2-corpus")
    (out / "collection").mkdir()
    shutil.copy(tiny_collection.corpus, out / "collection" / "corpus.jsonl")
    meta = read_json(out / "stage2-corpus" / "meta.json")
    finish_embeddings(out / "stage2-corpus", {**meta, "model": "gone", "input": "gone.jsonl"})
    found = ask(["what about ants?"], out, "--bm25")
    assert found == [
        {**one, "seconds": there["seconds"], "terms": there["terms"], "ranks": there["ranks"]}
        for one, there in zip(
            ask(["what about ants?"], made / "dense-corpus", "--bm25"), found, strict=True
        )
    ]


def test_mistakes(made, tiny_collection, script, tmp_path):
    (tmp_path / "other.tsv").write_text("p1\tants\n")
    bare = tmp_path / "bare"
    shutil.copytree(made / "dense-corpus", bare)
    finish_embeddings(bare, {"count": 40, "dim": 32, "kind": "passage"})
    cases = [
        ([], "nothing to search — give FOLDER"),
        (["--bm25"], "nothing to search — give FOLDER"),
        ([made / "dense-queries"], "not of passages"),
        ([bare], "names no corpus — give vectors of passages, and --corpus"),
        ([bare, "--corpus", tiny_collection.corpus], "names no model"),
        ([made / "dense-corpus", "--corpus", tmp_path / "other.tsv"], "vectors of other texts"),
        ([made / "dense-corpus", "--model", made / "chunks"], "made by another checkpoint"),
        ([made / "dense-corpus", "--model", "a", "b"], "with --model, one for each folder"),
        ([made / "dense"], "no meta.json, it is unfinished"),
        ([made / "dense-corpus", "--top", 0], "--top 0"),
    ]
    for flags, message in cases:
        status, shown, error = script("recipes.search", *flags, "--query", "ants")
        assert status == 1 and message in error and error.count("\n") == 1, error
        assert shown == ""
    flags = ["--corpus", tiny_collection.corpus, "--model", made / "dense", "--query", "ants"]
    assert script("recipes.search", bare, *flags)[0] == 0
    assert script("recipes.search", made / "dense-corpus", "--bm25", *flags)[0] == 0


def test_ctrl_c_ends_in_one_line(tiny_collection, script, monkeypatch):
    lines = iter(["ants"])

    def typed(_):
        for line in lines:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", typed)
    status, shown, error = script("recipes.search", "--bm25", "--corpus", tiny_collection.corpus)
    assert status == 130 and "**ants**" in shown and error.count("\n") == 1, error


def test_an_empty_line_ends_it(tiny_collection, ask):
    found = ask(["ants", "", "bees"], "--bm25", "--corpus", tiny_collection.corpus)
    assert {one["query"] for one in found} == {"ants"}
