"""The WordPiece tokenizer of a corpus: the same each time, and what BERT's normaliser makes of any
text."""

import random

import pytest
from transformers import AutoTokenizer

from lib.checkpoint import load_encoder, save_encoder
from lib.encoder import Head
from lib.files import UserError, read_json, write_json
from recipes.train_tokenizer import train


def test_the_same_texts_give_the_same_vocabulary():
    draw = random.Random(0)
    texts = [
        " ".join("".join(draw.choices("abcdefghij", k=draw.randint(2, 8))) for _ in range(300))
        for _ in range(5)
    ]
    texts += [
        "".join(chr(0xAC00 + n) for n in range(1100))
    ]  # more characters than are kept, all as frequent
    vocabularies = [sorted(train(lambda: texts, 2500).items()) for _ in range(5)]
    assert all(one == vocabularies[0] for one in vocabularies[1:])
    vocabulary = dict(vocabularies[0])
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert [vocabulary[c] for c in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_what_it_writes_splits_any_text_of_the_corpus_without_unknown_words(script, tmp_path):
    texts = [
        "Café au lait: 3.5 €, naïve?",
        "中文 and Ελληνικά, snake_case (x[0])",
        "snake snake lait lait",
    ]
    corpus = tmp_path / "corpus.tsv"
    corpus.write_text("".join(f"p{n}\t{text}\n" for n, text in enumerate(texts)))
    flags = ("--corpus", corpus, "--vocab_size", 200, "--output_dir", tmp_path / "t")
    status, out, err = script("recipes.train_tokenizer", *flags)
    assert status == 0, err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert f"{len(tokenizer):,} entries" in out
    tokens = tokenizer.tokenize(" ".join(texts))
    assert tokenizer.unk_token not in tokens and "snake" in tokens and "lait" in tokens
    assert "##中" not in tokenizer.get_vocab() and "##." not in tokenizer.get_vocab()
    assert (
        tokenizer.decode(tokenizer("Café 中文 snake", add_special_tokens=False).input_ids)
        == "cafe 中 文 snake"
    )


def test_a_folder_is_complete_for_its_corpus_and_other_folders_are_left_alone(script, tmp_path):
    corpus, out = tmp_path / "corpus.tsv", tmp_path / "out"
    corpus.write_text("p1\tant and ants\n")
    flags = ("recipes.train_tokenizer", "--vocab_size", 50, "--corpus", corpus, "--output_dir")
    assert script(*flags, out)[0] == 0
    before = (out / "tokenizer.json").read_bytes()
    assert "out is complete" in script(*flags, out)[1]
    (out / "done").unlink()
    (out / "tokenizer.json").write_text("{")  # a killed run
    assert script(*flags, out)[0] == 0 and (out / "tokenizer.json").read_bytes() == before
    corpus.write_text("p1\tbees and bees\n")
    assert "it was made with corpus" in script(*flags, out)[2]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    status, _, error = script(*flags, mine)
    assert status == 1 and "it holds something else (thesis.txt" in error
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_a_tokenizer_that_gives_other_ids_is_refused(tiny_model_dir, tmp_path):
    save_encoder(load_encoder(tiny_model_dir, Head("cls")), tmp_path / "model", {})
    content = read_json(tmp_path / "model" / "tokenizer.json")
    vocabulary = content["model"]["vocab"]
    vocabulary["##e"], vocabulary["##s"] = vocabulary["##s"], vocabulary["##e"]
    write_json(tmp_path / "model" / "tokenizer.json", content)
    with pytest.raises(UserError, match="other ids than when .* — install tokenizers"):
        load_encoder(tmp_path / "model")
