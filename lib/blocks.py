"""The texts of pre-training: a corpus cut into blocks, or into the short spans that coCondenser
pairs, both of whole sentences."""

import json
import os
import re
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset
from tqdm import tqdm

from lib.files import UserError, make_once, map_array
from lib.loader import load, permutation
from lib.text import join_title, pad, step_seed, to_ids
from lib.texts import Texts

AT_ONCE = 2048  # texts that are cut at a time
BLOCKS_VERSION = 3  # part of the cache key: raise it when the code below cuts differently
SHORT = 0.1  # probability that a span of COCO-DR ends before the next sentence although it fits

SENTENCE_END = re.compile(
    r"""(?: (?<!\b[A-Z])                              # no initial: J. Smith, the U.S. Army
            (?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)(?<!\bal)(?<!\b[Ff]ig)(?<!\bNo)
            (?<!\bMr)(?<!\bMs)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\bProf) \.
          | [!?…] )
        ["'”’»)\]]* (?=\s+[^\sa-z])                   # quotes; a space, no small letter
      | [。！？][”’」』）]*                              # needs no space
      | (?=\n\s*\n)                                   # an empty line""",
    re.VERBOSE,
)


@dataclass
class Cut:
    """How texts are cut, and how pieces become a batch."""

    tokenizer: object
    max_length: int  # of a block with its special tokens
    title: str = "space"  # how it is joined to the text; it begins the first block
    span_tokens: int = 0  # 0 cuts into blocks; another number is the longest span in tokens

    def key(self) -> str:
        """Hash of everything that decides where a text is cut."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None}  # left behind by earlier calls
        key = [BLOCKS_VERSION, state, self.max_length, self.title, self.span_tokens]
        return xxhash.xxh3_64_hexdigest(json.dumps(key).encode())

    def pieces(self, string: str, offsets: list[tuple[int, int]], row: int) -> list:
        """(first character, end) of each block or span of a text whose tokens have these offsets.
        Spans follow COCO-DR: a text of one sentence or span, or with a first span of at most two
        tokens, has none. Their draws depend on the row."""
        room = self.max_length - self.tokenizer.num_special_tokens_to_add()
        if not offsets:
            return []
        if not self.span_tokens:
            if len(offsets) <= room:  # the whole text, with white space at its ends
                return [(0, len(string))]
            return split(string, offsets, room, room)
        end = len(string.rstrip())
        if len(offsets) < 3 or not any(m.end() < end for m in SENTENCE_END.finditer(string)):
            return []
        draw = np.random.default_rng(step_seed(0, row))
        spans = split(string, offsets, room, min(self.span_tokens, room), draw)
        return spans if len(spans) > 1 and offsets[2][1] <= spans[0][1] else []

    def collate(self, items: list[tuple[int, list[str], int, int]]) -> dict:
        """Items of Corpora -> input_ids, attention_mask (B, L); rows (B,), the strings' numbers in
        the batch of all processes; examples (B,), or (B / 2,) if each has two strings, which then
        are rows 2i and 2i + 1; micro_step, an int."""
        examples, strings, micro_steps, rows = zip(*items, strict=True)
        each = len(strings[0])
        ids = to_ids(sum(strings, []), self.tokenizer, self.max_length)
        return pad(ids, self.tokenizer) | {
            "rows": torch.tensor([each * row + number for row in rows for number in range(each)]),
            "examples": torch.tensor(examples),
            "micro_step": micro_steps[0],
        }


def split(text: str, offsets: list, room: int, size: int, draw=None) -> list[tuple[int, int]]:
    """(first character, end) of pieces that hold as many whole sentences as fit into `size` tokens,
    but at least one. A sentence longer than `room` is cut before the last word that begins in the
    room, and its rest is packed with what follows. A piece begins where the previous one ended,
    white space included, so that it has the same tokens as in its text.

    offsets: (start, end) of each token   draw: ends a piece early with probability SHORT"""
    starts, ends = np.array(offsets).T
    word = np.append(True, starts[1:] > ends[:-1])  # token i follows white space, so a word begins
    sentence_ends = [match.end() for match in SENTENCE_END.finditer(text)]
    pieces = []  # in tokens
    first = last = 0  # the open piece is [first, last)
    for stop in [*np.searchsorted(starts, sentence_ends), len(starts)]:  # of each sentence
        if last > first and (stop - first > size or (draw and draw.random() < SHORT)):
            pieces.append((first, last))
            first = last
        while stop - first > room:
            inside = np.flatnonzero(word[first + 1 : first + room + 1])
            cut = first + 1 + inside[-1] if len(inside) else first + room
            pieces.append((first, cut))
            first = cut
        last = stop
    pieces.append((first, last))
    return [(int(ends[a - 1]) if a else 0, int(ends[b - 1])) for a, b in pieces if b > a]


def cut_texts(texts: Texts, cut: Cut, first: int) -> np.ndarray:
    """(n, 3) int32 (row, first character, end) of the pieces of AT_ONCE texts from row `first`."""
    rows = texts.stream(first, first + AT_ONCE)
    strings = [join_title(titles, text, cut.title, cut.tokenizer) for _, titles, text in rows]
    backend = cut.tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encoded = backend.encode_batch(strings, add_special_tokens=False)
    table = []
    for row, (string, one) in enumerate(zip(strings, encoded, strict=True), first):
        table += [(row, *piece) for piece in cut.pieces(string, one.offsets, row)]
    return np.array(table, dtype=np.int32).reshape(-1, 3)


def write_table(path, texts: Texts, cut: Cut) -> None:
    """The table of all texts, in bounded memory, by all cores if the corpus is large."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    firsts = range(0, len(texts), AT_ONCE)
    workers = min(cores, 16) if len(firsts) > 2 * cores else 0  # tokenizers has its own threads
    parts = load(firsts, partial(cut_texts, texts, cut), None, workers)
    with open(path, "wb") as stream:
        for part in tqdm(parts, desc="blocks", unit_scale=AT_ONCE, total=len(firsts)):
            np.asarray(part).tofile(stream)


class Blocks:
    """The examples of a corpus: its blocks, or two spans of a document, drawn anew at every visit.
    The corpus is cut once, by one of the processes; the table is kept beside its Arrow copy.
    UserError: there is no example."""

    def __init__(self, texts: Texts, cut: Cut):
        self.texts = texts
        self.cut = cut
        path = texts.folder / f"blocks-{cut.key()}.int32"
        make_once(path, partial(write_table, texts=texts, cut=cut))
        self.table = map_array(path, np.int32).reshape(-1, 3)  # (N, 3): row, first character, end
        if cut.span_tokens:
            # (M,) first line of each document in the table, and the number of its spans
            self.first = np.flatnonzero(np.diff(self.table[:, 0], prepend=-1))
            self.counts = np.diff(self.first, append=len(self.table))
        if not len(self):
            what = "document has two spans" if cut.span_tokens else "text has a token"
            raise UserError(f"{texts.source}: no {what} — check the corpus and the tokenizer")

    def __reduce__(self):  # workers started by spawn map the table again
        return Blocks, (self.texts, self.cut)

    def __len__(self) -> int:
        return len(self.first if self.cut.span_tokens else self.table)

    def whole(self, row: int) -> str:
        """A text of the corpus, uncut."""
        titles, text = self.texts[row]
        return join_title(titles, text, self.cut.title, self.cut.tokenizer)

    def string(self, line: int) -> str:
        row, start, end = self.table[line].tolist()
        return self.whole(row)[start:end]

    def id(self, index: int) -> str:
        """The id of the text that an example is taken from."""
        line = self.first[index] if self.cut.span_tokens else index
        return self.texts.id(self.table[line, 0])

    def strings(self, index: int, seed: int) -> list[str]:
        """The block, or two spans of the document drawn by the seed."""
        if not self.cut.span_tokens:
            return [self.string(index)]
        two = np.random.default_rng(seed).choice(self.counts[index], 2, replace=False)
        return [self.string(line) for line in self.first[index] + two]


class Corpora(Dataset):
    """The examples of one or several corpora, one after the other. A corpus of n examples has a
    share ~ n ** (1 / temperature) of an epoch: a small corpus then repeats; a large one continues
    in the next epoch where it stopped."""

    def __init__(self, parts: list[Blocks], seed: int, temperature: float = 1.0):
        self.parts = parts
        self.seed = seed
        self.sizes = np.array([len(part) for part in parts])
        self.starts = np.append(0, self.sizes.cumsum())
        shares = (self.sizes / self.sizes.max()) ** (1 / temperature)
        bounds = len(self) * shares.cumsum() / shares.sum()
        self.quotas = np.diff(np.floor(bounds + 0.5).astype(np.int64), prepend=0)  # of an epoch

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
        for part, share in zip(self.parts, self.quotas / len(self), strict=True):
            counts = f"{len(part.texts)} texts, {len(part)} examples"
            facts[f"corpus {part.texts.source}"] = f"{counts}, {share:.1%} of a batch"
        return facts

    def place(self, example: int) -> tuple[Blocks, int]:
        """The corpus of an example, and its number there."""
        corpus = int(np.searchsorted(self.starts, example, side="right")) - 1
        return self.parts[corpus], int(example - self.starts[corpus])

    def ids(self, examples) -> list[str]:
        """The ids of the texts that the examples are taken from."""
        return [part.id(index) for part, index in map(self.place, examples)]

    def __getitem__(self, place: tuple[int, int, int]) -> tuple[int, list[str], int, int]:
        """(example, micro-step, row) of step_batches -> (example, its strings, the rest)."""
        example, micro_step, row = place
        part, index = self.place(example)
        strings = part.strings(index, step_seed(self.seed, 6, micro_step, row))
        return example, strings, micro_step, row
