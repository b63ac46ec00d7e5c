"""The contract between the scripts: every file format, read as the field writes it, written in one form.

    corpus       {"_id": "7", "title": "Ants", "text": "Ants are ..."}   JSONL (BEIR; tevatron has "docid");
                 Parquet, a save_to_disk folder, a hub name (NAME or NAME:CONFIG)
                 {"spans": ["Ants are ...", "A queen ..."]}   JSONL of cut documents (coCondenser), _id optional
                 7 \t Ants are ...      7 \t Ants \t Ants are ...   TSV of 2 or 3 columns (MS MARCO, LexMAE)
                 D7 \t http://... \t Ants \t Ants are ...      MS MARCO documents (url and title: see FIELD)
    queries      {"_id": "q1", "text": "do ants sleep"}      q1 \t do ants sleep
    qrels        q1 0 7 1 (TREC, MS MARCO)      q1 \t 7 (RetroMAE)
                 query-id \t corpus-id \t score, then q1 \t 7 \t 1 (BEIR)
    negatives    q1 \t 9,4,12      best first; or a TREC run
    run          q1 Q0 7 1 13.25 tag (TREC)      q1 \t 7 \t 1 (MS MARCO: qid, pid, rank)
    candidates   q1 \t 7 \t do ants sleep \t Ants are ... (top1000.dev); or a run
    triples      do ants sleep \t Ants are ... \t Bees are ... (texts)      q1 \t 7 \t 9 (ids)
    scores       q1 \t 7 \t 8.31      clusters   q1 \t 12      titles   7 \t Ants
    embeddings   shard-00000.npy (n, D) float16/32, shard-00000.ids.txt, ..., meta.json (written last); sparse ones
                 shard-00000.npz, a CSR matrix (n, V) as scipy.sparse.load_npz reads it; a text of several chunks has
                 as many rows one after the other, with its id in each
    impacts      {"id": "7", "vector": {"ant": 113, "##s": 20}} (Anserini's JsonVectorCollection)
                 q1 \t ant ant ant ##s (its queries, each token as often as it weighs)

Every text file may be gzipped. Ids are strings. Readers stream, and stop at a bad line with `file:line: what is wrong
— what to do`.
"""

import contextlib
import gzip
import json
import math
import os
import shutil
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


class UserError(Exception):
    """A mistake the user can mend. The message names the place and the remedy; launch.run prints it as one line and
    exits with 1."""


# plain files
def lines(path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its newline) of a plain or gzipped UTF-8 file, streaming; lines of white space
    alone are passed over."""
    path, number = Path(path), 0
    if not path.is_file():
        raise UserError(
            f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'} — check the path"
        )
    with open(path, "rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = gzip.open(raw) if compressed else raw
        try:
            for number, line in enumerate(stream, 1):
                line = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line and not line.isspace():
                    yield number, line
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: not UTF-8 ({error.reason}) — convert the file, for example with iconv"
            ) from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{path}:{number + 1}: truncated or damaged gzip — fetch or write the file again"
            ) from error


@contextlib.contextmanager
def atomic(path) -> Iterator[Path]:
    """A temporary name beside `path` for a file or folder; it takes the name `path` when the block ends well and is
    removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        if path.is_dir() and temporary.is_dir():  # a folder cannot replace a folder in one step
            aside = path.with_name(f".old-{os.getpid()}-{path.name}")
            os.replace(path, aside)
            os.replace(temporary, path)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_lines(path, rows: Iterable[str]) -> None:
    """One line per row, atomically; gzipped if the name ends in .gz (without a time stamp, so equal content gives
    equal bytes)."""
    with atomic(path) as temporary, open(temporary, "wb") as raw:
        stream = (
            gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0)
            if str(path).endswith(".gz")
            else raw
        )
        for row in rows:
            stream.write(f"{row}\n".encode())
        if stream is not raw:
            stream.close()


def write_json(path, content) -> None:
    """Indented JSON, atomically: a reader sees the old file or the new one, never half of it."""
    write_lines(path, [json.dumps(content, indent=1, ensure_ascii=False)])


def read_json(path) -> dict:
    """A JSON object; UserError names the line when it does not parse."""
    text = "\n".join(line for _, line in lines(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg}) — repair or remove the file"
        ) from error


def split_columns(path, number, line, separator, allowed, what) -> list[str]:
    columns = line.split(separator)
    if len(columns) not in allowed:
        raise UserError(
            f"{path}:{number}: {len(columns)} columns where {what} has {' or '.join(map(str, allowed))} — mend "
            "the line"
        )
    return columns


# judgments, negatives, runs
def _integer(value, path, number, what) -> int:
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"{path}:{number}: {what} {value!r} is not an integer — mend the line"
        ) from None


def _number(value, path, number, what) -> float:
    try:
        result = float(value.strip("[]"))
    except ValueError:
        result = float("nan")
    if result != result:
        raise UserError(f"{path}:{number}: {what} {value!r} is not a number — mend the line")
    return result


def read_qrels(path) -> dict[str, dict[str, int]]:
    """qrels[qid][pid] = relevance, told apart by shape: 4 columns TREC / MS MARCO (qid, 0, pid, relevance), 3 columns
    with BEIR's header,
    2 columns RetroMAE (qid, pid; relevance 1). Anything else stops: 3 columns without header may be a run, a comma in
    column 2 a negatives file."""
    qrels, width = {}, None
    for number, line in lines(path):
        columns = line.split("\t") if "\t" in line else line.split()
        columns = line.split() if len(columns) not in (2, 3, 4) else [c.strip() for c in columns]
        if width is None:
            width = len(columns)
            if width == 6:
                raise UserError(
                    f"{path}:{number}: 6 columns, a run and not judgments — give the qrels file"
                )
            if width == 3:
                if [c.lower() for c in columns[:2]] == ["query-id", "corpus-id"]:
                    continue
                raise UserError(
                    f"{path}:{number}: 3 columns without BEIR's header may be judgments or a run — put "
                    "`query-id\\tcorpus-id\\tscore` first"
                )
            if width not in (2, 4):
                raise UserError(
                    f"{path}:{number}: {width} columns — qrels have 4 (TREC), 3 with a header (BEIR) or 2 (RetroMAE)"
                )
        if len(columns) != width:
            raise UserError(
                f"{path}:{number}: {len(columns)} columns after lines of {width} — mend the line"
            )
        if width == 2:
            qid, pid, relevance = columns[0], columns[1], 1
            if "," in pid:
                raise UserError(
                    f"{path}:{number}: several passages in column 2, as in a negatives file — qrels have one per line"
                )
        else:
            qid, pid = columns[0], columns[2 if width == 4 else 1]
            grade = columns[-1]
            relevance = (
                int(_number(grade, path, number, "relevance"))
                if "." in grade
                else _integer(grade, path, number, "relevance")
            )
        if qrels.setdefault(qid, {}).setdefault(pid, relevance) != relevance:
            raise UserError(
                f"{path}:{number}: {qid} {pid} is judged twice with different grades — keep one line"
            )
    if not qrels:
        raise UserError(f"{path}: no judgments in it — is it the right file?")
    return qrels


def line_of(path, *fields) -> str:
    """`file:line` of the first line that holds all `fields` as columns or list items, for an error found after
    reading; else `file`."""
    for number, line in lines(path):
        if set(fields) <= set(line.replace(",", " ").split()):
            return f"{path}:{number}"
    return str(path)


def read_negatives(path) -> Iterator[tuple[str, list[str]]]:
    """(qid, [pid, ...] best first) from `qid \\t pid,pid,...` or a TREC run (in rank order). A qid may come again
    later: extend its list."""
    group, width = (None, []), None
    for number, line in lines(path):
        columns = line.split()
        width = width or len(columns)
        if width == 6:
            columns = split_columns(path, number, line, None, (6,), "a TREC run")
            entry = (_integer(columns[3], path, number, "rank"), columns[2])
            if columns[0] == group[0]:
                group[1].append(entry)
                continue
            if group[1]:
                yield group[0], [pid for _, pid in sorted(group[1], key=lambda e: e[0])]
            group = (columns[0], [entry])
        else:
            qid, tab, pids = line.partition("\t")
            if not tab or "\t" in pids:
                raise UserError(
                    f"{path}:{number}: not `qid<TAB>pid,pid,...` — negatives are that or a TREC run of 6 columns"
                )
            pids = [p.strip() for p in pids.split(",")]
            if "" in pids and len(pids) > 1:
                raise UserError(f"{path}:{number}: an empty passage id in the list — mend the line")
            yield qid.strip(), list(dict.fromkeys(p for p in pids if p))
    if group[1]:
        yield group[0], [pid for _, pid in sorted(group[1], key=lambda e: e[0])]


def write_negatives(path, rows: Iterable[tuple[str, list[str]]]) -> None:
    write_lines(path, (f"{qid}\t{','.join(pids)}" for qid, pids in rows))


class RunList(NamedTuple):
    """What a run holds for one query, in the order of the file."""

    pids: list[str]
    scores: np.ndarray  # (n,) float32; -rank where the file states no score
    ranks: np.ndarray  # (n,) int32


def read_run(path) -> dict[str, RunList]:
    """run[qid] from TREC's 6 columns or MS MARCO's 3 (qid, pid, rank). A passage twice for a query stops."""
    gathered, names, width = {}, {}, None
    for number, line in lines(path):
        columns = line.split()
        width = width or len(columns)
        if len(columns) != width or width not in (3, 6):
            raise UserError(
                f"{path}:{number}: {len(columns)} columns — a run has 6 (TREC) or 3 (qid, pid, rank), the same "
                "in every line"
            )
        pid, rank = (columns[1], columns[2]) if width == 3 else (columns[2], columns[3])
        pid = names.setdefault(pid, pid)  # one string for all its lines
        rank = _integer(rank, path, number, "rank")
        score = float(-rank) if width == 3 else _number(columns[4], path, number, "score")
        if columns[0] not in gathered:
            gathered[columns[0]] = {}, array("f"), array("i")
        entry = gathered[columns[0]]
        if pid in entry[0]:
            raise UserError(
                f"{path}:{number}: {pid} is listed twice for query {columns[0]} — remove the duplicate"
            )
        entry[0][pid] = None
        entry[1].append(score)
        entry[2].append(rank)
    if not gathered:
        raise UserError(f"{path}: an empty run — is it the right file?")
    run = {}
    for qid in list(gathered):
        pids, scores, ranks = gathered.pop(qid)
        run[qid] = RunList(
            list(pids), np.array(scores, dtype=np.float32), np.array(ranks, dtype=np.int32)
        )
    return run


def write_run(
    path, rows: Iterable[tuple[str, list[str], Iterable[float]]], tag: str = "isthmus"
) -> None:
    """TREC run; ranks from 1 in the order given. Nine digits bring a float32 score back unchanged."""
    write_lines(
        path,
        (
            f"{qid} Q0 {pid} {rank} {score:.9g} {tag}"
            for qid, pids, scores in rows
            for rank, (pid, score) in enumerate(zip(pids, scores, strict=True), 1)
        ),
    )


def read_candidates(path) -> dict[str, list[str]]:
    """candidates[qid] = [pid, ...] from top1000.dev (qid, pid, query, passage) or a run."""
    _, first = next(lines(path), (0, ""))
    if len(first.split("\t")) != 4:
        return {qid: entry.pids for qid, entry in read_run(path).items()}
    candidates = {}
    for number, line in lines(path):
        columns = split_columns(path, number, line, "\t", (4,), "a file like top1000.dev")
        candidates.setdefault(columns[0], {})[columns[1]] = None
    return {qid: list(pids) for qid, pids in candidates.items()}


def write_qrels(path, qrels: dict[str, dict[str, int]]) -> None:
    write_lines(
        path,
        (
            f"{qid} 0 {pid} {grade}"
            for qid, judged in qrels.items()
            for pid, grade in judged.items()
        ),
    )


def read_scores(path) -> Iterator[tuple[str, str, float]]:
    """(qid, pid, teacher score); white space between, the score bare or in [ ] as RetroMAE's cross-encoder writes
    it."""
    for number, line in lines(path):
        qid, pid, score = split_columns(path, number, line, None, (3,), "a file of teacher scores")
        yield qid, pid, _number(score, path, number, "score")


def write_scores(path, rows: Iterable[tuple[str, str, float]]) -> None:
    write_lines(path, (f"{qid}\t{pid}\t{score:.9g}" for qid, pid, score in rows))


def read_clusters(path) -> Iterator[tuple[str, int]]:
    for number, line in lines(path):
        qid, cluster = split_columns(path, number, line, None, (2,), "a file of clusters")
        yield qid, _integer(cluster, path, number, "cluster")


def read_triples(path) -> Iterator[tuple[str, str, str]]:
    """(query, positive passage, negative passage) as texts: triples.train.small.tsv."""
    for number, line in lines(path):
        query, positive, negative = split_columns(
            path, number, line, "\t", (3,), "a file of text triples"
        )
        yield query, positive, negative


def read_id_triples(path) -> Iterator[tuple[str, str, str]]:
    """(qid, positive pid, negative pid): qidpidtriples.train.*"""
    for number, line in lines(path):
        qid, positive, negative = split_columns(
            path, number, line, None, (3,), "a file of id triples"
        )
        yield qid, positive, negative


# the training file
class TrainingRow(NamedTuple):
    """One query with everything that training needs of it, by id; negatives best first."""

    qid: str
    pos: list[str]
    neg: list[str]
    pos_scores: list[float] | None  # aligned with pos
    neg_scores: list[float] | None  # aligned with neg
    cluster: int | None


def read_training_file(path) -> Iterator[tuple[int, TrainingRow]]:
    """(line number, row) of a training file, streaming.

    UserError: a line that is not JSON, an id that is not a string, scores that do not fit."""
    for number, line in lines(path):
        try:
            record = json.loads(line)
            row = TrainingRow(
                qid=record["qid"],
                pos=record["pos"],
                neg=record.get("neg", []),
                pos_scores=record.get("pos_scores"),
                neg_scores=record.get("neg_scores"),
                cluster=record.get("cluster"),
            )
            problem = _problem(row)
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
            problem = 'not a row like {"qid": "q1", "pos": ["7"], "neg": ["9"]}'
        if problem:
            raise UserError(f"{path}:{number}: {problem} — fix the line")
        yield number, row


def _problem(row: TrainingRow) -> str | None:
    """What is wrong with a row; None if nothing is."""
    if not isinstance(row.pos, list) or not isinstance(row.neg, list) or not row.pos:
        return "pos must be a list of at least one passage id, and neg a list"
    if not all(isinstance(one, str) and one for one in [row.qid, *row.pos, *row.neg]):
        return "ids must be strings that are not empty"
    for name, ids, scores in (("pos", row.pos, row.pos_scores), ("neg", row.neg, row.neg_scores)):
        if scores is not None and len(scores) != len(ids):
            return f"{len(scores)} numbers in {name}_scores for {len(ids)} passages in {name}"
        if not all(math.isfinite(score) for score in scores or []):
            return f"{name}_scores holds a number that is not finite"
    if row.cluster is not None and (type(row.cluster) is not int or row.cluster < 0):
        return f"the cluster {row.cluster!r} is not a whole number of at least 0"
    return None


def write_training_file(path, rows: Iterable[TrainingRow]) -> None:
    """train.jsonl, atomically; optional keys without a value are left out."""

    def record(row: TrainingRow) -> dict:
        kept = {name: value for name, value in row._asdict().items() if value is not None}
        if not row.neg:
            kept.pop("neg")
            kept.pop("neg_scores", None)
        return kept

    write_lines(path, (json.dumps(record(row), ensure_ascii=False) for row in rows))


def foreign_format(line: str) -> str | None:
    """Format of a file of somebody else's training data by its first line, named as in
    recipes/import_training_data.py; None for a training file of ours, qrels and what is unknown."""
    if line.lstrip().startswith("{"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return None
        first = next(iter(record), None)
        if isinstance(record.get("neg"), dict):
            return "hard-negatives"
        if "pos" in record:
            return None if "qid" in record else "flagembedding"
        if "positive_passages" in record or "positive_document_ids" in record:
            return "tevatron"
        is_anchor = first in ("anchor", "query", "question")
        is_tuple = len(record) > 1 and (
            is_anchor or "positive" in record or "positive_id" in record
        )
        return "sentence-transformers" if is_tuple else None
    columns = line.split("\t") if "\t" in line else line.split()
    if len(columns) == 3 and " " in columns[0].strip():
        return "text-triples"
    if any(" " in column.strip() for column in columns):
        return None
    if len(columns) == 3 and columns[2].lower() not in ("score", "0", "1", "2", "3", "4"):
        return "ance" if "," in columns[2] else "id-triples"  # qrels and runs end in 0 to 4
    return "negative-lists" if len(columns) == 2 and "," in columns[1] else None
