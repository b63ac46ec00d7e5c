"""The bi-encoder, dense or sparse: one tower for queries and passages. lib/checkpoint.py reads and
writes it.

B texts, L tokens, H hidden size, V vocabulary, D dimensions of a vector: V of a sparse one.
attention_mask 1 = keep."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.files import UserError
from lib.lm_head import head_transform, max_pooled_logits
from lib.text import TextFormat


# model
class Dense(nn.Module):
    """activation(Linear(x)), named as in sentence-transformers."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, activation: str = "Identity"
    ):
        super().__init__()
        self.linear, self.activation = (
            nn.Linear(in_features, out_features, bias),
            getattr(nn, activation)(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))

    def settings(self) -> dict:
        kind = type(self.activation)
        return {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": f"{kind.__module__}.{kind.__name__}",
        }


class LayerNorm(nn.Module):
    def __init__(self, dimension: int):
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)

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
    """hidden (B, L, H), mask (B, L), 1 = counts -> (B, H) fp32; and its names in the files of
    sentence-transformers."""

    function: Callable[[Tensor, Tensor], Tensor]
    mode: str  # pooling_mode, since version 5.3
    flag: str  # before: pooling_mode_FLAG


POOLINGS = {
    "cls": Pooling(first_token, mode="cls", flag="cls_token"),
    "mean": Pooling(mean_of_tokens, mode="mean", flag="mean_tokens"),
    "last_token": Pooling(last_token, mode="lasttoken", flag="lasttoken"),
}


class BiEncoder(nn.Module):
    """Dense: backbone -> pooling (an entry of POOLINGS) -> head modules -> vector.

    `format` is how the checkpoint wants its texts; `stated` holds those of its settings that the
    folder really names (a plain Hugging Face folder names none). Pooling and head run in fp32 under
    autocast."""

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer,
        pooling: str,
        head: list[nn.Module],
        form: TextFormat,
        stated: dict | None = None,
    ):
        super().__init__()
        self.backbone, self.head = backbone, nn.ModuleList(head)
        self.tokenizer, self.pooling, self.format, self.stated = (
            tokenizer,
            pooling,
            form,
            stated or {},
        )

    @property
    def dim(self) -> int:
        """D, the size of a vector."""
        dense = [module.linear.out_features for module in self.head if isinstance(module, Dense)]
        return dense[-1] if dense else self.backbone.config.hidden_size

    @property
    def normalized(self) -> bool:
        return any(isinstance(module, Normalize) for module in self.head)

    @property
    def portable(self) -> bool:
        """Whether sentence-transformers can express it: it cuts a passage to one chunk of tokens
        only. (How titles are joined is the business of its caller.)"""
        return self.format.max_chunks == 1 and not self.format.max_characters

    def encode(self, batch: dict) -> Tensor:
        """{"input_ids": (B, L), "attention_mask": (B, L)} -> (B, D) fp32. Or {"chunks": a list of
        these, each padded to its own longest text, "order": (n,) places among their rows} -> (n,
        D), encoded chunk by chunk."""
        if "chunks" in batch:
            return torch.cat([self.encode(chunk) for chunk in batch["chunks"]])[batch["order"]]
        return self.vectors(batch["input_ids"], batch["attention_mask"])

    def vectors(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L), (B, L) -> (B, D) fp32."""
        hidden = self.backbone(
            input_ids=input_ids, attention_mask=mask
        ).last_hidden_state  # (B, L, H)
        with torch.autocast(hidden.device.type, enabled=False):
            reps = POOLINGS[self.pooling].function(hidden, mask)  # (B, H)
            for module in self.head:
                reps = module(reps)
        return reps

    def forward(self, query=None, passage=None) -> tuple[Tensor | None, Tensor | None]:
        """(q_reps, p_reps) of two batches as `encode` takes them, either of which may be None. Both
        sides in one call, so that one DDP forward covers both."""
        return tuple(None if side is None else self.encode(side) for side in (query, passage))


class SparseBiEncoder(BiEncoder):
    """Sparse: a weight for every term of the vocabulary, log(1 + relu(max over positions of the
    masked LM's logits)): SPLADE-max (arXiv 2109.10086), LexMAE (2208.14754). The backbone is the LM
    with its head.

    exclude_special_tokens   LexMAE: no maximum over the positions of [CLS] and [SEP], whatever
                             their number; else only
                             padding is excluded (SPLADE, sentence-transformers). No term is ever
                             excluded.
    A text without a position that counts is the zero vector."""

    def __init__(
        self,
        lm: nn.Module,
        tokenizer,
        exclude_special_tokens: bool,
        form: TextFormat,
        stated: dict | None = None,
    ):
        super().__init__(lm, tokenizer, "max", [], form, stated)
        self.exclude_special_tokens = exclude_special_tokens
        ids = {
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        }
        self.register_buffer("special", torch.tensor(sorted(ids - {None})), persistent=False)

    @property
    def dim(self) -> int:
        return self.backbone.get_output_embeddings().weight.shape[0]

    @property
    def portable(self) -> bool:
        return super().portable and not self.exclude_special_tokens

    def vectors(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.backbone.base_model(
            input_ids=input_ids, attention_mask=mask
        ).last_hidden_state  # (B, L, H)
        hidden, output = (
            head_transform(self.backbone, hidden),
            self.backbone.get_output_embeddings(),
        )
        counts = mask.bool()
        if self.exclude_special_tokens:
            counts = counts & ~torch.isin(input_ids, self.special)
        return max_pooled_logits(hidden, output.weight, output.bias, counts).relu().log1p()


def positions(backbone: nn.Module) -> int | None:
    """How many tokens the backbone takes; RoBERTa counts positions from padding_idx + 1. None = no
    bound."""
    limit = getattr(backbone.config, "max_position_embeddings", None)
    if limit is None or limit < 1:
        return None
    for module in backbone.modules():
        learned = isinstance(getattr(module, "position_embeddings", None), nn.Embedding)
        if learned and isinstance(getattr(module, "padding_idx", None), int):
            return limit - module.padding_idx - 1
    return limit


def extend_head(
    folder, head: list, hidden: int, projection: int | None, normalize: bool
) -> list[nn.Module]:
    sizes = [module.linear.out_features for module in head if isinstance(module, Dense)]
    if projection and sizes and sizes[-1] != projection:
        raise UserError(
            f"{folder}: projects to {sizes[-1]} dimensions, not {projection} — leave --projection "
            "out"
        )
    if projection and not sizes:
        dense = Dense(hidden, projection)
        nn.init.normal_(dense.linear.weight, std=0.02)
        nn.init.zeros_(dense.linear.bias)
        head = [dense, LayerNorm(projection), *head]
    if normalize and not any(isinstance(module, Normalize) for module in head):
        head = [*head, Normalize()]
    return head
