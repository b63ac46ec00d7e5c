"""The bi-encoder, dense or sparse: one tower for queries and passages. lib/checkpoint.py reads and
writes it.

B texts, L tokens, H hidden size, D dimensions of a vector (sparse: the size of the vocabulary).
attention_mask 1 = keep."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.architectures import head_transform
from lib.files import UserError
from lib.lm_head import max_pooled_logits
from lib.query_table import QueryTable
from lib.text import TextFormat

# Standard deviations by which the logits of a new LM head are lowered: then, as with a trained
# head, a few per cent of the terms have their maximum above zero.
NEW_HEAD = 3.5


class Dense(nn.Sequential):
    """activation(Linear(x)). This class and the next have the names of sentence-transformers."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, activation: str = "Identity"):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias)
        self.activation = getattr(nn, activation)()

    def settings(self) -> dict:
        linear, kind = self.linear, type(self.activation)
        return {
            "in_features": linear.in_features,
            "out_features": linear.out_features,
            "bias": linear.bias is not None,
            "activation_function": f"{kind.__module__}.{kind.__name__}",
        }


class LayerNorm(nn.Sequential):
    def __init__(self, dimension: int):
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    def settings(self) -> dict:
        return {"dimension": self.norm.normalized_shape[0]}


class Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


def first_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The first token that counts; not column 0 where the tokenizer pads on the left."""
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.argmax(1)].float()


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The last token that counts."""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last].float()


def mean_of_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens that count; 0 for a text without one."""
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


class Pooling(NamedTuple):
    """A pooling, and its names in the files of sentence-transformers."""

    function: Callable[[Tensor, Tensor], Tensor]  # hidden (B, L, H), mask (B, L) -> (B, H) fp32
    mode: str  # pooling_mode, since version 5.3
    flag: str  # before: pooling_mode_FLAG


POOLINGS = {
    "cls": Pooling(first_token, mode="cls", flag="cls_token"),
    "mean": Pooling(mean_of_tokens, mode="mean", flag="mean_tokens"),
    "last_token": Pooling(last_token, mode="lasttoken", flag="lasttoken"),
}


@dataclass(frozen=True)
class Head:
    """What a bi-encoder shall end in; what is not given is as the checkpoint states.

    kind         sparse: from anything with an LM head; new_sparse: without one, a new one is drawn
    projection   add ANCE's Linear and LayerNorm of this size; a checkpoint that has them keeps them
    normalize    add L2 normalisation at the end if there is none"""

    pooling: str | None = None
    kind: Literal["dense", "sparse", "new_sparse"] | None = None
    projection: int = 0
    normalize: bool = False
    exclude_special_tokens: bool = False  # see SparseBiEncoder


AS_STATED = Head()


class BiEncoder(nn.Module):
    """Dense: backbone -> pooling (an entry of POOLINGS) -> head modules -> vector. `format` is how
    the checkpoint wants its texts. Pooling and head run in fp32 under autocast."""

    exclude_special_tokens = False

    def __init__(self, backbone: nn.Module, tokenizer, pooling: str, head: list, form: TextFormat):
        super().__init__()
        self.backbone = backbone
        self.head = nn.ModuleList(head)
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.format = form
        self.query_table: QueryTable | None = None  # only of a SparseBiEncoder

    @property
    def dim(self) -> int:
        """D, the size of a vector."""
        return self.projection or self.backbone.config.hidden_size

    @property
    def projection(self) -> int:
        """The output size of the last Dense, 0 without one."""
        sizes = [module.linear.out_features for module in self.head if isinstance(module, Dense)]
        return sizes[-1] if sizes else 0

    @property
    def normalized(self) -> bool:
        return any(isinstance(module, Normalize) for module in self.head)

    @property
    def portable(self) -> bool:
        """Whether sentence-transformers can express it. (Titles are joined by its caller.)"""
        return self.format.max_chunks == 1 and not self.format.max_characters

    def encode(self, batch: dict, kind: str = "passage") -> Tensor:
        """{"input_ids": (B, L), "attention_mask": (B, L)} -> (B, D) fp32. Or {"chunks": a list of
        these, each padded to its own longest text, "order": (n,) places among their rows} -> (n,
        D), encoded chunk by chunk. kind: query or passage"""
        if "chunks" in batch:
            reps = [self.encode(chunk, kind) for chunk in batch["chunks"]]
            return torch.cat(reps)[batch["order"]]
        return self.vectors(batch["input_ids"], batch["attention_mask"], kind)

    def vectors(self, ids: Tensor, mask: Tensor, kind: str) -> Tensor:
        """(B, L), (B, L) -> (B, D) fp32."""
        hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, L, H)
        with torch.autocast(hidden.device.type, enabled=False):
            reps = POOLINGS[self.pooling].function(hidden, mask)  # (B, H)
            for module in self.head:
                reps = module(reps)
        return reps

    def forward(self, query=None, passage=None) -> tuple[Tensor | None, Tensor | None]:
        """(q_reps, p_reps) of two batches as `encode` takes them, either of which may be None. Both
        sides in one call, so that one DDP forward covers both."""
        q_reps = None if query is None else self.encode(query, "query")
        p_reps = None if passage is None else self.encode(passage, "passage")
        return q_reps, p_reps


class SparseBiEncoder(BiEncoder):
    """Sparse: a weight for every term of the vocabulary, log(1 + relu(max over positions of the
    masked LM's logits)): SPLADE-max (arXiv 2109.10086), LexMAE (2208.14754). The backbone is the LM
    with its head.

    exclude_special_tokens   LexMAE: no maximum over the positions of [CLS] and [SEP]; else only
                             padding is excluded (SPLADE). No term is ever excluded.
    query_table              gives the vectors of queries in place of the LM; None = the LM does
    A text without a position that counts is the zero vector."""

    def __init__(self, lm: nn.Module, tokenizer, exclude_special_tokens: bool, form: TextFormat):
        super().__init__(lm, tokenizer, "max", [], form)
        self.exclude_special_tokens = exclude_special_tokens
        names = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")
        ids = {getattr(tokenizer, name) for name in names} - {None}
        self.register_buffer("special", torch.tensor(sorted(ids)), persistent=False)

    @property
    def dim(self) -> int:
        return self.backbone.get_output_embeddings().weight.shape[0]

    @property
    def portable(self) -> bool:
        return super().portable and not self.exclude_special_tokens

    def make_table(self, weights: Tensor, learned: bool) -> QueryTable:
        """weights: (V,)"""
        ordinary = torch.ones(self.dim, dtype=torch.bool)
        special = {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}
        ordinary[sorted(special)] = False
        return QueryTable(weights, ordinary, learned)

    def forward(self, query=None, passage=None) -> tuple[Tensor | None, Tensor | None]:
        q_reps, p_reps = super().forward(query, passage)
        if query is None and self.query_table is not None:
            # DDP waits for the gradient of every parameter, also after a call without queries
            p_reps = p_reps + 0.0 * self.query_table.scaled.sum()
        return q_reps, p_reps

    def vectors(self, ids: Tensor, mask: Tensor, kind: str) -> Tensor:
        if kind == "query" and self.query_table is not None:
            return self.query_table(ids, mask)
        encoder = self.backbone.base_model
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, L, H)
        hidden = head_transform(self.backbone, hidden)
        output = self.backbone.get_output_embeddings()
        counts = mask.bool()
        if self.exclude_special_tokens:
            counts = counts & ~torch.isin(ids, self.special)
        return max_pooled_logits(hidden, output.weight, output.bias, counts).relu().log1p()


def lower_bias(lm: nn.Module) -> None:
    """Make the vectors of a new LM head sparse. Its inputs leave a LayerNorm, so its logits are
    normal, with the norm of the term's embedding for standard deviation."""
    output = lm.get_output_embeddings()
    if output.bias is not None:
        output.bias.data.copy_(-NEW_HEAD * output.weight.data.norm(dim=1))


def extend(model: BiEncoder, head: Head, strict: bool, place) -> None:
    """Add what `head` asks for and the model lacks. UserError: the model has it otherwise, or lacks
    it and `strict`; an unknown pooling."""
    if head.pooling and head.pooling not in POOLINGS:
        raise UserError(f"--pooling {head.pooling}: unknown — give {', '.join(POOLINGS)}")
    stated = {
        "pooling": model.pooling,
        "projection": model.projection,
        "normalize": model.normalized,
        "exclude_special_tokens": model.exclude_special_tokens,
    }
    for name, value in stated.items():
        asked = getattr(head, name)
        if asked and asked != value and (value or strict):
            raise UserError(f"{place}: its {name} is {value}, not {asked} — leave --{name} out")
    model.exclude_special_tokens |= head.exclude_special_tokens
    if head.projection and not model.projection:
        dense = Dense(model.dim, head.projection)
        nn.init.normal_(dense.linear.weight, std=0.02)
        nn.init.zeros_(dense.linear.bias)
        model.head = nn.ModuleList([dense, LayerNorm(head.projection), *model.head])
    if head.normalize and not model.normalized:
        model.head.append(Normalize())


def positions(model: nn.Module) -> int:
    """How many tokens a text may have. RoBERTa counts positions from padding_idx + 1."""
    limit = getattr(model.config, "max_position_embeddings", None) or 0
    if limit < 1:
        return sys.maxsize
    for module in model.modules():
        learned = isinstance(getattr(module, "position_embeddings", None), nn.Embedding)
        if learned and isinstance(getattr(module, "padding_idx", None), int):
            return limit - module.padding_idx - 1
    return limit
