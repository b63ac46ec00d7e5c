"""The bi-encoder, dense or sparse: one tower for queries and passages, and its checkpoint on disk.

A checkpoint is a Hugging Face folder that is a sentence-transformers folder as well. A dense one:

    config.json, model.safetensors, tokenizer files   backbone, as AutoModel and AutoTokenizer read it
    modules.json                                      Transformer, Pooling, then Dense, LayerNorm, Normalize if used
    1_Pooling/, 2_Dense/, 3_LayerNorm/                their settings and weights
    sentence_bert_config.json                         passage length; the query length where it differs
    config_sentence_transformers.json                 prompts
    bottleneck.json                                   how titles are joined, how passages are cut into chunks, what
                                                      the tokenizer gave when it was saved

A sparse one has the masked language model as AutoModelForMaskedLM reads it, and MLMTransformer, SpladePooling for
modules.

The older spelling of these files is written, which newer sentence-transformers read too; only a query length of its
own needs sentence-transformers 6 (earlier ones refuse the key). With `sep` titles, which it cannot join, passages of
several chunks or cut to so many characters, or special tokens excluded from the pooling, there is no modules.json: the
list is in bottleneck.json, and the folder does not claim to be loadable there.

B texts, L tokens, H hidden size, V vocabulary, D dimensions of a vector: V of a sparse one. attention_mask 1 = keep.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import safetensors.torch
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForTextEncoding, AutoTokenizer

from lib.files import UserError, atomic, read_json, write_json, write_lines
from lib.text import TextFormat, format_texts, pad, to_ids
from lib.vocab import ARCHITECTURES, head_transform, max_pooled_logits

VERSION = 1  # of bottleneck.json
CUT_VERSION = 2  # of one that states max_chunks or max_characters: a reader that does not know them must refuse
# The logits of a new LM head are normal, with the norm of the term's embedding for standard deviation: its inputs
# leave a LayerNorm. So many of these lower, some per cent of the terms have their maximum above zero, as with a
# trained head, and not all of them, from which training must first find back.
NEW_HEAD = 3.5
FILES = (  # of a checkpoint: what decides its vectors
    "config.json",
    "model*.safetensors*",
    "pytorch_model*",
    "*.py",
    "*token*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "bottleneck.json",
    "[0-9]*_*/*",
)
PROBES = (  # what the tokenizer is asked when a checkpoint is saved, and again when it is loaded
    "The quick brown fox jumps over the lazy dog.",
    "Déjà vu in the naïve Straße, 3.14159 and 10,000 km²",
    "机器学习 モデル 한국어 العربية",
    "<b>tags</b>\ttabs  spaces\u00a0[SEP] </s> 😀",
    "pneumonoultramicroscopicsilicovolcanoconiosis e-mail C++ don't",
)
TRIAL = (  # what is encoded before and after a save
    ("", "ants"),
    ("Ants", "A queen may live for decades."),
    ("", "How long does a volcano sleep before it erupts again?"),
    ("Glaciers", "Ice that flows downhill. " * 20),
    ("", "1 + 1 = 2"),
    ("Ünïcödé", "déjà vu, 机器学习"),
    ("A title alone", ""),
    ("", "the " * 400),
)


# ---------------------------------------------------------------------------------------------------------------------
# model


class Dense(nn.Module):
    """activation(Linear(x)), named as in sentence-transformers."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str = "Identity"):
        super().__init__()
        self.linear, self.activation = nn.Linear(in_features, out_features, bias), getattr(nn, activation)()

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


class BiEncoder(nn.Module):
    """Dense: backbone -> pooling (the first token, or the mean over the attention mask) -> head modules -> vector.

    `format` is how the checkpoint wants its texts; `stated` holds those of its settings that the folder really names
    (a plain Hugging Face folder names none). Pooling and head run in fp32 under autocast."""

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer,
        pooling: Literal["cls", "mean", "max"],
        head: list[nn.Module],
        form: TextFormat,
        stated: dict | None = None,
    ):
        super().__init__()
        self.backbone, self.head = backbone, nn.ModuleList(head)
        self.tokenizer, self.pooling, self.format, self.stated = tokenizer, pooling, form, stated or {}

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
        """Whether sentence-transformers can express it: it joins no title by a separator, and cuts a passage to one
        chunk of tokens only."""
        return self.format.title != "sep" and self.format.max_chunks == 1 and not self.format.max_characters

    def encode(self, batch: dict[str, Tensor] | list[dict[str, Tensor]]) -> Tensor:
        """{"input_ids": (B, L), "attention_mask": (B, L)} -> (B, D) fp32. A list of such chunks, each padded to its
        own longest text, is encoded chunk by chunk and concatenated in that order."""
        if isinstance(batch, list):
            return torch.cat([self.encode(chunk) for chunk in batch])
        return self.vectors(batch["input_ids"], batch["attention_mask"])

    def vectors(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L), (B, L) -> (B, D) fp32."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=mask).last_hidden_state  # (B, L, H)
        with torch.autocast(hidden.device.type, enabled=False):
            if self.pooling == "cls":
                first = mask.argmax(1)  # not 0 where the tokenizer pads on the left
                reps = hidden[torch.arange(len(hidden), device=hidden.device), first].float()  # (B, H)
            else:
                weights = mask.unsqueeze(-1).float()
                reps = (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
            for module in self.head:
                reps = module(reps)
        return reps

    def forward(self, query=None, passage=None) -> tuple[Tensor | None, Tensor | None]:
        """(q_reps, p_reps) of two batches as `encode` takes them, either of which may be None. Both sides in one call,
        so that one DDP forward covers both."""
        return tuple(None if side is None else self.encode(side) for side in (query, passage))


class SparseBiEncoder(BiEncoder):
    """Sparse: a weight for every term of the vocabulary, log(1 + relu(max over positions of the masked LM's logits)):
    SPLADE-max (arXiv 2109.10086), LexMAE (2208.14754). The backbone is the LM with its head.

    exclude_special_tokens   LexMAE: no maximum over the positions of [CLS] and [SEP], whatever their number; else only
                             padding is excluded (SPLADE, sentence-transformers). No term is ever excluded.
    A text without a position that counts is the zero vector."""

    def __init__(
        self, lm: nn.Module, tokenizer, exclude_special_tokens: bool, form: TextFormat, stated: dict | None = None
    ):
        super().__init__(lm, tokenizer, "max", [], form, stated)
        self.exclude_special_tokens = exclude_special_tokens
        ids = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
        self.register_buffer("special", torch.tensor(sorted(ids - {None})), persistent=False)

    @property
    def dim(self) -> int:
        return self.backbone.get_output_embeddings().weight.shape[0]

    @property
    def portable(self) -> bool:
        return super().portable and not self.exclude_special_tokens

    def vectors(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.backbone.base_model(input_ids=input_ids, attention_mask=mask).last_hidden_state  # (B, L, H)
        hidden, output = head_transform(self.backbone, hidden), self.backbone.get_output_embeddings()
        counts = mask.bool()
        if self.exclude_special_tokens:
            counts = counts & ~torch.isin(input_ids, self.special)
        return max_pooled_logits(hidden, output.weight, output.bias, counts).relu().log1p()


# ---------------------------------------------------------------------------------------------------------------------
# load


def load_encoder(
    model,
    pooling: Literal["cls", "mean"] | None = None,
    overrides: dict | None = None,
    projection: int | None = None,
    normalize: bool = False,
    strict: bool = False,
    trust_remote_code: bool = False,
    head: Literal["dense", "sparse"] | None = None,
    exclude_special_tokens: bool = False,
    allow_new_head: bool = False,
) -> BiEncoder:
    """A bi-encoder in fp32 from our folder, any sentence-transformers folder of these two kinds, or a Hugging Face
    folder with `pooling`, or with `head` sparse. `model` may also be a name on the hub.

    overrides    fields of TextFormat in place of what the checkpoint states; None = as it states. With `strict` one
                 that differs is an error (a stage that only uses the checkpoint), else it is the new checkpoint's
    projection   add ANCE's head, Linear(H -> projection) + LayerNorm, weights from N(0, 0.02), biases zero, drawn from
                 torch's generator; a checkpoint that has one of this size keeps it. 0 or None = as the checkpoint is
    normalize    add L2 normalisation at the end if there is none
    head         None = as the folder states. sparse: of anything with an LM head, or with `allow_new_head` a new one,
                 drawn from torch's generator
    exclude_special_tokens   of a new sparse head; a folder that states its own keeps it

    UserError: missing weights (but BERT's pooler, which is never kept), a pooling that contradicts the folder, lengths
    beyond the model's positions, several chunks with a sparse head or a slow tokenizer, a tokenizer that gives other
    ids than when the checkpoint was saved, modules or settings that cannot be expressed here."""
    folder = checkpoint_folder(model)
    private = read_json(folder / "bottleneck.json") if (folder / "bottleneck.json").is_file() else {}
    if private.get("version", VERSION) > CUT_VERSION:
        raise UserError(f"{folder}: written by a newer version of this project — update it")
    modules = private.get("modules") or _read_list(folder / "modules.json")
    base, stored_pooling, layers = folder, None, []
    if modules:
        base, stored_pooling, layers = _read_head(folder, modules)
    stored = None if not modules else "sparse" if stored_pooling == "max" else "dense"
    sparse = (head or stored) == "sparse"
    if stored == "sparse" and not sparse:
        raise UserError(f"{folder}: a sparse checkpoint — add --head sparse")
    if stored == "dense" and sparse and strict:
        raise UserError(f"{folder}: a dense checkpoint, not a sparse one — leave --head out")
    if sparse and (pooling or projection or normalize):
        raise UserError("a sparse head is pooled by max — leave out --pooling, --projection and --normalize")
    if not modules and not pooling and not sparse:
        raise UserError(f"{folder}: states no pooling (a plain Hugging Face folder) — add --pooling cls or mean")
    if modules and not sparse and pooling not in (None, stored_pooling):
        raise UserError(f"{folder}: its pooling is {stored_pooling}, not {pooling} — leave --pooling out")

    auto = _masked_lm if sparse else _encoder
    backbone, tokenizer = _load_backbone(base, auto, allow_new_head, trust_remote_code)
    limit = positions(backbone)
    stated = {}
    if modules:
        stated = _stated_format(folder, base, stored, tokenizer, limit)
    if private:
        stated = {"query_prompt": "", "passage_prompt": "", **stated, "title": private["title"]}
        if modules:
            stated |= {"max_chunks": private.get("max_chunks", 1), "max_characters": private.get("max_characters", 0)}
        if private["tokenizer"]["ids"] != fingerprint(tokenizer):
            raise UserError(
                f"{folder}: the tokenizer gives other ids than when the checkpoint was saved (tokenizers "
                f"{private['tokenizer']['version']} then, {tokenizers.__version__} now) — install that version"
            )
    form = TextFormat(**stated)
    for name in ("max_query_length", "max_passage_length"):
        setattr(form, name, min(getattr(form, name), limit or getattr(form, name)))
    for name, value in (overrides or {}).items():
        assert name in asdict(form), name
        if value is None:
            continue
        if strict and stated.get(name, value) != value:
            raise UserError(
                f"{folder}: its {name} is {stated[name]!r}, not {value!r} — leave it out, or add --override"
            )
        if name.endswith("_length") and not 2 < value <= (limit or value):
            raise UserError(f"{folder}: {name} {value} — the model has {limit} positions, give 3 to {limit}")
        least = {"max_chunks": 1, "max_characters": 0}.get(name)
        if least is not None and value < least:
            raise UserError(f"{folder}: {name} {value} — give {least} or more")
        setattr(form, name, value)
    if form.title == "sep" and tokenizer.sep_token is None:
        raise UserError(f"{folder}: the tokenizer has no separator token for --title sep — use --title space")
    if form.max_chunks > 1 and (sparse or not tokenizer.is_fast):
        reason = "a sparse vector is one per text" if sparse else "a slow tokenizer gives no chunks"
        raise UserError(f"{folder}: max_chunks {form.max_chunks}, but {reason} — use --max_chunks 1")
    if sparse:
        if stored == "sparse":
            own = private.get("exclude_special_tokens", False)
            if exclude_special_tokens and not own:
                raise UserError(f"{folder}: pools over special tokens too — leave --exclude_special_tokens out")
            exclude_special_tokens = own
        return SparseBiEncoder(backbone, tokenizer, exclude_special_tokens, form, stated).eval()
    if normalize and strict and modules and not any(isinstance(module, Normalize) for module in layers):
        raise UserError(f"{folder}: its vectors are not normalised — leave --normalize out, or add --override")
    layers = _extend_head(folder, layers, backbone.config.hidden_size, projection, normalize)
    return BiEncoder(backbone, tokenizer, pooling or stored_pooling, layers, form, stated).eval()


def checkpoint_folder(model) -> Path:
    """The folder of a checkpoint: as given, or fetched from the Hugging Face hub (or its cache) by name."""
    folder = Path(model)
    if not folder.exists() and len(folder.parts) <= 2 and not folder.is_absolute():
        from huggingface_hub import snapshot_download

        try:
            skip = ["*.onnx", "*.h5", "*.msgpack", "*.ot", "onnx/*", "openvino/*"]
            folder = Path(snapshot_download(str(model), ignore_patterns=skip))
        except Exception as error:  # of many kinds: no network, no such name, no access
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{model}: neither a folder nor to be had from the hub ({reason}) — check it") from error
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        found = "no config.json in it" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {found} — give the folder of a checkpoint")
    return folder


def _encoder(config):
    return AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel  # T5: the encoder alone


def _masked_lm(config):
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{config.name_or_path}: the LM head of {config.model_type} is built otherwise than those a sparse head "
            f"knows — use {', '.join(ARCHITECTURES)}"
        )
    return AutoModelForMaskedLM


def _load_backbone(base: Path, auto: Callable, allow_new_head: bool, trust_remote_code: bool):
    remote = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(base, **remote)
        backbone, report = auto(config).from_pretrained(
            base, config=config, dtype=torch.float32, output_loading_info=True, **remote
        )
        tokenizer = AutoTokenizer.from_pretrained(base, **remote)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, safetensors.SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{base}: cannot be loaded ({reason}) — give the folder of a checkpoint") from error
    wrong = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    if auto is _masked_lm and wrong and not any(key.startswith(backbone.base_model_prefix) for key in wrong):
        if not allow_new_head:
            raise UserError(f"{base}: has no LM head for --head sparse — add --allow_new_head to train a new one")
        wrong = []
        with torch.no_grad():
            output = backbone.get_output_embeddings()
            output.bias.copy_(-NEW_HEAD * output.weight.norm(dim=1))
    wrong += [str(key) for key in report.get("mismatched_keys", ())]
    if wrong:
        raise UserError(
            f"{base}: {len(wrong)} weights are missing or of another shape ({sorted(wrong)[0]}, ...) — give a "
            f"complete {config.model_type} checkpoint"
        )
    if getattr(backbone, "pooler", None) is not None:  # it would be a parameter without gradient
        backbone.pooler = None
    align(backbone)
    if tokenizer.pad_token_id is None:
        raise UserError(f"{base}: the tokenizer has no padding token — set one and save it in the folder")
    if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
        raise UserError(f"{base}: the tokenizer has more tokens than the model embeddings — give the two that match")
    return backbone, tokenizer


def align(model: nn.Module) -> None:
    """Copy the weights of a model that from_pretrained has just loaded. In a run of one process they lie in the mapped
    file, not aligned as those of several processes are, and MKL would add in another order."""
    for weight in model.parameters():
        weight.data = weight.data.clone()


def positions(backbone: nn.Module) -> int | None:
    """How many tokens the backbone takes; RoBERTa counts positions from padding_idx + 1. None = no bound."""
    limit = getattr(backbone.config, "max_position_embeddings", None)
    if limit is None or limit < 1:
        return None
    for module in backbone.modules():
        learned = isinstance(getattr(module, "position_embeddings", None), nn.Embedding)
        if learned and isinstance(getattr(module, "padding_idx", None), int):
            return limit - module.padding_idx - 1
    return limit


def _extend_head(folder, head: list, hidden: int, projection: int | None, normalize: bool) -> list[nn.Module]:
    sizes = [module.linear.out_features for module in head if isinstance(module, Dense)]
    if projection and sizes and sizes[-1] != projection:
        raise UserError(f"{folder}: projects to {sizes[-1]} dimensions, not {projection} — leave --projection out")
    if projection and not sizes:
        dense = Dense(hidden, projection)
        nn.init.normal_(dense.linear.weight, std=0.02)
        nn.init.zeros_(dense.linear.bias)
        head = [dense, LayerNorm(projection), *head]
    if normalize and not any(isinstance(module, Normalize) for module in head):
        head = [*head, Normalize()]
    return head


# ---------------------------------------------------------------------------------------------------------------------
# sentence-transformers' files, in the spelling of any version


def _read_list(path: Path) -> list[dict] | None:
    return read_json(path) if path.is_file() else None


def _settings(folder: Path) -> dict:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _refuse(place, what: str):
    raise UserError(f"{place}: {what}, which cannot be expressed here — give a checkpoint without it")


def _read_head(folder: Path, modules: list[dict]) -> tuple[Path, str, list[nn.Module]]:
    """(folder of the backbone, pooling, the modules behind the pooling); the pooling of a sparse head is max."""
    path = folder / "modules.json"
    names = [one["type"].rsplit(".", 1)[-1] for one in modules]
    for one in modules:
        if not one["type"].startswith("sentence_transformers."):
            _refuse(path, f"the module {one['type']}")
    if names in (["MLMTransformer", "SpladePooling"], ["Transformer", "SpladePooling"]):
        place = folder / modules[1]["path"]
        config = {"pooling_strategy": "max", "activation_function": "relu", **_settings(place)}
        for key, value in (("pooling_strategy", "max"), ("activation_function", "relu")):
            if config[key] != value:
                _refuse(place, f"{key} {config[key]} (not {value})")
        return folder / modules[0]["path"], "max", []
    if names[:2] != ["Transformer", "Pooling"]:
        _refuse(path, f"a model of {' + '.join(names[:2])} (not Transformer + Pooling)")
    pooling, head = _read_pooling(folder / modules[1]["path"]), []
    for name, one in zip(names[2:], modules[2:], strict=True):
        place = folder / one["path"]
        config = _settings(place)
        for key in ("module_input_name", "module_output_name"):
            if config.get(key) not in (None, "sentence_embedding"):
                _refuse(place, f"{key} {config[key]}")
        if name == "Dense":
            activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
            short = activation.rsplit(".", 1)[-1]
            if config.get("use_residual") or not activation.startswith("torch.nn.") or not hasattr(nn, short):
                _refuse(place, "a residual Dense" if config.get("use_residual") else f"the activation {activation}")
            module = Dense(config["in_features"], config["out_features"], config.get("bias", True), short)
        elif name == "LayerNorm":
            module = LayerNorm(config["dimension"])
        elif name == "Normalize":
            module = Normalize()
        else:
            _refuse(path, f"the module {one['type']}")
        if name != "Normalize":
            _read_weights(place, module)
        head.append(module)
    return folder / modules[0]["path"], pooling, head


def _read_pooling(place: Path) -> str:
    config = _settings(place)
    modes = config.get("pooling_mode")
    if modes is None:  # older: one flag per mode; none of them set means mean
        flags = {"cls_token": "cls", "mean_tokens": "mean"}
        on = [key.removeprefix("pooling_mode_") for key in config if key.startswith("pooling_mode_") and config[key]]
        modes = [flags.get(key, key) for key in on] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if modes not in (["cls"], ["mean"]):
        _refuse(place, f"pooling by {' + '.join(modes)} (not cls or mean)")
    if not config.get("include_prompt", True):
        _refuse(place, "pooling without the prompt (include_prompt false)")
    return modes[0]


def _read_weights(place: Path, module: nn.Module) -> None:
    safe, old = place / "model.safetensors", place / "pytorch_model.bin"
    if not safe.is_file() and not old.is_file():
        raise UserError(f"{place}: no model.safetensors in it — the checkpoint is not complete")
    weights = safetensors.torch.load_file(safe) if safe.is_file() else torch.load(old, weights_only=True)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: weights do not fit config.json ({reason}) — give a complete checkpoint") from error


def _stated_format(folder: Path, base: Path, stored: str, tokenizer, limit: int | None) -> dict:
    """The fields of TextFormat that the folder names: prompts if there are any, and lengths."""
    general = folder / "config_sentence_transformers.json"
    config = read_json(general) if general.is_file() else {}
    expected = "SparseEncoder" if stored == "sparse" else "SentenceTransformer"
    if config.get("model_type", expected) != expected:
        _refuse(general, f"a {config['model_type']}")
    if config.get("max_active_dims"):
        _refuse(general, f"vectors cut to {config['max_active_dims']} terms (max_active_dims)")
    if config.get("truncate_dim"):
        _refuse(general, f"vectors cut to {config['truncate_dim']} dimensions (truncate_dim)")
    # sentence-transformers 6 adds an empty "document" prompt, which hides the others there: take the first not empty
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    query = prompts.get("query") or prompts.get(default) or ""
    passage = next(filter(None, map(prompts.get, ("document", "passage", "corpus", default))), "")
    stated = {"query_prompt": query, "passage_prompt": passage} if query or passage else {}

    names = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    paths = [base / f"sentence_{name}_config.json" for name in names]
    path = next((path for path in paths if path.is_file()), paths[0])
    config = read_json(path) if path.is_file() else {}
    outputs = {"feature-extraction": "last_hidden_state", "fill-mask": "logits"}
    task = config.get("transformer_task", "feature-extraction")
    if task not in outputs:
        _refuse(path, f"the task {task}")
    text = {"text": {"method": "forward", "method_output_name": outputs[task]}}
    if config.get("modality_config", text) != text:
        _refuse(path, "inputs other than plain text")
    refused = (
        "processing_kwargs",
        "query_expansion",
        "tokenizer_args",
        "processor_kwargs",
        "config_args",
        "config_kwargs",
    )
    for key in refused:
        if config.get(key):
            _refuse(path, f"{key} {config[key]}")
    if config.get("do_lower_case") and tokenizer.backend_tokenizer.normalizer is None:
        tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    elif config.get("do_lower_case") and tokenizer.backend_tokenizer.normalizer.normalize_str("A") != "a":
        steps = [tokenizers.normalizers.Lowercase(), tokenizer.backend_tokenizer.normalizer]
        tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
    longest = config.get("max_seq_length") or min(tokenizer.model_max_length, limit or tokenizer.model_max_length)
    if longest < 1_000_000:  # a tokenizer without a limit has 10^30
        lengths = config.get("query_length") or longest, config.get("document_length") or longest
        lengths = [min(length, limit or length) for length in lengths]
        stated |= {"max_query_length": lengths[0], "max_passage_length": lengths[1]}
    return stated


# ---------------------------------------------------------------------------------------------------------------------
# save


def save_encoder(model: BiEncoder, folder, card: dict, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write the checkpoint (see the top) under a temporary name, read it back, and only then give it its name. For the
    main process alone.

    card         what the model card says: {"base": ..., "data": {...}, "command": [...], "metrics": {...}}
    state_dict   weights to write in place of the model's own, under the same names

    A folder that also holds other things (log, resume state) keeps them; the files of the checkpoint are replaced.
    UserError when the folder, read again, does not give the same vectors for 8 fixed texts."""
    folder, training = Path(folder), model.training
    weights = model.state_dict() if state_dict is None else state_dict
    with _taking_place_of(folder) as temporary:
        _write_folder(model, temporary, weights, {"name": folder.name, **card})
        model.eval()
        device = next(model.parameters()).device
        expected, found = _trial(model, weights), _trial(load_encoder(temporary).to(device))
        model.train(training)
        if not torch.allclose(expected, found, rtol=1e-4, atol=1e-5):
            gap = (expected - found).abs().max().item()
            raise UserError(
                f"{folder}: the checkpoint gives other vectors when it is read back (by {gap:.3g}) and was not kept — "
                "look for NaN in training, a full disk, other versions of transformers or tokenizers"
            )


def checkpoint_files(folder) -> list[Path]:
    """What decides the vectors of a checkpoint (weights, tokenizer, head, settings), relative to `folder`, in a fixed
    order; neither the model card nor what a training run keeps beside it."""
    folder, found = Path(folder), set()
    for pattern in FILES:
        found |= {path.relative_to(folder) for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def model_hash(folder) -> str:
    """sha256 over names and contents of checkpoint_files(folder)."""
    digest = hashlib.sha256()
    for path in checkpoint_files(folder):
        content = hashlib.sha256()
        with open(Path(folder) / path, "rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
        digest.update(f"{path.as_posix()}\0{content.hexdigest()}\n".encode())
    return digest.hexdigest()


def fingerprint(tokenizer) -> str:
    """A hash of the ids of fixed strings."""
    return hashlib.sha256(repr(to_ids(PROBES, tokenizer, 256)).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _taking_place_of(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well; or, if that holds more than a checkpoint,
    whose entries take the place of the old ones in it."""
    old = {path.parts[0] for path in checkpoint_files(folder)} | {"README.md"}
    if not folder.is_dir() or {path.name for path in folder.iterdir()} <= old:
        with atomic(folder) as temporary:
            temporary.mkdir()
            yield temporary
        return
    temporary = folder / f".tmp-{os.getpid()}-checkpoint"
    temporary.mkdir()
    try:
        yield temporary
        new = {path.name for path in temporary.iterdir()}
        for name in sorted(old | new):
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            elif name not in new:
                (folder / name).unlink(missing_ok=True)
            if name in new:
                os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary)


def _write_folder(model: BiEncoder, folder: Path, weights: dict[str, Tensor], card: dict) -> None:
    form, tokenizer = model.format, model.tokenizer
    own = {name.removeprefix("backbone."): w for name, w in weights.items() if name.startswith("backbone.")}
    model.backbone.save_pretrained(folder, state_dict=own)
    if tokenizer.is_fast:  # else the last cut would be stored as a setting
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)

    sparse = isinstance(model, SparseBiEncoder)
    names = ["MLMTransformer", "SpladePooling"] if sparse else ["Transformer", "Pooling"]
    names += [type(module).__name__ for module in model.head]
    paths = ["", *(f"{index}_{name}" for index, name in enumerate(names[1:], 1))]
    home = "sentence_transformers.sparse_encoder.models" if sparse else "sentence_transformers.models"
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{home}.{name}"}
        for index, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    if sparse:
        pooling = {"pooling_strategy": "max", "activation_function": "relu", "word_embedding_dimension": model.dim}
    else:
        pooling = {"word_embedding_dimension": model.backbone.config.hidden_size}
        for mode, name in (("cls_token", "cls"), ("mean_tokens", "mean"), ("max_tokens", "max")):
            pooling[f"pooling_mode_{mode}"] = model.pooling == name
    write_json(folder / paths[1] / "config.json", pooling)
    for index, (module, path) in enumerate(zip(model.head, paths[2:], strict=True)):
        if isinstance(module, Normalize):
            continue  # has neither settings nor weights
        own = {name: weights[f"head.{index}.{name}"].contiguous() for name in module.state_dict()}
        write_json(folder / path / "config.json", module.settings())
        safetensors.torch.save_file(own, folder / path / "model.safetensors")

    lengths = {"max_seq_length": form.max_passage_length, "do_lower_case": False}
    if form.max_query_length != form.max_passage_length:
        lengths["query_length"] = form.max_query_length
    write_json(folder / "sentence_bert_config.json", lengths)
    general = {
        **({"model_type": "SparseEncoder"} if sparse else {}),
        "__version__": {"transformers": transformers.__version__, "pytorch": torch.__version__},
        "prompts": {"query": form.query_prompt, "document": form.passage_prompt},
        "default_prompt_name": None,
        "similarity_fn_name": "dot",
    }
    write_json(folder / "config_sentence_transformers.json", general)
    ids = {"ids": fingerprint(tokenizer), "version": tokenizers.__version__}
    private = {"version": VERSION, "title": form.title, "tokenizer": ids}
    if form.max_chunks > 1 or form.max_characters:
        private["version"] = CUT_VERSION
        private |= {"max_chunks": form.max_chunks, "max_characters": form.max_characters}
    if sparse:
        private["exclude_special_tokens"] = model.exclude_special_tokens
    if model.portable:
        write_json(folder / "bottleneck.json", private)
        write_json(folder / "modules.json", modules)
    else:
        write_json(folder / "bottleneck.json", {**private, "modules": modules})
    write_lines(folder / "README.md", _card(model, names[1:], card))
    mode = (folder / "README.md").stat().st_mode
    for path in folder.rglob("*.safetensors"):  # which safetensors lets only the owner read
        path.chmod(mode)


def _card(model: BiEncoder, modules: list[str], card: dict) -> Iterator[str]:
    form = model.format
    sparse = isinstance(model, SparseBiEncoder)
    library = "sentence-transformers" if model.portable else "transformers"
    yield from ("---", f"library_name: {library}", "pipeline_tag: sentence-similarity", "---", "")
    yield from (f"# {card['name']}", "")
    head = " + ".join([f"{model.pooling} pooling", *modules[1:]])
    kind = f"Dense retriever: {head}, {model.dim} dimensions"
    if sparse:
        over = "special tokens excluded" if model.exclude_special_tokens else "special tokens included"
        kind = f"Sparse retriever: log(1 + relu(max over positions of the LM's logits)), {over}, {model.dim} terms"
    yield f"{kind}, compared by dot product."
    yield from ("", "| | |", "| --- | --- |")
    for name, value in {**asdict(form), **{k: v for k, v in card.items() if k != "name"}}.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items() if v is not None)
        value = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
        yield f"| {name.replace('_', ' ')} | `{value}` |"


@torch.no_grad()
def _trial(model: BiEncoder, weights: dict[str, Tensor] | None = None) -> Tensor:
    """(16, D) vectors of 8 fixed texts, as queries and as passages."""
    device = next(model.parameters()).device
    sides = []
    for kind in ("query", "passage"):
        strings = format_texts(TRIAL, kind, model.format, model.tokenizer)
        batch = pad(to_ids(strings, model.tokenizer, model.format.max_length(kind)), model.tokenizer)
        sides.append({name: values.to(device) for name, values in batch.items()})
    if weights is None:
        return torch.cat(model(*sides)).cpu()
    weights = {name: weights[name].to(device) for name, _ in model.named_parameters()}  # tied ones once
    autocast = model.__dict__.pop("forward", None)  # hung on the instance by Accelerate; compare in fp32
    try:
        return torch.cat(torch.func.functional_call(model, weights, tuple(sides))).cpu()
    finally:
        if autocast is not None:
            model.forward = autocast
