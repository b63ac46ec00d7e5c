"""pytest tests/test_blocks.py — sentences, blocks, and what the loader makes of them."""

import json
import os
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lib import blocks as module
from lib.blocks import SENTENCE_END, Blocks, Corpora, Cut
from lib.files import UserError
from lib.loader import permutation, step_batches
from lib.text import to_ids
from lib.texts import open_texts

TRICKY = (
    'Dr. Smith et al. fought in the U.S. Army. "Is it?" Yes! See e.g. Fig. 3 or No. 5. '
    "Version 2.0 is out... and so on. J. K. Rowling (author). (An aside.) "
    "Then 这是一句。那是另一句！「好。」\n\n"
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
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    names = dict(zip(("bos", "pad", "eos", "unk", "mask"), specials, strict=True)) | {
        "cls": "<s>",
        "sep": "</s>",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": t for name, t in names.items()}
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts that fit, one of many sentences, one of a long sentence, one of a long word, one
    without any token."""
    path = tmp_path_factory.mktemp("blocks") / "corpus.jsonl"
    sentence = "Queen ants and their larvae trail along the lava of a volcano, under ice and snow"
    sentence += "; the bridge holds"
    rows = [
        ("A title", "Short text."),
        ("", f"{sentence}. " * 6 + TRICKY),
        ("Long", f"{sentence}, and " * 8),
        ("", "abcdefghij" * 30),
        ("", "\u200b"),
        ("Only a title", ""),
    ]
    lines = [
        json.dumps({"_id": f"d{i}", "title": t, "text": x}) + "\n" for i, (t, x) in enumerate(rows)
    ]
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("max_length", [12, 80])
def test_blocks_hold_every_token_once_and_fit(corpus, tiny_model_dir, kind, max_length):
    tokenizer = (
        AutoTokenizer.from_pretrained(tiny_model_dir)
        if kind == "wordpiece"
        else byte_level_bpe([TRICKY] * 2)
    )
    texts = open_texts(corpus)
    blocks = Blocks(texts, Cut(tokenizer, max_length))
    rows = np.array(blocks.table[:, 0])
    assert (np.diff(rows) >= 0).all() and {0, 1, 2, 5} <= set(rows.tolist())
    assert kind == "bpe" or 4 not in rows, "a text without a token is no block"
    for row in set(rows.tolist()) - {3}:  # a word cut in two has other tokens
        titles, text = texts[row]
        whole = " ".join([*titles, text]) if text else "".join(titles)
        parts = [blocks.string(i) for i in np.flatnonzero(rows == row)]
        ids = to_ids(parts, tokenizer, 10**6)
        assert "".join(parts).split() == whole.split()
        assert sum((one[1:-1] for one in ids), []) == to_ids([whole], tokenizer, 10**6)[0][1:-1]
        assert max(map(len, ids)) <= max_length
        if len(parts) == 1:
            assert parts == [whole]
        for part, following in zip(
            ids, ids[1:], strict=False
        ):  # greedy: full, or the next sentence would not fit
            assert len(part) > max_length // 2 or len(part) + len(following) - 2 > max_length
    assert blocks.string(int(np.flatnonzero(rows == 5)[0])) == "Only a title"
    if max_length == 80 and kind == "wordpiece":
        parts = [blocks.string(i) for i in np.flatnonzero(rows == 1)]
        assert all(part.rstrip()[-1] in '.?!"」。' for part in parts[:-1]), parts


def test_the_table_is_made_once_per_tokenizer_and_setting(corpus, tiny_model_dir):
    tokenizer, texts = AutoTokenizer.from_pretrained(tiny_model_dir), open_texts(corpus)

    def made():
        return {path.name: path.stat().st_mtime_ns for path in texts.folder.glob("blocks-*")}

    Blocks(texts, Cut(tokenizer, 20))
    once = made()
    to_ids(["a"], tokenizer, 8)  # leaves a truncation setting in the tokenizer
    again = Blocks(texts, Cut(tokenizer, 20))
    assert made() == once and isinstance(again.table, np.memmap)
    assert len(Blocks(texts, Cut(tokenizer, 21))) <= len(again) and len(made()) == len(once) + 1
    Blocks(texts, Cut(tokenizer, 20, title="none"))
    assert len(made()) == len(once) + 2 and not [
        p for p in texts.folder.iterdir() if p.name.startswith(".tmp")
    ]


def test_batches(corpus, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    blocks = Blocks(open_texts(corpus), Cut(tokenizer, 20, title="sep"))
    examples = Corpora([blocks], seed=0)
    places = next(step_batches(examples, 3, rank=1, world=2, start=5))
    epoch, offset = divmod(5 * 6 + 3, len(blocks))
    assert places[0][0] == permutation(len(blocks), 0, epoch)[offset], "as in fine-tuning"
    batch = blocks.cut.collate([examples[place] for place in places])
    assert batch["micro_step"] == 5 and batch["rows"].tolist() == [3, 4, 5]
    assert batch["input_ids"].shape == batch["attention_mask"].shape and len(batch["rows"]) == 3
    assert batch["input_ids"].shape[1] <= 20
    rows = [int(blocks.table[example, 0]) for example, _, _ in places]
    assert batch["examples"].tolist() == [example for example, _, _ in places]
    assert examples.ids(batch["examples"].tolist()) == blocks.texts.ids(rows)
    assert blocks.string(0) == "A title[SEP]Short text."


def test_a_corpus_without_tokens_stops(tmp_path, tiny_model_dir):
    (tmp_path / "c.jsonl").write_text(json.dumps({"_id": "a", "text": "\u200b"}) + "\n")
    with pytest.raises(UserError, match="no text has a token"):
        Blocks(
            open_texts(tmp_path / "c.jsonl"), Cut(AutoTokenizer.from_pretrained(tiny_model_dir), 20)
        )


# ------------------------------------------------------------------------------------------------
# spans and several corpora


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Documents of twelve, three and one sentences, and one whose first span is too short."""
    path = tmp_path_factory.mktemp("documents") / "corpus.jsonl"
    many = " ".join(f"Sentence {n} is on ice and snow and a bridge." for n in "ABCDEFGHIJKL")
    rows = {
        "many": many,
        "three": "Lava and ash. Ice and snow. A queen and a nest.",
        "one": "queens and nests",
        "short": "A. " + many,
    }
    lines = [json.dumps({"_id": name, "text": text}) + "\n" for name, text in rows.items()]
    path.write_text("".join(lines))
    return path


def test_spans_are_whole_sentences(documents, tiny_model_dir, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    size = len(tokenizer.tokenize("Sentence A is on ice and snow and a bridge.")) * 2 + 1
    cut = Cut(tokenizer, 4 * size, span_tokens=size)
    blocks = Blocks(open_texts(documents), cut)
    found = {blocks.id(index): index for index in range(len(blocks))}
    assert "many" in found and "one" not in found
    start, count = blocks.first[found["many"]], blocks.counts[found["many"]]
    spans = [blocks.string(int(start + line)) for line in range(count)]
    assert "".join(spans) == blocks.whole(0)
    assert all(span.rstrip().endswith("bridge.") for span in spans)
    lengths = [len(tokenizer.tokenize(span)) for span in spans]
    assert max(lengths) <= size and 2 <= count < 12
    again = Blocks(open_texts(documents), cut)
    assert np.array_equal(again.table, blocks.table)
    monkeypatch.setattr(module, "AT_ONCE", 1)  # four texts, so four parts, by workers
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    shutil.rmtree(blocks.texts.folder)
    again = Blocks(open_texts(documents), cut)
    assert np.array_equal(again.table, blocks.table), "whoever cuts it"
    pairs = [tuple(blocks.strings(found["many"], seed)) for seed in range(200)]
    assert set(pairs) == {(a, b) for a in spans for b in spans if a != b}
    assert blocks.strings(found["many"], 7) == blocks.strings(found["many"], 7)


def test_a_corpus_of_single_spans_stops(tmp_path, tiny_model_dir):
    (tmp_path / "c.jsonl").write_text(json.dumps({"_id": "a", "text": "one sentence only"}) + "\n")
    cut = Cut(AutoTokenizer.from_pretrained(tiny_model_dir), 20, span_tokens=9)
    with pytest.raises(UserError, match="no document has two spans"):
        Blocks(open_texts(tmp_path / "c.jsonl"), cut)


class Part:
    """Stands for the Blocks of a corpus: Corpora asks for their number only."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


def test_corpora_have_their_share_of_every_epoch():
    sizes = [10, 90, 40]
    for temperature, expected in ((1.0, [10, 90, 40]), (1e9, [47, 47, 46]), (2.0, [23, 70, 47])):
        corpora = Corpora([Part(size) for size in sizes], seed=3, temperature=temperature)
        assert corpora.quotas.sum() == len(corpora) == 140
        assert np.abs(corpora.quotas - expected).max() <= 1, (temperature, corpora.quotas)
        epochs = [corpora.order(epoch) for epoch in range(4)]
        for order in epochs:
            counts = np.bincount(
                np.searchsorted(corpora.starts, order, side="right") - 1, minlength=3
            )
            assert counts.tolist() == corpora.quotas.tolist()
        assert np.array_equal(epochs[2], corpora.order(2)) and not np.array_equal(
            epochs[0], epochs[1]
        )
        visits = np.bincount(np.concatenate(epochs), minlength=140)
        for start, stop in zip(corpora.starts, corpora.starts[1:], strict=False):
            assert np.ptp(visits[start:stop]) <= 1, "no example twice before all others once"
    tiny = Corpora([Part(1), Part(1000)], seed=0)
    assert tiny.quotas.tolist() == [1, 1000]


def test_several_corpora(corpus, documents, tiny_model_dir):
    cut = Cut(AutoTokenizer.from_pretrained(tiny_model_dir), 20)
    parts = [Blocks(open_texts(path), cut) for path in (corpus, documents)]
    corpora = Corpora(parts, seed=0)
    assert corpora.ids([0, len(corpora) - 1]) == [parts[0].texts.id(0), "short"]
    assert list(corpora.shares()) == [f"corpus {corpus}", f"corpus {documents}"]
