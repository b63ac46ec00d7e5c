"""The only door for model folders: bi-encoders, masked LMs with their decoder, cross-encoders;
load, save, read back.

A checkpoint is a Hugging Face folder that is a sentence-transformers folder as well
(lib/sentence_files.py):

    config.json, model.safetensors, tokenizer files   backbone, as AutoModel and AutoTokenizer read
                                                      it; of a sparse
                                                      bi-encoder or a masked LM, as
                                                      AutoModelForMaskedLM does
    modules.json, 1_Pooling/, ...                     the head of a bi-encoder, for
                                                      sentence-transformers and for us
    isthmus.json                                      how titles are joined, how passages are cut,
                                                      what the tokenizer
                                                      gave when it was saved
    decoder.safetensors, decoder.json                 the decoder of a pre-training objective

Weights and tokenizers never run code of the checkpoint, unless trust_remote_code says so.
B texts, D dimensions of a vector.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
)

from lib.encoder import BiEncoder, Normalize, SparseBiEncoder, extend_head, positions
from lib.files import UserError, atomic, read_json, write_json, write_lines
from lib.lm_head import ARCHITECTURES
from lib.sentence_files import read_head, read_list, stated_format, write_head
from lib.text import TextFormat, format_texts, pad, to_ids

VERSION = 1  # of isthmus.json
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


# The logits of a new LM head are normal, with the norm of the term's embedding for standard
# deviation: its inputs leave a LayerNorm. So many of these lower, some per cent of the terms have
# their maximum above zero, as with a trained head, and not all of them, from which training must
# first find back.
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
    "isthmus.json",
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
    ((), "ants"),
    (("Ants",), "A queen may live for decades."),
    ((), "How long does a volcano sleep before it erupts again?"),
    (("Glaciers",), "Ice that flows downhill. " * 20),
    ((), "1 + 1 = 2"),
    (("Ünïcödé",), "déjà vu, 机器学习"),
    (("A title alone",), ""),
    ((), "the " * 400),
)


# load
def load_encoder(
    model,
    pooling: str | None = None,
    overrides: dict | None = None,
    projection: int | None = None,
    normalize: bool = False,
    strict: bool = False,
    trust_remote_code: bool = False,
    head: Literal["dense", "sparse"] | None = None,
    exclude_special_tokens: bool = False,
    allow_new_head: bool = False,
) -> BiEncoder:
    """A bi-encoder in fp32 from our folder, any sentence-transformers folder of these two kinds, or
    a Hugging Face folder with `pooling`, or with `head` sparse. `model` may also be a name on the
    hub.

    overrides    fields of TextFormat in place of what the checkpoint states; None = as it states.
                 With `strict` one
                 that differs is an error (a stage that only uses the checkpoint), else it is the
                 new checkpoint's
    projection   add ANCE's head, Linear(H -> projection) + LayerNorm, weights from N(0, 0.02),
                 biases zero, drawn from
                 torch's generator; a checkpoint that has one of this size keeps it. 0 or None = as
                 the checkpoint is
    normalize    add L2 normalisation at the end if there is none
    head         None = as the folder states. sparse: of anything with an LM head, or with
                 `allow_new_head` a new one,
                 drawn from torch's generator
    exclude_special_tokens   of a new sparse head; a folder that states its own keeps it

    UserError: missing weights (but BERT's pooler, which is never kept), a pooling that contradicts
    the folder, lengths beyond the model's positions, several chunks with a sparse head or a slow
    tokenizer, a tokenizer that gives other ids than when the checkpoint was saved, modules or
    settings that cannot be expressed here."""
    folder = checkpoint_folder(model)
    private = read_json(folder / "isthmus.json") if (folder / "isthmus.json").is_file() else {}
    if private.get("version", VERSION) > VERSION:
        raise UserError(f"{folder}: written by a newer version of this project — update it")
    modules = read_list(folder / "modules.json")
    base, stored_pooling, layers = folder, None, []
    if modules:
        base, stored_pooling, layers = read_head(folder, modules)
    stored = None if not modules else "sparse" if stored_pooling == "max" else "dense"
    sparse = (head or stored) == "sparse"
    if stored == "sparse" and not sparse:
        raise UserError(f"{folder}: a sparse checkpoint — add --head sparse")
    if stored == "dense" and sparse and strict:
        raise UserError(f"{folder}: a dense checkpoint, not a sparse one — leave --head out")
    if sparse and (pooling or projection or normalize):
        raise UserError(
            "a sparse head is pooled by max — leave out --pooling, --projection and --normalize"
        )
    if not modules and not pooling and not sparse:
        raise UserError(
            f"{folder}: states no pooling (a plain Hugging Face folder) — add --pooling cls, mean "
            "or last_token"
        )
    if modules and not sparse and pooling not in (None, stored_pooling):
        raise UserError(
            f"{folder}: its pooling is {stored_pooling}, not {pooling} — leave --pooling out"
        )

    auto = _masked_lm if sparse else _encoder
    backbone, tokenizer = _load_backbone(base, auto, allow_new_head, trust_remote_code)
    limit = positions(backbone)
    stated = {}
    if modules:
        stated = stated_format(folder, base, stored, tokenizer, limit)
    if private:
        stated = {"query_prompt": "", "passage_prompt": "", **stated, "title": private["title"]}
        if modules:
            stated |= {
                "max_chunks": private.get("max_chunks", 1),
                "max_characters": private.get("max_characters", 0),
            }
        if private["tokenizer"]["ids"] != fingerprint(tokenizer):
            raise UserError(
                f"{folder}: the tokenizer gives other ids than when the checkpoint was saved "
                "(tokenizers "
                f"{private['tokenizer']['version']} then, {tokenizers.__version__} now) — install "
                "that version"
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
                f"{folder}: its {name} is {stated[name]!r}, not {value!r} — leave it out, or add "
                "--override"
            )
        if name.endswith("_length") and not 2 < value <= (limit or value):
            raise UserError(
                f"{folder}: {name} {value} — the model has {limit} positions, give 3 to {limit}"
            )
        least = {"max_chunks": 1, "max_characters": 0}.get(name)
        if least is not None and value < least:
            raise UserError(f"{folder}: {name} {value} — give {least} or more")
        setattr(form, name, value)
    if form.title == "sep" and tokenizer.sep_token is None:
        raise UserError(
            f"{folder}: the tokenizer has no separator token for --title sep — use --title space"
        )
    if form.max_chunks > 1 and (sparse or not tokenizer.is_fast):
        reason = "a sparse vector is one per text" if sparse else "a slow tokenizer gives no chunks"
        raise UserError(
            f"{folder}: max_chunks {form.max_chunks}, but {reason} — use --max_chunks 1"
        )
    if sparse:
        if stored == "sparse":
            own = private.get("exclude_special_tokens", False)
            if exclude_special_tokens and not own:
                raise UserError(
                    f"{folder}: pools over special tokens too — leave --exclude_special_tokens out"
                )
            exclude_special_tokens = own
        return SparseBiEncoder(backbone, tokenizer, exclude_special_tokens, form, stated).eval()
    if (
        normalize
        and strict
        and modules
        and not any(isinstance(module, Normalize) for module in layers)
    ):
        raise UserError(
            f"{folder}: its vectors are not normalised — leave --normalize out, or add --override"
        )
    layers = extend_head(folder, layers, backbone.config.hidden_size, projection, normalize)
    return BiEncoder(backbone, tokenizer, pooling or stored_pooling, layers, form, stated).eval()


def checkpoint_folder(model) -> Path:
    """The folder of a checkpoint: as given, or fetched from the Hugging Face hub (or its cache) by
    name."""
    folder = Path(model)
    if not folder.exists() and len(folder.parts) <= 2 and not folder.is_absolute():
        from huggingface_hub import snapshot_download

        try:
            skip = ["*.onnx", "*.h5", "*.msgpack", "*.ot", "onnx/*", "openvino/*"]
            folder = Path(snapshot_download(str(model), ignore_patterns=skip))
        except Exception as error:  # of many kinds: no network, no such name, no access
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{model}: neither a folder nor to be had from the hub ({reason}) — check it"
            ) from error
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        found = "no config.json in it" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {found} — give the folder of a checkpoint")
    return folder


def _encoder(config):
    return (
        AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
    )  # T5: the encoder alone


def _masked_lm(config):
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{config.name_or_path}: the LM head of {config.model_type} is built otherwise than "
            "those a sparse head "
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
    except LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{base}: cannot be loaded ({reason}) — give the folder of a checkpoint"
        ) from error
    wrong = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    if (
        auto is _masked_lm
        and wrong
        and not any(key.startswith(backbone.base_model_prefix) for key in wrong)
    ):
        if not allow_new_head:
            raise UserError(
                f"{base}: has no LM head for --head sparse — train one with finetune_biencoder.py "
                "--head new_sparse"
            )
        wrong = []
        with torch.no_grad():
            output = backbone.get_output_embeddings()
            output.bias.copy_(-NEW_HEAD * output.weight.norm(dim=1))
    wrong += [str(key) for key in report.get("mismatched_keys", ())]
    if wrong:
        raise UserError(
            f"{base}: {len(wrong)} weights are missing or of another shape ({sorted(wrong)[0]}, "
            "...) — give a "
            f"complete {config.model_type} checkpoint"
        )
    if getattr(backbone, "pooler", None) is not None:  # it would be a parameter without gradient
        backbone.pooler = None
    align(backbone)
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{base}: the tokenizer has no padding token — set one and save it in the folder"
        )
    if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
        raise UserError(
            f"{base}: the tokenizer has more tokens than the model embeddings — give the two that "
            "match"
        )
    return backbone, tokenizer


def align(model: nn.Module) -> None:
    """Copy the weights of a model that from_pretrained has just loaded. In a run of one process
    they lie in the mapped file, not aligned as those of several processes are, and MKL would add in
    another order."""
    for weight in model.parameters():
        weight.data = weight.data.clone()


# save
def save_encoder(model: BiEncoder, folder, card: dict) -> None:
    """Write the checkpoint under a temporary name, read it back, and only then give it its name.
    For the main process alone. card: what the model card says, {"base": ..., "data": [...],
    "command": [...], "metrics": {...}}.

    A folder that also holds other things (log, resume state) keeps them; the files of the
    checkpoint are replaced. UserError: the folder, read again, does not give the same vectors for 8
    fixed texts; what was written is kept aside as FOLDER.refused."""
    folder, training = Path(folder), model.training
    refused = folder.with_name(f"{folder.name}.refused")
    with _taking_place_of(folder) as temporary:
        _write_folder(model, temporary, {"name": folder.name, **card})
        model.eval()
        device = next(model.parameters()).device
        expected, found = _trial(model), _trial(load_encoder(temporary).to(device))
        model.train(training)
        if not torch.allclose(expected, found, rtol=1e-4, atol=1e-5):
            shutil.rmtree(refused, ignore_errors=True)
            shutil.copytree(temporary, refused)
            gap = (expected - found).abs().max().item()
            raise UserError(
                f"{folder}: the checkpoint gives other vectors when it is read back (by "
                f"{gap:.3g}); it is in {refused} — "
                "look for NaN in training, a full disk, other versions of transformers or "
                "tokenizers"
            )


def check_checkpoint(model: BiEncoder, output_dir) -> None:
    """Save a model into output_dir, read it back and remove it again: before the first step, so
    that a model which cannot be kept is refused in the first second and not after hours. For the
    main process alone."""
    trial = Path(output_dir) / ".tmp-trial"
    save_encoder(model, trial / "model", {})
    shutil.rmtree(trial)


def checkpoint_files(folder) -> list[Path]:
    """What decides the vectors of a checkpoint (weights, tokenizer, head, settings), relative to
    `folder`, in a fixed order; neither the model card nor what a training run keeps beside it."""
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
    """A temporary folder that becomes `folder` when the block ends well; or, if that holds more
    than a checkpoint, whose entries take the place of the old ones in it."""
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


def _write_folder(model: BiEncoder, folder: Path, card: dict) -> None:
    form, tokenizer = model.format, model.tokenizer
    model.backbone.save_pretrained(folder)
    if tokenizer.is_fast:  # else the last cut would be stored as a setting
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)

    write_head(model, folder)
    ids = {"ids": fingerprint(tokenizer), "version": tokenizers.__version__}
    private = {"version": VERSION, "title": form.title, "tokenizer": ids}
    private |= {"max_chunks": form.max_chunks, "max_characters": form.max_characters}
    if isinstance(model, SparseBiEncoder):
        private["exclude_special_tokens"] = model.exclude_special_tokens
    write_json(folder / "isthmus.json", private)
    write_lines(folder / "README.md", _card(model, card))
    mode = (folder / "README.md").stat().st_mode
    for path in folder.rglob("*.safetensors"):  # which safetensors lets only the owner read
        path.chmod(mode)


TITLES = {  # how a caller of sentence-transformers joins titles
    "none": "text",
    "space": 'f"{title} {text}" if title else text',
    "sep": 'f"{title}{model.tokenizer.sep_token}{text}" if title else text',
}


def _card(model: BiEncoder, card: dict) -> Iterator[str]:
    form, sparse = model.format, isinstance(model, SparseBiEncoder)
    library = "sentence-transformers" if model.portable else "transformers"
    yield from ("---", f"library_name: {library}", "pipeline_tag: sentence-similarity", "---", "")
    yield from (f"# {card['name']}", "")
    if sparse:
        over = "without special tokens" if model.exclude_special_tokens else "all positions"
        formula = f"log(1 + relu(max of the LM's logits over {over}))"
        yield f"Sparse retriever: {formula}, {model.dim} terms,"
    else:
        head = " + ".join([f"{model.pooling} pooling", *(type(m).__name__ for m in model.head)])
        yield f"Dense retriever: {head}, {model.dim} dimensions,"
    yield "compared by dot product."
    if model.portable:
        name = "SparseEncoder" if sparse else "SentenceTransformer"
        yield from ("", "```python", f"from sentence_transformers import {name}", "")
        yield f"model = {name}({card['name']!r})"
        yield "queries = model.encode_query(['what is it?'])"
        yield f"passages = model.encode_document([{TITLES[form.title]} for title, text in corpus])"
        yield "```"
    yield from ("", "| | |", "| --- | --- |")
    for name, value in {**asdict(form), **{k: v for k, v in card.items() if k != "name"}}.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items() if v is not None)
        value = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
        yield f"| {name.replace('_', ' ')} | `{value}` |"


@torch.no_grad()
def _trial(model: BiEncoder) -> Tensor:
    """(16, D) vectors of 8 fixed texts, as queries and as passages. By `encode`, as Accelerate
    wraps `forward` in autocast, and vectors are compared in fp32."""
    device = next(model.parameters()).device
    found = []
    for kind in ("query", "passage"):
        strings = format_texts(TRIAL, kind, model.format, model.tokenizer)
        ids = to_ids(strings, model.tokenizer, model.format.max_length(kind))
        batch = pad(ids, model.tokenizer)
        found.append(model.encode({name: values.to(device) for name, values in batch.items()}))
    return torch.cat(found).cpu()


def read_architecture(
    model: str | None, model_config: str | None = None, tokenizer: str | None = None
):
    """(config, tokenizer) of a checkpoint, or of a config file and a tokenizer's folder; reads no
    weights and no data.
    UserError for an architecture whose embeddings and LM head the objectives do not know, and for a
    tokenizer without the special tokens they need."""
    if (model is None) == (model_config is None) or (model_config is None) != (tokenizer is None):
        raise UserError(
            "which model? — give --model, or --model_config and --tokenizer to start from scratch"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model or tokenizer, trust_remote_code=False)
        if model:
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        else:
            stated = {
                "vocab_size": len(tokenizer),
                "pad_token_id": tokenizer.pad_token_id,
            } | read_json(model_config)
            config = AutoConfig.for_model(stated.pop("model_type", None), **stated)
    except LOADING_ERRORS as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{model or model_config}: not a model and tokenizer ({reason}) — check the path"
        ) from error
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{model or model_config}: {config.model_type} is not supported, its embeddings and LM "
            "head are built "
            f"otherwise — use {', '.join(ARCHITECTURES)}"
        )
    for name in ("cls_token", "sep_token", "mask_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no {name} — use the one of a masked "
                "LM"
            )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{model or model_config}: {config.vocab_size} embeddings for {len(tokenizer)} tokens "
            "of "
            f"{tokenizer.name_or_path} — give the tokenizer that belongs to the model"
        )
    tokenizer.padding_side = "right"  # slot 0 is the bottleneck
    return config, tokenizer


def max_positions(config) -> int:
    """Tokens that a text may have; RoBERTa's positions begin after that of the padding."""
    return config.max_position_embeddings - (
        config.pad_token_id + 1 if config.model_type == "roberta" else 0
    )


def load_lm(config, model: str | None) -> tuple[nn.Module, str]:
    """(masked LM in fp32, what the echo says of it): the weights of a checkpoint, or fresh ones if
    `model` is None. A checkpoint without LM head gets a new one; one that lacks anything else is
    refused."""
    if model is None:
        return AutoModelForMaskedLM.from_config(config, dtype=torch.float32), "from scratch"
    try:
        lm, info = AutoModelForMaskedLM.from_pretrained(
            model, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except LOADING_ERRORS as error:
        raise UserError(
            f"{model}: its weights cannot be read ({str(error).strip().splitlines()[0]})"
        ) from error
    missing = sorted(info["missing_keys"])
    if any(key.startswith(lm.base_model_prefix) for key in missing) or info["mismatched_keys"]:
        example = (missing or [*info["mismatched_keys"]])[0]
        raise UserError(
            f"{model}: weights are missing or of another shape ({example}) — is the checkpoint "
            "complete?"
        )
    return lm, f"{model}{', new LM head' if missing else ''}"


# on disk: a Hugging Face folder with its LM head, and the decoder in a file of its own
def load_decoder(model: nn.Module, folder: str | None) -> str:
    """Go on with the decoder that `folder` holds if it is one of the same objective -> what the
    echo says of it."""
    settings = Path(folder or "") / "decoder.json"
    if not hasattr(model, "decoder"):
        return "none"
    if folder is None or not settings.is_file():
        return "new"
    found = read_json(settings)
    if found.get("decoder", found["objective"]) != model.settings["decoder"]:
        return f"new, that of {folder} is of the objective {found['objective']}"
    path = settings.with_suffix(".safetensors")
    try:
        model.decoder.load_state_dict(load_file(path))
    except LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"{path}: does not fit this model ({reason}) — remove {settings} to start a new one"
        ) from error
    return f"that of {folder}"


def stated_title(model: str | None) -> str | None:
    """How titles are joined, if the folder `model` is a checkpoint of ours that says so."""
    path = Path(model or "") / "isthmus.json"
    return read_json(path)["title"] if model and path.is_file() else None


def save_checkpoint(model: nn.Module, tokenizer, folder, title: str, card: dict) -> None:
    """The LM for AutoModel and AutoModelForMaskedLM, its tokenizer, decoder.safetensors with
    decoder.json, how titles were joined, README.md from `card` (base, data, command, metrics).
    Staged, read back and compared, then moved into `folder`, one rename per file; it is the caller
    who marks the folder complete."""
    staging = Path(folder) / ".tmp-checkpoint"
    shutil.rmtree(staging, ignore_errors=True)
    model.lm.save_pretrained(staging)
    tokenizer.backend_tokenizer.no_truncation()  # else the last cut would be saved as a setting
    tokenizer.save_pretrained(staging)
    ids = {"ids": fingerprint(tokenizer), "version": tokenizers.__version__}
    write_json(staging / "isthmus.json", {"version": VERSION, "title": title, "tokenizer": ids})
    if hasattr(model, "decoder"):
        decoder = {
            name: tensor.contiguous().cpu() for name, tensor in model.decoder.state_dict().items()
        }
        save_file(decoder, staging / "decoder.safetensors", metadata={"format": "pt"})
        write_json(staging / "decoder.json", model.settings)
    lines = [f"# {model.lm.config.model_type}, pre-trained: {model.settings['objective']}", ""]
    lines += [
        f"- **{name}**: {value}" for name, value in {**card, "settings": model.settings}.items()
    ]
    write_lines(
        staging / "README.md", [*lines, "", "`AutoModelForMaskedLM` loads it with its LM head."]
    )
    again, info = AutoModelForMaskedLM.from_pretrained(
        staging, dtype=torch.float32, output_loading_info=True
    )
    wrong = [
        key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]
    ]
    here = {name: tensor.cpu() for name, tensor in model.lm.state_dict().items()}
    wrong += [
        name for name, tensor in again.state_dict().items() if not torch.equal(tensor, here[name])
    ]
    if wrong:
        raise RuntimeError(f"{staging}: what was saved does not read back: {wrong[:3]}")
    mode = (staging / "README.md").stat().st_mode
    for path in sorted(staging.iterdir()):
        path.chmod(mode)  # safetensors lets only the owner read
        os.replace(path, Path(folder) / path.name)
    staging.rmdir()


# ------------------------------------------------------------------------------------------------
# cross-encoders


@dataclass
class PairFormat:
    """How a query and a passage become the input of a cross-encoder."""

    title: str = "space"  # see lib/text.py
    max_query_length: int = 64  # tokens of the query alone
    max_length: int = 256  # tokens of the pair, special tokens included


class CrossEncoder(nn.Module):
    """A Hugging Face sequence classifier as a scorer: the logit of its one label, or of two labels
    (irrelevant, relevant) logit 1 - logit 0, the log-odds of the second."""

    def __init__(self, classifier: nn.Module, tokenizer, form: PairFormat):
        super().__init__()
        self.classifier, self.tokenizer, self.format = classifier, tokenizer, form

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """input_ids, attention_mask, token_type_ids (n, L) -> (n,) fp32 scores."""
        logits = self.classifier(**batch).logits.float()  # (n, 1 or 2)
        return logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)


def load_cross_encoder(folder, form: PairFormat) -> CrossEncoder:
    """In fp32 and eval mode. UserError: missing weights, other than one or two labels, a tokenizer
    that cannot pad or is not fast, lengths that leave no room for the passage."""
    how = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    try:
        classifier, report = AutoModelForSequenceClassification.from_pretrained(folder, **how)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: cannot be loaded ({reason}) — give a cross-encoder") from error
    if report["missing_keys"]:
        key = sorted(report["missing_keys"])[0]
        raise UserError(
            f"{folder}: the weights of {key} are missing, so it is no cross-encoder — train one "
            "with "
            "recipes/train_cross_encoder.py"
        )
    labels = classifier.config.num_labels
    if labels > 2:
        raise UserError(
            f"{folder}: it has {labels} labels — a cross-encoder has one, or two (irrelevant, "
            "relevant)"
        )
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"{folder}: its tokenizer cannot pad, or is not fast — save one that is")
    if form.title == "sep" and tokenizer.sep_token is None:
        raise UserError(f"{folder}: its tokenizer has no separator — use --title space")
    limit = positions(classifier) or form.max_length
    room = form.max_length - tokenizer.num_special_tokens_to_add(pair=True) - form.max_query_length
    if room < 1 or form.max_length > limit:
        raise UserError(
            f"{folder}: --max_query_length {form.max_query_length} in --max_length "
            f"{form.max_length} — the passage "
            f"needs room beside the query, and the model has {limit} positions"
        )
    align(classifier)
    return CrossEncoder(classifier, tokenizer, form).eval()
