"""What the masked language models of transformers call their parts; no other module does one thing
or another by the `model_type`. A new architecture is one entry of ARCHITECTURES.

D hidden size, n tokens."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

SIZES = """hidden_size num_attention_heads intermediate_size max_position_embeddings hidden_act
    hidden_dropout_prob attention_probs_dropout_prob layer_norm_eps initializer_range""".split()


class Architecture(NamedTuple):
    """transform   (LM, states (n, D)) -> (n, D): the LM head up to its output layer
    sizes       SIZES that have another name in its config than in BERT's
    positions   whether positions are learned and added to the embeddings; False: they are rotary
    final_norm  name of the norm after the last layer, where the layers add to a stream that has no
                norm of its own; empty: each layer ends in one"""

    transform: Callable[[nn.Module, Tensor], Tensor]
    sizes: dict[str, str] = {}
    positions: bool = True
    final_norm: str = ""


BERT = Architecture(lambda lm, x: lm.cls.predictions.transform(x))
ROBERTA = Architecture(lambda lm, x: lm.lm_head.layer_norm(F.gelu(lm.lm_head.dense(x))))
DISTILBERT = Architecture(
    lambda lm, x: lm.vocab_layer_norm(lm.activation(lm.vocab_transform(x))),
    sizes={
        "intermediate_size": "hidden_dim",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "hidden_act": "activation",
    },
)
MODERNBERT = Architecture(  # also Ettin and mmBERT
    lambda lm, x: lm.head(x),
    sizes={
        "hidden_dropout_prob": "mlp_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "hidden_act": "hidden_activation",
        "layer_norm_eps": "norm_eps",
    },
    positions=False,
    final_norm="final_norm",
)
ARCHITECTURES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": DISTILBERT,
    "modernbert": MODERNBERT,
}


def of(config) -> Architecture:
    """The architecture of a model's config."""
    return ARCHITECTURES[config.model_type]


def bert_config(config) -> BertConfig:
    """The encoder's SIZES under BERT's names, which the decoders read."""
    names = {name: of(config).sizes.get(name, name) for name in SIZES}
    found = {name: getattr(config, own, None) for name, own in names.items()}
    return BertConfig(**{name: value for name, value in found.items() if value is not None})


def head_transform(lm: nn.Module, hidden: Tensor) -> Tensor:
    """The LM head up to its output layer: dense, activation, norm. (n, D) -> (n, D)"""
    return of(lm.config).transform(lm, hidden)
