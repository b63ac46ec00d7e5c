"""The texts of pre-training: a corpus cut into blocks of whole sentences, or into the short spans
of whole sentences that coCondenser pairs.

Text becomes ids here, in the loader workers; every draw is a function of (seed, step, row).
"""

import json
import os
import re
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lib.files import UserError, atomic
from lib.launch import end_with_parent
from lib.loader import permutation
from lib.text import join_title, pad, step_seed, to_ids
from lib.texts import Texts, open_texts

BLOCKS_VERSION = 2  # part of the cache key: raise it when the code below cuts differently
SHORT = 0.1  # probability that a span of COCO-DR ends early before a sentence

SENTENCE_END = re.compile(
    r"""(?: (?<!\b[A-Z])                              # no initial: J. Smith, the U.S. Army
            (?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)(?<!\bal)(?<!\b[Ff]ig)(?<!\bNo)
            (?<!\bMr)(?<!\bMs)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\bProf) \.
          | [!?…] )
        ["'”’»)\]]* (?=\s+[^\sa-z])                   # closing quotes; then space, no small letter
      | [。！？][”’」』）]*                              # needs no space
      | (?=\n\s*\n)                                   # an empty line""",
    re.VERBOSE,
)


@dataclass
class Cut:
    """How texts are cut. title: how it is joined to the text, before the first block; span_tokens:
    0 = blocks of at most max_length tokens; else COCO-DR's spans of about so many tokens."""

    tokenizer: object
    max_length: int  # special tokens included
    title: str = "space"
    span_tokens: int = 0

    @property
    def room(self) -> int:
        return self.max_length - self.tokenizer.num_special_tokens_to_add()

    def key(self) -> str:
        """Hash of everything that decides where a text is cut."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None}  # left behind by earlier calls
        key = [BLOCKS_VERSION, state, self.max_length, self.title, self.span_tokens]
        return xxhash.xxh3_64_hexdigest(json.dumps(key).encode())

    def join(self, titles: tuple[str, ...], text: str) -> str:
        return join_title(titles, text, self.title, self.tokenizer)

    def pieces(self, string: str, offsets: list[tuple[int, int]], row: int) -> list:
        """(first character, end) of the blocks or spans of a text. offsets: those of its tokens.

        Blocks: a text that fits stays whole. Spans, by COCO-DR's rule: a text of one sentence, or
        whose first span has at most two tokens, has none; random numbers depend on the row."""
        if not offsets:
            return []
        if not self.span_tokens:
            whole = [(0, len(string))]
            return whole if len(offsets) <= self.room else split(string, offsets, self.room)
        end = len(string.rstrip())
        if not any(match.end() < end for match in SENTENCE_END.finditer(string)):
            return []
        draw = np.random.default_rng(step_seed(0, row))
        spans = split(string, offsets, self.room, self.span_tokens, draw)
        few = sum(end <= spans[0][1] for _, end in offsets[:3]) <= 2
        return [] if few else spans


def split(
    text: str, offsets: list[tuple[int, int]], room: int, size: int = 0, draw=None
) -> list[tuple[int, int]]:
    """(first character, end) of pieces with as many whole sentences as fit into `room` tokens.

    offsets: (start, end) of each token. Sentences end where SENTENCE_END says. A sentence that is
    too long is cut before the last word that begins in the room; its rest is packed with what
    follows. A piece begins where the one before it ended, white space included, so that it has the
    same tokens as in its text.
    size, draw: COCO-DR's spans of at most `size` tokens, but at least one sentence; `draw`, a
    random Generator, ends one in ten (SHORT) before the next sentence."""
    starts, ends = np.array(offsets).T
    word = np.append(True, starts[1:] > ends[:-1])  # token i follows white space, so a word begins
    sentence_ends = [match.end() for match in SENTENCE_END.finditer(text)]
    target = room if draw is None else min(size, room)
    pieces = []  # of tokens
    first = last = 0  # the open piece is [first, last)
    for stop in [*np.searchsorted(starts, sentence_ends), len(starts)]:  # of each sentence
        if last > first and (stop - first > target or (draw is not None and draw.random() < SHORT)):
            pieces.append((first, last))
            first = last
        while stop - first > room:
            cut = first + room
            inside = np.flatnonzero(word[first + 1 : cut + 1])
            cut = first + 1 + inside[-1] if len(inside) else cut
            pieces.append((first, cut))
            first = cut
        last = stop
    pieces.append((first, last))
    return [(int(ends[a - 1]) if a else 0, int(ends[b - 1])) for a, b in pieces if b > a]


@dataclass
class Cutter(Dataset):
    """Item n: the table (row, first character, end) of the pieces of the n-th AT_ONCE texts."""

    texts: Texts
    cut: Cut
    AT_ONCE = 2000

    def __len__(self) -> int:
        return -(-len(self.texts) // self.AT_ONCE)

    def __getitem__(self, number: int) -> np.ndarray:
        first = number * self.AT_ONCE
        rows = self.texts.stream(first, first + self.AT_ONCE)
        strings = [self.cut.join(titles, text) for _, titles, text in rows]
        backend = self.cut.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encoded = backend.encode_batch(strings, add_special_tokens=False)
        table = []
        for row, (string, one) in enumerate(zip(strings, encoded, strict=True), first):
            table += [(row, *piece) for piece in self.cut.pieces(string, one.offsets, row)]
        return np.array(table, dtype=np.int32).reshape(-1, 3)


class Blocks:
    """The examples of a corpus: its blocks, or two spans of a document, drawn anew at every visit.
    Documents with fewer than two spans are left out (COCO-DR pairs a span with itself).

    Cutting takes one pass over the corpus in bounded memory, on all cores if the corpus is large.
    The table (N, 3) of (row, first character, end) is kept beside the corpus' Arrow copy and
    mapped by all processes and workers. Call it under accelerator.main_process_first()."""

    def __init__(self, texts: Texts, cut: Cut, progress: bool = False):
        self.texts = texts
        self.cut = cut
        path = texts.folder / f"blocks-{cut.key()}.int32"
        if not path.is_file():
            with atomic(path) as temporary:
                write_table(temporary, Cutter(texts, cut), progress)
        empty = path.stat().st_size == 0  # such a file cannot be mapped
        table = np.zeros(0, np.int32) if empty else np.memmap(path, dtype=np.int32, mode="r")
        self.table = table.reshape(-1, 3)
        if cut.span_tokens:
            first = np.flatnonzero(np.diff(self.table[:, 0], prepend=-1))
            counts = np.diff(first, append=len(self.table))
            self.first = first[counts > 1]  # (M,) first line of each document in the table
            self.counts = counts[counts > 1]  # (M,) number of its spans
        if not len(self):
            what = "document has two spans" if cut.span_tokens else "text has a token"
            raise UserError(f"{texts.source}: no {what} — check the corpus and the tokenizer")

    def __reduce__(self):  # workers started by spawn map the table again
        return Blocks, (self.texts, self.cut)

    def __len__(self) -> int:
        return len(self.first if self.cut.span_tokens else self.table)

    def whole(self, row: int) -> str:
        """A text of the corpus, uncut."""
        return self.cut.join(*self.texts[row])

    def string(self, line: int) -> str:
        row, start, end = self.table[line].tolist()
        return self.whole(row)[start:end]

    def row(self, index: int) -> int:
        """The row of the text that an example is taken from."""
        return int(self.table[self.first[index] if self.cut.span_tokens else index, 0])

    def strings(self, index: int, seed: int) -> list[str]:
        """The block, or two spans of the document drawn by the seed."""
        if not self.cut.span_tokens:
            return [self.string(index)]
        pair = np.random.default_rng(seed).choice(self.counts[index], 2, replace=False)
        return [self.string(int(self.first[index] + line)) for line in pair]


def write_table(path, cutter: Cutter, progress: bool) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores, 16) if len(cutter) > 2 * cores else 0  # tokenizers has its own threads
    if workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns at every fork
    parts = DataLoader(cutter, batch_size=None, num_workers=workers, worker_init_fn=end_with_parent)
    bar = tqdm(desc="blocks", total=len(cutter.texts), unit="text", disable=not progress)
    with open(path, "wb") as stream, bar:
        for part in parts:
            np.asarray(part).tofile(stream)
            bar.update(min(cutter.AT_ONCE, bar.total - bar.n))


class Corpora(Dataset):
    """The examples of one or several corpora, {name: Blocks}, one after the other. Batches mix
    them by their number of examples, or more equally by a temperature: corpus c of n_c examples
    has a share ~ n_c ** (1 / temperature) of an epoch; 1 = proportional, large = equal. A small
    corpus then repeats, and a large one continues in the next epoch where it stopped."""

    def __init__(self, parts: dict[str, Blocks], seed: int, temperature: float = 1.0):
        self.parts = parts
        self.seed = seed
        self.sizes = np.array([len(part) for part in parts.values()])
        self.starts = np.append(0, self.sizes.cumsum())
        shares = (self.sizes / self.sizes.max()) ** (1 / temperature)
        exact = shares / shares.sum() * len(self)
        self.quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
        missing = max(len(self) - self.quotas.sum(), 0)
        self.quotas[np.argsort(self.quotas - exact, kind="stable")[:missing]] += 1
        # takes back what rounding up to 1 added
        self.quotas[self.quotas.argmax()] -= self.quotas.sum() - len(self)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def order(self, epoch: int) -> np.ndarray:
        """(N,) the examples of an epoch."""
        shuffle = permutation(len(self), self.seed, epoch)
        if (self.quotas == self.sizes).all():
            return shuffle
        chosen = []
        for corpus, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            rounds, offsets = np.divmod(np.arange(epoch * quota, (epoch + 1) * quota), size)
            for number in np.unique(rounds):
                order = permutation(size, self.seed, corpus, int(number), 1)
                chosen.append(self.starts[corpus] + order[offsets[rounds == number]])
        return np.concatenate(chosen)[shuffle]

    def shares(self) -> dict[str, str]:
        """One line for each corpus, shown at the start of a run."""
        facts = {}
        for (name, part), quota in zip(self.parts.items(), self.quotas, strict=True):
            unit = "documents of two spans or more" if part.cut.span_tokens else "blocks"
            share = f"{quota / len(self):.1%} of a batch"
            facts[f"corpus {name}"] = f"{len(part.texts)} texts, {len(part)} {unit}, {share}"
        return facts

    def place(self, example: int) -> tuple[Blocks, int]:
        """The corpus of an example, and its number there."""
        corpus = int(np.searchsorted(self.starts, example, side="right")) - 1
        return [*self.parts.values()][corpus], int(example - self.starts[corpus])

    def ids(self, examples) -> list[str]:
        """The ids of the texts that the examples are taken from."""
        return [part.texts.id(part.row(index)) for part, index in map(self.place, examples)]

    def __getitem__(self, place: tuple[int, int, int]) -> tuple[int, list[str], int, int]:
        """An item of StepSampler (example, micro-step, global row) -> (example, its strings,
        micro-step, global row)."""
        example, micro_step, row = place
        part, index = self.place(example)
        strings = part.strings(index, step_seed(self.seed, 6, micro_step, row))
        return example, strings, micro_step, row


def open_corpora(
    given: list[str], cut: Cut, seed: int, balance: float = 1.0, progress: bool = False
) -> Corpora:
    """given: FILE or NAME=FILE of each corpus   balance: the temperature of Corpora"""
    parts = {}
    for item in given:
        named = "=" in item and not os.path.exists(item)
        name, path = item.split("=", 1) if named else (item, item)
        if name in parts:
            raise UserError(f"--corpus {item}: there are two corpora {name} — rename one of them")
        parts[name] = Blocks(open_texts(path), cut, progress)
    return Corpora(parts, seed, balance)


@dataclass
class BlockCollator:
    """Items of Corpora -> input_ids, attention_mask (B, L); rows (B,), numbers of the strings in
    the batch of all processes; examples (B,), or (B / 2,) if each has two strings, which then are
    rows 2i and 2i + 1; micro_step and tokens, ints."""

    tokenizer: object
    max_length: int

    def __call__(self, items: list[tuple[int, list[str], int, int]]) -> dict:
        examples, strings, micro_steps, rows = zip(*items, strict=True)
        each = len(strings[0])
        flat = [string for some in strings for string in some]
        ids = to_ids(flat, self.tokenizer, self.max_length)
        return pad(ids, self.tokenizer) | {
            "rows": torch.tensor([each * row + number for row in rows for number in range(each)]),
            "examples": torch.tensor(examples),
            "micro_step": micro_steps[0],
            "tokens": sum(map(len, ids)),
        }
