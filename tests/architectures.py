"""Small random models of every architecture that lib/architectures.py knows."""

from transformers import AutoConfig

from lib.architectures import ARCHITECTURES

KINDS = list(ARCHITECTURES)
COMMON = {  # BERT's names
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,  # vectors that differ clearly from text to text
}
MORE = {  # ModernBERT: a layer that sees everything, and one that sees four tokens on each side
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8}
}


def tiny_config(kind: str, tokenizer, **sizes):
    """The config of a small model; sizes by BERT's names."""
    names = {"num_hidden_layers": "n_layers"} if kind == "distilbert" else {}
    names |= ARCHITECTURES[kind].sizes
    own = {names.get(name, name): value for name, value in (COMMON | sizes).items()}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos")}
    ids |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    own |= {name: value for name, value in ids.items() if value is not None}
    return AutoConfig.for_model(kind, vocab_size=len(tokenizer), **own, **MORE.get(kind, {}))
