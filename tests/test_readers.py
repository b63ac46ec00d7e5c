"""What real files hold: headers, quotes, other packings, damaged lines; the changes of the fuzzer;
and the cache when processes meet or are killed. Run: python -m pytest tests/test_readers.py"""

import bz2
import csv
import gzip
import io
import json
import lzma
import multiprocessing
import os
import resource
import tarfile
import time
import zipfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import files
from lib.files import UserError, make_once
from lib.groups import TrainingFile, read_rows
from lib.texts import open_texts, read_texts
from tests.fuzz_readers import FILES, fault_of, fuzz


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(path):
    return list(read_texts(path))


def training(path):
    return list(read_rows(path))


READERS = {
    "texts": texts,
    "qrels": files.read_qrels,
    "run": files.read_run,
    "training file": training,
}


def refused(read, path) -> str:
    """The message with which a file is refused: one line that names it."""
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and " — " in message
    return message.removeprefix(str(path))


# ---- headers and quotes of TSV

ROWS = [
    ("1", ("Ants",), 'Ants "sleep".'),
    ("2", ("A\ttitle",), "Bees\tfly."),
    ("3", (), '"quoted"'),
    ("4", (), "two lines\n\nand more"),
    ("5", ('"T"',), ""),
    ("6", (), 'plain 5" text'),
]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_tsv_of_dpr_as_csv_writes_it(tmp_path, newline, quoting):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator=newline, quoting=quoting)
    writer.writerow(["id", "text", "title"])
    writer.writerows((i, text, "".join(titles)) for i, titles, text in ROWS)
    path = put(tmp_path / "psgs_w100.tsv.gz", gzip.compress(stream.getvalue().encode()))
    assert list(open_texts(path).stream()) == ROWS
    path = put(tmp_path / "bom.tsv", "\ufeff" + stream.getvalue())
    assert texts(path) == ROWS


def test_places_in_a_quoted_tsv(tmp_path):
    head = 'id\ttext\ttitle\n1\t"two\nlines"\tA\n'
    assert refused(texts, put(tmp_path / "a", head + '2\t"open\tB\n3\tc\tC\n')).startswith(
        ":4: a damaged quoted field"
    )
    assert refused(texts, put(tmp_path / "b", head + "2\tb\n")).startswith(":4: 2 columns after")
    assert refused(texts, put(tmp_path / "c", head + '2\t"b"c\tB\n')).startswith(":4: a damaged")


def test_without_dprs_header_quotes_are_literal(tmp_path):
    quoted = '7\t"Ants"\t"sleep" well\n8\t""\t"Bees"\n'
    rows = [("7", ('"Ants"',), '"sleep" well'), ("8", ('""',), '"Bees"')]
    assert texts(put(tmp_path / "a", quoted)) == rows
    assert texts(put(tmp_path / "b", "pid\ttitle\tpassage\n" + quoted)) == rows


HEADERS = {
    "id\ttext": "7\tAnts",
    "qid\tquery": "7\tAnts",
    "Query_ID\ttext": "7\tAnts",
    "Text\t_id": "Ants\t7",
    "docid\ttitle\turl\tbody": "7\tT\thttp://u\tAnts",
    "docid\turl\ttitle\tbody": "7\thttp://u\tT\tAnts",
    "contents\tscore\tpid": "Ants\t1\t7",
    "id\ttext\tn_words\tsource": "7\tAnts\t1\twiki",
}


@pytest.mark.parametrize("names", HEADERS)
def test_a_header_tells_the_order_of_texts(tmp_path, names):
    titles = ("http://u", "T") if "url" in names else ()
    found = texts(put(tmp_path / "x.tsv", f"{names}\n\n{HEADERS[names]}\n"))
    assert found == [("7", titles, "Ants")]


@pytest.mark.parametrize(
    "names",
    ["query-id\tcorpus-id\tscore", "corpus_id query_id  relevance", "qid iteration docid Score"],
)
def test_a_header_tells_the_order_of_judgments(tmp_path, names):
    values = {"q": "q1", "c": "7,a", "d": "7,a", "s": "2", "S": "2", "r": "2", "i": "0"}
    row = "\t".join(values[name[0]] for name in names.split())
    path = put(tmp_path / "q", f"{names}\n{row}\n")
    assert files.read_qrels(path) == {"q1": {"7,a": 2}}


@pytest.mark.parametrize(
    "reader, names",
    [
        ("texts", "query_id\tanswer_id"),
        ("texts", "number\ttopic"),
        ("texts", "qid\tutterance"),
        ("qrels", "topic iter docno relevance"),
        ("run", "qid\tdocno\trank\tscore"),
        ("texts", "title\tbody"),
        ("qrels", "qid pid"),
        ("run", "qid q0 docid rank score tag"),
        ("run", "query-id\tcorpus-id\tscore"),
        ("run", "qid\tpid\tquery\tpassage"),
        ("run", "qid\tpid"),
        ("training file", "qid\tpid"),
    ],
)
def test_other_headers_are_refused(tmp_path, reader, names):
    row = "\t".join("1" for _ in names.split())
    message = refused(READERS[reader], put(tmp_path / "x", f"\n{names}\n{row}\n"))
    assert message.startswith(":2: a header with other columns — ")


def test_a_header_within_a_file_is_refused(tmp_path):
    for reader, names, row in (
        ("texts", "id\ttext\ttitle", "7\tAnts\tT"),
        ("qrels", "query-id\tcorpus-id\tscore", "q1\t7\t1"),
    ):
        path = put(tmp_path / "x", f"{names}\n{row}\n{names}\n")
        assert refused(READERS[reader], path) == ":3: the header once more — remove the line"


# ---- judgments

SHAPES = {
    "TREC": "q1 0 7 {}\n",
    "BEIR": "query-id\tcorpus-id\tscore\nq1\t7\t{}\n",
    "JSONL": '{{"query-id": "q1", "corpus-id": "7", "score": {}}}\n',
}
GRADES = ["0.9", "2.7", "1.0e999", "1e5", "-0.5", "NaN", "Infinity", "9" * 4000, "9" * 5000]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_grade_is_a_whole_number(tmp_path, shape):
    line = 2 if shape == "BEIR" else 1
    for grade, value in (("1.0", 1), ("-2", -2), ("3e0", 3)):
        assert files.read_qrels(put(tmp_path / "q", SHAPES[shape].format(grade))) == {
            "q1": {"7": value}
        }
    for grade in GRADES:
        message = refused(files.read_qrels, put(tmp_path / "q", SHAPES[shape].format(grade)))
        assert message.startswith(f":{line}: ") and len(message) < 200


def test_judgments_as_jsonl_and_parquet(tmp_path):
    rows = [
        {"query-id": "q,1", "corpus-id": "A,_b", "score": 1},
        {"query-id": 2, "corpus-id": 9, "score": 2.0},
    ]
    expected = {"q,1": {"A,_b": 1}, "2": {"9": 2}}
    assert files.read_qrels(put(tmp_path / "q.jsonl", jsonl(*rows))) == expected
    assert files.read_qrels(put(tmp_path / "q.gz", gzip.compress(jsonl(*rows).encode())))
    numbers = [{"query-id": 2, "corpus-id": 9, "score": 2.0}]
    pq.write_table(pa.Table.from_pylist(numbers), tmp_path / "q.parquet")
    assert files.read_qrels(tmp_path / "q.parquet") == {"2": {"9": 2}}
    assert training(tmp_path / "q.parquet")[0].pos == ["9"]
    bad = put(tmp_path / "bad.jsonl", jsonl(rows[0], {"query-id": "q", "score": 1}))
    assert refused(files.read_qrels, bad).startswith(":2: no field has one of the names corpus-id")
    for qid in (None, 1.5, True, "a b", "", ["a"]):
        bad = put(tmp_path / "bad.jsonl", jsonl(rows[0] | {"query-id": qid}))
        assert refused(files.read_qrels, bad).startswith(f":1: the id {qid!r} ")


def test_ids_with_commas_and_empty_texts_from_judgments_to_training(script, tmp_path):
    """FEVER's and DBpedia's ids, FiQA's empty passage: BM25, mining twice, the training file."""
    words = ["ants sleep", "bees fly", "ants and bees", None, "ice and ants", "ice"]
    corpus = [{"_id": f"A,_{n}", "text": text} for n, text in enumerate(words)]
    queries = [{"_id": "q,0", "text": "ants"}, {"_id": "q,1", "text": ""}]
    judged = [
        {"query-id": "q,0", "corpus-id": "A,_0", "score": 1},
        {"query-id": "q,1", "corpus-id": "A,_3", "score": 1},
    ]
    for name, rows in (("corpus", corpus), ("queries", queries), ("qrels", judged)):
        put(tmp_path / name, jsonl(*rows))

    def call(name, *flags):
        sources = [f"--corpus={tmp_path}/corpus", f"--qrels={tmp_path}/qrels"]
        done = script(name, *sources, *flags)
        assert done[0] == 0, done[2]
        return done[1]

    searched = ["--bm25", f"--queries={tmp_path}/queries", "--output_dir"]
    out = call("evaluate", *searched, tmp_path / "run")
    assert f"{tmp_path}/corpus: 1 texts are empty; they are kept" in out
    assert f"{tmp_path}/queries: 1 texts are empty; they are kept" in out
    call("mine_negatives", *searched, tmp_path / "mined")
    call("mine_negatives", "--run", tmp_path / "run/run.trec", "--output_dir", tmp_path / "again")
    opened = open_texts(tmp_path / "queries"), open_texts(tmp_path / "corpus")
    for folder in ("mined", "again"):
        rows = {row.qid: row for row in training(tmp_path / folder / "train.jsonl")}
        assert rows["q,0"].neg and set(rows["q,0"].neg) <= {"A,_2", "A,_4"}
        assert rows["q,1"].pos == ["A,_3"]
        assert len(TrainingFile(tmp_path / folder / "train.jsonl", *opened).rows) >= 4


# ---- JSON


def test_half_a_surrogate_pair_is_replaced_counted_and_said(tmp_path, capsys):
    line = r'{"_id": "1\udc00", "title": "\ud83d\ude00", "text": "a \ud83d\uD83D b \\ud83d"}' + "\n"
    rows = [("1\ufffd", ("\U0001f600",), "a \ufffd\ufffd b \\ud83d")]
    path = put(tmp_path / "c.jsonl", line)
    assert list(open_texts(path).stream()) == rows
    assert f"{path}: 3 lone surrogates are replaced by U+FFFD" in capsys.readouterr().out
    path = put(tmp_path / "t.jsonl", r'{"qid": "\ud83d", "pos": ["7"]}' + "\n")
    assert training(path)[0].qid == "\ufffd"
    path = put(tmp_path / "q.jsonl", r'{"query-id": "q\ud83d", "corpus-id": 7, "score": 1}' + "\n")
    assert files.read_qrels(path) == {"q\ufffd": {"7": 1}}


BAD_JSON = {
    "deep": '{"a":' * 99999,
    "deep and whole": '{"a":' + "[" * 50000 + "]" * 50000 + "}",
    "a long integer": '{"qid": "1", "pos": [%s]}' % ("9" * 5000),
    "half a line": '{"qid": "q1", "pos": ["7"',
    "a list": '["7"]',
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", ['[{"_id": "1"}]\n', "[\n{}\n]\n", '{\n "_id": "1"\n}\n'])
def test_json_that_is_not_one_object_a_line(tmp_path, reader, text):
    assert refused(READERS[reader], put(tmp_path / "x.json", text)).startswith(":1: not ")


@pytest.mark.parametrize("case", BAD_JSON)
@pytest.mark.parametrize("reader", READERS)
def test_bad_json(tmp_path, reader, case):
    good = {"_id": "1", "text": "a"}
    good |= {"query-id": "q1", "corpus-id": "7", "score": 1}
    good |= {"qid": "q1", "pos": ["7"]}
    path = put(tmp_path / "x.jsonl", jsonl(good) + "\n" + BAD_JSON[case] + "\n")
    message = refused(READERS[reader], path)
    assert message.startswith(":3: not ") and len(message) < 200


VALUES = {
    "title": [7, True, ["a"], {"a": 1}, 10**400],
    "text": [7, 0, False, [], ["a"], {"a": 1}, float("nan")],
    "_id": [None, 7.0, 1.5, True, [], "", " ", "a b", "a\n", "a\0", "a\u00a0"],
}


def test_values_that_are_no_strings(tmp_path):
    good = {"_id": 7, "title": None, "text": "a"}  # a whole number is an id
    assert texts(put(tmp_path / "c", jsonl(good, good | {"_id": -1}))) == [
        ("7", (), "a"),
        ("-1", (), "a"),
    ]
    for name, values in VALUES.items():
        for value in values:
            path = put(tmp_path / "c", jsonl(good | {"_id": "8"}, good | {name: value}))
            expected = ":2: the id " if name == "_id" else ":2: title and text must be strings"
            assert refused(texts, path).startswith(expected), (name, value)


@pytest.mark.parametrize("score", ["1e39", "10" * 200, "NaN", "-Infinity", '"1"', "true", "null"])
def test_scores_that_float32_does_not_hold(tmp_path, score):
    row = '{"qid": "q1", "pos": ["7"], "pos_scores": [%s]}\n'
    assert refused(training, put(tmp_path / "t", row % score)).startswith(":1: ids must be strings")
    if score[0] not in '"tn':
        run = f"q1 Q0 7 1 {score} tag\n"
        assert refused(files.read_run, put(tmp_path / "r", run)).startswith(":1: the score '")


def test_a_rank_beyond_what_a_float32_tells_apart(tmp_path):
    found = files.read_run(put(tmp_path / "r", "q1 7 16777216\n"))
    assert found["q1"].scores == [-16777216]
    for rank in (16777217, 3_000_000_000):
        found = refused(files.read_run, put(tmp_path / "r", f"q1 7 {rank}\n"))
        assert found.startswith(f":1: the rank {rank} is above 16777216")
    assert refused(files.read_run, put(tmp_path / "r", "q1 7 1.5\n")).startswith(
        ":1: the rank '1.5'"
    )


@pytest.mark.parametrize("ids", ['["a b"]', '["a", " "]', '[" ", "a"]', '[""]', '["a", "\\n"]'])
def test_ids_of_a_training_file_have_no_white_space(tmp_path, ids):
    path = put(tmp_path / "t", f'{{"qid": "q1", "pos": ["7"], "neg": {ids}}}\n')
    assert refused(training, path).startswith(":1: ids must be strings without white space")


# ---- whole files


def zipped(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x", data)
    return stream.getvalue()


def tarred(data: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        part = tarfile.TarInfo("x")
        part.size = len(data)
        archive.addfile(part, io.BytesIO(data))
    return stream.getvalue()


TEXT = b"q1 0 7 1\n"
PACKED = {
    "bzip2 file — unpack it with bunzip2": bz2.compress(TEXT),
    "xz file — unpack it with unxz": lzma.compress(TEXT),
    "zstd file — unpack it with unzstd": b"\x28\xb5\x2f\xfd\x24\x09\x49\x00\x00" + TEXT,
    "zip archive — unpack it with unzip": zipped(TEXT),
    "tar archive — unpack it with tar": tarred(TEXT),
    "gzip inside gzip — unpack it with gunzip": gzip.compress(gzip.compress(TEXT)),
    "UTF-16 — convert it with iconv": TEXT.decode().encode("utf-16"),
}


@pytest.mark.parametrize("what", PACKED)
@pytest.mark.parametrize("reader", READERS)
def test_a_packed_file_gets_the_command_that_unpacks_it(tmp_path, reader, what):
    message = refused(READERS[reader], put(tmp_path / "x.gz", PACKED[what]))
    assert message.startswith(": this is ") and what in message


DAMAGED = {
    "cut gzip": (gzip.compress(TEXT)[:14], ":1: truncated or damaged gzip"),
    "a checksum": (gzip.compress(b"\n" + TEXT)[:-8] + b"\0" * 8, ":3: truncated or damaged gzip"),
    "Parquet": (b"PAR1" + b"\0" * 40, ":1: cannot be read"),
    "Latin-1": ("é".encode("latin-1"), ":1: not UTF-8 — convert the file with iconv"),
    "a pickle": (b"\x80\x04\x95\0\0\0\0\x8c\xff.", ":1: not text — give a text file or Parquet"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("reader", READERS)
def test_damaged(tmp_path, reader, case):
    data, expected = DAMAGED[case]
    reader = "qrels" if case == "a checksum" else reader  # the first line of others is bad
    assert refused(READERS[reader], put(tmp_path / "x", data)).startswith(expected)


@pytest.mark.parametrize("reader", [*READERS, "open_texts"])
def test_what_is_no_file(tmp_path, reader):
    read = READERS.get(reader, open_texts)
    os.mkfifo(tmp_path / "pipe")
    assert refused(read, tmp_path / "pipe").startswith(": no regular file")
    assert refused(read, tmp_path / "absent.tsv").startswith(": no such file")
    assert refused(read, tmp_path / ("x" * 300)).startswith(": no such file")
    folder = "not a file, a save_to_disk" if "texts" in reader else "no regular file"
    assert refused(read, tmp_path).startswith(f": {folder}")
    path = put(tmp_path / "x", TEXT)
    path.chmod(0)
    if os.geteuid():  # root may read it
        assert refused(read, path).startswith(":1: cannot be read (Permission denied)")


def test_ends_of_lines_make_no_difference(tmp_path):
    forms = {
        "texts": "7\tAnts\n\n8\tBees\n",
        "qrels": "q1 0 7 1\n\nq2 0 8 1\n",
        "run": "q1\t7\t1\n\nq2\t8\t1\n",
        "training file": '{"qid": "q1", "pos": ["7"]}\n\n{"qid": "q2", "pos": ["8"]}\n',
    }
    for reader, text in forms.items():
        read = READERS[reader]
        expected = repr(read(put(tmp_path / "x", text)))
        for other in (text[:-1], text.replace("\n", "\r\n"), "\ufeff" + text, "\n \n" + text):
            assert repr(read(put(tmp_path / "x", other))) == expected


# ---- the fuzzer


def test_readers_survive_the_fuzzer(tmp_path):
    for read, data in FILES:
        assert fault_of(read, put(tmp_path / "whole", data)) is None
    count, faults = fuzz(0, tmp_path, range(12 * len(FILES)))
    assert count == 12 * len(FILES) and not faults


def test_the_fuzzer_notices_faults(tmp_path):
    path = put(tmp_path / "x", "")

    def other_file(path):
        raise UserError("no name of a file")

    def two_lines(path):
        raise UserError(f"{path}: a\nb")

    assert "ZeroDivisionError" in fault_of(lambda path: 1 / 0, path)
    assert "not one line" in fault_of(other_file, path)
    assert "not one line" in fault_of(two_lines, path)


# ---- the cache


def test_the_cache_misses_when_a_file_below_a_folder_is_rewritten(tmp_path):
    def save(text):
        rows = datasets.Dataset.from_list([{"_id": "1", "text": text}])
        datasets.DatasetDict({"corpus": rows, "queries": rows}).save_to_disk(tmp_path / "disk")

    save("ants")
    assert open_texts(tmp_path / "disk")[0] == ((), "ants")
    other = datasets.Dataset.from_list([{"_id": "1", "text": "bees"}])
    other.save_to_disk(tmp_path / "disk" / "corpus")
    assert open_texts(tmp_path / "disk")[0] == ((), "bees")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path = put(tmp_path / "c.tsv", "".join(f"{n}\t{'ants ' * 99}\n" for n in range(2000)))
    said = r"/texts-\w+: cannot be written \(.*\) — .*ISTHMUS_CACHE"
    monkeypatch.setenv("ISTHMUS_CACHE", str(put(tmp_path / "file", "")))
    with pytest.raises(UserError, match=said):
        open_texts(path)
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "full"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # as a full disk
    try:
        with pytest.raises(UserError, match=said):
            open_texts(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "full").iterdir())
    texts = open_texts(path)
    assert len(texts) == 2000
    put(texts.folder / "texts.arrow", (texts.folder / "texts.arrow").read_bytes()[:-50])
    with pytest.raises(UserError, match=r"the copy of .*c.tsv is damaged .* — remove it"):
        open_texts(path)


def together(path, start, folder):
    """Open a corpus at a moment; say in a file what went wrong."""
    while time.time() < start:
        pass
    try:
        assert len(open_texts(path)) == 40
    except BaseException as error:
        put(folder / f"failed-{os.getpid()}", repr(error))


def test_four_processes_open_a_corpus_while_some_are_killed(tmp_path, cache):
    fork = multiprocessing.get_context("fork")
    path = tmp_path / "c.tsv"
    for number in range(8):
        put(path, "".join(f"{n}\tpassage {number} {n}\n" for n in range(40)))
        start = time.time() + 0.02
        parts = [fork.Process(target=together, args=(path, start, tmp_path)) for _ in range(4)]
        for part in parts:
            part.start()
        if number % 3:
            time.sleep(max(start + 0.0008 * number - time.time(), 0))
            parts[0].kill()
            parts[1].kill()
        for part in parts:
            part.join()
        together(path, 0, tmp_path)  # the next run, which removes what is left
        assert not list(tmp_path.glob("failed-*")) and not list(cache.glob(".tmp-*"))
    assert len(list(cache.glob("texts-*"))) == 8


def make_folder(path, started, seconds):
    def make(temporary):
        temporary.mkdir()
        put(started, "")
        time.sleep(seconds)

    make_once(path, make)


def test_one_process_makes_it_and_left_overs_of_the_dead_go(tmp_path):
    fork = multiprocessing.get_context("fork")

    def start(name, seconds):
        part = fork.Process(target=make_folder, args=(tmp_path / "made", tmp_path / name, seconds))
        part.start()
        return part

    def left():
        return sorted(path.name for path in tmp_path.glob("*made"))

    first = start("first", 60)
    while not (tmp_path / "first").exists():
        time.sleep(0.01)
    second = start("second", 0)
    second.join(0.3)
    assert second.is_alive() and left() == [".lock-made", f".tmp-{first.pid}-made"]
    first.kill()
    second.join()
    assert (tmp_path / "second").exists() and left() == ["made"]


def test_what_a_killed_run_left_beside_an_index_goes(script, tmp_path):
    for name, rows in (
        ("corpus", [{"_id": "7", "text": "ants"}]),
        ("queries", [{"_id": "q1", "text": "ants"}]),
    ):
        put(tmp_path / name, jsonl(*rows))
    put(tmp_path / "qrels", "q1 0 7 1\n")
    (tmp_path / "indexes" / ".tmp-99-bm25").mkdir(parents=True)
    put(tmp_path / "indexes" / ".tmp-99-bm25" / "documents.bin", "half")
    put(tmp_path / "indexes" / ".tmp-99-other", "of somebody else")
    flags = [f"--{name}={tmp_path / name}" for name in ("corpus", "queries", "qrels")]
    flags += ["--bm25", "--bm25_index", tmp_path / "indexes/bm25", "--output_dir", tmp_path / "out"]
    assert script("evaluate", *flags)[0] == 0
    names = {path.name for path in (tmp_path / "indexes").iterdir()}
    assert names == {"bm25", ".tmp-99-other"}
