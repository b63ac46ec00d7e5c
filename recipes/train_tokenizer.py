"""Train a WordPiece tokenizer as BERT's (lower case) on a corpus, for a model from scratch.

Reads   --corpus (any format of lib/files.py)
Writes  --output_dir: a Hugging Face tokenizer, for pretrain_mae.py --tokenizer

    python -m recipes.train_tokenizer --corpus corpus.jsonl --output_dir tokenizer --vocab_size 12000
"""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizerFast
from transformers.hf_argparser import HfArg

from lib.files import atomic, read_texts
from lib.launch import parse_args, run


@dataclass
class Args:
    corpus: str = HfArg(help="texts to learn from")
    output_dir: str = HfArg(help="where the tokenizer goes")
    vocab_size: int = HfArg(default=12_000, help="entries (BERT 30,522)")
    max_length: int = HfArg(default=512, help="longest text of the model")


def main():
    args = parse_args(Args)
    if (Path(args.output_dir) / "tokenizer_config.json").is_file():
        return print(f"{args.output_dir}: the tokenizer is complete")
    wordpiece = BertWordPieceTokenizer(lowercase=True)
    texts = (f"{title} {text}" for _, title, text in read_texts(args.corpus))
    wordpiece.train_from_iterator(texts, vocab_size=args.vocab_size, show_progress=False)
    with atomic(args.output_dir) as folder:  # through the JSON: BERT's order of the special tokens, 0 = [PAD]
        tokenizer = BertTokenizerFast(vocab=wordpiece.get_vocab(), model_max_length=args.max_length)
        tokenizer.save_pretrained(folder)
    print(f"{args.output_dir}: {len(tokenizer):,} entries")


if __name__ == "__main__":
    run(main)
