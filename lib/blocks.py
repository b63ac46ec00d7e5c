"""What the loaders of the two training scripts yield. Text becomes ids here, in the workers; every draw is a function
of (seed, step, row)."""

import json
import os
import re
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lib.files import UserError, atomic
from lib.groups import starts
from lib.launch import end_with_parent
from lib.loader import permutation
from lib.text import join_title, pad, step_seed, to_ids
from lib.texts import SPAN, Texts, open_texts

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
    text: str,
    offsets: list[tuple[int, int]],
    room: int,
    rule: str | None = None,
    size: int = 0,
    draw=None,
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
    for stop in [
        *np.searchsorted(starts, sentence_ends),
        len(starts),
    ]:  # tokens up to the end of each sentence
        if target is None:
            short = rule == "cocondenser" and draw.random() < SHORT
            target = (
                int(draw.integers(1, room + 1))
                if short
                else min(size, room)
                if rule == "coco"
                else room
            )
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

    def __init__(
        self, texts: Texts, tokenizer, max_length: int, title: str, rule: str | None, size: int
    ):
        self.texts, self.tokenizer, self.title, self.rule, self.size = (
            texts,
            tokenizer,
            title,
            rule,
            size,
        )
        self.room = max_length - tokenizer.num_special_tokens_to_add()

    def join(self, title: str, text: str) -> str:
        string = join_title(title, text, self.title, self.tokenizer)
        return string if self.rule else string.replace(SPAN, "\n\n")

    def __len__(self) -> int:
        return -(-len(self.texts) // self.AT_ONCE)

    def __getitem__(self, number: int) -> np.ndarray:
        first = number * self.AT_ONCE
        strings = [
            self.join(title, text)
            for _, title, text in self.texts.stream(first, first + self.AT_ONCE)
        ]
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encoded = backend.encode_batch(strings, add_special_tokens=False)
        spans = [
            self.spans(*pair, first + row)
            for row, pair in enumerate(zip(strings, encoded, strict=True))
        ]
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
        if self.rule == "coco" and not any(
            match.end() < end for match in SENTENCE_END.finditer(string)
        ):
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
        state = json.loads(tokenizer.backend_tokenizer.to_str()) | {
            "truncation": None,
            "padding": None,
        }
        key = [BLOCKS_VERSION, state, max_length, title, *([rule, size] if rule else [])]
        path = texts.folder / f"blocks-{xxhash.xxh3_64_hexdigest(json.dumps(key).encode())}.npy"
        if not path.is_file():
            with atomic(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as rows:
                self._cut(rows, progress)
                table = (
                    np.memmap(rows, dtype=np.int32, mode="r")
                    if rows.tell()
                    else np.zeros(0, dtype=np.int32)
                )
                with open(temporary, "wb") as stream:
                    np.save(stream, table.reshape(-1, 3))
        self.table = np.load(path, mmap_mode="r")  # (N, 3) int32: row, first character, end
        if rule:
            first = (
                np.flatnonzero(np.append(True, np.diff(self.table[:, 0]) != 0))
                if len(self.table)
                else []
            )
            counts = np.diff([*first, len(self.table)])
            self.documents = np.asarray(first)[
                counts > 1
            ]  # (M,) first line of each document in the table
            self.counts = counts[counts > 1]  # (M,) how many spans it has
        if not len(self):
            what = "document has two spans" if rule else "text has a token"
            raise UserError(
                f"{texts.source}: no {what} — is it the right corpus, the right tokenizer?"
            )

    def __reduce__(self):  # workers started by spawn map the table again
        return Blocks, self.arguments

    def _cut(self, rows, progress: bool) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = (
            min(cores, 16) if len(self.cutter) > 2 * cores else 0
        )  # tokenizers has threads for a small one
        if workers:
            os.environ.setdefault(
                "TOKENIZERS_PARALLELISM", "false"
            )  # or tokenizers warns at every fork
        parts = DataLoader(
            self.cutter, batch_size=None, num_workers=workers, worker_init_fn=end_with_parent
        )
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
        self.starts = starts(self.sizes)
        shares = (self.sizes / self.sizes.max()) ** (1 / temperature)
        exact = shares / shares.sum() * len(self)
        self.quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
        for corpus in np.argsort(self.quotas - exact, kind="stable")[
            : max(len(self) - self.quotas.sum(), 0)
        ]:
            self.quotas[corpus] += 1
        self.quotas[self.quotas.argmax()] -= self.quotas.sum() - len(
            self
        )  # if rounding up to 1 was too much

    def __len__(self) -> int:
        return int(self.starts[-1])

    def order(self, epoch: int) -> np.ndarray:
        """(N,) the examples of an epoch."""
        if (self.quotas == self.sizes).all():
            return permutation(len(self), self.seed, epoch)
        chosen = []
        for corpus, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            rounds, offsets = np.divmod(np.arange(epoch * quota, (epoch + 1) * quota), size)
            for number in np.unique(rounds):
                order = permutation(size, self.seed, corpus, int(number), 1)
                chosen.append(self.starts[corpus] + order[offsets[rounds == number]])
        return np.concatenate(chosen)[permutation(len(self), self.seed, epoch)]

    def shares(self) -> dict[str, str]:
        """What the echo says of each corpus."""
        facts = {}
        for (name, part), size, quota in zip(
            self.parts.items(), self.sizes, self.quotas, strict=True
        ):
            unit = "documents of two spans or more" if part.rule else "blocks"
            facts[f"corpus {name}"] = (
                f"{len(part.texts)} texts, {size} {unit}, {quota / len(self):.1%} of a batch"
            )
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
        return (
            example,
            part.strings(index, step_seed(self.seed, 6, micro_step, global_row)),
            micro_step,
            global_row,
        )


def open_corpora(
    given: list[str],
    titles: str | None,
    cut: tuple,
    seed: int,
    balance: float = 1.0,
    progress: bool = False,
) -> Corpora:
    """Corpora of `FILE` or `NAME=FILE` each; cut: what Blocks takes after the texts."""
    parts = {}
    if balance <= 0:
        raise UserError(
            f"--balance {balance}: a temperature — give 1, or more for more equal shares"
        )
    if titles and len(given) > 1:
        raise UserError(
            "--titles joins to one corpus — give one, or corpora that hold their titles"
        )
    for item in given:
        name, _, path = (
            item.partition("=") if "=" in item and not os.path.exists(item) else (item, "", item)
        )
        if name in parts:
            raise UserError(
                f"--corpus {item}: {name} is there already — give each corpus a name of its own"
            )
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
        ids = to_ids(
            [string for some in strings for string in some], self.tokenizer, self.max_length
        )
        return pad(ids, self.tokenizer) | {
            "rows": torch.tensor([each * row + number for row in rows for number in range(each)]),
            "examples": torch.tensor(examples),
            "micro_step": micro_steps[0],
            "tokens": sum(map(len, ids)),
        }
