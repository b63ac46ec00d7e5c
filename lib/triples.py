"""Training triples as MS MARCO publishes them, streamed: ANCE's warm-up on BM25 negatives.

    do ants sleep \\t Ants are ... \\t Bees are ...     texts (triples.train.small.tsv)
    q1 \\t 7 \\t 9                                      ids of --queries and --corpus (qidpidtriples.train.*)

B triples per device, W processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from lib.files import UserError, read_id_triples, read_triples
from lib.groups import length_chunks
from lib.text import TextFormat, step_seed
from lib.texts import Texts, known_rows, text_key

BUFFER = 1 << 15  # lines shuffled together


class Triples(IterableDataset):
    """Batches of B triples, [(line, query, positive, negative), ...], without end. Passages are (title, text), a query
    its text.

    Micro-step m takes triples m·W·B ... (m + 1)·W·B of the concatenated epochs, this process B of them, whatever the
    number of loader workers: W processes of batch B see what one of batch W·B sees, and a resume starts at any
    micro-step, for the price of reading up to it. Every BUFFER lines are put into an order by (seed, epoch, place) of
    their own; no more than these are in memory. (ANCE: the order of the file.)

    The only judged positive that is known of a query is that of its line.
    UserError: a malformed line; an id without a text; ids without --queries and --corpus."""

    def __init__(
        self, path, queries: Texts | None, corpus: Texts | None, seed: int, buffer: int = BUFFER
    ):
        self.path, self.queries, self.corpus, self.seed, self.buffer = (
            path,
            queries,
            corpus,
            seed,
            buffer,
        )
        first = next(read_triples(path), None)
        if first is None:
            raise UserError(f"{path}: no triple in it — is it the right file?")
        self.by_id = not any(" " in field.strip() for field in first)
        if self.by_id and not (queries and corpus):
            raise UserError(
                f"{path}:1: three ids, not texts — give --queries and --corpus, whose ids they are"
            )
        self.notes = {
            "group": "1 positive + 1 negative",
            "examples": f"triples of {'ids' if self.by_id else 'texts'}",
        }

    def sampler(self, per_device_batch_size: int, rank: int, world: int, start: int) -> None:
        """Which batches iteration yields: this process's, from a micro-step on."""
        self.batch, self.rank, self.world, self.start = per_device_batch_size, rank, world, start

    def sample(self, size: int) -> list[tuple[str, list[tuple[str, str]]]]:
        """(query, its passages) of the first triples."""
        self.sampler(size, 0, 1, 0)
        return [(query, [positive, negative]) for _, query, positive, negative in next(iter(self))]

    def __iter__(self) -> Iterator[list[tuple]]:
        info = get_worker_info()
        mine, workers = (info.id, info.num_workers) if info else (0, 1)
        stream, micro_step = self._shuffled(self.start * self.world * self.batch), self.start
        while True:  # the loader takes the workers in turn
            block = list(islice(stream, self.world * self.batch))
            if (micro_step - self.start) % workers == mine:
                part = block[self.rank * self.batch : (self.rank + 1) * self.batch]
                yield (
                    self._by_id(part)
                    if self.by_id
                    else [(n, q, ("", p), ("", o)) for n, (q, p, o) in part]
                )
            micro_step += 1

    def _shuffled(self, skip: int) -> Iterator[tuple[int, tuple[str, str, str]]]:
        """(number from 1, columns) of all triples after the first `skip`, epoch after epoch."""
        epoch, read = 0, read_id_triples if self.by_id else read_triples
        while True:
            numbered, length = enumerate(read(self.path), 1), 0
            while block := list(islice(numbered, self.buffer)):
                order = np.random.default_rng(step_seed(self.seed, epoch, length)).permutation(
                    len(block)
                )
                length += len(block)
                yield from (block[at] for at in order[skip:])
                skip = max(skip - len(block), 0)
            epoch, skip = (
                epoch + 1 + skip // length,
                skip % length,
            )  # whole epochs are skipped unread

    def _by_id(self, part: list) -> list[tuple]:
        qids, positives, negatives = zip(*(columns for _, columns in part), strict=True)
        query = known_rows(self.queries, qids, self.path, "query")
        positive, negative = (
            known_rows(self.corpus, pids, self.path, "passage") for pids in (positives, negatives)
        )
        rows = zip(query, positive, negative, strict=True)
        texts = [(self.queries[q][1], self.corpus[p], self.corpus[n]) for q, p, n in rows]
        return [(number, *text) for (number, _), text in zip(part, texts, strict=True)]

    def names(self, lines) -> str:
        return f"in triples {', '.join(map(str, lines))}"


@dataclass
class TripleCollator:
    """Items of Triples -> the batch of GroupCollator, P = 2. Rows are 2n and 2n + 1 of triple n."""

    groups: Triples
    tokenizer: object
    form: TextFormat
    chunk_rows: int

    def __call__(self, items: list[tuple]) -> dict:
        lines, queries, positives, negatives = zip(*items, strict=True)
        passages = [passage for pair in zip(positives, negatives, strict=True) for passage in pair]
        how = self.form, self.tokenizer, self.chunk_rows
        query, query_order = length_chunks("query", [("", text) for text in queries], *how)
        passage, passage_order = length_chunks("passage", passages, *how)
        numbers, keys = torch.tensor(lines), torch.tensor([text_key(*one) for one in passages])
        return {
            "query": query,
            "passage": passage,
            "query_order": query_order,
            "passage_order": passage_order,
            "query_rows": numbers,
            "passage_rows": torch.stack([2 * numbers, 2 * numbers + 1], 1).flatten(),
            "passage_keys": keys,
            "positive_rows": 2 * numbers,
            "positive_keys": keys[::2, None],
            "teacher_scores": torch.zeros(len(items), 2),
        }
