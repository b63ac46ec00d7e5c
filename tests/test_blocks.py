"""pytest tests/test_blocks.py — sentences, blocks, and what the loader makes of them."""

import json
import os
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lib.blocks import SENTENCE_END, BlockCollator, Blocks, Corpora, Cutter, open_corpora
from lib.files import UserError
from lib.loader import StepSampler
from lib.text import to_ids
from lib.texts import open_texts

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
        return {path.name: path.stat().st_mtime_ns for path in texts.folder.glob("blocks-*.npy")}

    Blocks(texts, tokenizer, 20)
    once = made()
    to_ids(["a"], tokenizer, 8)  # leaves a truncation setting in the tokenizer
    again = Blocks(texts, tokenizer, 20)
    assert made() == once and isinstance(again.table, np.memmap)
    assert len(Blocks(texts, tokenizer, 21)) <= len(again) and len(made()) == len(once) + 1
    Blocks(texts, tokenizer, 20, title="none")
    assert len(made()) == len(once) + 2 and not [
        p for p in texts.folder.iterdir() if p.name.startswith(".tmp")
    ]


def test_batches(corpus, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    blocks = Blocks(open_texts(corpus), tokenizer, 20, title="sep")
    examples = Corpora({"one": blocks}, seed=0)
    places = next(
        iter(
            StepSampler(
                len(blocks), 3, rank=1, world=2, seed=0, start=5, epoch_order=examples.order
            )
        )
    )
    assert places == next(iter(StepSampler(len(blocks), 3, rank=1, world=2, seed=0, start=5))), (
        "one order for both"
    )
    batch = BlockCollator(tokenizer, 20)([examples[place] for place in places])
    assert batch["micro_step"] == 5 and batch["rows"].tolist() == [3, 4, 5]
    assert batch["tokens"] == batch["attention_mask"].sum() and batch["input_ids"].shape[1] <= 20
    rows = [int(blocks.table[example, 0]) for example, _, _ in places]
    assert batch["examples"].tolist() == [example for example, _, _ in places]
    assert examples.ids(batch["examples"].tolist()) == blocks.texts.ids(rows)
    assert blocks.string(0) == "A title[SEP]Short text."


def test_a_corpus_without_tokens_stops(tmp_path, tiny_model_dir):
    (tmp_path / "c.jsonl").write_text(json.dumps({"_id": "a", "text": "\u200b"}) + "\n")
    with pytest.raises(UserError, match="no text has a token"):
        Blocks(open_texts(tmp_path / "c.jsonl"), AutoTokenizer.from_pretrained(tiny_model_dir), 20)


# ------------------------------------------------------------------------------------------------
# spans and several corpora


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Documents of twelve, three and one sentences, one cut beforehand, one cut into a single span."""
    path = tmp_path_factory.mktemp("documents") / "corpus.jsonl"
    many = " ".join(
        f"Sentence {n} is on ice and snow and a bridge." for n in "A B C D E F G H I J K L".split()
    )
    rows = [
        {"_id": "many", "text": many},
        {"_id": "three", "text": "Lava and ash. Ice and snow. A queen and a nest."},
    ]
    rows += [
        {"_id": "one", "text": "queens and nests"},
        {"spans": ["Ash is grey", "Ice. Snow", "Nests"]},
    ]
    rows += [{"_id": "single", "spans": ["Ash is grey"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("rule", ["coco", "cocondenser"])
def test_spans_are_whole_sentences_and_given_ones_stay(
    documents, tiny_model_dir, rule, monkeypatch
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    size = len(tokenizer.tokenize("Sentence A is on ice and snow and a bridge.")) * 2 + 1
    blocks = Blocks(open_texts(documents), tokenizer, 4 * size, rule=rule, size=size)
    assert blocks.texts.ids([3]) == ["4"], "a line of spans without an id has its number"
    found = {blocks.texts.id(blocks.row(index)): index for index in range(len(blocks))}
    assert {"many", "4"} <= found.keys() and not {"one", "single"} & found.keys()
    start, count = blocks.documents[found["many"]], blocks.counts[found["many"]]
    spans = [blocks.string(int(start + line)) for line in range(count)]
    assert "".join(spans) == blocks.whole(0) and all(
        span.rstrip().endswith("bridge.") for span in spans
    )
    lengths = [len(tokenizer.tokenize(span)) for span in spans]
    limit = size if rule == "coco" else 4 * size - 2
    assert max(lengths) <= limit and 2 <= count < 12
    again = Blocks(open_texts(documents), tokenizer, 4 * size, rule=rule, size=size)
    assert np.array_equal(again.table, blocks.table)
    monkeypatch.setattr(Cutter, "AT_ONCE", 1)  # five texts, so five parts, by two workers
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    shutil.rmtree(blocks.texts.folder)
    again = Blocks(open_texts(documents), tokenizer, 4 * size, rule=rule, size=size)
    assert np.array_equal(again.table, blocks.table), "whoever cuts it"
    given = [blocks.strings(found["4"], seed) for seed in range(40)]
    pairs = {tuple(pair) for pair in given}
    assert len(pairs) == 6 and all(a != b for a, b in pairs)
    assert {a for a, _ in pairs} == {"Ash is grey", "Ice. Snow", "Nests"}
    assert blocks.strings(found["many"], 7) == blocks.strings(found["many"], 7)


def test_blocks_of_documents_that_come_in_spans(documents, tiny_model_dir):
    blocks = Blocks(open_texts(documents), AutoTokenizer.from_pretrained(tiny_model_dir), 64)
    assert (
        blocks.whole(3)
        == "Ash is grey\n\nIce. Snow\n\nNests"
        == blocks.string(int(np.flatnonzero(blocks.table[:, 0] == 3)[0]))
    )


def test_a_corpus_of_single_spans_stops(tmp_path, tiny_model_dir):
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"_id": "a", "text": "one sentence and no more"}) + "\n"
    )
    with pytest.raises(UserError, match="no document has two spans"):
        Blocks(
            open_texts(tmp_path / "c.jsonl"),
            AutoTokenizer.from_pretrained(tiny_model_dir),
            20,
            rule="coco",
            size=9,
        )
    (tmp_path / "d.jsonl").write_text(json.dumps({"spans": [[7, 8], [9]]}) + "\n")
    with pytest.raises(UserError, match="d.jsonl:1: spans must be strings, not ids"):
        open_texts(tmp_path / "d.jsonl")


class Part:
    """Stands for the Blocks of a corpus: Corpora asks for their number only."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


def test_corpora_have_their_share_of_every_epoch():
    sizes = {"small": 10, "large": 90, "middle": 40}
    for temperature, expected in ((1.0, [10, 90, 40]), (1e9, [47, 47, 46]), (2.0, [23, 70, 47])):
        corpora = Corpora(
            {name: Part(size) for name, size in sizes.items()}, seed=3, temperature=temperature
        )
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
    tiny = Corpora({"one": Part(1), "many": Part(1000)}, seed=0)
    assert tiny.quotas.tolist() == [1, 1000]


def test_corpora_by_name(corpus, documents, tiny_model_dir):
    cut = AutoTokenizer.from_pretrained(tiny_model_dir), 20
    corpora = open_corpora([f"a={corpus}", str(documents)], None, cut, seed=0)
    assert list(corpora.parts) == ["a", str(documents)]
    assert corpora.ids([0, len(corpora) - 1]) == [corpora.parts["a"].texts.id(0), "single"]
    assert list(corpora.shares()) == ["corpus a", f"corpus {documents}"]
    with pytest.raises(UserError, match="a is there already"):
        open_corpora([f"a={corpus}", f"a={documents}"], None, cut, seed=0)
    with pytest.raises(UserError, match="--titles joins to one corpus"):
        open_corpora([f"a={corpus}", f"b={documents}"], "titles.tsv", cut, seed=0)
