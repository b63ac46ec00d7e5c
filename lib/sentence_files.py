"""How sentence-transformers spells a bi-encoder: its modules, pooling, prompts and lengths, in the
files of any version.

    modules.json                           Transformer, Pooling, then Dense, LayerNorm, Normalize if
                                           used; of a sparse
                                           one MLMTransformer, SpladePooling
    1_Pooling/, 2_Dense/, 3_LayerNorm/     their settings and weights
    sentence_bert_config.json              passage length; the query length where it differs
    config_sentence_transformers.json      prompts

The older spelling is written, which newer versions read too; only a query length of its own needs
version 6. A folder that sentence-transformers cannot express ends in a module named UNPORTABLE,
which it fails to import."""

from pathlib import Path

import safetensors.torch
import tokenizers
import torch
import transformers
from torch import nn

from lib.encoder import POOLINGS, BiEncoder, Dense, LayerNorm, Normalize, SparseBiEncoder
from lib.files import UserError, read_json, write_json


# sentence-transformers' files, in the spelling of any version
def read_list(path: Path) -> list[dict] | None:
    return read_json(path) if path.is_file() else None


UNPORTABLE = "isthmus.NotExpressibleHere"  # several chunks, cut characters, special tokens excluded


def _settings(folder: Path) -> dict:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _refuse(place, what: str):
    raise UserError(
        f"{place}: {what}, which cannot be expressed here — give a checkpoint without it"
    )


def read_head(folder: Path, modules: list[dict]) -> tuple[Path, str, list[nn.Module]]:
    """(folder of the backbone, pooling, the modules behind the pooling); the pooling of a sparse
    head is max."""
    path = folder / "modules.json"
    modules = [one for one in modules if one["type"] != UNPORTABLE]
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
        of_flag = {pooling.flag: pooling.mode for pooling in POOLINGS.values()}
        flags = [key.removeprefix("pooling_mode_") for key in config if config[key] is True]
        known = [key for key in flags if f"pooling_mode_{key}" in config]
        modes = [of_flag.get(flag, flag) for flag in known] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    names = [name for name, pooling in POOLINGS.items() if [pooling.mode] == modes]
    if not names:
        _refuse(place, f"pooling by {' + '.join(modes)} (not {', '.join(POOLINGS)})")
    if not config.get("include_prompt", True):
        _refuse(place, "pooling without the prompt (include_prompt false)")
    return names[0]


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
    # sentence-transformers 6 adds an empty "document" prompt, which hides the others there: take
    # the first not empty
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


# ------------------------------------------------------------------------------------------------
# write


def write_head(model: BiEncoder, folder: Path) -> None:
    """All files of sentence-transformers but backbone and tokenizer."""
    form, sparse = model.format, isinstance(model, SparseBiEncoder)
    names = ["MLMTransformer", "SpladePooling"] if sparse else ["Transformer", "Pooling"]
    names += [type(module).__name__ for module in model.head]
    paths = ["", *(f"{index}_{name}" for index, name in enumerate(names[1:], 1))]
    home = (
        "sentence_transformers.sparse_encoder.models" if sparse else "sentence_transformers.models"
    )
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{home}.{name}"}
        for index, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    if sparse:
        pooling = {
            "pooling_strategy": "max",
            "activation_function": "relu",
            "word_embedding_dimension": model.dim,
        }
    else:
        pooling = {"word_embedding_dimension": model.backbone.config.hidden_size}
        for name, one in POOLINGS.items():
            pooling[f"pooling_mode_{one.flag}"] = model.pooling == name
    if not model.portable:
        modules.append({"idx": len(modules), "name": "-", "path": "", "type": UNPORTABLE})
    write_json(folder / "modules.json", modules)
    write_json(folder / paths[1] / "config.json", pooling)
    for module, path in zip(model.head, paths[2:], strict=True):
        if isinstance(module, Normalize):
            continue  # has neither settings nor weights
        own = {name: weight.contiguous().cpu() for name, weight in module.state_dict().items()}
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
