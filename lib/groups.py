"""Training data of a bi-encoder: a training file in flat arrays, groups drawn from it, and the
batches they become.

B queries per batch, P passages per query (the positive first, then P - 1 negatives), n = B·P, M
chunks of a passage at most, Q queries of the file, E positives of all queries together. A corpus
row of -1 is a filler: it stands where a list of negatives is too short, is encoded as an empty
text, and has its column masked by the loss."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset

from lib.files import (
    TrainingRow,
    UserError,
    first_line,
    foreign_format,
    read_positives,
    read_training_file,
)
from lib.text import TextFormat, chunk_ids, format_texts, pad, step_seed, to_ids
from lib.texts import Texts, places, require_rows

LINES_AT_A_TIME = 4096
NEGATIVES_AT_A_TIME = 1 << 22


def read_rows(path) -> Iterator[TrainingRow]:
    """The rows of what --train takes: a training file, or judgments, whose queries have no
    negatives."""
    first = first_line(path)
    foreign = foreign_format(first)
    if foreign == "negative-lists":
        raise UserError(
            f"{path}:1: these are lists of negatives without positives — join them with judgments: "
            f"mine_negatives.py --run {path} --qrels QRELS --corpus CORPUS --output_dir OUT"
        )
    if first.lstrip().startswith("{") or foreign:
        yield from (row for _, row in read_training_file(path))
        return
    for qid, pids in read_positives(path).items():
        yield TrainingRow(qid, pids)


class TrainingFile:
    """A training file, or judgments, as flat arrays of rows in queries and corpus; workers share
    them.

    query_rows         (Q,)
    positive_rows      (E,); those of query i begin at positive_starts[i], (Q + 1,)
    negative_rows      (N,); negative_starts (Q + 1,) in the same way
    positive_scores    float32 beside positive_rows, or None; negative_scores in the same way
    clusters           (Q,) int64, or None

    UserError: an id without a text; a file without a positive; a negative that is a positive of its
    query, by id or by its exact text; scores or clusters that only some of the lines have."""

    def __init__(self, path, queries: Texts, corpus: Texts):
        self.path, self.queries, self.corpus = path, queries, corpus
        self.query_rows = array("q")
        self.positive_rows, self.negative_rows = array("i"), array("i")
        self.positive_scores, self.negative_scores = array("f"), array("f")
        positive_counts, negative_counts = array("q"), array("q")
        self.clusters, scored = array("q"), 0
        rows = read_rows(path)
        while block := list(islice(rows, LINES_AT_A_TIME)):
            self.query_rows.extend(self._rows(queries, [row.qid for row in block], "query"))
            for row_ids, found in (
                ([row.pos for row in block], self.positive_rows),
                ([row.neg for row in block], self.negative_rows),
            ):
                found.extend(self._rows(corpus, list(chain(*row_ids)), "passage"))
            for row in block:
                positive_counts.append(len(row.pos))
                negative_counts.append(len(row.neg))
                if row.cluster is not None:
                    self.clusters.append(row.cluster)
                if row.pos_scores is not None and (row.neg_scores is not None or not row.neg):
                    scored += 1
                    self.positive_scores.extend(row.pos_scores)
                    self.negative_scores.extend(row.neg_scores or [])
        if not self.query_rows:
            raise UserError(f"{path}: no query has a positive — training needs positives")
        for name in ("query_rows", "positive_rows", "negative_rows"):
            setattr(self, name, np.array(getattr(self, name), dtype=np.int64))
        self.positive_starts = np.cumsum([0, *positive_counts])
        self.negative_starts = np.cumsum([0, *negative_counts])
        self.positive_scores = self._whole(self.positive_scores, scored, "scores")
        self.negative_scores = self._whole(self.negative_scores, scored, "scores")
        self.clusters = self._whole(self.clusters, len(self.clusters), "a cluster")
        self._refuse_positives_among_negatives()
        digest = xxhash.xxh3_128()
        for rows in (self.query_rows, self.positive_rows, self.negative_rows):
            digest.update(rows.tobytes())
        self.fingerprints = {
            "train": digest.hexdigest(),
            "queries": queries.fingerprint,
            "corpus": corpus.fingerprint,
        }

    def require(self, scores: bool, clusters: bool) -> None:
        """UserError if a training needs the teacher's scores or clusters, and the file has none."""
        if scores and self.positive_scores is None:
            raise UserError(
                f"{self.path}: it has no teacher scores — add them with recipes/score_pairs.py"
            )
        if clusters and self.clusters is None:
            raise UserError(
                f"{self.path}: it has no clusters — add them with recipes/cluster_queries.py"
            )

    def _rows(self, texts: Texts, ids: list[str], what: str) -> list[int]:
        return require_rows(texts, ids, self.path, what).tolist()

    def _whole(self, values: array, lines_with: int, what: str) -> np.ndarray | None:
        """The values as an array, None if no line has them; UserError if only some lines do."""
        if 0 < lines_with < len(self):
            raise UserError(
                f"{self.path}: only {lines_with} of {len(self)} lines have {what} — run the recipe "
                "that writes them again"
            )
        return np.array(values) if lines_with else None

    def __len__(self) -> int:
        return len(self.query_rows)

    def positive_keys(self, index: int) -> np.ndarray:
        """Text keys of all positives of a query."""
        own = slice(self.positive_starts[index], self.positive_starts[index + 1])
        return np.asarray(self.corpus.text_keys[self.positive_rows[own]])

    def _refuse_positives_among_negatives(self) -> None:
        """A (query, text) pair is one 64-bit number; the positives are sorted, and every negative
        is looked up."""
        queries = np.arange(len(self), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

        def pairs(rows: np.ndarray, owners: np.ndarray) -> np.ndarray:
            return np.asarray(self.corpus.text_keys[rows]).view(np.uint64) ^ queries[owners]

        owners = np.repeat(np.arange(len(self)), np.diff(self.positive_starts))
        positives = np.sort(pairs(self.positive_rows, owners))
        owners = np.repeat(np.arange(len(self)), np.diff(self.negative_starts))
        for start in range(0, len(owners), NEGATIVES_AT_A_TIME):
            part = slice(start, start + NEGATIVES_AT_A_TIME)
            wrong = places(pairs(self.negative_rows[part], owners[part]), positives) >= 0
            if wrong.any():
                first = start + int(wrong.argmax())
                qid = self.queries.id(self.query_rows[owners[first]])
                pid = self.corpus.id(self.negative_rows[first])
                raise UserError(
                    f"{self.path}: passage {pid} is a negative of query {qid}, but it is one of "
                    "its positives or an exact copy of one — mine the negatives again with "
                    "mine_negatives.py"
                )


class Groups(Dataset):
    """Training examples: one for every positive of the file, with negatives drawn anew at every
    visit.

    From the first `depth` negatives of a query, num_negatives are drawn without replacement, as a
    function of (seed, micro-step, global row). A shorter list is filled up with row -1."""

    def __init__(self, file: TrainingFile, num_negatives: int, depth: int, seed: int):
        self.file, self.num_negatives, self.depth, self.seed = file, num_negatives, depth, seed
        counts = np.minimum(np.diff(file.negative_starts), depth)
        if num_negatives and not counts.any():
            raise UserError(
                f"{file.path}: it has no negatives for --passages_per_query {num_negatives + 1} — "
                "mine some with "
                "mine_negatives.py, or give --passages_per_query 1"
            )
        per_query = np.diff(file.positive_starts)
        self.query_of = np.repeat(np.arange(len(file), dtype=np.int64), per_query)  # (E,)
        short = np.maximum(num_negatives - counts, 0)
        self.notes = {
            "group": f"1 positive + {num_negatives} negatives",
            "examples": f"{len(self)} positives of {len(file)} queries",
            "negatives per query": f"min {counts.min()}, median {int(np.median(counts))}, "
            f"max {counts.max()}",
        }
        if short.any():
            self.notes["short lists"] = (
                f"{(short > 0).sum()} queries have fewer than {num_negatives} negatives: "
                f"{short @ per_query} columns "
                "per epoch are empty and masked"
            )

    def __len__(self) -> int:
        return len(self.file.positive_rows)

    def __getitem__(self, place: tuple[int, int, int]) -> tuple[int, np.ndarray, np.ndarray]:
        """(example, micro-step, global row) of StepSampler -> (query of the file, (P,) corpus rows,
        the positive first, (P,) teacher scores, 0 where there is none)."""
        example, micro_step, global_row = place
        file, query = self.file, int(self.query_of[example])
        start = file.negative_starts[query]
        pool = np.arange(start, min(file.negative_starts[query + 1], start + self.depth))
        if len(pool) > self.num_negatives:
            # the 1 is a stream of random numbers beside that of the permutations
            draw = np.random.default_rng(step_seed(self.seed, 1, micro_step, global_row))
            pool = draw.choice(pool, self.num_negatives, replace=False)
        rows = np.full(1 + self.num_negatives, -1, dtype=np.int64)
        rows[0] = file.positive_rows[example]
        rows[1 : 1 + len(pool)] = file.negative_rows[pool]
        scores = np.zeros(1 + self.num_negatives, dtype=np.float32)
        if file.positive_scores is not None:
            scores[0] = file.positive_scores[example]
            scores[1 : 1 + len(pool)] = file.negative_scores[pool]
        return query, rows, scores


@dataclass
class GroupCollator:
    """Items of Groups -> the batch of one micro-step. Text becomes ids here, in the workers.

    query, passage     what the encoder reads, see encoder_input
    passage_rows       (n,) corpus row, -1 = filler
    passage_keys       (n,) text key
    query_rows         (B,) row of the query
    positive_rows      (B,) corpus row of its positive
    positive_keys      (B, K) text keys of all positives of each query, padded by repetition
    teacher_scores     (B, P), 0 where there is none
    clusters           (B,), if the file has them"""

    groups: Groups
    tokenizer: object
    form: TextFormat
    chunk_rows: int

    def __call__(self, items: list[tuple[int, np.ndarray, np.ndarray]]) -> dict:
        file, corpus = self.groups.file, self.groups.file.corpus
        indices = [index for index, _, _ in items]
        rows = np.stack([rows for _, rows, _ in items])  # (B, P)
        passage_rows = rows.ravel()
        keys = [file.positive_keys(index) for index in indices]
        width = max(map(len, keys))
        queries = [file.queries[row] for row in file.query_rows[indices]]
        passages = [corpus[row] if row >= 0 else ((), "") for row in passage_rows]
        batch = {
            "query": self.encoder_input("query", queries),
            "passage": self.encoder_input("passage", passages),
            "query_rows": file.query_rows[indices],
            "passage_rows": passage_rows,
            "passage_keys": np.where(passage_rows >= 0, corpus.text_keys[passage_rows], 0),
            "positive_rows": rows[:, 0].copy(),
            "positive_keys": np.stack([np.pad(k, (0, width - len(k)), mode="edge") for k in keys]),
            "teacher_scores": np.stack([scores for _, _, scores in items]),
        }
        if file.clusters is not None:
            batch["clusters"] = file.clusters[indices]
        return {
            name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x
            for name, x in batch.items()
        }

    def encoder_input(self, kind: str, texts: list) -> dict:
        return encoder_input(kind, texts, self.form, self.tokenizer, self.chunk_rows)


def encoder_input(
    kind: str, texts: list[tuple], form: TextFormat, tokenizer, chunk_rows: int
) -> dict[str, list | Tensor]:
    """(titles, text) pairs -> {"chunks": padded batches of at most `chunk_rows` texts of like
    length, "order": the place of each text among their rows}, so that torch.cat(encoded
    chunks)[order] is in the order of the texts.

    Where a text may have M > 1 chunks, the rows are the chunks that there are, and order has
    (len(texts)·M,) places, text by text. Missing chunks point at chunk 0 of their text, so that the
    maximum over M is unchanged."""
    M = form.chunks(kind)
    strings = format_texts(texts, kind, form, tokenizer)
    cut = chunk_ids(strings, tokenizer, form.max_length(kind), M)
    ids = list(chain.from_iterable(cut))
    counts = np.array([len(chunks) for chunks in cut], dtype=np.int64)
    by_length = np.argsort([-len(one) for one in ids], kind="stable")
    parts = [by_length[start : start + chunk_rows] for start in range(0, len(ids), chunk_rows)]
    offsets = np.arange(M) * (np.arange(M) < counts[:, None])  # (n, M), 0 for a missing chunk
    places = np.argsort(by_length)[(np.cumsum(counts) - counts)[:, None] + offsets]
    return {
        "chunks": [pad([ids[row] for row in rows], tokenizer) for rows in parts],
        "order": torch.from_numpy(places.ravel()),
    }


def preview(collate: GroupCollator, examples: int = 256) -> dict[str, str]:
    """What a dry run shows: the first group as the encoder will read it, and how many texts are
    cut."""
    groups, form, tokenizer = collate.groups, collate.form, collate.tokenizer
    file = groups.file
    items = [groups[example, 0, example] for example in range(min(examples, len(groups)))]
    queries = [file.queries[file.query_rows[index]] for index, _, _ in items]
    passages = [[file.corpus[row] for row in rows if row >= 0] for _, rows, _ in items]
    first = {"query": queries[:1], "positive": passages[0][:1], "negative": passages[0][1:2]}
    facts = {}
    for name, texts in first.items():
        kind = "query" if name == "query" else "passage"
        strings = format_texts(texts, kind, form, tokenizer)
        for chunks in chunk_ids(strings, tokenizer, form.max_length(kind), form.chunks(kind)):
            facts[f"first {name}"] = " | ".join(map(tokenizer.decode, chunks))
    for kind, texts in (("query", queries), ("passage", list(dict.fromkeys(chain(*passages))))):
        ids = to_ids(format_texts(texts, kind, form, tokenizer), tokenizer, max_length=10**6)
        lengths = np.array([len(one) for one in ids])
        longest, M = form.max_length(kind), form.chunks(kind)
        room = M * longest - (M - 1) * tokenizer.num_special_tokens_to_add()
        shown = f"{M} x {longest}" if M > 1 else longest
        cut = (lengths > room).mean()
        facts[f"{kind} tokens"] = (
            f"median {int(np.median(lengths))}, {cut:.1%} of texts cut at {shown}"
        )
    return facts
