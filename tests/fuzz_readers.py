"""Damaged files, again and again: small valid files of every format that is read are changed at
random and read in this process. A reader may return, or raise a UserError of one line that names
the file. What it returns must come back unchanged from the form in which we write it.

    python -m tests.fuzz_readers --seconds 60 --seed 0
"""

import argparse
import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_matrix, save_npz

from lib import files
from lib.embeddings import Embeddings, write_shard
from lib.files import UserError
from lib.groups import read_rows
from lib.lines import is_json
from lib.texts import open_texts, read_texts, write_texts
from recipes.import_training_data import convert, format_of


# ---- readers: each reads a file, and again what was written of it
def read_corpus(path: Path) -> None:
    rows = list(read_texts(path))
    write_texts(path.with_name("again.jsonl"), rows)
    assert list(read_texts(path.with_name("again.jsonl"))) == joined(rows)


def joined(rows: list) -> list:
    """Rows as our JSONL holds them, with one title."""
    return [(i, (" ".join(titles),) if titles else (), text) for i, titles, text in rows]


def open_corpus(path: Path) -> None:
    texts = open_texts(path)
    rows = list(texts.stream())
    assert rows == list(read_texts(path)) and len(rows) == len(texts)
    assert texts.rows([i for i, _, _ in rows]).tolist() == list(range(len(rows)))


def read_qrels(path: Path) -> None:
    qrels = files.read_qrels(path)
    if any(map(is_json, qrels)):  # an id on the first line that looks like JSON is taken for it
        return
    files.write_qrels(path.with_name("again.tsv"), qrels)
    assert files.read_qrels(path.with_name("again.tsv")) == qrels


def read_run(path: Path) -> None:
    run = {qid: entry for qid, entry in files.read_run(path).items() if entry.pids}
    if any(map(is_json, run)):
        return
    files.write_run(path.with_name("again.trec"), ((qid, *entry) for qid, entry in run.items()))
    again = files.read_run(path.with_name("again.trec")) if run else {}
    for qid, entry in run.items():
        assert again[qid].pids == entry.pids and (again[qid].scores == entry.scores).all()


def read_train(path: Path) -> None:
    rows = list(read_rows(path))
    files.write_training_file(path.with_name("again.jsonl"), rows)
    again = [row for _, row in files.read_training_file(path.with_name("again.jsonl"))]
    assert [row._replace(pos_scores=None, neg_scores=None) for row in again] == [
        row._replace(pos_scores=None, neg_scores=None) for row in rows
    ]


def import_train(path: Path) -> None:
    out = path.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    convert([str(path)], format_of(str(path)), None, out)
    rows = [row for _, row in files.read_training_file(out / "train.jsonl")]
    positives = {row.qid: dict.fromkeys(row.pos, 1) for row in rows}
    assert files.read_qrels(out / "qrels.tsv") == positives
    for name in ("corpus.jsonl", "queries.jsonl"):
        if (out / name).exists():
            list(open_texts(out / name).stream())


def read_embeddings(name: str):
    """A reader of a folder of embeddings in which one file is the given one."""

    def read(path: Path) -> None:
        folder = path.with_name(f"{path.name}-folder")
        shutil.rmtree(folder, ignore_errors=True)
        sparse = name.endswith("npz")
        whole = csr_matrix(VECTORS) if sparse else VECTORS
        write_shard(folder, 0, whole, ["a", "b", "c"])
        head = "sparse" if sparse else "dense"
        files.write_json(folder / "meta.json", {"count": 3, "dim": 2, "head": head})
        shutil.copy(path, folder / name)
        stored = Embeddings(folder)
        assert stored.rows(stored.ids([0, 2])).min() >= 0
        assert stored.take([1]).shape == (1, 2)
        shutil.rmtree(folder)

    return read


# ---- small files of every format
def jsonl(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(*rows: dict) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), stream)
    return stream.getvalue()


VECTORS = np.float32([[1, 0], [2, 3], [0, 4]])


def array_file(save, array) -> bytes:
    stream = io.BytesIO()
    save(stream, array)
    return stream.getvalue()


BEIR = [
    {"_id": "7,a", "title": "Ants", "text": 'Ants \U0001f41c "sleep".'},
    {"_id": "8", "title": None, "text": ""},
    {"_id": "9", "title": "", "text": "Bees\tfly.\nBees"},
]
DPR = b'id\ttext\ttitle\n1\t"Ants ""sleep"".\n\nOften."\tAnts\n2\t"Bees\tfly."\t""\n'
JUDGED = [
    {"query-id": "q1", "corpus-id": "7,a", "score": 1},
    {"query-id": "q2", "corpus-id": "8", "score": 0},
]
TRAINING = [
    {"qid": "q1", "pos": ["7,a"], "neg": ["9", "4"], "pos_scores": [9.5], "neg_scores": [8, 2.5]},
    {"qid": "q2", "pos": ["3", "7"], "cluster": 4},
]
BGE = [
    {"query": "a b", "pos": ["c d"], "neg": ["e", ""], "pos_scores": [1], "neg_scores": [2, 3.5]}
]
PASSAGES = [{"docid": "7", "title": "t", "text": "c d"}, {"docid": 8, "title": None, "text": ""}]
TEVATRON = {"query_id": "1", "query": "a b"}
TEVATRON |= {"positive_passages": PASSAGES[:1], "negative_passages": PASSAGES[1:]}
TEVATRON_IDS = {"query_id": "1", "query_text": "a b", "positive_document_ids": ["7"]}
TEVATRON_IDS |= {"negative_document_ids": ["8", "9"]}
SYSTEMS = [{"qid": 1, "pos": [7], "neg": {"bm25": [9, 4], "x": [3]}}]
SCORED = [{"qid": 1, "pos": [{"pid": 7, "ce-score": 9.5}], "neg": {"x": []}}]
COLUMNS = [{"anchor": "a b", "positive": "c d", "negative_1": "e", "negative_2": None}]
FILES = [
    (read_corpus, jsonl(*BEIR)),
    (read_corpus, parquet(*BEIR)),
    (read_corpus, b"7\tAnts sleep.\n8\t\n"),
    (read_corpus, "\ufeff7\tÄnts\tsleep.\r\n8\t\tBees\r\n".encode()),
    (read_corpus, b"D1\thttp://u\tAnts\tAnts sleep.\nD2\thttp://v\t\tBees\n"),
    (read_corpus, b"docid\turl\ttitle\tbody\nD1\thttp://u\tAnts\tAnts sleep.\n"),
    (read_corpus, DPR),
    (read_corpus, jsonl({"pid": "p_1", "passage": "Ants.", "docid": "d_1"})),
    (open_corpus, jsonl(*BEIR)),
    (open_corpus, parquet(*BEIR)),
    (open_corpus, DPR),
    (read_qrels, b"q1 0 7,a 1\nq1 0 8 2\nq2 0 8 -1\n"),
    (read_qrels, b"query-id\tcorpus-id\tscore\nq1\t7,a\t1\nq2\t8\t1.0\n"),
    (read_qrels, b"q1\t7\nq1\t8\nq2\t9\n"),
    (read_qrels, jsonl(*JUDGED)),
    (read_qrels, parquet(*JUDGED)),
    (read_run, b"q1 Q0 7,a 1 13.25 tag\nq1 Q0 8 2 1e-3 tag\nq2 Q0 8 1 .5 tag\n"),
    (read_run, b"q1\t7,a\t1\nq1\t8\t2\nq2\t9\t1\n"),
    (read_run, b"q1\t7\ta b\tc d\nq1\t8\ta b\te\n"),
    (read_run, b"q1\t7,8,9\nq2\t\nq3\t8\n"),
    (read_run, jsonl(*TRAINING)),
    (read_train, jsonl(*TRAINING)),
    (read_train, parquet(*TRAINING[:1])),
    (read_train, b"q1 0 7,a 1\nq1 0 8 2\nq2 0 8 -1\n"),
    (read_train, jsonl(*JUDGED)),
    (import_train, jsonl(*BGE)),
    (import_train, parquet(*BGE)),
    (import_train, jsonl(TEVATRON)),
    (import_train, jsonl(TEVATRON_IDS)),
    (import_train, jsonl(*SYSTEMS)),
    (import_train, jsonl(*SCORED)),
    (import_train, jsonl(*COLUMNS)),
    (import_train, parquet(*COLUMNS)),
    (import_train, b"a b\tc d\te f\na b\tc d\tg\n"),
    (import_train, b"1 7 9\n1 7 4\n"),
    (import_train, b"1\t7\t9,4\n2\t8\t3\n"),
    (read_embeddings("meta.json"), b'{"count": 3, "dim": 2, "head": "dense", "vectors": 3}\n'),
    (read_embeddings("shard-00000.ids.txt"), b"a\nb\nc\n"),
    (read_embeddings("shard-00000.npy"), array_file(np.save, VECTORS)),
    (read_embeddings("shard-00000.npz"), array_file(save_npz, csr_matrix(VECTORS))),
]

# ---- changes
PIECES = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n", b"\t", b" ", b'"', b"\\ud83d"]
PIECES += [b"\\u0000", b"\xe2\x80\xa8", b"\xc2\xa0", b"{", b"}", b"[", b"]", b",", b"\x1c"]
PIECES += [b"9" * 5000, b"9" * 4000, b"1e999", b"1e39", b"nan", b"-inf", b"0.5", b"1_0", b"-1"]
PIECES += [b"3000000000", b"\xd9\xa3", b"[" * 3000, b'{"a":' * 3000, b"null", b"true", b"score"]
VALUES = [None, True, 0, -1, 0.5, 7.0, 10**400, 3e9, 1e300, float("nan"), float("inf"), "", " "]
VALUES += ["\ud83d", "a\tb", "a\nb", "\0", "a" * 3000, "\u2028", [], [[]], ["a"], [1], {}, {"a": 1}]


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    stop = min(at + draw.choice((1, 1, 2, 8, 40)), len(data))
    kind = draw.randrange(6)
    if kind == 0:
        return data[:at] + draw.choice(PIECES) + data[at:]
    if kind == 1:
        return data[:at] + draw.choice(PIECES) + data[stop:]
    if kind == 2:
        return data[:at] + data[stop:]
    if kind == 3:
        return data[:at] + data[at:stop] * 2 + data[stop:]
    if kind == 4:
        return data[:at]
    return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]


def change_lines(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    kind = draw.randrange(3)
    if kind == 0:
        lines.insert(draw.randrange(len(lines) + 1), lines[at])
    elif kind == 1:
        draw.shuffle(lines)
    else:
        separator = draw.choice((b"\t", b" "))
        columns = lines[at].split(separator)
        columns[draw.randrange(len(columns))] = draw.choice(PIECES)
        lines[at] = separator.join(columns)
    return b"\n".join(lines)


def change_values(data: bytes, draw: random.Random) -> bytes:
    """A value of JSON becomes another, anywhere in a record, or loses its key."""
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    try:
        record = json.loads(lines[at])
    except (ValueError, RecursionError):
        return change_lines(data, draw)
    part = record
    while isinstance(part, (dict, list)) and part:
        key = draw.choice(list(part) if isinstance(part, dict) else range(len(part)))
        inner = part[key]
        if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.4:
            if draw.random() < 0.2:
                del part[key]
            else:
                part[key] = draw.choice(VALUES)
            break
        part = inner
    lines[at] = json.dumps(record).encode()
    return b"\n".join(lines)


def pack(data: bytes, draw: random.Random) -> bytes:
    kind = draw.randrange(8)
    if kind == 0:
        return bz2.compress(data)
    if kind == 1:
        return lzma.compress(data)
    if kind == 2:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("x", data)
        return stream.getvalue()
    if kind == 3:
        return data.decode("utf-8", "replace").encode("utf-16")
    packed = gzip.compress(data)
    return change_bytes(packed, draw) if draw.random() < 0.5 else packed


def changed(data: bytes, draw: random.Random) -> bytes:
    """One to three changes; the file may be packed after them."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        change = draw.choice((change_bytes, change_lines, change_values, change_values))
        data = change(data, draw)
    return pack(data, draw) if draw.random() < 0.1 else data


def fault_of(read, path: Path) -> str | None:
    """What is wrong with the way in which a reader takes a file; None if nothing is."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
    except UserError as error:
        message = str(error)
        if "\n" in message or path.name not in message:
            return f"a UserError that is not one line with the file: {message!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:1000]
    return None


def fuzz(seed: int, folder: Path, numbers) -> tuple[int, list[str]]:
    """(number of files, faults) of the changes with these numbers; the files of faults stay in the
    folder."""
    count, faults = 0, []
    for number in numbers:
        count += 1
        draw = random.Random(f"{seed} {number}")
        read, data = FILES[number % len(FILES)]
        path = folder / f"fuzzed-{number}.x"
        path.write_bytes(changed(data, draw))
        fault = fault_of(read, path)
        if fault:
            faults.append(f"{path} by {read.__name__}, seed {seed}: {fault}")
            print(faults[-1], flush=True)
        else:
            path.unlink()
    return count, faults


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-readers-"))
    os.environ["ISTHMUS_CACHE"] = str(folder / "cache")
    stop = time.monotonic() + args.seconds

    def numbers():
        number = 0
        while time.monotonic() < stop:
            yield number
            number += 1

    count, faults = fuzz(args.seed, folder, numbers())
    print(f"{count} files, {len(faults)} faults" + (f", see {folder}" if faults else ""))
    if not faults:
        shutil.rmtree(folder)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
