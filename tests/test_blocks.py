"""pytest tests/test_blocks.py — sentences, blocks, and what the loader makes of them."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lib.data import SENTENCE_END, BlockCollator, Blocks, StepSampler
from lib.files import UserError, open_texts
from lib.text import to_ids

TRICKY = (
    'Dr. Smith et al. fought in the U.S. Army. "Is it?" Yes! See e.g. Fig. 3 or No. 5. Version 2.0 is out... and so '
    "on. J. K. Rowling (author). (An aside.) Then 这是一句。那是另一句！「好。」\n\n"
    "A title\n\nIt cost 3.14 at 5 p.m. We left"
)
SENTENCES = [
    "Dr. Smith et al. fought in the U.S. Army.",
    '"Is it?"',
    "Yes!",
    "See e.g. Fig. 3 or No. 5.",
    "Version 2.0 is out... and so on.",
    "J. K. Rowling (author).",
    "(An aside.)",
    "Then 这是一句。",
    "那是另一句！",
    "「好。」",
    "A title",
    "It cost 3.14 at 5 p.m.",
    "We left",
]


def test_sentences_of_tricky_text():
    ends = [0, *(match.end() for match in SENTENCE_END.finditer(TRICKY)), len(TRICKY)]
    parts = [TRICKY[a:b].strip() for a, b in zip(ends, ends[1:], strict=False)]
    assert [part for part in parts if part] == SENTENCES


def byte_level_bpe(texts):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = dict(zip(("bos", "pad", "eos", "unk", "mask"), specials, strict=True)) | {"cls": "<s>", "sep": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{name}_token": t for name, t in names.items()})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts that fit, one of many sentences, one of a long sentence, one of a long word, one without any token."""
    path = tmp_path_factory.mktemp("blocks") / "corpus.jsonl"
    sentence = "Queen ants and their larvae trail along the lava of a volcano, under ice and snow; the bridge holds"
    rows = [
        ("A title", "Short text."),
        ("", f"{sentence}. " * 6 + TRICKY),
        ("Long", f"{sentence}, and " * 8),
        ("", "abcdefghij" * 30),
        ("", "\u200b"),
        ("Only a title", ""),
    ]
    lines = [json.dumps({"_id": f"d{i}", "title": t, "text": x}) + "\n" for i, (t, x) in enumerate(rows)]
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("max_length", [12, 80])
def test_blocks_hold_every_token_once_and_fit(corpus, tiny_model_dir, kind, max_length):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir) if kind == "wordpiece" else byte_level_bpe([TRICKY] * 2)
    texts = open_texts(corpus)
    blocks = Blocks(texts, tokenizer, max_length)
    rows = np.array(blocks.table[:, 0])
    assert (np.diff(rows) >= 0).all() and {0, 1, 2, 5} <= set(rows.tolist())
    assert kind == "bpe" or 4 not in rows, "a text without a token is no block"
    for row in set(rows.tolist()) - {3}:  # a word cut in two has other tokens
        title, text = texts[row]
        whole = f"{title} {text}" if title and text else title or text
        parts = [blocks.string(i) for i in np.flatnonzero(rows == row)]
        ids = to_ids(parts, tokenizer, 10**6)
        assert "".join(parts).split() == whole.split()
        assert sum((one[1:-1] for one in ids), []) == to_ids([whole], tokenizer, 10**6)[0][1:-1]
        assert max(map(len, ids)) <= max_length
        if len(parts) == 1:
            assert parts == [whole]
        for part, following in zip(ids, ids[1:], strict=False):  # greedy: full, or the next sentence would not fit
            assert len(part) > max_length // 2 or len(part) + len(following) - 2 > max_length
    assert blocks.string(int(np.flatnonzero(rows == 5)[0])) == "Only a title"
    if max_length == 80 and kind == "wordpiece":
        parts = [blocks.string(i) for i in np.flatnonzero(rows == 1)]
        assert all(part.rstrip()[-1] in '.?!"」。' for part in parts[:-1]), parts


def test_the_table_is_made_once_per_tokenizer_and_setting(corpus, tiny_model_dir):
    tokenizer, texts = AutoTokenizer.from_pretrained(tiny_model_dir), open_texts(corpus)

    def made():
        return {path.name: path.stat().st_mtime_ns for path in texts.folder.glob("blocks-*.npy")}

    Blocks(texts, tokenizer, 20)
    once = made()
    to_ids(["a"], tokenizer, 8)  # leaves a truncation setting in the tokenizer
    again = Blocks(texts, tokenizer, 20)
    assert made() == once and isinstance(again.table, np.memmap)
    assert len(Blocks(texts, tokenizer, 21)) <= len(again) and len(made()) == len(once) + 1
    Blocks(texts, tokenizer, 20, title="none")
    assert len(made()) == len(once) + 2 and not [p for p in texts.folder.iterdir() if p.name.startswith(".tmp")]


def test_batches(corpus, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    blocks = Blocks(open_texts(corpus), tokenizer, 20, title="sep")
    places = next(iter(StepSampler(len(blocks), 3, rank=1, world=2, seed=0, start=5)))
    batch = BlockCollator(tokenizer, 20)([blocks[place] for place in places])
    assert batch["micro_step"] == 5 and batch["rows"].tolist() == [3, 4, 5]
    assert batch["tokens"] == batch["attention_mask"].sum() and batch["input_ids"].shape[1] <= 20
    assert batch["texts"].tolist() == [int(blocks.table[example, 0]) for example, _, _ in places]
    assert blocks.string(0) == "A title[SEP]Short text."


def test_a_corpus_without_tokens_stops(tmp_path, tiny_model_dir):
    (tmp_path / "c.jsonl").write_text(json.dumps({"_id": "a", "text": "\u200b"}) + "\n")
    with pytest.raises(UserError, match="no text has a token"):
        Blocks(open_texts(tmp_path / "c.jsonl"), AutoTokenizer.from_pretrained(tiny_model_dir), 20)
