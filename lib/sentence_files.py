"""The bi-encoder, dense or sparse: one tower for queries and passages, and its checkpoint on disk.

A checkpoint is a Hugging Face folder that is a sentence-transformers folder as well. A dense one:

    config.json, model.safetensors, tokenizer files   backbone, as AutoModel and AutoTokenizer read it
    modules.json                                      Transformer, Pooling, then Dense, LayerNorm, Normalize if used
    1_Pooling/, 2_Dense/, 3_LayerNorm/                their settings and weights
    sentence_bert_config.json                         passage length; the query length where it differs
    config_sentence_transformers.json                 prompts
    isthmus.json                                   how titles are joined, how passages are cut into chunks, what
                                                      the tokenizer gave when it was saved

A sparse one has the masked language model as AutoModelForMaskedLM reads it, and MLMTransformer, SpladePooling for
modules.

The older spelling of these files is written, which newer sentence-transformers read too; only a query length of its
own needs sentence-transformers 6 (earlier ones refuse the key). With `sep` titles, which it cannot join, passages of
several chunks or cut to so many characters, or special tokens excluded from the pooling, there is no modules.json: the
list is in isthmus.json, and the folder does not claim to be loadable there.

B texts, L tokens, H hidden size, V vocabulary, D dimensions of a vector: V of a sparse one. attention_mask 1 = keep.
"""

from pathlib import Path

import safetensors.torch
import tokenizers
import torch
from torch import nn

from lib.encoder import Dense, LayerNorm, Normalize
from lib.files import UserError, read_json


# sentence-transformers' files, in the spelling of any version
def read_list(path: Path) -> list[dict] | None:
    return read_json(path) if path.is_file() else None


def _settings(folder: Path) -> dict:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _refuse(place, what: str):
    raise UserError(
        f"{place}: {what}, which cannot be expressed here — give a checkpoint without it"
    )


def read_head(folder: Path, modules: list[dict]) -> tuple[Path, str, list[nn.Module]]:
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
            if (
                config.get("use_residual")
                or not activation.startswith("torch.nn.")
                or not hasattr(nn, short)
            ):
                _refuse(
                    place,
                    "a residual Dense"
                    if config.get("use_residual")
                    else f"the activation {activation}",
                )
            module = Dense(
                config["in_features"], config["out_features"], config.get("bias", True), short
            )
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
        on = [
            key.removeprefix("pooling_mode_")
            for key in config
            if key.startswith("pooling_mode_") and config[key]
        ]
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
    weights = (
        safetensors.torch.load_file(safe) if safe.is_file() else torch.load(old, weights_only=True)
    )
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{place}: weights do not fit config.json ({reason}) — give a complete checkpoint"
        ) from error


def stated_format(folder: Path, base: Path, stored: str, tokenizer, limit: int | None) -> dict:
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
    elif (
        config.get("do_lower_case")
        and tokenizer.backend_tokenizer.normalizer.normalize_str("A") != "a"
    ):
        steps = [tokenizers.normalizers.Lowercase(), tokenizer.backend_tokenizer.normalizer]
        tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
    longest = config.get("max_seq_length") or min(
        tokenizer.model_max_length, limit or tokenizer.model_max_length
    )
    if longest < 1_000_000:  # a tokenizer without a limit has 10^30
        lengths = config.get("query_length") or longest, config.get("document_length") or longest
        lengths = [min(length, limit or length) for length in lengths]
        stated |= {"max_query_length": lengths[0], "max_passage_length": lengths[1]}
    return stated
