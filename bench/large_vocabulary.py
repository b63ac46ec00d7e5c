"""A masked language model with a vocabulary as large as XLM-R's, for the other benches.

    python -m bench.large_vocabulary --model DIR --vocab_size 250002 --output_dir DIR

Writes the encoder of --model with a table of word embeddings of --vocab_size rows and an LM head
tied to it, and the tokenizer as it is. New rows are drawn at random. The texts of a bench keep
their tokens and lengths, but every loss is over the larger vocabulary.
"""

import argparse

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--vocab_size", type=int, default=250_002, help="XLM-R's")
    args = parser.parse_args()
    torch.manual_seed(0)
    lm = AutoModelForMaskedLM.from_pretrained(args.model, trust_remote_code=False)
    lm.resize_token_embeddings(args.vocab_size)
    lm.save_pretrained(args.output_dir)
    AutoTokenizer.from_pretrained(args.model, trust_remote_code=False).save_pretrained(
        args.output_dir
    )


if __name__ == "__main__":
    main()
