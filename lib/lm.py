"""The masked language model underneath a pre-training objective: read, taken apart, saved with its decoder.

Legend: B texts, L tokens of the longest, D hidden size, V vocabulary, n positions.
"""

import os
import shutil
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from lib.encoder import VERSION, fingerprint
from lib.files import UserError, read_json, write_json, write_lines
from lib.vocab import ARCHITECTURES


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


# ---------------------------------------------------------------------------------------------------------------------
# on disk: a Hugging Face folder with its LM head, and the decoder in a file of its own


def load_decoder(model: nn.Module, folder: str | None) -> str:
    """Go on with the decoder that `folder` holds if it is one of the same objective -> what the echo says of it."""
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
