"""Text to ids: the only place where titles are joined, prompts put in front, and texts cut.

Shapes: B texts, L tokens of the longest. attention_mask 1 = keep.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor


def step_seed(seed: int, *parts: int) -> int:
    """A seed in [0, 2**63) for what happens at (step, rank, row, ...): random choices are functions
    of their place, never of generator state."""
    digest = hashlib.blake2b(repr((seed, *map(int, parts))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass
class TextFormat:
    """How a checkpoint wants its texts; stored with it, read by every later stage.

    With max_chunks > 1 the score of a passage is the highest of its chunks (ANCE's MaxP, arXiv
    2007.00808). Deliberate deviation: each chunk has special tokens of its own. The official code
    folds one sequence of 2048 tokens, of which only the first chunk begins with [CLS]."""

    title: Literal["none", "space", "sep"] = "space"  # no title | title + " " | title + [SEP]
    query_prompt: str = ""
    passage_prompt: str = ""
    max_query_length: int = 64  # tokens, special tokens included
    max_passage_length: int = 256  # of each chunk
    max_chunks: int = 1  # of a passage
    max_characters: int = 0  # of a passage with its title, without prompt (ANCE 10000); 0 = all

    def max_length(self, kind: str) -> int:
        return self.max_query_length if kind == "query" else self.max_passage_length

    def chunks(self, kind: str) -> int:
        """M, how many chunks a text may have."""
        return 1 if kind == "query" else self.max_chunks

    def prompt(self, kind: str) -> str:
        return self.query_prompt if kind == "query" else self.passage_prompt


def join_title(titles: Sequence[str], text: str, how: str, tokenizer) -> str:
    """Titles (none, one, or address and title of a document) and text as one string. What is empty
    leaves no separator behind (RetroMAE's pre-processing leaves a leading [SEP])."""
    if how == "none" or not titles:
        return text or " ".join(titles)
    parts = [*titles, text] if text.strip() else titles
    return (tokenizer.sep_token if how == "sep" else " ").join(parts)


def format_texts(rows: Sequence[tuple], kind: str, form: TextFormat, tokenizer) -> list[str]:
    """(titles, text) pairs -> the strings that are tokenised: prompt, then titles and text joined,
    cut to max_characters. Queries have no title and are not cut."""
    strings = [text for _, text in rows]
    if kind == "passage":
        end = form.max_characters or None
        joined = (join_title(titles, text, form.title, tokenizer) for titles, text in rows)
        strings = [string[:end] for string in joined]
    return [form.prompt(kind) + string for string in strings]


def chunk_ids(
    strings: Sequence[str], tokenizer, max_length: int, max_chunks: int
) -> list[list[list[int]]]:
    """For each string the ids of its chunks, 1 to `max_chunks`: consecutive tokens, in each chunk
    between special tokens; all but the last have `max_length`. What is left over is dropped.
    Several chunks need a fast tokenizer."""
    if not strings:
        return []
    encoded = tokenizer(
        list(strings),
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=max_chunks > 1,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    owners = encoded.get("overflow_to_sample_mapping", range(len(strings)))
    chunks = [[] for _ in strings]
    for row, ids in zip(owners, encoded["input_ids"], strict=True):
        chunks[row].append(ids)
    return [some[:max_chunks] for some in chunks]


def to_ids(strings: Sequence[str], tokenizer, max_length: int) -> list[list[int]]:
    """Ids with special tokens, cut at the tail to `max_length` tokens, not padded."""
    return [ids for (ids,) in chunk_ids(strings, tokenizer, max_length, 1)]


def pad(ids: Sequence[Sequence[int]], tokenizer, width: int = 0) -> dict[str, Tensor]:
    """{"input_ids", "attention_mask"}: (B, L) int64, padded to the longest, or to `width` if that
    is more, on the tokenizer's padding side."""
    width = max(width, max(map(len, ids)))
    input_ids = np.full((len(ids), width), tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, one in enumerate(ids):
        first = width - len(one) if tokenizer.padding_side == "left" else 0
        input_ids[row, first : first + len(one)] = one
        mask[row, first : first + len(one)] = 1
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}


def token_batches(lengths: np.ndarray, budget: int, limit: int) -> list[tuple[np.ndarray, int]]:
    """(rows, width) of batches, longest first: rows x width <= budget (or one row). Few shapes
    occur, because libraries keep code and memory for each: the width is rounded up to one of eight
    steps between two powers of two (at most `limit`); the last rows are split by powers of two."""
    order = np.argsort(-lengths, kind="stable")
    batches = []
    while len(order):
        longest = max(int(lengths[order[0]]), 1)  # a text may have no token
        step = 1 << max(longest.bit_length() - 4, 0)
        width = min(-(-longest // step) * step, limit)
        rows = max(budget // width, 1)
        rows = rows if rows <= len(order) else 1 << (len(order).bit_length() - 1)
        batches.append((order[:rows], width))
        order = order[rows:]
    return batches
