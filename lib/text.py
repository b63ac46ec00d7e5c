"""Text to ids: the only place where titles are joined, prompts put in front, texts cut, and tokens hidden from a
language model.

Shapes: B texts, L tokens of the longest, V vocabulary. Masks: attention_mask 1 = keep; mlm masks True = hidden.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor


def step_seed(seed: int, *parts: int) -> int:
    """A seed in [0, 2**63) for what happens at (step, rank, row, ...): random choices are functions of their place,
    never of generator state."""
    digest = hashlib.blake2b(repr((seed, *map(int, parts))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ---------------------------------------------------------------------------------------------------------------------
# strings and ids


@dataclass
class TextFormat:
    """How a checkpoint wants its texts; stored with it, read by every later stage."""

    title: Literal["none", "space", "sep"] = "space"  # left out | title + " " + text | title + [SEP] + text
    query_prompt: str = ""
    passage_prompt: str = ""
    max_query_length: int = 64  # tokens, special tokens included
    max_passage_length: int = 256

    def max_length(self, kind: str) -> int:
        return self.max_query_length if kind == "query" else self.max_passage_length

    def prompt(self, kind: str) -> str:
        return self.query_prompt if kind == "query" else self.passage_prompt


def join_title(title: str, text: str, how: str, tokenizer) -> str:
    """Title and text as one string. An empty title leaves no separator behind (RetroMAE's pre-processing leaves a
    leading [SEP])."""
    if how == "none" or not title.strip():
        return text or title
    return f"{title}{tokenizer.sep_token if how == 'sep' else ' '}{text}" if text.strip() else title


def format_texts(rows: Sequence[tuple[str, str]], kind: str, form: TextFormat, tokenizer) -> list[str]:
    """(title, text) pairs -> the strings that are tokenised: prompt, then title and text joined. Queries have no
    title."""
    if kind == "query":
        return [form.query_prompt + text for _, text in rows]
    return [form.passage_prompt + join_title(title, text, form.title, tokenizer) for title, text in rows]


def to_ids(strings: Sequence[str], tokenizer, max_length: int) -> list[list[int]]:
    """Ids with special tokens, cut at the tail to `max_length` tokens, not padded."""
    if not strings:
        return []
    encoded = tokenizer(
        list(strings), truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False
    )
    return encoded["input_ids"]


def pad(ids: Sequence[Sequence[int]], tokenizer) -> dict[str, Tensor]:
    """{"input_ids", "attention_mask"}: (B, L) int64, padded to the longest on the tokenizer's padding side."""
    width = max(map(len, ids))
    input_ids = np.full((len(ids), width), tokenizer.pad_token_id, dtype=np.int64)
    attention_mask = np.zeros((len(ids), width), dtype=np.int64)
    for row, one in enumerate(ids):
        place = slice(width - len(one), width) if tokenizer.padding_side == "left" else slice(0, len(one))
        input_ids[row, place] = one
        attention_mask[row, place] = 1
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}


def special_table(tokenizer) -> Tensor:
    """(V,) bool, True for the ids of special tokens ([CLS], [SEP], [PAD], ...). [UNK] stands for ordinary text and is
    none of them."""
    table = torch.zeros(len(tokenizer), dtype=torch.bool)
    table[[i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id]] = True
    return table


def word_start_table(tokenizer) -> Tensor:
    """(V,) bool, True where a token opens a word: not "##..." in WordPiece, "Ġ..." in byte-level BPE, "▁..." in
    SentencePiece."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    for mark in ("Ġ", "▁"):
        if sum(t.startswith(mark) for t in tokens if t) > len(tokens) // 10:
            return torch.tensor([bool(t) and t.startswith(mark) for t in tokens])
    return torch.tensor([not (t or "").startswith("##") for t in tokens])
