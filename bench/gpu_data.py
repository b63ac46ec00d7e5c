"""What bench/gpu.py trains and encodes: generated texts, models with random weights. Nothing is
downloaded."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from lib.files import TrainingRow, write_training_file

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ENDINGS = ("ing", "ed", "er", "ly", "ness", "able")  # a third of the words are of two tokens
SENTENCE = 12  # words


def write_tokenizer(folder: Path, size: int, longest: int) -> list[str]:
    """Write a WordPiece tokenizer of `size` entries; returns the words that it knows whole."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *LETTERS]
    vocabulary += [f"##{letter}" for letter in LETTERS]
    vocabulary += [f"##{ending}" for ending in ENDINGS]
    words = []
    number = 0
    while len(vocabulary) + len(words) < size:
        rest, letters = number, ""
        for _ in range(4):
            rest, letter = divmod(rest, len(LETTERS))
            letters += LETTERS[letter]
        words.append(letters)
        number += 1
    ids = {token: number for number, token in enumerate(vocabulary + words)}
    BertTokenizerFast(vocab=ids, model_max_length=longest).save_pretrained(folder)
    return words


def write_model(folder: Path, vocabulary: int, **sizes) -> list[str]:
    """Write a BertForMaskedLM with random weights and its tokenizer, in float32; returns the words.
    sizes: of BertConfig, by default those of BERT-base"""
    words = write_tokenizer(folder, vocabulary, sizes.get("max_position_embeddings", 512))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=vocabulary, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    return words


class Writer:
    """Draws texts. Words have the frequencies of Zipf's law."""

    def __init__(self, words: list[str], seed: int = 0):
        self.words = np.array(words)
        self.draw = np.random.default_rng(seed)
        share = 1 / (np.arange(len(words)) + 10)
        self.cumulative = np.cumsum(share / share.sum())

    def text(self, tokens: int) -> str:
        """A text of sentences, of about `tokens` tokens."""
        count = max(round(tokens * SENTENCE / (SENTENCE + 1) * 3 / 4), 1)
        places = np.searchsorted(self.cumulative, self.draw.random(count))
        words = self.words[np.minimum(places, len(self.words) - 1)].tolist()
        for place in range(0, count, 3):
            words[place] += ENDINGS[place % len(ENDINGS)]
        for place in range(SENTENCE - 1, count, SENTENCE):
            words[place] += "."
        words[::SENTENCE] = [word.capitalize() for word in words[::SENTENCE]]
        return " ".join(words) + "."


@dataclass
class Collection:
    """How large a generated collection is."""

    passages: int
    queries: int
    tokens: int  # of a passage
    query_tokens: int
    vary: bool = False  # most passages are shorter, down to half


def write_collection(folder: Path, words: list[str], size: Collection) -> None:
    """corpus.jsonl, queries.jsonl, qrels.tsv and train.jsonl with negatives, scores and
    clusters."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = Writer(words)
    draw = random.Random(0)
    with open(folder / "corpus.jsonl", "w") as stream:
        for number in range(size.passages):
            least = size.tokens // 2 if size.vary and number % 4 else size.tokens
            text = writer.text(draw.randint(least, size.tokens))
            stream.write(json.dumps({"_id": f"p{number}", "text": text}) + "\n")
    rows = []
    with open(folder / "queries.jsonl", "w") as stream:
        for number in range(size.queries):
            text = writer.text(size.query_tokens)
            stream.write(json.dumps({"_id": f"q{number}", "text": text}) + "\n")
            pids = [
                f"p{place}" for place in draw.sample(range(size.passages), min(16, size.passages))
            ]
            scores = [round(draw.uniform(-5, 5), 2) for _ in pids]
            cluster = number % 3
            row = TrainingRow(f"q{number}", pids[:1], pids[1:], scores[:1], scores[1:], cluster)
            rows.append(row)
    write_training_file(folder / "train.jsonl", rows)
    qrels = "".join(f"{row.qid} 0 {row.pos[0]} 1\n" for row in rows)
    (folder / "qrels.tsv").write_text(qrels)
