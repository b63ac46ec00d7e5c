"""Train a WordPiece tokenizer as BERT's (lower case) on a corpus, for a model from scratch.

Reads   --corpus (any format of lib/texts.py)
Writes  --output_dir: a Hugging Face tokenizer, for pretrain_mae.py --tokenizer, and `done` last; of
        the same texts the same, each time

    python -m recipes.train_tokenizer --corpus corpus.jsonl --output_dir tokenizer \\
        --vocab_size 12000
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizerFast

from lib.arguments import arg, identity, parse_args
from lib.files import write_lines
from lib.launch import claim_output, make_accelerator, run
from lib.texts import open_texts


@dataclass(kw_only=True)
class Args:
    corpus: str = arg(help="texts to learn from")
    output_dir: str = arg(help="folder for the tokenizer")
    vocab_size: int = arg(
        12_000, least=10, most=1_000_000, help="entries of the vocabulary (BERT 30,522)"
    )
    max_length: int = arg(512, least=4, most=1_000_000, help="longest text of the model, in tokens")


def train(texts: Callable[[], Iterable[str]], vocab_size: int) -> dict[str, int]:
    """{entry: id}: BERT's special tokens, up to 1000 characters, each also within a word (##), and
    merges of them. Reads the texts twice.

    The library's trainer takes characters from a hash map, in an order that changes from process to
    process and settles ties between merges (huggingface/tokenizers#1794). So the alphabet is made
    here."""
    wordpiece = BertWordPieceTokenizer(lowercase=True)
    clean, split = wordpiece.normalizer.normalize_str, wordpiece.pre_tokenizer.pre_tokenize_str
    counts = Counter()
    for text in texts():
        counts.update(clean(text))
    characters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    characters = characters[:1000]
    # not a full stop, which ends a word, and no Chinese character, which is a word
    within = [f"##{c}" for c in sorted(characters) if len(split(clean(f"a{c}"))) == 1]
    wordpiece.train_from_iterator(
        texts(),
        vocab_size=vocab_size,
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *within],
        show_progress=False,
    )
    return wordpiece.get_vocab()


def main():
    args = parse_args(Args)
    corpus = open_texts(args.corpus)
    inputs = {"corpus": corpus.fingerprint}
    if claim_output(make_accelerator(), args.output_dir, identity(args, inputs)):
        return

    def texts():
        return (" ".join([*titles, text]) for _, titles, text in corpus.stream())

    vocabulary = train(texts, args.vocab_size)
    tokenizer = BertTokenizerFast(vocab=vocabulary, model_max_length=args.max_length)
    tokenizer.save_pretrained(args.output_dir)
    write_lines(Path(args.output_dir) / "done", [])
    print(f"{args.output_dir}: {len(tokenizer):,} entries")


if __name__ == "__main__":
    run(main)
