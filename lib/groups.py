"""What the loaders of the two training scripts yield. Text becomes ids here, in the workers; every draw is a function
of (seed, step, row)."""

from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lib.dist import world
from lib.files import UserError, line_of, read_clusters, read_negatives, read_qrels, read_scores
from lib.loader import StepSampler
from lib.text import TextFormat, chunk_ids, format_texts, pad, step_seed, to_ids
from lib.texts import Texts, known_rows


# fine-tuning: groups of one query, one positive and P - 1 negatives
class TeacherScores:
    """A teacher's scores of pairs (`qid TAB pid TAB score`), in sorted arrays. The first line of a pair counts; other
    queries than `qids` and passages that the corpus lacks are passed over."""

    def __init__(self, path, qids: list[str], corpus: Texts):
        self.path, self.qids, self.corpus = path, qids, corpus
        place, keys, scores = {qid: index for index, qid in enumerate(qids)}, [], []
        lines = tqdm(read_scores(path), "teacher scores", leave=False, disable=world()[0] > 0)
        while block := list(islice(lines, 1 << 16)):
            block = [(place[qid], pid, score) for qid, pid, score in block if qid in place]
            rows = corpus.rows([pid for _, pid, _ in block])
            known = rows >= 0
            keys.append(
                self._keys(np.array([index for index, _, _ in block], dtype=np.int64), rows)[known]
            )
            scores.append(np.array([score for _, _, score in block], dtype=np.float32)[known])
        keys, first = np.unique(np.concatenate([*keys, np.zeros(0, np.int64)]), return_index=True)
        self.keys = np.append(
            keys, np.iinfo(np.int64).max
        )  # a last one that no pair has: searches end before it
        self.scores = np.concatenate([*scores, np.zeros(0, np.float32)])[first]

    @staticmethod
    def _keys(index: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return (index.astype(np.int64) << 32) + rows

    def __call__(self, index: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(n,) places in `qids`, (n,) corpus rows -> (n,) float32. UserError: a pair without a score, by name."""
        wanted = self._keys(index, rows)
        at = np.searchsorted(self.keys, wanted)
        missing = self.keys[at] != wanted
        if missing.any():
            pair = int(wanted[missing.argmax()])
            raise UserError(
                f"{self.path}: no score for query {self.qids[pair >> 32]} and passage "
                f"{self.corpus.id(pair & 0xFFFFFFFF)} ({missing.sum()} of {len(wanted)} pairs) — score them with "
                "recipes/rerank.py, or cut the lists of negatives"
            )
        return self.scores[at]


class Groups(Dataset):
    """Training examples of a bi-encoder: one for every judged positive (a line of the qrels with grade > 0), with
    negatives drawn anew at every visit. All lists are flat arrays that workers share: no dict of texts or of lists.

    `negatives_path` (`qid TAB pid,pid,...`, best first, or a TREC run) is cut to the first `depth` passages of each
    query, of which passages_per_query - 1 are drawn without replacement as a function of (seed, micro-step, global
    row). A shorter list is filled with row -1: an empty text whose column the loss masks. No judged positive of a
    query is ever its negative, neither by id nor as an exact copy of its text. `scores_path`: a teacher's scores, `qid
    TAB pid TAB score`, of which the first line of a pair counts. `mined_only`: examples of queries without a negative
    are left out. `clusters_path`: `qid TAB cluster`, in `clusters` (J,). `notes`: what a user must know of it.

    UserError: an id of the qrels without a text; an unknown passage among the negatives; negatives that overlap the
    positives (unless allow_overlap: they are dropped and counted); negatives present and unused (unless allow_unused);
    groups without a negatives file; a pair that may be drawn and has no teacher score; a query without a cluster."""

    def __init__(
        self,
        queries: Texts,
        corpus: Texts,
        qrels_path,
        negatives_path=None,
        passages_per_query: int = 1,
        depth: int = 200,
        seed: int = 0,
        allow_overlap: bool = False,
        allow_unused: bool = False,
        scores_path=None,
        mined_only: bool = False,
        clusters_path=None,
    ):
        if passages_per_query < 1 or depth < 1:
            raise UserError(
                "--passages_per_query and --negatives_depth count from 1 — give larger numbers"
            )
        if passages_per_query > 1 and not negatives_path:
            raise UserError(
                f"--passages_per_query {passages_per_query} without negatives — give --negatives FILE, which "
                "mine_negatives.py writes"
            )
        if passages_per_query == 1 and negatives_path and not allow_unused:
            raise UserError(
                f"{negatives_path}: unused with --passages_per_query 1 — raise it, drop --negatives, or add "
                "--allow_unused_negatives"
            )
        self.queries, self.corpus, self.seed, self.num_negatives = (
            queries,
            corpus,
            seed,
            passages_per_query - 1,
        )
        self.notes = {
            "group": f"{passages_per_query} passages per query: 1 positive + {self.num_negatives} negatives"
        }

        judged = {
            q: [p for p, grade in grades.items() if grade > 0]
            for q, grades in read_qrels(qrels_path).items()
        }
        judged = {qid: dict.fromkeys(pids) for qid, pids in judged.items() if pids}
        if not judged:
            raise UserError(
                f"{qrels_path}: no passage is judged relevant (grade > 0) — training needs positives"
            )
        pids = [pid for positives in judged.values() for pid in positives]
        self.query_rows = known_rows(
            queries, list(judged), qrels_path, "query"
        )  # (J,) the judged queries
        self.positive_rows = known_rows(corpus, pids, qrels_path, "passage")  # (E,) one per example
        self.positive_starts = starts(map(len, judged.values()))  # (J + 1,) into positive_rows
        self.example_query = np.repeat(
            np.arange(len(judged), dtype=np.int32), np.diff(self.positive_starts)
        )  # (E,)
        self.notes["examples"] = f"{len(pids)} of {len(judged)} queries"
        self.negative_rows = np.zeros(0, dtype=np.int32)
        self.negative_starts = np.zeros(
            len(judged) + 1, dtype=np.int64
        )  # (J + 1,) into negative_rows
        if negatives_path and self.num_negatives:
            self._read_negatives(judged, negatives_path, depth, allow_overlap, allow_unused)
        self.positive_scores = self.negative_scores = None
        if scores_path:
            scores = TeacherScores(scores_path, list(judged), corpus)
            self.positive_scores = scores(self.example_query, self.positive_rows)
            index = np.repeat(np.arange(len(judged)), np.diff(self.negative_starts))
            self.negative_scores = scores(index, self.negative_rows)
        self.examples = np.arange(len(pids))  # those that are trained on
        if mined_only:
            self.examples = np.flatnonzero(np.diff(self.negative_starts)[self.example_query])
            self.notes["examples"] = (
                f"{len(self.examples)} of {len(pids)}, those of the queries mined"
            )
        self.clusters = _read_clusters(clusters_path, judged, qrels_path) if clusters_path else None

    def _read_negatives(self, judged, path, depth, allow_overlap, allow_unused) -> None:
        place = {qid: index for index, qid in enumerate(judged)}
        lists = [self.negative_rows] * len(judged)
        listed, unjudged, overlap, example = np.zeros(len(judged), dtype=bool), 0, 0, ()
        for qid, pids in tqdm(
            read_negatives(path), "negatives", leave=False, disable=world()[0] > 0
        ):
            if qid not in place:
                unjudged += 1
                continue
            index = place[qid]
            listed[index] = True
            others = [pid for pid in pids if pid not in judged[qid]]
            rows = known_rows(self.corpus, others[:depth], path, "passage", qid)
            copies = np.isin(self.corpus.text_keys[rows], self.positive_keys(index))
            if copies.any() or len(others) < len(pids):
                overlap += len(pids) - len(others) + int(copies.sum())
                wrong = (
                    others[copies.argmax()]
                    if copies.any()
                    else next(pid for pid in pids if pid in judged[qid])
                )
                example = example or (qid, wrong)
            rows = np.concatenate(
                [lists[index], rows[~copies].astype(np.int32)]
            )  # a query may have several lines
            lists[index] = rows[np.sort(np.unique(rows, return_index=True)[1])][:depth]
        if not listed.any() and not allow_unused:
            raise UserError(
                f"{path}: none of its {unjudged} queries is judged in the qrels — give the file of these queries, or "
                "add --allow_unused_negatives"
            )
        if overlap and not allow_overlap:
            raise UserError(
                f"{line_of(path, *example)}: passage {example[1]} is a judged positive of query {example[0]} or an "
                f"exact copy of one ({overlap} such negatives in the file) — mine again with these qrels, or add "
                "--allow_overlap to drop them"
            )
        self.negative_starts, self.negative_rows = starts(map(len, lists)), np.concatenate(lists)
        counts = np.diff(self.negative_starts)
        self.notes["negatives per query"] = (
            f"min {counts.min()}, median {int(np.median(counts))}, max {counts.max()}"
        )
        missing = np.maximum(self.num_negatives - counts, 0)
        columns = missing @ np.diff(self.positive_starts)
        if overlap:
            self.notes["positives dropped"] = f"{overlap} among the negatives"
        if unjudged:
            self.notes["negatives ignored"] = f"{unjudged} lines of queries that are not judged"
        if not listed.all():
            self.notes["queries not mined"] = (
                f"{(~listed).sum()} of {len(listed)} have no line in {path}"
            )
        if columns:
            self.notes["short lists"] = (
                f"{(missing > 0).sum()} queries have fewer than {self.num_negatives} negatives: {columns} "
                "empty, masked columns per epoch"
            )

    def positive_keys(self, index: int) -> np.ndarray:
        """Text keys of all judged positives of the judged query `index`."""
        rows = self.positive_rows[self.positive_starts[index] : self.positive_starts[index + 1]]
        return np.asarray(self.corpus.text_keys[rows])

    def __len__(self) -> int:
        return len(self.examples)

    def sampler(self, per_device_batch_size: int, rank: int, world: int, start: int) -> StepSampler:
        return StepSampler(len(self), per_device_batch_size, rank, world, self.seed, start)

    def sample(self, size: int) -> list[tuple[str, list[tuple[str, str]]]]:
        """(query, its passages) of the first examples."""
        items = [self[example, 0, example] for example in range(min(size, len(self)))]
        texts = [[self.corpus[row] for row in rows if row >= 0] for _, rows, _ in items]
        return [
            (self.queries[self.query_rows[i]][1], own)
            for (i, *_), own in zip(items, texts, strict=True)
        ]

    def names(self, rows) -> str:
        """Of queries, for an error message."""
        return f"for queries {', '.join(self.queries.ids(rows))}"

    def __getitem__(self, place: tuple[int, int, int]) -> tuple[int, np.ndarray, np.ndarray]:
        """(example, micro-step, global row) of StepSampler -> (judged query, (P,) corpus rows, positive first, (P,)
        teacher scores, 0 where there is none)."""
        number, micro_step, global_row = place
        example = self.examples[number]
        index = int(self.example_query[example])
        pool = np.arange(self.negative_starts[index], self.negative_starts[index + 1])
        if (
            len(pool) > self.num_negatives
        ):  # the 1: a stream of its own, beside that of the permutations
            draw = np.random.default_rng(step_seed(self.seed, 1, micro_step, global_row))
            pool = draw.choice(pool, self.num_negatives, replace=False)
        rows, scores = (
            np.full(1 + self.num_negatives, -1, dtype=np.int64),
            np.zeros(1 + self.num_negatives, np.float32),
        )
        rows[0], rows[1 : 1 + len(pool)] = self.positive_rows[example], self.negative_rows[pool]
        if self.positive_scores is not None:
            scores[0], scores[1 : 1 + len(pool)] = (
                self.positive_scores[example],
                self.negative_scores[pool],
            )
        return index, rows, scores


def _read_clusters(path, judged: dict, qrels_path) -> np.ndarray:
    """(J,) int64, the cluster of each judged query, from 0."""
    place = {qid: index for index, qid in enumerate(judged)}
    clusters = np.full(len(place), -1, dtype=np.int64)
    for qid, cluster in read_clusters(path):
        if qid in place:
            if cluster < 0:
                raise UserError(
                    f"{line_of(path, qid)}: cluster {cluster} of query {qid} — clusters count from 0"
                )
            clusters[place[qid]] = cluster
    if clusters.min() < 0:
        qid = next(qid for qid, index in place.items() if clusters[index] < 0)
        raise UserError(
            f"{path}: no cluster for query {qid} of {qrels_path} ({(clusters < 0).sum()} such) — cluster the queries "
            "of these judgments"
        )
    return clusters


def starts(lengths) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)


@dataclass
class GroupCollator:
    """Rows of Groups -> a batch for one micro-step; text becomes ids here. B queries, n = B·P passages, query-major; M
    chunks of a passage at most (the format's max_chunks).

    query, passage               lists of {"input_ids", "attention_mask"} of `chunk_rows` texts, or chunks of texts,
                                 of like length
    query_order, passage_order   (B,), (n·M,) place among the encoded rows, as length_chunks gives it:
                                 p_reps[passage_order] is query-major
    passage_rows, passage_keys   (n,) corpus row (-1 = filler), text key
    query_rows, positive_rows    (B,) row of the query; corpus row of its positive, by the qrels
    positive_keys                (B, M) text keys of all judged positives of each query, padded by repetition
    teacher_scores               (B, P) 0 where there is none
    clusters, text_clusters      if there are any: (B,); of every text in the order of encoding, queries first"""

    groups: Groups
    tokenizer: object
    form: TextFormat
    chunk_rows: int

    def __call__(self, items: list[tuple[int, np.ndarray, np.ndarray]]) -> dict:
        groups, corpus = self.groups, self.groups.corpus
        query_rows = groups.query_rows[[index for index, *_ in items]]
        passage_rows = np.concatenate([rows for _, rows, _ in items])
        keys = [groups.positive_keys(index) for index, *_ in items]
        width = max(map(len, keys))
        how = self.form, self.tokenizer, self.chunk_rows
        query, query_order = length_chunks(
            "query", [groups.queries[row] for row in query_rows], *how
        )
        texts = [corpus[row] if row >= 0 else ("", "") for row in passage_rows]
        passage, passage_order = length_chunks("passage", texts, *how)
        batch = {
            "query": query,
            "passage": passage,
            "query_order": query_order,
            "passage_order": passage_order,
            "query_rows": torch.from_numpy(query_rows),
            "passage_rows": torch.from_numpy(passage_rows),
            "passage_keys": torch.from_numpy(
                np.where(passage_rows >= 0, corpus.text_keys[passage_rows], 0)
            ),
            "positive_rows": torch.from_numpy(np.stack([rows[0] for _, rows, _ in items])),
            "positive_keys": torch.from_numpy(
                np.stack([np.pad(k, (0, width - len(k)), mode="edge") for k in keys])
            ),
            "teacher_scores": torch.from_numpy(np.stack([scores for *_, scores in items])),
        }
        if groups.clusters is not None:
            batch["clusters"] = torch.from_numpy(groups.clusters[[index for index, *_ in items]])
            orders = query_order, passage_order
            batch["text_clusters"] = torch.cat(
                [_in_order(batch["clusters"], order) for order in orders]
            )
        return batch


def _in_order(clusters: Tensor, order: Tensor) -> Tensor:
    """clusters (B,), order (B·m,) places of texts among the rows encoded -> the cluster of each row."""
    rows = torch.empty(int(order.max()) + 1, dtype=clusters.dtype)
    rows[order] = clusters.repeat_interleave(len(order) // len(clusters))
    return rows


def length_chunks(
    kind: str, texts: list[tuple[str, str]], form: TextFormat, tokenizer, chunk_rows: int
) -> tuple[list[dict], Tensor]:
    """(title, text) pairs -> (batches, order): padded batches of at most `chunk_rows` texts of like length, and
    (len(texts),) int64, the place of each text among their rows: torch.cat(encoded batches)[order].

    Where a text may have M > 1 chunks, the rows are the chunks that there are, and order has (len(texts)·M,) places,
    text by text. A chunk that a text lacks has the place of its first: a maximum over M is one over its own."""
    M, strings = form.chunks(kind), format_texts(texts, kind, form, tokenizer)
    cut = chunk_ids(strings, tokenizer, form.max_length(kind), M)
    ids, counts = (
        list(chain.from_iterable(cut)),
        np.array([len(chunks) for chunks in cut], dtype=np.int64),
    )
    by_length = np.argsort([-len(one) for one in ids], kind="stable")
    batches = [by_length[start : start + chunk_rows] for start in range(0, len(ids), chunk_rows)]
    offsets = np.arange(M) * (
        np.arange(M) < counts[:, None]
    )  # (n, M), 0 for a chunk that is not there
    places = np.argsort(by_length)[(np.cumsum(counts) - counts)[:, None] + offsets]
    return [pad([ids[row] for row in rows], tokenizer) for rows in batches], torch.from_numpy(
        places.ravel()
    )


def preview(collate, examples: int = 256) -> dict[str, str]:
    """What a dry run shows: the first group as the encoder will read it, and how many texts are cut."""
    form, tokenizer, sample = collate.form, collate.tokenizer, collate.groups.sample(examples)
    first = {"query": [("", sample[0][0])], "passage": sample[0][1]}
    passages = dict.fromkeys(passage for _, own in sample for passage in own)
    texts = {"query": [("", query) for query, _ in sample], "passage": list(passages)}
    names, facts = {"query": ["query"], "passage": ["positive", "negative", "another negative"]}, {}
    for kind in ("query", "passage"):
        longest, M = form.max_length(kind), form.chunks(kind)
        chunks = chunk_ids(format_texts(first[kind], kind, form, tokenizer), tokenizer, longest, M)
        read = [" | ".join(map(tokenizer.decode, some)) for some in chunks]
        facts |= {f"first {name}": one for name, one in zip(names[kind], read, strict=False)}
        lengths = [
            len(one)
            for one in to_ids(format_texts(texts[kind], kind, form, tokenizer), tokenizer, 10**6)
        ]
        room = M * longest - (M - 1) * tokenizer.num_special_tokens_to_add()
        cut, at = (
            sum(length > room for length in lengths) / len(lengths),
            f"{M} x {longest}" if M > 1 else longest,
        )
        facts[f"{kind} tokens"] = (
            f"median {int(np.median(lengths))}, {cut:.1%} of texts cut at {at}"
        )
    return facts
