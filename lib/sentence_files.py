"""How sentence-transformers spells a bi-encoder: its modules, pooling, prompts and lengths, in the
files of any version.

    modules.json                           Transformer, Pooling, then Dense, LayerNorm, Normalize;
                                           of a sparse one MLMTransformer, SpladePooling
    1_Pooling/, 2_Dense/, 3_LayerNorm/     their settings and weights
    sentence_bert_config.json              passage length; the query length where it differs
    config_sentence_transformers.json      prompts
    README.md                              the model card

A sparse one with a table for queries is a Router instead: router_config.json,
query_0_SparseStaticEmbedding/, the masked LM as ever, document_1_SpladePooling/.

The older spelling is written, which newer versions read too; only a query length of its own needs
version 6. A folder that sentence-transformers cannot express ends in a module named UNPORTABLE,
which it fails to import."""

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import get_args, get_type_hints

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from torch import nn

from lib.encoder import POOLINGS, BiEncoder, Dense, LayerNorm, Normalize, SparseBiEncoder
from lib.files import UserError, read_json, write_json
from lib.text import TextFormat

UNPORTABLE = "isthmus.NotExpressibleHere"  # several chunks, cut characters, special tokens excluded
SPARSE = (["MLMTransformer", "SpladePooling"], ["Transformer", "SpladePooling"])
TABLE = "query_0_SparseStaticEmbedding"

# the only value of a setting that gives the vectors we give, file by file
SPLADE_POOLING = {"pooling_strategy": "max", "activation_function": "relu"}
POOLING = {"include_prompt": True}
BEHIND_POOLING = {
    "module_input_name": "sentence_embedding",
    "module_output_name": "sentence_embedding",
    "use_residual": False,
}
GENERAL = {"max_active_dims": None, "truncate_dim": None}
TRANSFORMER = dict.fromkeys(
    """processing_kwargs query_expansion tokenizer_args processor_kwargs config_args
    config_kwargs""".split()
)


def _refuse(place, what: str):
    raise UserError(f"{place}: {what} cannot be expressed here — give a checkpoint without it")


def _settings(path: Path, expected: dict) -> dict:
    """The content of a JSON file, {} if there is none. UserError: a setting is not as expected."""
    settings = read_json(path) if path.is_file() else {}
    for key, value in expected.items():
        if (settings.get(key, value) or None) != (value or None):
            _refuse(path, f"{key} {settings[key]} (not {value})")
    return settings


def read_head(folder: Path) -> tuple[Path, str | None, list[nn.Module]]:
    """(folder of the backbone, pooling, the modules behind the pooling). The pooling of a sparse
    head is max; that of a plain Hugging Face folder is None."""
    path = folder / "modules.json"
    if not path.is_file():
        return folder, None, []
    modules = [(one["path"], one["type"]) for one in read_json(path) if one["type"] != UNPORTABLE]
    if [_short(kind) for _, kind in modules] == ["Router"]:
        queries, modules = _routes(folder)
        if [_short(kind) for _, kind in queries] != ["SparseStaticEmbedding"]:
            _refuse(path, "a model of other routes than a table for queries")
    places = [folder / one for one, _ in modules]
    names = [_short(kind) for _, kind in modules]
    if names in SPARSE:
        _settings(places[1] / "config.json", SPLADE_POOLING)
        return places[0], "max", []
    known = all(name in ("Dense", "LayerNorm", "Normalize") for name in names[2:])
    if names[:2] != ["Transformer", "Pooling"] or not known:
        _refuse(path, f"a model of {' + '.join(names)}")
    head = [_read_module(name, place) for name, place in zip(names[2:], places[2:], strict=True)]
    return places[0], _read_pooling(places[1] / "config.json"), head


def _short(name: str) -> str:
    """The name of a class of sentence-transformers; any other stays whole."""
    return name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name


def _routes(folder: Path) -> list[list[tuple[str, str]]]:
    """(path, class) of the modules of a Router for queries, and for passages."""
    config = read_json(folder / "router_config.json")
    routes = [config["structure"][kind] for kind in ("query", "document")]
    return [[(one, config["types"][one]) for one in route] for route in routes]


def read_query_table(folder: Path) -> tuple[torch.Tensor, bool] | None:
    """((V,) weights of a table for queries, whether training changes them), None without one."""
    if not (folder / "router_config.json").is_file():
        return None
    place = folder / _routes(folder)[0][0][0]
    frozen = _settings(place / "config.json", {"path": None}).get("frozen", False)
    return load_file(place / "model.safetensors")["weight"], not frozen


def _read_pooling(path: Path) -> str:
    config = _settings(path, POOLING)
    modes = config.get("pooling_mode")
    if modes is None:  # older: one flag per mode; none of them set means mean
        of_flag = {f"pooling_mode_{one.flag}": one.mode for one in POOLINGS.values()}
        flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        modes = [of_flag.get(key, key.removeprefix("pooling_mode_")) for key in flags] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    for name, pooling in POOLINGS.items():
        if [pooling.mode] == modes:
            return name
    _refuse(path, f"pooling by {' + '.join(modes)} (not {', '.join(POOLINGS)})")


def _read_module(name: str, place: Path) -> nn.Module:
    config = _settings(place / "config.json", BEHIND_POOLING)
    if name == "Normalize":
        return Normalize()
    if name == "LayerNorm":
        module = LayerNorm(config["dimension"])
    else:
        activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
        short = activation.rpartition(".")[2]
        if not activation.startswith("torch.nn.") or not hasattr(nn, short):
            _refuse(place, f"the activation {activation}")
        bias = config.get("bias", True)
        module = Dense(config["in_features"], config["out_features"], bias, short)
    if (place / "model.safetensors").is_file():
        weights = load_file(place / "model.safetensors")
    else:
        weights = torch.load(place / "pytorch_model.bin", weights_only=True)
    module.load_state_dict(weights)
    return module


def stated_format(folder: Path, base: Path, sparse: bool, tokenizer, limit: int) -> dict:
    """The fields of TextFormat that the folder names: prompts if there are any, and lengths.
    limit: tokens that the backbone (in the folder `base`) can take"""
    kind = {"model_type": "SparseEncoder" if sparse else "SentenceTransformer"}
    config = _settings(folder / "config_sentence_transformers.json", GENERAL | kind)
    # version 6 adds an empty "document" prompt, which hides the others there: an empty one is none
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    query = prompts.get("query") or prompts.get(default) or ""
    passage = next(filter(None, map(prompts.get, ("document", "passage", "corpus", default))), "")
    stated = {"query_prompt": query, "passage_prompt": passage} if query or passage else {}

    output = "logits" if sparse else "last_hidden_state"
    text = {"text": {"method": "forward", "method_output_name": output}}
    task = "fill-mask" if sparse else "feature-extraction"
    expected = TRANSFORMER | {"transformer_task": task, "modality_config": text}
    paths = [*sorted(base.glob("sentence_*_config.json")), base / "sentence_bert_config.json"]
    config = _settings(paths[0], expected)
    if config.get("do_lower_case"):
        backend = tokenizer.backend_tokenizer
        steps = [normalizers.Lowercase(), backend.normalizer]
        backend.normalizer = normalizers.Sequence([step for step in steps if step])
    longest = config.get("max_seq_length") or min(tokenizer.model_max_length, limit)
    if longest < 1_000_000:  # a tokenizer without a limit has 10^30
        stated["max_query_length"] = min(config.get("query_length") or longest, limit)
        stated["max_passage_length"] = min(config.get("document_length") or longest, limit)
    return stated


def text_format(folder, stated: dict, overrides: dict, strict: bool, limit: int) -> TextFormat:
    """stated: fields that the checkpoint names; overrides: in their place, None = as stated;
    strict: they may not differ. UserError: they do, a length above `limit`, a senseless value."""
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        own = stated.get(name, value)
        if strict and own != value:
            what = f"its {name} is {own!r}, not {value!r}"
            raise UserError(f"{folder}: {what} — leave it out, or add --override")
        if name.endswith("_length") and value > limit:
            what = f"{folder}: {name} {value}, but the model has {limit} positions"
            raise UserError(f"{what} — lower it")
    form = TextFormat(**stated | given)
    titles = get_args(get_type_hints(TextFormat)["title"])
    least = {"max_query_length": 3, "max_passage_length": 3, "max_chunks": 1, "max_characters": 0}
    for name, value in asdict(form).items():
        right = type(value) is type(getattr(TextFormat, name))
        if not right or value < least.get(name, value) or form.title not in titles:
            raise UserError(f"{folder}: its {name} is {value!r} — correct the checkpoint's files")
    form.max_query_length = min(form.max_query_length, limit)
    form.max_passage_length = min(form.max_passage_length, limit)
    return form


def write_head(model: BiEncoder, folder: Path) -> None:
    """All files of sentence-transformers but backbone and tokenizer."""
    form, sparse = model.format, isinstance(model, SparseBiEncoder)
    if sparse:
        home, names = "sentence_transformers.sparse_encoder.models.", SPARSE[0]
        pooling = SPLADE_POOLING | {"word_embedding_dimension": model.dim}
    else:
        home, names = "sentence_transformers.models.", ["Transformer", "Pooling"]
        pooling = {"word_embedding_dimension": model.backbone.config.hidden_size}
        for name, one in POOLINGS.items():
            pooling[f"pooling_mode_{one.flag}"] = model.pooling == name
    names = [*names, *(type(module).__name__ for module in model.head)]
    paths = ["", *(f"{index}_{name}" for index, name in enumerate(names[1:], 1))]
    kinds = [home + name for name in names]
    modules = list(zip(paths, kinds, strict=True))
    if model.query_table is not None:
        paths[1] = f"document_{paths[1]}"
        _write_router(model, folder, dict(zip(paths, kinds, strict=True)))
        modules = [("", "sentence_transformers.models.Router")]
    if not model.portable:
        modules.append(("", UNPORTABLE))
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": kind}
        for index, (path, kind) in enumerate(modules)
    ]
    write_json(folder / "modules.json", listed)
    write_json(folder / paths[1] / "config.json", pooling)
    for module, path in zip(model.head, paths[2:], strict=True):
        if isinstance(module, Normalize):
            continue  # has neither settings nor weights
        own = {name: weight.contiguous().cpu() for name, weight in module.state_dict().items()}
        write_json(folder / path / "config.json", module.settings())
        save_file(own, folder / path / "model.safetensors")

    lengths = {"max_seq_length": form.max_passage_length, "do_lower_case": False}
    if form.max_query_length != form.max_passage_length:
        lengths["query_length"] = form.max_query_length
    write_json(folder / "sentence_bert_config.json", lengths)
    kind = {"model_type": "SparseEncoder"} if sparse else {}
    general = kind | {
        "__version__": {"transformers": transformers.__version__, "pytorch": torch.__version__},
        "prompts": {"query": form.query_prompt, "document": form.passage_prompt},
        "default_prompt_name": None,
        "similarity_fn_name": "dot",
    }
    write_json(folder / "config_sentence_transformers.json", general)


def _write_router(model: SparseBiEncoder, folder: Path, documents: dict[str, str]) -> None:
    """A Router and its table for queries. documents: {path: type} of its modules for passages."""
    kind = "sentence_transformers.sparse_encoder.models.SparseStaticEmbedding"
    structure = {"query": [TABLE], "document": list(documents)}
    parameters = {"default_route": "document", "allow_empty_key": True, "route_mappings": {}}
    config = {"types": {TABLE: kind, **documents}, "structure": structure}
    write_json(folder / "router_config.json", {**config, "parameters": parameters})
    table = model.query_table
    write_json(folder / TABLE / "config.json", {"frozen": not table.learned})
    weights = table.weights.detach().contiguous().cpu()
    save_file({"weight": weights}, folder / TABLE / "model.safetensors")
    model.tokenizer.save_pretrained(folder / TABLE)
    # sentence-transformers cuts a query to this number of tokens and adds no special tokens to it
    path = folder / TABLE / "tokenizer_config.json"
    special = model.tokenizer.num_special_tokens_to_add()
    length = {"model_max_length": model.format.max_query_length - special}
    write_json(path, read_json(path) | length)


CODE = """
```python
{faiss}from sentence_transformers import {library}

corpus = [("Ants", "They live in colonies."), ("", "Lava is molten rock.")]  # titles, texts
model = {library}({name!r})
passages = model.encode_document([{joined} for title, text in corpus])
queries = model.encode_query(["who lives in colonies?"])
{search}  # the best two for each query
```

`mteb.evaluate(model, mteb.get_tasks(["SciFact"]))` is MTEB's evaluation{titles}."""
SIMILARITY = "scores, rows = model.similarity(queries, passages).topk(2)"
FAISS = """index = faiss.IndexFlatIP(passages.shape[1])
index.add(passages)
scores, rows = index.search(queries, 2)"""


def model_card(model: BiEncoder, name: str, card: dict) -> Iterator[str]:
    """Lines of README.md."""
    sparse, title = isinstance(model, SparseBiEncoder), model.format.title
    head = " + ".join([f"{model.pooling} pooling", *(type(part).__name__ for part in model.head)])
    if sparse:
        over = "without special tokens" if model.exclude_special_tokens else "all positions"
        head = f"log(1 + relu(max of the LM's logits over {over}))"
    yield from ("---", "pipeline_tag: sentence-similarity", "---", "", f"# {name}", "")
    kind = "Sparse" if sparse else "Dense"
    yield f"{kind} retriever: {head}, {model.dim} dimensions, compared by dot product."
    if model.portable:
        separator = {"space": " ", "sep": model.tokenizer.sep_token}.get(title)
        joined = "text or title"
        if separator:
            joined = f"{separator!r}.join(filter(None, (title, text)))"
        yield CODE.format(
            faiss="" if sparse else "import faiss\n",
            library="SparseEncoder" if sparse else "SentenceTransformer",
            name=name,
            joined=joined,
            search=SIMILARITY if sparse else FAISS,
            titles="" if title == "space" else "; it joins titles by a space, not as above",
        )
    yield ""
    yield from card_facts(asdict(model.format) | card)


def card_facts(values: dict) -> Iterator[str]:
    """Lines of a model card. Of an absolute path, which would be published, they have the name."""
    for name, value in {**values, "command": sys.argv}.items():
        words = value if isinstance(value, list) else [value]
        names = (re.sub(r"^(--\w+=)?/.*?([^/]*)/*$", r"\1\2", str(word)) for word in words)
        text = " ".join(names).replace("`", "'")
        yield f"- **{name.replace('_', ' ')}**: `{' '.join(text.split())}`"
