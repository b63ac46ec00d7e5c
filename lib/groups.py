"""Training data of a bi-encoder: a training file in flat arrays, groups drawn from it, and the
batches they become.

B queries per batch, P passages per query (the positive first, then P - 1 negatives), n = B·P, M
chunks of a passage at most, Q queries of the file, E positives of all. A corpus row of -1 is a
filler where a list of negatives is too short: an empty text, whose column the loss masks."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset

from lib.files import TrainingRow, UserError, foreign_format, read_positives, read_training_file
from lib.lines import first_line
from lib.loader import permutation
from lib.text import TextFormat, chunk_ids, format_texts, pad, step_seed, to_ids
from lib.texts import Texts, places, require_rows

LINES_AT_A_TIME = 4096


def read_rows(path) -> Iterator[TrainingRow]:
    """The rows of what --train takes: a training file, or judgments (no negatives)."""
    first = first_line(path)
    foreign = foreign_format(first)
    if foreign == "negative-lists":
        remedy = f"join them with judgments: mine_negatives.py --run {path} --qrels QRELS"
        raise UserError(f"{path}:1: these are lists of negatives without positives — {remedy}")
    if foreign or '"pos"' in first:
        return (row for _, row in read_training_file(path))
    return (TrainingRow(qid, pids) for qid, pids in read_positives(path).items())


def pair_keys(queries: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """A uint64 for each pair of a query, by any whole number, and a text, by its key: (n,) each."""
    return texts.view(np.uint64) ^ (queries.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def scores_of(row: TrainingRow) -> list[float]:
    """Of the positives, then of the negatives; empty if the line does not have all of them."""
    scores = (row.pos_scores or []) + (row.neg_scores or [])
    return scores if len(scores) == len(row.pos) + len(row.neg) else []


class TrainingFile:
    """A training file, or judgments, as flat arrays; workers share them.

    query_rows   (Q,) row in queries
    rows         (N,) rows in corpus: the positives of query 0, its negatives, those of query 1, ...
    bounds       (2Q + 1,) query i has the positives rows[bounds[2i] : bounds[2i + 1]], and the
                 negatives up to bounds[2i + 2]
    scores       (N,) float32 of a teacher; (0,) if the file has none
    clusters     (Q,) int64; (0,) if the file has none

    UserError: an id without a text; a file without a positive; a negative that is a positive of its
    query, by id or by its exact text; scores or clusters that only some lines have, or that no line
    has although the arguments of these names ask for them."""

    def __init__(self, path, queries: Texts, corpus: Texts, scores=False, clusters=False):
        self.path, self.queries, self.corpus = path, queries, corpus
        lines = read_rows(path)
        blocks = []
        while block := list(islice(lines, LINES_AT_A_TIME)):
            blocks.append(self._arrays(block))
        if not blocks:
            raise UserError(f"{path}: no query has a positive — training needs positives")
        arrays = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        self.query_rows = arrays["query_rows"]
        self.rows = arrays["rows"]
        self.bounds = np.cumsum([0, *arrays["counts"]])
        self.scores = arrays["scores"]
        self.clusters = arrays["clusters"]
        if len(self.scores) < len(self.rows) and (scores or len(self.scores)):
            remedy = "add them with recipes/score_pairs.py"
            raise UserError(f"{path}: lines without scores — {remedy}")
        if len(self.clusters) < len(self.query_rows) and (clusters or len(self.clusters)):
            remedy = "add them with recipes/cluster_queries.py"
            raise UserError(f"{path}: lines without clusters — {remedy}")
        digest = xxhash.xxh3_128()
        for values in arrays.values():
            digest.update(values.tobytes())
        self.fingerprint = digest.hexdigest()

    def _arrays(self, block: list[TrainingRow]) -> dict[str, np.ndarray]:
        pids = [pid for row in block for pid in (*row.pos, *row.neg)]
        rows = require_rows(self.corpus, pids, self.path, "passage")
        counts = np.array([len(ids) for row in block for ids in (row.pos, row.neg)])
        owners = np.repeat(np.arange(len(counts)) // 2, counts)
        pairs = pair_keys(owners, np.asarray(self.corpus.text_keys[rows]))
        negative = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        wrong = negative & (places(pairs, np.sort(pairs[~negative])) >= 0)
        if wrong.any():
            pid = pids[int(wrong.argmax())]
            qid = block[owners[int(wrong.argmax())]].qid
            both = f"passage {pid} is a negative of query {qid} and a positive, or a copy of one"
            raise UserError(f"{self.path}: {both} — run mine_negatives.py again")
        qids = [row.qid for row in block]
        clusters = [row.cluster for row in block if row.cluster is not None]
        return {
            "query_rows": require_rows(self.queries, qids, self.path, "query"),
            "rows": rows,
            "counts": counts,
            "scores": np.fromiter(chain.from_iterable(map(scores_of, block)), np.float32),
            "clusters": np.array(clusters, dtype=np.int64),
        }

    def positive_pairs(self) -> np.ndarray:
        """pair_keys of each query's text and its positives, by their texts."""
        counts = np.diff(self.bounds)  # of positives and negatives in turn
        positive = np.repeat(np.arange(len(counts)) % 2 == 0, counts)
        queries = np.repeat(self.queries.text_keys[self.query_rows], counts[::2])
        return pair_keys(queries, self.corpus.text_keys[self.rows[positive]])

    def positive_keys(self, query: int) -> np.ndarray:
        """Text keys of all positives of a query."""
        rows = self.rows[self.bounds[2 * query] : self.bounds[2 * query + 1]]
        return np.asarray(self.corpus.text_keys[rows])


class Groups(Dataset):
    """Training examples: one for every positive of the file, with negatives drawn at every visit.

    From the first `depth` negatives of a query, P - 1 are drawn without replacement, as a function
    of (seed, micro-step, global row). A shorter list is filled up with row -1. P is by default 8,
    or 1 if the file has no negatives.

    one_cluster   0, or the number of queries of a micro-step in all processes, which then takes
                  them from one cluster of the file"""

    def __init__(self, file: TrainingFile, P: int | None, depth: int, seed: int, one_cluster=0):
        positives, negatives = np.diff(file.bounds).reshape(-1, 2).T  # (Q,) numbers
        negatives = np.minimum(negatives, depth)
        P = P or (8 if negatives.any() else 1)
        self.file = file
        self.passages_per_query = P
        self.depth = depth
        self.seed = seed
        self.one_cluster = one_cluster
        if P > 1 and not negatives.any():
            wrong = f"{file.path}: it has no negatives for --passages_per_query {P}"
            raise UserError(f"{wrong} — run mine_negatives.py, or leave the flag out")
        self.query_of = np.repeat(np.arange(len(positives)), positives)  # (E,)
        first = file.bounds[:-1:2] - (np.cumsum(positives) - positives)
        self.place_of = np.arange(len(self)) + np.repeat(first, positives)  # (E,) in rows
        short = np.maximum(P - 1 - negatives, 0)
        self.notes = {
            "group": f"1 positive + {P - 1} negatives",
            "examples": f"{len(self)} positives of {len(positives)} queries",
            "negatives of a query": f"{negatives.min()} to {negatives.max()}, "
            f"median {np.median(negatives):.0f}",
            "short lists": f"{(short > 0).sum()} queries have fewer than {P - 1} negatives: "
            f"{short @ positives} columns per epoch are empty and masked",
        }
        if one_cluster:
            sizes = np.unique(file.clusters[self.query_of], return_counts=True)[1]
            pure = (sizes // one_cluster).sum()
            share = f"{pure} of {len(self) / one_cluster:.1f} batches of an epoch"
            self.notes["batches"] = f"{share} are of one cluster, the others of the rest"

    def __len__(self) -> int:
        return len(self.query_of)

    def order(self, epoch: int) -> np.ndarray:
        """The examples of an epoch."""
        order = permutation(len(self), self.seed, epoch)
        return self._by_cluster(order, epoch) if self.one_cluster else order

    def _by_cluster(self, order: np.ndarray, epoch: int) -> np.ndarray:
        """In batches of one cluster as far as its examples go (as TAS-B, arXiv 2104.06967, but each
        example once an epoch). What is left over of the clusters completes the last batch of the
        epoch before, and makes the last ones of this epoch."""
        size = self.one_cluster
        clusters = self.file.clusters[self.query_of[order]]
        by_cluster = np.argsort(clusters, kind="stable")
        counts = np.unique(clusters, return_counts=True)[1]
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        full = place < np.repeat(counts // size * size, counts)
        order = order[by_cluster]
        batches = order[full].reshape(-1, size)
        batches = batches[permutation(len(batches), self.seed, epoch, 1)]
        rest = order[~full]
        rest = rest[permutation(len(rest), self.seed, epoch, 2)]
        missing = -epoch * len(order) % size  # to the last batch of the epoch before
        while len(rest) < missing:
            rest = np.concatenate([batches[-1], rest])
            batches = batches[:-1]
        return np.concatenate([rest[:missing], batches.ravel(), rest[missing:]])

    def __getitem__(self, place: tuple[int, int, int]) -> tuple[int, np.ndarray, np.ndarray]:
        """(example, micro-step, global row), see step_batches -> (query of the file, (P,) rows of
        the corpus, the positive first, (P,) teacher scores, 0 where there is none)."""
        example, micro_step, global_row = place
        file = self.file
        query = int(self.query_of[example])
        first, last = file.bounds[2 * query + 1 : 2 * query + 3]
        pool = np.arange(first, min(last, first + self.depth))
        num_negatives = self.passages_per_query - 1
        if len(pool) > num_negatives:
            # the 1 is a stream of random numbers beside that of the permutations
            draw = np.random.default_rng(step_seed(self.seed, 1, micro_step, global_row))
            pool = draw.choice(pool, num_negatives, replace=False)
        chosen = np.array([self.place_of[example], *pool])
        rows = np.full(self.passages_per_query, -1)
        rows[: len(chosen)] = file.rows[chosen]
        scores = np.zeros(len(rows), dtype=np.float32)
        if len(file.scores):
            scores[: len(chosen)] = file.scores[chosen]
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
        file = self.groups.file
        indices, rows, scores = zip(*items, strict=True)
        indices = list(indices)
        passage_rows = np.concatenate(rows)
        keys = [file.positive_keys(query) for query in indices]
        width = max(map(len, keys))
        arrays = {
            "query_rows": file.query_rows[indices],
            "passage_rows": passage_rows,
            "passage_keys": np.where(passage_rows >= 0, file.corpus.text_keys[passage_rows], 0),
            "positive_rows": np.stack(rows)[:, 0].copy(),
            "positive_keys": np.stack([np.pad(k, (0, width - len(k)), mode="edge") for k in keys]),
            "teacher_scores": np.stack(scores),
        }
        if len(file.clusters):
            arrays["clusters"] = file.clusters[indices]
        queries = [file.queries[row] for row in arrays["query_rows"]]
        passages = [file.corpus[row] if row >= 0 else ((), "") for row in passage_rows]
        return {
            "query": self.encoder_input("query", queries),
            "passage": self.encoder_input("passage", passages),
            **{name: torch.from_numpy(values) for name, values in arrays.items()},
        }

    def encoder_input(self, kind: str, texts: list[tuple]) -> dict[str, list | Tensor]:
        """(titles, text) pairs -> {"chunks": padded batches of at most `chunk_rows` texts of like
        length, "order": the place of each text among their rows}, so that torch.cat(encoded
        chunks)[order] is in the order of the texts. With M > 1 chunks a text, order has
        (len(texts)·M,) places; missing chunks point at chunk 0, so the maximum is unchanged."""
        cut = self.cut(kind, texts)
        ids = list(chain.from_iterable(cut))
        counts = np.array([len(chunks) for chunks in cut])
        chunk = np.arange(self.form.chunks(kind))
        chunk = np.where(chunk < counts[:, None], chunk, 0)  # (len(texts), M)
        by_length = np.argsort([-len(one) for one in ids], kind="stable")
        parts = np.split(by_length, range(self.chunk_rows, len(ids), self.chunk_rows))
        order = np.argsort(by_length)[(np.cumsum(counts) - counts)[:, None] + chunk]
        return {
            "chunks": [pad([ids[row] for row in rows], self.tokenizer) for rows in parts],
            "order": torch.from_numpy(order.ravel()),
        }

    def cut(self, kind: str, texts: list[tuple]) -> list[list[list[int]]]:
        """The ids of the chunks of each text."""
        strings = format_texts(texts, kind, self.form, self.tokenizer)
        most = self.form.chunks(kind)
        return chunk_ids(strings, self.tokenizer, self.form.max_length(kind), most)

    def preview(self, examples: int = 256) -> dict[str, str]:
        """What a dry run shows: the first two queries and passages as the encoder will read them,
        and how many texts are cut."""
        file = self.groups.file
        items = [self.groups[row, 0, row] for row in range(min(examples, len(self.groups)))]
        queries = [file.queries[file.query_rows[query]] for query, _, _ in items]
        passages = [file.corpus[row] for _, rows, _ in items for row in rows if row >= 0]
        facts = {}
        for kind, texts in (("query", queries), ("passage", list(dict.fromkeys(passages)))):
            for number, chunks in enumerate(self.cut(kind, texts[:2]), 1):
                facts[f"{kind} {number}"] = " | ".join(map(self.tokenizer.decode, chunks))
            strings = format_texts(texts, kind, self.form, self.tokenizer)
            lengths = [len(ids) for ids in to_ids(strings, self.tokenizer, max_length=10**6)]
            longest, M = self.form.max_length(kind), self.form.chunks(kind)
            room = M * longest - (M - 1) * self.tokenizer.num_special_tokens_to_add()
            share = np.mean([length > room for length in lengths])
            limit = f"{M} x {longest}" if M > 1 else longest
            shown = f"median {np.median(lengths):.0f}, {share:.1%} of texts cut at {limit}"
            facts[f"{kind} tokens"] = shown
        return facts
