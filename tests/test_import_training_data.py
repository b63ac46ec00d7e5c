"""Import of training data: every documented form by hand, damaged lines, equal texts.

pytest tests/test_import_training_data.py"""

import bz2
import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from lib.files import UserError, foreign_format, read_qrels, read_training_file
from lib.texts import text_key


def pid(text: str) -> str:
    return f"p{text_key('', text) + 2**63:016x}"


def qid(text: str) -> str:
    return "q" + pid(text)[1:]


def jsonl(*rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def convert(tmp_path, script):
    """convert(text, name="x.jsonl", **flags) -> (train.jsonl as dictionaries, output folder)."""

    def call(text, name="x.jsonl", *flags):
        source, out = tmp_path / name, tmp_path / "out"
        if text is not None:
            source.parent.mkdir(exist_ok=True)
            source.write_bytes(text if isinstance(text, bytes) else text.encode())
        done = script(
            "recipes.import_training_data", "--input", source, "--output_dir", out, *flags
        )
        if done[0]:
            raise UserError(done[2])
        assert not done[2] and not [*out.glob(".tmp*")]
        assert (out / "audit.json").is_file()
        rows = read(out / "train.jsonl")
        judged = {row["qid"]: dict.fromkeys(row["pos"], 1) for row in rows}
        assert read_qrels(out / "qrels.tsv") == judged
        assert len([*read_training_file(out / "train.jsonl")]) == len(rows)
        return rows, out

    return call


def audit(out) -> dict:
    return {
        name: value for name, value in json.loads((out / "audit.json").read_text()).items() if value
    }


BGE = [
    {"query": "do ants sleep", "pos": ["Ants rest."], "neg": ["Bees fly.", "Öl, überall"]},
    {"query": "what is a bee", "pos": ["Bees fly.", "A bee is …"], "neg": [], "prompt": "Find: "},
    {"query": "do ants sleep", "pos": ["Ants nap."], "neg": ["Bees fly.", "Ants rest."]},
]


def test_flagembedding_texts_are_named_by_their_text_and_rows_of_a_query_joined(convert):
    rows, out = convert(jsonl(*BGE))
    assert rows == [
        {
            "qid": qid("do ants sleep"),
            "pos": [pid("Ants rest."), pid("Ants nap.")],
            "neg": [pid("Bees fly."), pid("Öl, überall")],  # "Ants rest." is a positive
        },
        {"qid": qid("what is a bee"), "pos": [pid("Bees fly."), pid("A bee is …")]},
    ]
    texts = ["Ants rest.", "Bees fly.", "Öl, überall", "A bee is …", "Ants nap."]
    assert {row["_id"]: row["text"] for row in read(out / "corpus.jsonl")} == {
        pid(text): text for text in texts
    }
    assert read(out / "queries.jsonl") == [
        {"_id": qid(text), "text": text} for text in ("do ants sleep", "what is a bee")
    ]
    counts = audit(out)
    assert counts == {
        "format": "flagembedding",
        "rows of the input": 3,
        "queries": 2,
        "positives": 4,
        "negatives": 2,
        "repeated pairs, dropped": 1,
        "negatives dropped, positives of their query": 1,
        "queries without a negative": 1,
    }


def test_flagembedding_scores_stay_with_their_passages(convert):
    one = {"query": "q", "pos": ["a"], "neg": ["b", "a", "c"], "pos_scores": [9.1]}
    rows, _ = convert(jsonl(one | {"neg_scores": [3, 9.1, -1.5], "category": "x", "id": 3}))
    assert rows[0]["pos_scores"] == [9.1] and rows[0]["neg_scores"] == [3.0, -1.5]
    assert rows[0]["neg"] == [pid("b"), pid("c")]


def test_incomplete_scores_of_a_query_are_left_out_and_counted(convert):
    scored = {"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1], "neg_scores": [0]}
    bare = {"query": "q", "pos": ["a"], "neg": ["c"], "pos_scores": None, "neg_scores": None}
    rows, out = convert(jsonl(scored, bare, scored | {"query": "r"}))
    assert rows[0] == {"qid": qid("q"), "pos": [pid("a")], "neg": [pid("b"), pid("c")]}
    assert rows[1]["neg_scores"] == [0.0]
    assert audit(out)["queries with incomplete scores"] == 1


def test_empty_texts_are_kept_and_queries_without_positives_dropped(convert):
    rows, out = convert(jsonl({"query": "q", "pos": ["a"], "neg": [""]}, {"query": "", "pos": []}))
    assert rows == [{"qid": qid("q"), "pos": [pid("a")], "neg": [pid("")]}]
    assert {"_id": pid(""), "text": ""} in read(out / "corpus.jsonl")
    counts = audit(out)
    assert counts["empty passages, kept"] == counts["empty queries, kept"] == 1
    assert "queries without a positive, dropped" not in counts  # it has no pair at all


NULLS = {
    "flagembedding": {"query": None, "pos": [None], "neg": ["a"]},
    "tevatron": {
        "query_id": "1",
        "query": None,
        "positive_passages": [{"docid": "7", "title": None, "text": None}],
        "negative_passages": [{"docid": "8", "text": "a"}],
    },
    "sentence-transformers": {"query": None, "positive": None, "negative": None, "other": "a"},
}


@pytest.mark.parametrize("name", NULLS)
def test_null_is_an_empty_text_and_no_negative(convert, name):
    """Null is an empty text, but among the columns of negatives it fills up shorter rows."""
    rows, out = convert(jsonl(NULLS[name]))
    texts = {row["_id"]: row["text"] for row in read(out / "corpus.jsonl")}
    assert [texts[pid] for pid in rows[0]["pos"]] == [""]
    assert [texts[pid] for pid in rows[0]["neg"]] == ["a"] and len(texts) == 2
    assert [row["text"] for row in read(out / "queries.jsonl")] == [""]
    counts = audit(out)
    assert counts["empty passages, kept"] == counts["empty queries, kept"] == 1


def test_half_a_surrogate_pair_is_replaced_and_counted(convert, capfd):
    line = '{"query": "\\ud83d\\ude00 \\ud83d", "pos": ["\\uDE00"], "neg": ["\\\\ud83d"]}\n'
    rows, out = convert(line)
    assert rows[0]["pos"] == [pid("\ufffd")] and rows[0]["neg"] == [pid("\\ud83d")]
    assert read(out / "queries.jsonl")[0]["text"] == "\U0001f600 \ufffd"


def test_tevatron_with_texts(convert):
    row = {
        "query_id": 1,
        "query": "q",
        "positive_passages": [{"docid": "7,a#0", "title": "t", "text": "a"}],
        "negative_passages": [
            {"docid": 9, "title": None, "text": "b"},
            {"docid": "12", "text": "a"},  # the text of the positive under another id
        ],
        "answers": ["x"],
    }
    again = row | {"positive_passages": [{"docid": "8", "text": "c"}], "negative_passages": []}
    rows, out = convert(jsonl(row, again))
    assert rows == [{"qid": "1", "pos": ["7,a#0", "8"], "neg": ["9"]}]
    assert read(out / "corpus.jsonl")[:2] == [
        {"_id": "7,a#0", "title": "t", "text": "a"},
        {"_id": "9", "text": "b"},
    ]
    assert read(out / "queries.jsonl") == [{"_id": "1", "text": "q"}]


def test_tevatron_with_ids_is_checked_against_its_corpus(convert, tmp_path):
    row = {"query_id": "1", "query_text": "q", "query_image": None}
    row |= {"positive_document_ids": ["7"], "negative_document_ids": ["9", "12"]}
    rows, out = convert(jsonl(row))
    assert rows == [{"qid": "1", "pos": ["7"], "neg": ["9", "12"]}]
    assert not (out / "corpus.jsonl").exists()
    assert read(out / "queries.jsonl") == [{"_id": "1", "text": "q"}]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(jsonl(*({"docid": i, "text": t} for i, t in (("7", "a"), ("9", "a")))))
    shutil.rmtree(out)
    with pytest.raises(
        UserError, match="corpus.jsonl: has no passage 12, which query 1 names — give"
    ):
        convert(None, "x.jsonl", "--corpus", corpus)
    with open(corpus, "a") as stream:
        stream.write(jsonl({"docid": "12", "text": "b"}))
    shutil.rmtree(out)
    rows, _ = convert(None, "x.jsonl", "--corpus", corpus)
    assert rows == [{"qid": "1", "pos": ["7"], "neg": ["12"]}]  # 9 has the text of 7


def test_sentence_transformers_columns_count_by_their_order(convert):
    rows, _ = convert(
        jsonl(
            {"query": "q", "answer": "a"},
            {"query": "q", "positive": "b", "negative": "c"},
            {"query": "r", "positive": "a", "negative_1": "b", "negative_2": "c"},
        )
    )
    assert rows == [
        {"qid": qid("q"), "pos": [pid("a"), pid("b")], "neg": [pid("c")]},
        {"qid": qid("r"), "pos": [pid("a")], "neg": [pid("b"), pid("c")]},
    ]


def test_sentence_transformers_labels_are_kept_where_they_are_scores(convert):
    row = {"anchor": "q", "d1": "a", "d2": "b", "label": [3.5, 1]}
    rows, _ = convert(jsonl(row))
    assert rows[0]["pos_scores"] == [3.5] and rows[0]["neg_scores"] == [1.0]


@pytest.mark.parametrize("label", [2.5, [2.5]])
def test_margins_are_refused(convert, label):
    row = {"query_id": "1", "positive_id": "7", "negative_id": "9", "score": label}
    with pytest.raises(UserError, match="x.jsonl:2: the label is a margin, not a score"):
        convert(jsonl(row | {"score": [2, 1]}, row))


def test_labelled_pairs_are_refused(convert):
    with pytest.raises(UserError, match="x.jsonl:1: a pair with a label may be no positive"):
        convert(jsonl({"anchor": "q", "sentence": "a", "label": 0}))


def test_parquet(convert, tmp_path):
    triples = [{"query": "q", "positive": "a, b\n\nc", "negative": text} for text in ("n", "m")]
    datasets.Dataset.from_list(triples).to_parquet(str(tmp_path / "x.parquet"))
    rows, _ = convert(None, "x.parquet")
    assert rows == [{"qid": qid("q"), "pos": [pid("a, b\n\nc")], "neg": [pid("n"), pid("m")]}]


@pytest.mark.parametrize("scored", [False, True])
def test_hard_negatives_of_several_systems(convert, scored):
    def entries(*pids):
        return [{"pid": p, "ce-score": p / 2} for p in pids] if scored else list(pids)

    row = {"qid": 867436, "pos": entries(5238393)}
    row["neg"] = {"bm25": entries(9, 4), "tas-b": entries(4, 6, 5238393), "none": []}
    rows, out = convert(
        gzip.compress(jsonl(row, {"qid": 3, "pos": [], "neg": {"bm25": [1]}}).encode()),
        "msmarco-hard-negatives.jsonl.gz",
    )
    expected = {"qid": "867436", "pos": ["5238393"], "neg": ["9", "4", "6"]}
    if scored:
        expected |= {"pos_scores": [5238393 / 2], "neg_scores": [4.5, 2.0, 3.0]}
    assert rows == [expected]
    assert sorted(path.name for path in out.iterdir()) == [
        "args.json",
        "audit.json",
        "qrels.tsv",
        "train.jsonl",
    ]
    assert audit(out)["queries without a positive, dropped"] == 1


def test_triples_of_texts(convert):
    lines = ["do ants sleep\tAnts rest.\tBees fly.", "what is it\tIt is\tAnts rest."]
    lines += ["do ants sleep\tAnts rest.\tCows eat.", "do ants sleep\tAnts rest.\tBees fly."]
    rows, out = convert("\r\n".join(lines).encode(), "triples.tsv")
    assert rows[0]["pos"] == [pid("Ants rest.")]
    assert rows[0]["neg"] == [pid("Bees fly."), pid("Cows eat.")]
    assert [row["qid"] for row in rows] == [qid("do ants sleep"), qid("what is it")]
    assert len(read(out / "corpus.jsonl")) == 4 and len(read(out / "queries.jsonl")) == 2


@pytest.mark.parametrize("separator", ["\t", " "])
def test_triples_of_ids(convert, separator):
    triples = [("q2", "7", "9"), ("q1", "8", "9"), ("q2", "7", "4"), ("q2", "5", "7")]
    rows, out = convert("".join(separator.join(t) + "\n" for t in triples), "triples.tsv")
    assert rows == [
        {"qid": "q2", "pos": ["7", "5"], "neg": ["9", "4"]},
        {"qid": "q1", "pos": ["8"], "neg": ["9"]},
    ]
    assert not (out / "queries.jsonl").exists()


def test_ance(convert):
    rows, _ = convert("q1\t7\t9,4\nq1\t8\t12\n", "ann_training_data_0")
    assert rows == [{"qid": "q1", "pos": ["7", "8"], "neg": ["9", "4", "12"]}]


def test_ids_with_commas_need_the_name_of_the_format(convert):
    rows, _ = convert("q1\tA,_b\tC,_d\n", "t.tsv", "--format", "id-triples")
    assert rows == [{"qid": "q1", "pos": ["A,_b"], "neg": ["C,_d"]}]


GOOD = '{"query": "q", "pos": ["a"], "neg": ["b"]}\n'
DOCS = '"negative_passages": []'
BAD = {
    "not JSON": (GOOD + '{"query": "q", "pos": \n', ":2: not JSON"),
    "deep": (GOOD + '{"a":' * 99999 + "\n", ":2: not JSON"),
    "a long integer": (GOOD + '{"query": "q", "pos": [%s]}\n' % ("9" * 5000), ":2: not JSON"),
    "scores": ('{"query": "q", "pos": ["a"], "pos_scores": [1, 2]}\n', ":1: 2 scores for 1 pass"),
    "no list": ('{"query": "q", "pos": "a"}\n', ":1: 'a' is not a list — fix"),
    "a number": (GOOD + '{"query": "q", "pos": [7]}\n', ":2: the text 7 is not a string — fix"),
    "a query of numbers": (GOOD + '{"query": [7], "pos": ["a"]}\n', r":2: the text \[7\] is not"),
    "no query": (GOOD + '{"question": "q", "pos": ["a"]}\n', ":2: not a row of flagembedding"),
    "a score": ('{"query": "q", "pos": ["a"], "pos_scores": ["x"]}\n', ":1: the score 'x' is"),
    "NaN": (
        '{"query": "q", "pos": ["a"], "pos_scores": [NaN]}\n',
        ":1: the score nan is not a fin",
    ),
    "a great score": (
        '{"query": "q", "pos": ["a"], "pos_scores": [1%s]}\n' % ("0" * 400),
        ":1: the score 10+ is not a finite number",
    ),
    "TSV after JSON": (GOOD + "a b\tc\td\n", ":2: not JSON"),
    "a header": ("query\tpositive\tnegative\na b\tc\td\n", ":1: unknown format"),
    "JSON after TSV": ("a b\tc\td\n" + GOOD, ":2: not a row of text-triples"),
    "three words": ("a b\tc\td\nhow are you\n", ":2: not a row of text-triples"),
    "columns": ("a b\tc\td\na b\tc\n", ":2: not a row of text-triples"),
    "no passages": (
        '{"query_id": 1, "query": "q", "positive_passages": [{"docid": 7}]}',
        ":1: not a row of",
    ),
    "white space": ("q1\t7\t9\nq 1\t7\t9\n", ":2: the id 'q 1' is empty, has white space"),
    "empty id": ("q1\t7\t9,\n", ":1: the id '' is empty, .* — rename"),
    "two texts": (
        jsonl(*({"query_id": 1, "query": text, "positive_passages": []} for text in "qr")),
        ":2: query 1 has another text than before",
    ),
    "two passages": (
        jsonl(
            *(
                {"query_id": n, "query": "q", "positive_passages": [{"docid": "7", "text": text}]}
                for n, text in enumerate("ab")
            )
        ),
        ":2: passage 7 has another text than before",
    ),
    "lists": ("q1\t7,9,4\n", ":1: lists of negatives without positives — .*mine_negatives.py"),
    "qrels": ("q1 0 7 1\n", ":1: unknown format — --format takes flagembedding, tevatron, "),
    "a run": ("q1\t7\t1\n", ":1: unknown format"),
    "an empty file": ("", ":1: unknown format"),
    "nothing": ('{"query": "q", "pos": []}\n', ":1: no query with a positive"),
    "not UTF-8": (GOOD.encode() + b'{"query": "\xff"}\n', ":2: not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_input_is_one_line_with_its_place(convert, case, tmp_path):
    with pytest.raises(UserError) as error:
        convert(BAD[case][0], "x.jsonl")
    message = str(error.value)
    assert message.count("\n") == 1 and "Traceback" not in message
    assert re.search(f"x.jsonl{BAD[case][1]}", message), message
    assert not (tmp_path / "out" / "audit.json").exists()
    assert not [*(tmp_path / "out").glob(".tmp*")]


def test_damaged_files_that_are_no_text(convert, tmp_path):
    with pytest.raises(UserError, match="x.parquet:1: not text"):
        convert(b"\x00\xff\x00", "x.parquet")
    with pytest.raises(UserError, match="x.parquet:1: cannot be read .*magic bytes"):
        convert(b"PAR1\x00\xff\x00\xff\x00\xff\x00\xff\x00", "x.parquet")
    with pytest.raises(UserError, match="x.gz: this is a bzip2 file — unpack it with bunzip2"):
        convert(bz2.compress(GOOD.encode()), "x.gz")
    with pytest.raises(UserError, match="x.tsv:1: a header, no training data — remove the line"):
        convert("query\tpositive\tnegative\n", "x.tsv", "--format", "text-triples")
    with pytest.raises(UserError, match="no such file"):
        convert(None, "nowhere.jsonl")
    with pytest.raises(UserError, match="/nowhere: no such file"):
        convert(GOOD, "x.jsonl", "--input", tmp_path / "x.jsonl", "/nowhere")


def test_a_finished_import_is_complete_for_its_own_input_only(convert, script, tmp_path):
    convert(GOOD)
    flags = ["--input", tmp_path / "x.jsonl", "--output_dir", tmp_path / "out"]
    assert "is complete" in script("recipes.import_training_data", *flags)[1]
    (tmp_path / "x.jsonl").write_text(GOOD + GOOD)
    assert "it was made with" in script("recipes.import_training_data", *flags)[2]


def test_several_files_give_what_one_gives(convert, script, tmp_path):
    rows, out = convert(jsonl(*BGE))
    parts = [tmp_path / f"part{number}.jsonl" for number in range(3)]
    for part, row in zip(parts, BGE, strict=True):
        part.write_text(jsonl(row))
    done = script(
        "recipes.import_training_data", "--input", *parts, "--output_dir", tmp_path / "parts"
    )
    assert done[0] == 0, done[2]
    for name in ("train.jsonl", "corpus.jsonl", "queries.jsonl", "qrels.tsv"):
        assert (out / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


FIRST_LINES = {
    '{"qid": "q1", "pos": ["7"], "neg": ["9"]}': None,
    '{"qid": "q1", "pos": ["7"]}': None,
    '{"_id": "7", "title": "", "text": "a"}': None,
    "query-id\tcorpus-id\tscore": None,
    "q1 0 7 1": None,
    "q1\t7": None,
    "q1\tdo ants, or bees, sleep": None,
    "7\tAnts\tAnts sleep": None,
    "q1 Q0 7 1 13.25 tag": None,
    "": None,
    "{": None,
    "q1\t7,9": "negative-lists",
    "q1 7 9": "id-triples",
}


@pytest.mark.parametrize("line", FIRST_LINES)
def test_first_lines(line):
    assert foreign_format(line) == FIRST_LINES[line]


def test_help_names_every_format():
    done = subprocess.run(
        [sys.executable, "-m", "recipes.import_training_data", "--help"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    from recipes.import_training_data import FORMATS

    assert done.returncode == 0 and all(f"    {name} " in done.stdout for name in FORMATS)
