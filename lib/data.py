"""What the loaders of the two training scripts yield. Text becomes ids here, in the workers; every draw is a function
of (seed, step, row)."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
import xxhash
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lib.dist import world
from lib.files import (
    SPAN,
    Texts,
    UserError,
    atomic,
    line_of,
    open_texts,
    read_candidates,
    read_clusters,
    read_negatives,
    read_qrels,
    read_scores,
)
from lib.launch import end_with_parent
from lib.metrics import mrr_at_k
from lib.text import TextFormat, chunk_ids, format_texts, join_title, pad, step_seed, to_ids


class StepSampler:
    """Batch sampler without end and without state: micro-step m takes positions m*W*B ... (m+1)*W*B of the
    concatenated epochs, this process its B of them. So W processes of batch B see what one of batch W*B sees, and a
    resume starts at any micro-step.

    Yields [(example, micro_step, global_row), ...] of length B; global_row counts within the batch of the whole world.
    Each epoch is a permutation by (seed, epoch), or epoch_order(epoch); a batch that runs over the end of an epoch is
    filled from the next.
    """

    def __init__(
        self,
        num_examples: int,
        per_device_batch_size: int,
        rank: int,
        world: int,
        seed: int,
        start: int = 0,
        epoch_order: Callable[[int], np.ndarray] | None = None,
    ):
        assert num_examples > 0 and 0 <= rank < world
        self.num_examples, self.batch, self.rank, self.world = num_examples, per_device_batch_size, rank, world
        self.start, self.epoch_order = start, epoch_order or (lambda epoch: _permutation(num_examples, seed, epoch))

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, order, micro_step = -1, None, self.start
        while True:
            batch = []
            for row in range(self.rank * self.batch, (self.rank + 1) * self.batch):
                now, offset = divmod(micro_step * self.world * self.batch + row, self.num_examples)
                if now != epoch:
                    epoch, order = now, self.epoch_order(now)
                batch.append((int(order[offset]), micro_step, row))
            yield batch
            micro_step += 1


def load(dataset: Dataset, collate: Callable, sampler, num_workers: int, device) -> Iterator[dict]:
    """Batches without end, made by loader workers. sampler: of batches; None = the dataset yields them whole."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns at every fork of a worker
    how = {"batch_sampler": sampler} if sampler else {"batch_size": None}
    how |= {"num_workers": num_workers, "worker_init_fn": end_with_parent, "pin_memory": device.type == "cuda"}
    return iter(DataLoader(dataset, collate_fn=collate, **how))


def _permutation(size: int, seed: int, *place: int) -> np.ndarray:
    return np.random.default_rng(step_seed(seed, *place)).permutation(size)


# ---------------------------------------------------------------------------------------------------------------------
# pre-training: blocks of whole sentences, or two spans of a document

BLOCKS_VERSION = 1  # part of the cache key: raise it when split_blocks changes
SHORT = 0.1  # of coCondenser's spans have a random target, and COCO's end early before a sentence as often
SENTENCE_END = re.compile(
    r"""(?: (?<!\b[A-Z])                              # no initial: J. Smith, the U.S. Army
            (?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)(?<!\bal)(?<!\b[Ff]ig)(?<!\bNo)
            (?<!\bMr)(?<!\bMs)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\bProf) \.
          | [!?…] )
        ["'”’»)\]]* (?=\s+[^\sa-z])                   # closing quotes and brackets; then space, and no small letter
      | [。！？][”’」』）]*                              # needs no space
      | (?=\n\s*\n)                                   # an empty line""",
    re.VERBOSE,
)


def split_blocks(
    text: str, offsets: list[tuple[int, int]], room: int, rule: str | None = None, size: int = 0, draw=None
) -> list[tuple[int, int]]:
    """Character spans of the blocks of a text: as many whole sentences as have at most `room` tokens together.

    offsets: (start, end) of each token in the text. Sentences end where SENTENCE_END says; a long one is cut before
    the last word that begins in the room, and its rest is packed with what follows. A span begins where the one before
    it ended, white space included, so that a block has the tokens that it has in its text.
    rule: smaller spans that still hold whole sentences, one at least; `draw`, a random Generator, makes them uneven.
    "coco", COCO-DR: up to `size` tokens, and a span ends early before one sentence in ten. "cocondenser": up to the
    room, but one span in ten up to a random length."""
    starts, ends = np.array(offsets).T
    word = np.append(True, starts[1:] > ends[:-1])  # token i follows white space, so a word begins
    sentence_ends = [match.end() for match in SENTENCE_END.finditer(text)]
    spans, first, last, target = [], 0, 0, None  # token spans; the open block is [first, last)
    for stop in [*np.searchsorted(starts, sentence_ends), len(starts)]:  # tokens up to the end of each sentence
        if target is None:
            short = rule == "cocondenser" and draw.random() < SHORT
            target = int(draw.integers(1, room + 1)) if short else min(size, room) if rule == "coco" else room
        if last > first and (stop - first > target or (rule == "coco" and draw.random() < SHORT)):
            spans.append((first, last))
            first, target = last, None if rule else target
        while stop - first > room:
            cut = first + room
            inside = np.flatnonzero(word[first + 1 : cut + 1])
            cut = first + 1 + inside[-1] if len(inside) else cut
            spans.append((first, cut))
            first = cut
        last = stop
    spans.append((first, last))
    return [(int(ends[a - 1]) if a else 0, int(ends[b - 1])) for a, b in spans if b > a]


class Cutter(Dataset):
    """Where the texts of a corpus are cut. Item n: the table, (row, first character, end), of the n-th AT_ONCE texts.

    title: how it is joined; it stands before the first block of a text.
    rule: None for blocks of at most `max_length` tokens, a text that fits stays whole; "coco" (with `size`) or
    "cocondenser" for spans. Spans that the corpus states are taken as they are; else split_blocks cuts, by random
    numbers of its own for each text. By "coco" texts of one sentence, or whose first span has at most two tokens,
    have no span."""

    AT_ONCE = 2000

    def __init__(self, texts: Texts, tokenizer, max_length: int, title: str, rule: str | None, size: int):
        self.texts, self.tokenizer, self.title, self.rule, self.size = texts, tokenizer, title, rule, size
        self.room = max_length - tokenizer.num_special_tokens_to_add()

    def join(self, title: str, text: str) -> str:
        string = join_title(title, text, self.title, self.tokenizer)
        return string if self.rule else string.replace(SPAN, "\n\n")

    def __len__(self) -> int:
        return -(-len(self.texts) // self.AT_ONCE)

    def __getitem__(self, number: int) -> np.ndarray:
        first = number * self.AT_ONCE
        strings = [self.join(title, text) for _, title, text in self.texts.stream(first, first + self.AT_ONCE)]
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encoded = backend.encode_batch(strings, add_special_tokens=False)
        spans = [self.spans(*pair, first + row) for row, pair in enumerate(zip(strings, encoded, strict=True))]
        table = [(first + row, *span) for row, some in enumerate(spans) for span in some]
        return np.array(table, dtype=np.int32).reshape(-1, 3)

    def spans(self, string: str, encoded, row: int) -> list[tuple[int, int]]:
        if self.rule and SPAN in string:
            ends = [match.start() for match in re.finditer(SPAN, string)] + [len(string)]
            starts = [0, *(end + len(SPAN) for end in ends[:-1])]
            return [(a, b) for a, b in zip(starts, ends, strict=True) if string[a:b].strip()]
        if not len(encoded):
            return []
        if not self.rule:
            whole = len(encoded) <= self.room
            return [(0, len(string))] if whole else split_blocks(string, encoded.offsets, self.room)
        end = len(string.rstrip())
        if self.rule == "coco" and not any(match.end() < end for match in SENTENCE_END.finditer(string)):
            return []
        draw, offsets = np.random.default_rng(step_seed(0, row)), encoded.offsets
        spans = split_blocks(string, offsets, self.room, self.rule, self.size, draw)
        few = self.rule == "coco" and sum(end <= spans[0][1] for _, end in offsets[:3]) <= 2
        return [] if few else spans


class Blocks:
    """The texts of a corpus cut into blocks (rule None), or two spans of each document that has them. Cutting takes
    one pass over the corpus, in bounded memory, by all cores if it is large; its result, a table of (row, first
    character, end), is kept beside the corpus' Arrow copy and mapped by all processes and workers; ids are made in
    the workers. Call under accelerator.main_process_first(). How texts are cut: see Cutter.

    An example is a block, or two spans of a document, drawn anew at every visit without replacement; documents with
    less than two are left out (COCO-DR pairs a span with itself)."""

    def __init__(
        self,
        texts: Texts,
        tokenizer,
        max_length: int,
        title: str = "space",
        rule: str | None = None,
        size: int = 0,
        progress: bool = False,
    ):
        self.texts, self.rule = texts, rule
        self.arguments = texts, tokenizer, max_length, title, rule, size
        self.cutter = Cutter(*self.arguments)
        state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        key = [BLOCKS_VERSION, state, max_length, title, *([rule, size] if rule else [])]
        path = texts.folder / f"blocks-{xxhash.xxh3_64_hexdigest(json.dumps(key).encode())}.npy"
        if not path.is_file():
            with atomic(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as rows:
                self._cut(rows, progress)
                table = np.memmap(rows, dtype=np.int32, mode="r") if rows.tell() else np.zeros(0, dtype=np.int32)
                with open(temporary, "wb") as stream:
                    np.save(stream, table.reshape(-1, 3))
        self.table = np.load(path, mmap_mode="r")  # (N, 3) int32: row, first character, end
        if rule:
            first = np.flatnonzero(np.append(True, np.diff(self.table[:, 0]) != 0)) if len(self.table) else []
            counts = np.diff([*first, len(self.table)])
            self.documents = np.asarray(first)[counts > 1]  # (M,) first line of each document in the table
            self.counts = counts[counts > 1]  # (M,) how many spans it has
        if not len(self):
            what = "document has two spans" if rule else "text has a token"
            raise UserError(f"{texts.source}: no {what} — is it the right corpus, the right tokenizer?")

    def __reduce__(self):  # workers started by spawn map the table again
        return Blocks, self.arguments

    def _cut(self, rows, progress: bool) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(cores, 16) if len(self.cutter) > 2 * cores else 0  # tokenizers has threads for a small one
        if workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns at every fork
        parts = DataLoader(self.cutter, batch_size=None, num_workers=workers, worker_init_fn=end_with_parent)
        with tqdm(desc="blocks", total=len(self.texts), unit="text", disable=not progress) as bar:
            for part in parts:
                np.asarray(part).tofile(rows)
                bar.update(min(Cutter.AT_ONCE, bar.total - bar.n))
        rows.flush()

    def whole(self, row: int) -> str:
        """A text of the corpus, uncut."""
        return self.cutter.join(*self.texts[row]).replace(SPAN, "\n\n")

    def string(self, line: int) -> str:
        row, start, end = self.table[line].tolist()
        return self.cutter.join(*self.texts[row])[start:end]

    def __len__(self) -> int:
        return len(self.documents if self.rule else self.table)

    def row(self, index: int) -> int:
        """Of the text that an example is taken from."""
        return int(self.table[self.documents[index] if self.rule else index, 0])

    def strings(self, index: int, seed: int) -> list[str]:
        """The block, or two spans of the document drawn by the seed."""
        if not self.rule:
            return [self.string(index)]
        pair = np.random.default_rng(seed).choice(self.counts[index], 2, replace=False)
        return [self.string(int(self.documents[index] + line)) for line in pair]


class Corpora(Dataset):
    """The examples of one or several corpora, {name: Blocks}, one after the other. Batches mix them by their number of
    examples, or flattened by a temperature: corpus c of n_c has a share ~ n_c ** (1 / temperature) of an epoch, 1 =
    proportional, large = equal. A small corpus then repeats, a large one goes on next epoch where it stopped."""

    def __init__(self, parts: dict[str, Blocks], seed: int, temperature: float = 1.0):
        self.parts, self.seed = parts, seed
        self.sizes = np.array([len(part) for part in parts.values()])
        self.starts = _starts(self.sizes)
        shares = (self.sizes / self.sizes.max()) ** (1 / temperature)
        exact = shares / shares.sum() * len(self)
        self.quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
        for corpus in np.argsort(self.quotas - exact, kind="stable")[: max(len(self) - self.quotas.sum(), 0)]:
            self.quotas[corpus] += 1
        self.quotas[self.quotas.argmax()] -= self.quotas.sum() - len(self)  # if rounding up to 1 was too much

    def __len__(self) -> int:
        return int(self.starts[-1])

    def order(self, epoch: int) -> np.ndarray:
        """(N,) the examples of an epoch."""
        if (self.quotas == self.sizes).all():
            return _permutation(len(self), self.seed, epoch)
        chosen = []
        for corpus, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            rounds, offsets = np.divmod(np.arange(epoch * quota, (epoch + 1) * quota), size)
            for number in np.unique(rounds):
                order = _permutation(size, self.seed, corpus, int(number), 1)
                chosen.append(self.starts[corpus] + order[offsets[rounds == number]])
        return np.concatenate(chosen)[_permutation(len(self), self.seed, epoch)]

    def shares(self) -> dict[str, str]:
        """What the echo says of each corpus."""
        facts = {}
        for (name, part), size, quota in zip(self.parts.items(), self.sizes, self.quotas, strict=True):
            unit = "documents of two spans or more" if part.rule else "blocks"
            facts[f"corpus {name}"] = f"{len(part.texts)} texts, {size} {unit}, {quota / len(self):.1%} of a batch"
        return facts

    def place(self, example: int) -> tuple[Blocks, int]:
        corpus = int(np.searchsorted(self.starts, example, side="right")) - 1
        return [*self.parts.values()][corpus], int(example - self.starts[corpus])

    def ids(self, examples) -> list[str]:
        """Of the texts that the examples are taken from."""
        return [part.texts.id(part.row(index)) for part, index in map(self.place, examples)]

    def __getitem__(self, place: tuple[int, int, int]) -> tuple[int, list[str], int, int]:
        """(example, micro-step, global row) of StepSampler -> (example, its strings, micro-step, global row)."""
        example, micro_step, global_row = place
        part, index = self.place(example)
        return example, part.strings(index, step_seed(self.seed, 6, micro_step, global_row)), micro_step, global_row


def open_corpora(
    given: list[str], titles: str | None, cut: tuple, seed: int, balance: float = 1.0, progress: bool = False
) -> Corpora:
    """Corpora of `FILE` or `NAME=FILE` each; cut: what Blocks takes after the texts."""
    parts = {}
    if balance <= 0:
        raise UserError(f"--balance {balance}: a temperature — give 1, or more for more equal shares")
    if titles and len(given) > 1:
        raise UserError("--titles joins to one corpus — give one, or corpora that hold their titles")
    for item in given:
        name, _, path = item.partition("=") if "=" in item and not os.path.exists(item) else (item, "", item)
        if name in parts:
            raise UserError(f"--corpus {item}: {name} is there already — give each corpus a name of its own")
        parts[name] = Blocks(open_texts(path, titles), *cut, progress=progress)
    return Corpora(parts, seed, balance)


@dataclass
class BlockCollator:
    """Items of Corpora -> input_ids, attention_mask (B, L); rows (B,), counted in the batch of all processes; examples
    (B,), or (B / 2,) if each has two strings, which then are rows 2i and 2i + 1; micro_step and tokens, ints."""

    tokenizer: object
    max_length: int

    def __call__(self, items: list[tuple[int, list[str], int, int]]) -> dict:
        examples, strings, micro_steps, rows = zip(*items, strict=True)
        each = len(strings[0])
        ids = to_ids([string for some in strings for string in some], self.tokenizer, self.max_length)
        return pad(ids, self.tokenizer) | {
            "rows": torch.tensor([each * row + number for row in rows for number in range(each)]),
            "examples": torch.tensor(examples),
            "micro_step": micro_steps[0],
            "tokens": sum(map(len, ids)),
        }


# ---------------------------------------------------------------------------------------------------------------------
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
            keys.append(self._keys(np.array([index for index, _, _ in block], dtype=np.int64), rows)[known])
            scores.append(np.array([score for _, _, score in block], dtype=np.float32)[known])
        keys, first = np.unique(np.concatenate([*keys, np.zeros(0, np.int64)]), return_index=True)
        self.keys = np.append(keys, np.iinfo(np.int64).max)  # a last one that no pair has: searches end before it
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
            raise UserError("--passages_per_query and --negatives_depth count from 1 — give larger numbers")
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
        self.queries, self.corpus, self.seed, self.num_negatives = queries, corpus, seed, passages_per_query - 1
        self.notes = {"group": f"{passages_per_query} passages per query: 1 positive + {self.num_negatives} negatives"}

        judged = {q: [p for p, grade in grades.items() if grade > 0] for q, grades in read_qrels(qrels_path).items()}
        judged = {qid: dict.fromkeys(pids) for qid, pids in judged.items() if pids}
        if not judged:
            raise UserError(f"{qrels_path}: no passage is judged relevant (grade > 0) — training needs positives")
        pids = [pid for positives in judged.values() for pid in positives]
        self.query_rows = known_rows(queries, list(judged), qrels_path, "query")  # (J,) the judged queries
        self.positive_rows = known_rows(corpus, pids, qrels_path, "passage")  # (E,) one per example
        self.positive_starts = _starts(map(len, judged.values()))  # (J + 1,) into positive_rows
        self.example_query = np.repeat(np.arange(len(judged), dtype=np.int32), np.diff(self.positive_starts))  # (E,)
        self.notes["examples"] = f"{len(pids)} of {len(judged)} queries"
        self.negative_rows = np.zeros(0, dtype=np.int32)
        self.negative_starts = np.zeros(len(judged) + 1, dtype=np.int64)  # (J + 1,) into negative_rows
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
            self.notes["examples"] = f"{len(self.examples)} of {len(pids)}, those of the queries mined"
        self.clusters = _read_clusters(clusters_path, judged, qrels_path) if clusters_path else None

    def _read_negatives(self, judged, path, depth, allow_overlap, allow_unused) -> None:
        place = {qid: index for index, qid in enumerate(judged)}
        lists = [self.negative_rows] * len(judged)
        listed, unjudged, overlap, example = np.zeros(len(judged), dtype=bool), 0, 0, ()
        for qid, pids in tqdm(read_negatives(path), "negatives", leave=False, disable=world()[0] > 0):
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
                wrong = others[copies.argmax()] if copies.any() else next(pid for pid in pids if pid in judged[qid])
                example = example or (qid, wrong)
            rows = np.concatenate([lists[index], rows[~copies].astype(np.int32)])  # a query may have several lines
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
        self.negative_starts, self.negative_rows = _starts(map(len, lists)), np.concatenate(lists)
        counts = np.diff(self.negative_starts)
        self.notes["negatives per query"] = f"min {counts.min()}, median {int(np.median(counts))}, max {counts.max()}"
        missing = np.maximum(self.num_negatives - counts, 0)
        columns = missing @ np.diff(self.positive_starts)
        if overlap:
            self.notes["positives dropped"] = f"{overlap} among the negatives"
        if unjudged:
            self.notes["negatives ignored"] = f"{unjudged} lines of queries that are not judged"
        if not listed.all():
            self.notes["queries not mined"] = f"{(~listed).sum()} of {len(listed)} have no line in {path}"
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
        return [(self.queries[self.query_rows[i]][1], own) for (i, *_), own in zip(items, texts, strict=True)]

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
        if len(pool) > self.num_negatives:  # the 1: a stream of its own, beside that of the permutations
            draw = np.random.default_rng(step_seed(self.seed, 1, micro_step, global_row))
            pool = draw.choice(pool, self.num_negatives, replace=False)
        rows, scores = (
            np.full(1 + self.num_negatives, -1, dtype=np.int64),
            np.zeros(1 + self.num_negatives, np.float32),
        )
        rows[0], rows[1 : 1 + len(pool)] = self.positive_rows[example], self.negative_rows[pool]
        if self.positive_scores is not None:
            scores[0], scores[1 : 1 + len(pool)] = self.positive_scores[example], self.negative_scores[pool]
        return index, rows, scores


def _read_clusters(path, judged: dict, qrels_path) -> np.ndarray:
    """(J,) int64, the cluster of each judged query, from 0."""
    place = {qid: index for index, qid in enumerate(judged)}
    clusters = np.full(len(place), -1, dtype=np.int64)
    for qid, cluster in read_clusters(path):
        if qid in place:
            if cluster < 0:
                raise UserError(f"{line_of(path, qid)}: cluster {cluster} of query {qid} — clusters count from 0")
            clusters[place[qid]] = cluster
    if clusters.min() < 0:
        qid = next(qid for qid, index in place.items() if clusters[index] < 0)
        raise UserError(
            f"{path}: no cluster for query {qid} of {qrels_path} ({(clusters < 0).sum()} such) — cluster the queries "
            "of these judgments"
        )
    return clusters


def _starts(lengths) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)


def known_rows(texts: Texts, ids: list[str], path, what: str, *beside: str) -> np.ndarray:
    """(n,) int64 rows; UserError for an unknown id, with the line of `path` that holds it (and `beside`)."""
    rows = texts.rows(ids)
    if len(rows) and rows.min() < 0:
        unknown, count = ids[int(rows.argmin())], int((rows < 0).sum())
        raise UserError(
            f"{line_of(path, unknown, *beside)}: {what} {unknown} is not in {texts.source} ({count} such) — give "
            "the files that belong together"
        )
    return rows


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
        query, query_order = length_chunks("query", [groups.queries[row] for row in query_rows], *how)
        texts = [corpus[row] if row >= 0 else ("", "") for row in passage_rows]
        passage, passage_order = length_chunks("passage", texts, *how)
        batch = {
            "query": query,
            "passage": passage,
            "query_order": query_order,
            "passage_order": passage_order,
            "query_rows": torch.from_numpy(query_rows),
            "passage_rows": torch.from_numpy(passage_rows),
            "passage_keys": torch.from_numpy(np.where(passage_rows >= 0, corpus.text_keys[passage_rows], 0)),
            "positive_rows": torch.from_numpy(np.stack([rows[0] for _, rows, _ in items])),
            "positive_keys": torch.from_numpy(np.stack([np.pad(k, (0, width - len(k)), mode="edge") for k in keys])),
            "teacher_scores": torch.from_numpy(np.stack([scores for *_, scores in items])),
        }
        if groups.clusters is not None:
            batch["clusters"] = torch.from_numpy(groups.clusters[[index for index, *_ in items]])
            orders = query_order, passage_order
            batch["text_clusters"] = torch.cat([_in_order(batch["clusters"], order) for order in orders])
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
    ids, counts = list(chain.from_iterable(cut)), np.array([len(chunks) for chunks in cut], dtype=np.int64)
    by_length = np.argsort([-len(one) for one in ids], kind="stable")
    batches = [by_length[start : start + chunk_rows] for start in range(0, len(ids), chunk_rows)]
    offsets = np.arange(M) * (np.arange(M) < counts[:, None])  # (n, M), 0 for a chunk that is not there
    places = np.argsort(by_length)[(np.cumsum(counts) - counts)[:, None] + offsets]
    return [pad([ids[row] for row in rows], tokenizer) for rows in batches], torch.from_numpy(places.ravel())


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
        lengths = [len(one) for one in to_ids(format_texts(texts[kind], kind, form, tokenizer), tokenizer, 10**6)]
        room = M * longest - (M - 1) * tokenizer.num_special_tokens_to_add()
        cut, at = sum(length > room for length in lengths) / len(lengths), f"{M} x {longest}" if M > 1 else longest
        facts[f"{kind} tokens"] = f"median {int(np.median(lengths))}, {cut:.1%} of texts cut at {at}"
    return facts


# ---------------------------------------------------------------------------------------------------------------------
# development set: candidates to re-rank while training


def open_dev(corpus: Texts | None, queries_path, qrels_path, candidates_path, wanted) -> tuple | None:
    """(queries, qrels, candidates) of a development set: the judgments, and the passages to re-rank for judged
    queries; None if there is none, and it is not wanted.
    UserError: a file is missing, an id has no text, or no judged query has candidates."""
    files = queries_path, qrels_path, candidates_path
    if not any(files) and not wanted:
        return None
    if not all(files) or corpus is None:
        raise UserError(
            "the development set is incomplete — give --dev_queries, --dev_qrels, --dev_candidates and --corpus"
        )
    queries = open_texts(queries_path)
    qrels = read_qrels(qrels_path)
    candidates = {qid: pids for qid, pids in read_candidates(candidates_path).items() if qid in qrels}
    if not candidates:
        raise UserError(f"{candidates_path}: no query of {qrels_path} is in it — give the candidates of these queries")
    known_rows(queries, list(candidates), candidates_path, "query")
    for qid, pids in candidates.items():
        known_rows(corpus, pids, candidates_path, "passage", qid)
    return queries, qrels, candidates


@torch.no_grad()
def rerank(
    encoder: Callable, device, collate: GroupCollator, queries: Texts, candidates: dict, k: int, at_once: int = 25_000
) -> dict:
    """{qid: the best k of its candidates by dot product, that of their best chunk where they have several, best
    first}; ties keep the order of the candidates. encoder(query, passage) -> (q_reps, p_reps), either side None. As
    many queries at a time as have about `at_once` candidates, each of which is encoded once for them: memory does not
    grow with the number of queries."""
    ranked, qids, corpus = {}, list(candidates), collate.groups.corpus
    size = max(at_once // max(map(len, candidates.values()), default=1), 1)

    def reps(side: int, texts: list) -> Tensor:
        kind = ("query", "passage")[side]
        chunks, order = length_chunks(kind, texts, collate.form, collate.tokenizer, chunk_rows=64)
        found = []
        for chunk in chunks:
            chunk = {name: values.to(device) for name, values in chunk.items()}
            found.append(encoder(*((chunk, None), (None, chunk))[side])[side].float().cpu())
        return torch.cat(found)[order]

    for start in tqdm(range(0, len(qids), size), "dev", leave=False, disable=world()[0] > 0):
        block = qids[start : start + size]
        pids = sorted({pid for qid in block for pid in candidates[qid]})
        place = {pid: row for row, pid in enumerate(pids)}
        q_reps = reps(0, [queries[row] for row in queries.rows(block)])
        p_reps = reps(1, [corpus[row] for row in corpus.rows(pids)]).unflatten(0, (len(pids), -1))  # (n, M, D)
        for qid, q in zip(block, q_reps, strict=True):
            scores = (p_reps[[place[pid] for pid in candidates[qid]]] @ q).amax(1)
            ranked[qid] = [candidates[qid][i] for i in scores.argsort(descending=True, stable=True)[:k]]
    return ranked


def dev_mrr(
    accelerator, model, collate, queries: Texts, qrels: dict, candidates: dict, k: int = 10, at_once: int = 25_000
) -> float:
    """MRR@k of the candidates re-ranked by the model as it stands, each process its share of the queries; judged
    queries without candidates count 0."""
    rank, W = accelerator.process_index, accelerator.num_processes
    mine = {qid: candidates[qid] for qid in sorted(candidates)[rank::W]}
    encoder = accelerator.unwrap_model(model).eval()
    parts = gather_object([rerank(encoder, accelerator.device, collate, queries, mine, k, at_once)])
    model.train()
    return mrr_at_k({qid: pids for part in parts for qid, pids in part.items()}, qrels, k)
