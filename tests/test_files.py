"""Formats: what is read, what is refused, what is written. Run: python -m pytest
tests/test_files.py"""

import gzip
import json
import os
import pickle

import datasets
import numpy as np
import pytest
from scipy.sparse import csr_matrix, load_npz, vstack

from lib import files
from lib.embeddings import Embeddings, finish_embeddings, write_shard
from lib.files import UserError
from lib.texts import open_texts, read_texts, write_texts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


def put(path, text, compress=False):
    (gzip.open(path, "wt") if compress else open(path, "w")).write(text)
    return path


CORPUS = [
    ("7", ("Ants",), "Ants sleep."),
    ("9", (), "Bees fly."),
    ("x-1", ("Ünï",), "Öl \u2028 line"),
]
CORPUS_FORMS = {
    "beir.jsonl": "".join(
        json.dumps({"_id": i, "title": "".join(t), "text": x}) + "\n" for i, t, x in CORPUS
    ),
    "tevatron.jsonl.gz": "".join(
        json.dumps({"docid": i, "title": "".join(t), "text": x}) + "\n" for i, t, x in CORPUS
    ),
    "three.tsv": "".join(f"{i}\t{''.join(t)}\t{x}\n" for i, t, x in CORPUS),
    "three.tsv.gz": "".join(f"{i}\t{''.join(t)}\t{x}\r\n" for i, t, x in CORPUS),
    "bom.tsv": "\ufeff" + "".join(f"{i}\t{''.join(t)}\t{x}\n" for i, t, x in CORPUS),
}


@pytest.mark.parametrize("name", CORPUS_FORMS)
def test_every_corpus_format_gives_the_same_texts(tmp_path, name):
    path = put(tmp_path / name, CORPUS_FORMS[name], compress=name.endswith(".gz"))
    texts = open_texts(path)
    assert list(texts.stream()) == CORPUS and list(texts.stream(1, 2)) == CORPUS[1:2]
    assert texts[2] == CORPUS[2][1:] and texts.ids([2, 0]) == ["x-1", "7"]
    assert texts.rows(["9", "nowhere", "7"]).tolist() == [1, -1, 0]
    assert pickle.loads(pickle.dumps(texts))[1] == ((), "Bees fly.")  # as a spawned worker gets it


def test_documents_keep_their_url_beside_the_title(tmp_path):
    put(
        tmp_path / "d.tsv.gz",
        "D1\thttp://u/1\tAnts\tAnts sleep.\r\nD2\thttp://u/2\t\tBees fly.\r\n",
        compress=True,
    )
    expected = [("D1", ("http://u/1", "Ants"), "Ants sleep."), ("D2", ("http://u/2",), "Bees fly.")]
    assert list(open_texts(tmp_path / "d.tsv.gz").stream()) == expected


def test_passages_of_ms_marco_v2_have_their_own_id(tmp_path):
    record = {"pid": "msmarco_passage_00_0", "passage": "Ants sleep.", "docid": "msmarco_doc_00_0"}
    put(tmp_path / "v2.jsonl", json.dumps(record) + "\n")
    assert list(read_texts(tmp_path / "v2.jsonl")) == [("msmarco_passage_00_0", (), "Ants sleep.")]
    name = "msmarco_v2.1_doc_00_0#0_0"
    record = {"docid": name, "url": "http://u", "title": "Ants", "segment": "Ants sleep."}
    put(tmp_path / "v2.1.jsonl", json.dumps(record | {"start_char": 0}) + "\n")
    assert list(read_texts(tmp_path / "v2.1.jsonl")) == [(name, ("Ants",), "Ants sleep.")]


def test_empty_texts_are_kept_and_counted(tmp_path, capsys):
    rows = [
        '{"_id": "1", "text": "a"}\n',
        '{"_id": "2", "title": "", "text": " "}\n',
        '{"_id": "3", "text": null}\n',
    ]
    texts = open_texts(put(tmp_path / "c.jsonl", "".join(rows)))
    assert len(texts) == 3 and texts[1] == ((), " ") and texts[2] == ((), "")
    assert "2 texts are empty; they are kept" in capsys.readouterr().out


def test_parquet_and_save_to_disk_equal_jsonl(tmp_path):
    table = datasets.Dataset.from_list(
        [{"_id": i, "title": "".join(t), "text": x} for i, t, x in CORPUS]
    )
    table.to_parquet(str(tmp_path / "c.parquet"))
    table.save_to_disk(str(tmp_path / "disk"))
    assert list(read_texts(tmp_path / "c.parquet")) == CORPUS == list(read_texts(tmp_path / "disk"))


def test_texts_over_many_batches_and_a_changed_file(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.texts.ROWS_PER_BATCH", 7)
    rows = [(f"d{i}", (), f"text {i % 13}") for i in range(50)]
    write_texts(tmp_path / "c.jsonl", rows)
    texts = open_texts(tmp_path / "c.jsonl")
    for start, stop in ((0, 50), (3, 4), (6, 8), (7, 14), (13, 50), (49, 99), (20, 20)):
        assert list(texts.stream(start, stop)) == rows[start:stop]
    assert all(texts.rows([f"d{i}"])[0] == i and texts.id(i) == f"d{i}" for i in range(50))
    assert (texts.text_keys[:13] == texts.text_keys[13:26]).all() and len(
        set(texts.text_keys.tolist())
    ) == 13
    fingerprint = texts.fingerprint
    write_texts(tmp_path / "c.jsonl", rows[:-1] + [("d49", (), "other")])
    os.utime(tmp_path / "c.jsonl", ns=(1, 1))
    assert open_texts(tmp_path / "c.jsonl").fingerprint != fingerprint


@pytest.mark.parametrize("width", [2, 3, 4])
def test_qrels_are_told_apart_by_shape(tmp_path, width):
    rows = {
        2: "q1\t7\nq1\t9\nq2\t8\n",
        3: "query-id\tcorpus-id\tscore\nq1\t7\t1\nq1\t9\t1\nq2\t8\t1\n",
        4: "q1\t0\t7\t1\nq1\t0\t9\t1\nq2\t0\t8\t1\n",
    }
    # RetroMAE reads columns 0 and 1 whatever the width: of the 4-column file it keeps the passage
    # "0" and protects no positive
    assert files.read_qrels(put(tmp_path / "q", rows[width])) == {
        "q1": {"7": 1, "9": 1},
        "q2": {"8": 1},
    }
    assert files.read_qrels(put(tmp_path / "s", rows[width].replace("\t", " "))) == {
        "q1": {"7": 1, "9": 1},
        "q2": {"8": 1},
    }


BAD_QRELS = {
    "a run as qrels": ("q1 Q0 7 1 3.2 tag\n", ":1: 6 columns — judgments have 4"),
    "three columns without header": ("q1\t7\t1\n", ":1: 3 columns — .* 3 after BEIR's header"),
    "a negatives file": ("q1\t7,8,9\n", ":1: several passages"),
    "a grade that is no number": ("q1 0 7 yes\n", ":1: the grade 'yes' is not"),
    "a grade of 0.9": ("q1 0 7 0.9\n", ":1: the grade '0.9' is not a whole number"),
    "a grade without end": ("q1 0 7 1.0e999\n", ":1: the grade '1.0e999' is not"),
    "columns that change": ("q1 0 7 1\nq1 7\n", ":2: 2 columns after lines of 4"),
    "two grades": ("q1 0 7 1\nq1 0 7 2\n", ":2: q1 7 is judged twice"),
    "nothing": ("", ": the file has no judgments"),
}


@pytest.mark.parametrize("case", BAD_QRELS)
def test_bad_qrels(tmp_path, case):
    with pytest.raises(UserError, match=f"{tmp_path}/q{BAD_QRELS[case][1]}"):
        files.read_qrels(put(tmp_path / "q", BAD_QRELS[case][0]))


BAD_CORPORA = {
    "broken JSON": ('{"_id": "1", "text": "a"}\n{"_id": "2", "text": \n', ":2: not JSON"),
    "no id": ('{"text": "a"}\n', ":1: no field has one of the names _id"),
    "no text": ('{"_id": "1", "body_text": "a"}\n', ":1: no field has one of the names text"),
    "text is a list": ('{"_id": "1", "text": ["a"]}\n', ":1: title and text must be strings"),
    "one column": ("1 a\n", ":1: 1 columns"),
    "columns that change": ("1\ta\n2\tb\tc\n", ":2: 3 columns after lines of 2"),
    "an id with a blank": ("1 2\ta\n", ":1: the id '1 2'"),
    "an id twice": ("1\ta\n2\tb\n1\tc\n", ": entries 1 and 3 have the same id 1"),
    "empty": ("\n", ": the file has no texts"),
}


@pytest.mark.parametrize("case", BAD_CORPORA)
def test_bad_corpora(tmp_path, case):
    path = put(tmp_path / "c.txt", BAD_CORPORA[case][0])
    with pytest.raises(UserError, match=f"{path}{BAD_CORPORA[case][1]}"):
        open_texts(path)
    assert not list((tmp_path / "cache").glob("*/meta.json"))


def test_damaged_files(tmp_path):
    whole = gzip.compress("".join(f"{i}\tpassage {i * i}\n" for i in range(2000)).encode())
    (tmp_path / "cut.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut.tsv.gz:\d+: truncated or damaged gzip"):
        list(files.lines(tmp_path / "cut.tsv.gz"))
    (tmp_path / "latin.tsv").write_bytes(b"1\tok\n2\tcaf\xe9\n")
    with pytest.raises(UserError, match="latin.tsv:2: not UTF-8"):
        list(files.lines(tmp_path / "latin.tsv"))
    for missing in ("missing.jsonl", str(tmp_path / "missing")):
        with pytest.raises(UserError, match="no such file"):
            open_texts(missing)


SCORED_ROW = (
    '{"qid": "q,1", "pos": ["7"], "neg": ["9", "4"], "pos_scores": [9.5], "neg_scores": [8.5, 2]}'
)
TRAINING = f"""{SCORED_ROW}
{{"qid": "q2", "pos": ["3", "7"], "cluster": 4}}
"""


@pytest.mark.parametrize(
    "text, expected",
    [
        ("q1 Q0 4 2 1.5 t\nq1 Q0 9 1 2.5 t\nq2\tQ0\t3\t1\t.5\tt\n",
         {"q1": (["4", "9"], [1.5, 2.5]), "q2": (["3"], [0.5])}),
        ("q1\t7\t2\nq1 8,9 1\n", {"q1": (["7", "8,9"], [-2, -1])}),
        ("q1\t7\tdo ants\tAnts sleep\nq2\t7\tx\ty\nq1\t8,9\tdo ants\tBees\n",
         {"q1": (["7", "8,9"], [-1, -2]), "q2": (["7"], [-1])}),
        ("q1\t9,4, 9,12\nq2\t\nq1\t3\n",
         {"q1": (["9", "4", "12", "3"], [-1, -2, -3, -4]), "q2": ([], [])}),
        (TRAINING, {"q,1": (["9", "4", "7"], [8.5, 2, 9.5]), "q2": (["3", "7"], [-1, -2])}),
    ],
)  # fmt: skip
def test_shapes_of_runs(tmp_path, text, expected):
    found = files.read_run(put(tmp_path / "run", text))
    assert {qid: (pids, scores.tolist()) for qid, (pids, scores) in found.items()} == expected
    assert all(entry.scores.dtype == np.float32 for entry in found.values())


@pytest.mark.parametrize(
    "text, message",
    [
        ("q1 Q0 7 1 2 t\nq1 Q0 7 2 1 t\n", "run:2: passage 7 is listed twice for query q1"),
        ("q1\t0\t7\t1\n", "run:1: 4 columns"),  # judgments
        ("q1\t7\tx\ty\nq1\t7\n", "run:2: 2 columns after lines of 4"),
        ("q1 7 1\nq1 7\n", "run:2: 2 columns"),
        ("q1\t7,,8\n", "run:1: the id '' is empty"),
        ("q1 Q0 7 1 nan t\n", "run:1: the score 'nan'"),
        (TRAINING + '{"qid": "q2", "pos": ["3"]}\n', "run:3: query q2 has a line already"),
        (TRAINING + '{"qid": "q3", "pos": []}\n', "run:3: "),
        (TRAINING + '{"qid": "q3", "pos": ["1"], "pos_scores": [1, 2]}\n', "run:3: "),
        (TRAINING + '{"qid": "q3", "pos": ["1"], "pos_scores": [NaN]}\n', "run:3: "),
        (TRAINING + "q3\t7\n", "run:3: "),
    ],
)
def test_runs_that_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        files.read_run(put(tmp_path / "run", text))


def test_what_is_written_comes_back(tmp_path):
    scores = np.float32([3.1415927, 1e-30, -2.5])
    files.write_run(tmp_path / "run", [("q1", ["a", "b", "c"], scores)])
    back = files.read_run(tmp_path / "run")["q1"]
    assert back.pids == ["a", "b", "c"] and (back.scores == scores).all()
    qrels = {"q": {"a": 1, "b": 0}}
    files.write_qrels(tmp_path / "qrels", qrels)
    assert files.read_qrels(tmp_path / "qrels") == qrels
    rows = [
        files.TrainingRow("q1", ["a,1", "b"], ["c"], [1.5, 2.0], [0.25], 3),
        files.TrainingRow("q2", ["d"]),
    ]
    files.write_training_file(tmp_path / "t.jsonl", rows)
    assert list(files.read_training_file(tmp_path / "t.jsonl")) == [(1, rows[0]), (2, rows[1])]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    files.write_lines(tmp_path / "f", ["old"])
    with pytest.raises(ZeroDivisionError):
        files.write_lines(tmp_path / "f", (str(1 / n) for n in (1, 0)))
    assert (tmp_path / "f").read_text() == "old\n" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_embeddings(tmp_path):
    whole = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float16)
    for index, (low, high) in enumerate(((0, 3), (3, 6), (6, 8))):
        write_shard(tmp_path, index, whole[low:high], [f"d{i}" for i in range(low, high)])
    with pytest.raises(UserError, match="no meta.json"):
        Embeddings(tmp_path)
    finish_embeddings(tmp_path, {"count": 8, "dim": 4})
    stored = Embeddings(tmp_path)
    assert (
        len(stored) == 8
        and stored.ids([7, 0, 3]) == ["d7", "d0", "d3"]
        and stored.rows(["d4", "?"]).tolist() == [4, -1]
    )
    assert (stored.take([7, 0, 3]) == whole[[7, 0, 3]].astype(np.float32)).all()
    assert [(row, len(block)) for row, block in stored.blocks(1, 8, 2)] == [
        (1, 2),
        (3, 2),
        (5, 1),
        (6, 2),
    ]
    assert (np.concatenate([block for _, block in stored.blocks(0, 8, 2)]) == whole).all()
    finish_embeddings(tmp_path, {"count": 9, "dim": 4})
    with pytest.raises(UserError, match="do not hold what meta.json states"):
        Embeddings(tmp_path)


def test_sparse_embeddings(tmp_path):
    draw = np.random.default_rng(0)
    whole = csr_matrix(
        np.where(draw.random((8, 30)) < 0.2, draw.random((8, 30)), 0).astype(np.float32)
    )
    for index, (low, high) in enumerate(((0, 3), (3, 6), (6, 8))):
        write_shard(tmp_path, index, whole[low:high], [f"d{i}" for i in range(low, high)])
    finish_embeddings(tmp_path, {"count": 8, "dim": 30, "head": "sparse"})
    stored = Embeddings(tmp_path)
    assert len(stored) == 8 and stored.rows(["d4", "?"]).tolist() == [4, -1]
    assert (load_npz(tmp_path / "shard-00001.npz") != whole[3:6]).nnz == 0
    for rows in ([7, 0, 3, 0], [], [5]):
        taken = stored.take(rows)
        assert (
            taken.shape == (len(rows), 30)
            and taken.dtype == np.float32
            and (taken != whole[rows]).nnz == 0
        )
    assert [(row, block.shape[0]) for row, block in stored.blocks(1, 8, 2)] == [
        (1, 2),
        (3, 2),
        (5, 1),
        (6, 2),
    ]
    assert (vstack([block for _, block in stored.blocks(0, 8, 2)]) != whole).nnz == 0
    (tmp_path / "shard-00001.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="shard-00001.npz: damaged"):
        Embeddings(tmp_path)
