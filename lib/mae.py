"""Pre-training objectives: one class each, holding the masked language model `lm` and, if it has one, its decoder.

Legend: B texts, L tokens of the longest, D hidden size, V vocabulary, n labelled positions. attention_mask 1 = keep.
h (B, D) = the encoder's last hidden state at position 0, the bottleneck. `places` (n,) index the flat (B·L) positions
that have a label; an LM head runs there and nowhere else.
"""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer
from transformers.activations import ACT2FN

from lib.encoder import VERSION, fingerprint
from lib.files import UserError, read_json, write_json, write_lines
from lib.losses import linear_cross_entropy
from lib.text import (
    corrupt,
    counter_uniform,
    mask_budget,
    position_specific_view,
    special_table,
    step_seed,
    whole_word_mask,
    word_index,
    word_start_table,
)

ARCHITECTURES = ("bert", "roberta", "distilbert")  # config.model_type
ENCODER_MASK, DECODER_MASK, DECODER_ROW = 3, 4, 5  # streams of random numbers, beside data order and dropout


class Term(NamedTuple):
    """One loss term of a batch: sum over its labels, so that the caller can divide by the labels of all processes."""

    loss: Tensor  # sum of the cross-entropies
    labels: int
    correct: Tensor  # labels that scored highest


# ---------------------------------------------------------------------------------------------------------------------
# the masked language model underneath


def read_architecture(model: str | None, model_config: str | None = None, tokenizer: str | None = None):
    """(config, tokenizer) of a checkpoint, or of a config file and a tokenizer's folder; reads no weights and no data.
    UserError for an architecture whose embeddings and LM head the objectives do not know, and for a tokenizer without
    the special tokens they need."""
    if (model is None) == (model_config is None) or (model_config is None) != (tokenizer is None):
        raise UserError("which model? — give --model, or --model_config and --tokenizer to start from scratch")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model or tokenizer)
        if model:
            config = AutoConfig.from_pretrained(model)
        else:
            stated = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | read_json(model_config)
            config = AutoConfig.for_model(stated.pop("model_type", None), **stated)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{model or model_config}: not a model and tokenizer ({reason}) — check the path") from error
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{model or model_config}: {config.model_type} is not supported, its embeddings and LM head are built "
            f"otherwise — use {', '.join(ARCHITECTURES)}"
        )
    for name in ("cls_token", "sep_token", "mask_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no {name} — use the one of a masked LM")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{model or model_config}: {config.vocab_size} embeddings for {len(tokenizer)} tokens of "
            f"{tokenizer.name_or_path} — give the tokenizer that belongs to the model"
        )
    tokenizer.padding_side = "right"  # slot 0 is the bottleneck
    return config, tokenizer


def max_positions(config) -> int:
    """Tokens that a text may have; RoBERTa's positions begin after that of the padding."""
    return config.max_position_embeddings - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)


def load_lm(config, model: str | None) -> tuple[nn.Module, str]:
    """(masked LM in fp32, what the echo says of it): the weights of a checkpoint, or fresh ones if `model` is None. A
    checkpoint without LM head gets a new one; one that lacks anything else is refused."""
    if model is None:
        return AutoModelForMaskedLM.from_config(config, dtype=torch.float32), "from scratch"
    try:
        lm, info = AutoModelForMaskedLM.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{model}: its weights cannot be read ({str(error).strip().splitlines()[0]})") from error
    missing = sorted(info["missing_keys"])
    if any(key.startswith(lm.base_model_prefix) for key in missing) or info["mismatched_keys"]:
        example = (missing or [*info["mismatched_keys"]])[0]
        raise UserError(f"{model}: weights are missing or of another shape ({example}) — is the checkpoint complete?")
    return lm, f"{model}{', new LM head' if missing else ''}"


def head_transform(lm: nn.Module, hidden: Tensor) -> Tensor:
    """The LM head up to its output layer: dense, activation, norm. (n, D) -> (n, D)"""
    if lm.config.model_type == "bert":
        return lm.cls.predictions.transform(hidden)
    if lm.config.model_type == "roberta":
        return lm.lm_head.layer_norm(F.gelu(lm.lm_head.dense(hidden)))
    return lm.vocab_layer_norm(lm.activation(lm.vocab_transform(hidden)))


# ---------------------------------------------------------------------------------------------------------------------
# objectives


class MLM(nn.Module):
    """Masked language modelling, the control every other objective must beat. BERT (arXiv 1810.04805) with whole-word
    masks, or with single tokens: exactly the budget, drawn without replacement, where BERT flips a coin per token."""

    def __init__(self, lm: nn.Module, tokenizer, mask_ratio: float = 0.3, whole_word: bool = True):
        super().__init__()
        self.lm, self.mask_ratio, self.mask_id = lm, mask_ratio, tokenizer.mask_token_id
        special, starts = special_table(tokenizer), word_start_table(tokenizer)
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("starts", starts if whole_word else torch.ones_like(starts), persistent=False)
        self.register_buffer("ordinary_ids", (~special).nonzero()[:, 0], persistent=False)
        self.settings = {"objective": "mlm", "encoder_mask_ratio": mask_ratio, "whole_word": whole_word}

    def forward(self, batch: dict, seed: int) -> dict[str, Term]:
        """batch: input_ids, attention_mask (B, L); rows (B,), counted in the batch of all processes; micro_step.
        -> loss terms by name."""
        corrupted, mask = self.corrupt(batch, seed)
        places = mask.flatten().nonzero()[:, 0]  # before the encoder is queued: a GPU waits here for the count
        hidden = self.encode(corrupted, batch["attention_mask"])
        return {"encoder": self.predict(hidden.flatten(0, 1)[places], batch["input_ids"].flatten()[places])}

    def words(self, batch: dict) -> Tensor:
        return word_index(batch["input_ids"], batch["attention_mask"], self.starts, self.special)

    @torch.no_grad()
    def corrupt(self, batch: dict, seed: int) -> tuple[Tensor, Tensor]:
        """((B, L) ids that the encoder reads, (B, L) bool, True = has a label)."""
        ids, keep, seed = batch["input_ids"], batch["attention_mask"], step_seed(seed, ENCODER_MASK)
        noise = counter_uniform(seed, batch["micro_step"], batch["rows"], (3, ids.shape[1]), ids.device)
        mask = whole_word_mask(self.words(batch), mask_budget(keep, self.mask_ratio), noise[:, 0])
        return corrupt(ids, mask, noise[:, 1:], self.mask_id, self.ordinary_ids), mask

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.lm.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, L, D)

    def predict(self, hidden: Tensor, labels: Tensor) -> Term:
        """hidden: (n, D), labels: (n,)   ->   the LM head's loss there."""
        output = self.lm.get_output_embeddings()
        loss, correct = linear_cross_entropy(head_transform(self.lm, hidden), output.weight, output.bias, labels)
        return Term(loss, len(labels), correct)


class RetroMAE(MLM):
    """MLM, and a one-layer decoder that rebuilds every token of the text from h and a view of the text that is another
    in each row ("enhanced decoding"). RetroMAE (arXiv 2205.12035) section 3; official code `src/pretrain/`.

    query_stream: how h meets the positions. "raw": h + position, the RetroMAE repository; "normed": through the whole
    embedding layer (token type, norm, dropout), FlagEmbedding and DupMAE. Keys and values are the clean embeddings
    with h in slot 0, the decoder's masks are drawn apart from the encoder's, and both share the LM head."""

    def __init__(
        self,
        lm: nn.Module,
        tokenizer,
        mask_ratio: float = 0.3,
        whole_word: bool = True,
        decoder_mask_ratio: float = 0.5,
        decoder_masks: int = 256,
        query_stream: str = "raw",
    ):
        super().__init__(lm, tokenizer, mask_ratio, whole_word)
        self.decoder = TwoStreamLayer(lm.config)
        self.decoder_mask_ratio, self.decoder_masks, self.query_stream = (
            decoder_mask_ratio,
            decoder_masks,
            query_stream,
        )
        self.settings |= {
            "objective": "retromae",
            "decoder_mask_ratio": decoder_mask_ratio,
            "decoder_masks": decoder_masks,
            "query_stream": query_stream,
        }

    def forward(self, batch: dict, seed: int) -> dict[str, Term]:
        ids = batch["input_ids"]
        corrupted, mask = self.corrupt(batch, seed)
        view, target = self.view(batch, seed)
        masked, targets = mask.flatten().nonzero()[:, 0], target.flatten().nonzero()[:, 0]
        hidden = self.encode(corrupted, batch["attention_mask"])
        decoded = self.decode(hidden[:, 0], ids, view, targets)
        return {
            "encoder": self.predict(hidden.flatten(0, 1)[masked], ids.flatten()[masked]),
            "decoder": self.predict(decoded, ids.flatten()[targets]),
        }

    @torch.no_grad()
    def view(self, batch: dict, seed: int) -> tuple[Tensor, Tensor]:
        """((B, L, L) bool, True = row i may attend to column j; (B, L) bool, True = has a label: ordinary tokens)."""
        keep, words, L = batch["attention_mask"], self.words(batch), batch["input_ids"].shape[1]
        place = batch["micro_step"], batch["rows"]
        noise = counter_uniform(step_seed(seed, DECODER_MASK), *place, (min(L, self.decoder_masks), L), keep.device)
        hidden = whole_word_mask(words, mask_budget(keep, self.decoder_mask_ratio), noise)
        pick = counter_uniform(step_seed(seed, DECODER_ROW), *place, (L,), keep.device)
        return position_specific_view(words, keep, hidden, pick), words >= 0

    def decode(self, h: Tensor, input_ids: Tensor, view: Tensor, places: Tensor) -> Tensor:
        """h: (B, D)   input_ids: (B, L) clean   view: (B, L, L) bool, True = visible   ->   (n, D) at `places`."""
        embeddings, config = self.lm.base_model.embeddings, self.lm.config
        keys = torch.cat([h[:, None], embeddings(input_ids=input_ids)[:, 1:]], 1)  # (B, L, D)
        if self.query_stream == "raw":
            first = config.pad_token_id + 1 if config.model_type == "roberta" else 0
            positions = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)
            queries = h[:, None] + embeddings.position_embeddings(positions)
        else:
            queries = embeddings(input_ids=None, inputs_embeds=h[:, None].expand_as(keys))
        return self.decoder(queries, keys, view, places)


class TwoStreamLayer(nn.Module):
    """A transformer layer whose queries and keys come from different streams, with the residual on the QUERY stream:
    by the other one a token would reach its own prediction past the mask. For depth one only: a second layer would see
    token i through its neighbours. Weights N(0, initializer_range), as BERT's."""

    def __init__(self, config):
        super().__init__()
        bert = config.model_type != "distilbert"  # which names the same things otherwise
        D, self.heads = config.hidden_size, config.num_attention_heads
        inner = config.intermediate_size if bert else config.hidden_dim
        eps = config.layer_norm_eps if bert else 1e-12
        self.attention_dropout = config.attention_probs_dropout_prob if bert else config.attention_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if bert else config.dropout)
        self.activation = ACT2FN[config.hidden_act if bert else config.activation]
        self.query, self.key, self.value, self.attention_output = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, inner), nn.Linear(inner, D)
        self.attention_norm, self.output_norm = nn.LayerNorm(D, eps=eps), nn.LayerNorm(D, eps=eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
                nn.init.zeros_(module.bias)

    def forward(self, queries: Tensor, keys: Tensor, view: Tensor, places: Tensor) -> Tensor:
        """queries, keys: (B, L, D)   view: (B, L, L) bool, True = visible   places: (n,)   ->   (n, D).
        All rows attend (one product), but only those at `places` go on: padding costs no feed-forward."""
        B, L, D = queries.shape
        q, k, v = (
            layer(x).view(B, L, self.heads, -1).transpose(1, 2)  # (B, heads, L, D / heads)
            for layer, x in ((self.query, queries), (self.key, keys), (self.value, keys))
        )
        dropout = self.attention_dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=view[:, None], dropout_p=dropout)
        x = x.transpose(1, 2).reshape(B * L, D)[places]
        x = self.attention_norm(self.dropout(self.attention_output(x)) + queries.flatten(0, 1)[places])
        return self.output_norm(self.dropout(self.down(self.activation(self.up(x)))) + x)


# ---------------------------------------------------------------------------------------------------------------------
# on disk: a Hugging Face folder with its LM head, and the decoder in a file of its own


def load_decoder(model: nn.Module, folder: str | None) -> str:
    """Go on with the decoder that `folder` holds if it is one of the same objective -> what the echo says of it."""
    settings = Path(folder or "") / "decoder.json"
    if not hasattr(model, "decoder"):
        return "none"
    if folder is None or not settings.is_file():
        return "new"
    found = read_json(settings)["objective"]
    if found != model.settings["objective"]:
        return f"new, that of {folder} is of the objective {found}"
    path = settings.with_suffix(".safetensors")
    try:
        model.decoder.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: names or shapes
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"{path}: does not fit this model ({reason}) — remove {settings} to start a new one"
        ) from error
    return f"that of {folder}"


def stated_title(model: str | None) -> str | None:
    """How titles are joined, if the folder `model` is a checkpoint of ours that says so."""
    path = Path(model or "") / "bottleneck.json"
    return read_json(path)["title"] if model and path.is_file() else None


def save_checkpoint(model: nn.Module, tokenizer, folder, title: str, card: dict) -> None:
    """The LM for AutoModel and AutoModelForMaskedLM, its tokenizer, decoder.safetensors with decoder.json, how titles
    were joined, README.md from `card` (base, data, command, metrics). Staged, read back and compared, then moved into
    `folder`, one rename per file; it is the caller who marks the folder complete."""
    staging = Path(folder) / ".tmp-checkpoint"
    shutil.rmtree(staging, ignore_errors=True)
    model.lm.save_pretrained(staging)
    tokenizer.backend_tokenizer.no_truncation()  # else the last cut would be saved as a setting
    tokenizer.save_pretrained(staging)
    ids = {"ids": fingerprint(tokenizer), "version": tokenizers.__version__}
    write_json(staging / "bottleneck.json", {"version": VERSION, "title": title, "tokenizer": ids})
    if hasattr(model, "decoder"):
        decoder = {name: tensor.contiguous().cpu() for name, tensor in model.decoder.state_dict().items()}
        save_file(decoder, staging / "decoder.safetensors", metadata={"format": "pt"})
        write_json(staging / "decoder.json", model.settings)
    lines = [f"# {model.lm.config.model_type}, pre-trained: {model.settings['objective']}", ""]
    lines += [f"- **{name}**: {value}" for name, value in {**card, "settings": model.settings}.items()]
    write_lines(staging / "README.md", [*lines, "", "`AutoModelForMaskedLM` loads it with its LM head."])
    again, info = AutoModelForMaskedLM.from_pretrained(staging, dtype=torch.float32, output_loading_info=True)
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    here = {name: tensor.cpu() for name, tensor in model.lm.state_dict().items()}
    wrong += [name for name, tensor in again.state_dict().items() if not torch.equal(tensor, here[name])]
    if wrong:
        raise RuntimeError(f"{staging}: what was saved does not read back: {wrong[:3]}")
    mode = (staging / "README.md").stat().st_mode
    for path in sorted(staging.iterdir()):
        path.chmod(mode)  # safetensors lets only the owner read
        os.replace(path, Path(folder) / path.name)
    staging.rmdir()


@torch.no_grad()
def preview(model: nn.Module, tokenizer, batch: dict, seed: int) -> dict[str, str]:
    """What a dry run shows of a batch: its first text as encoder and decoder see it."""
    ids, lengths = batch["input_ids"][0], batch["attention_mask"].sum(1)
    text = ids[: lengths[0]]
    corrupted, mask = model.corrupt(batch, seed)
    facts = {
        "first text": tokenizer.decode(text),
        "encoder reads": tokenizer.decode(corrupted[0, : lengths[0]]),
        "encoder predicts": f"{mask.sum() / lengths.sum():.1%} of the tokens",
    }
    if hasattr(model, "decoder"):
        row = len(text) // 2
        seen = model.view(batch, seed)[0][0, row, : len(text)].tolist()
        tokens = [
            token if see else "_" for token, see in zip(tokenizer.convert_ids_to_tokens(text), seen, strict=True)
        ]
        target = tokenizer.convert_ids_to_tokens(text)[row]
        facts[f"decoder row {row}"] = f"{target} from h and {' '.join(tokens[1:])}"
    return facts | {"tokens": f"median {int(lengths.median())} of the first {len(lengths)} blocks"}
