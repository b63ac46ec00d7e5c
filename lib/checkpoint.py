"""The only door for the folders of bi-encoders, masked LMs with their decoder, and cross-encoders.
A checkpoint is a Hugging Face folder and a sentence-transformers folder (lib/sentence_files.py):

    config.json, model.safetensors,    the backbone and its tokenizer; of a masked LM or a sparse
    tokenizer files                    bi-encoder with the LM head
    modules.json, 1_Pooling/, ...      the head of a bi-encoder
    isthmus.json                       how titles are joined, how passages are cut, what the
                                       tokenizer gave when it was saved
    decoder.safetensors, decoder.json  the decoder of a pre-training objective

Weights and tokenizers never run code of the checkpoint, unless trust_remote_code says so."""

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import tokenizers
import torch
from accelerate.utils import send_to_device
from huggingface_hub import snapshot_download
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

from lib.architectures import ARCHITECTURES
from lib.dist import world
from lib.encoder import AS_STATED, BiEncoder, SparseBiEncoder, extend, lower_bias, positions
from lib.files import UserError, atomic, read_json, write_json, write_lines
from lib.lines import one_line
from lib.sentence_files import (
    card_facts,
    model_card,
    read_head,
    read_query_table,
    stated_format,
    text_format,
    write_head,
)
from lib.text import TextFormat, format_texts, pad, to_ids

VERSION = 1  # of isthmus.json

CUT = ("max_chunks", "max_characters")  # how passages are cut, in isthmus.json
REHEARSAL = ".tmp-rehearsal"  # the folder of check_checkpoint

# the files of a checkpoint that decide its vectors
FILES = """config.json model*.safetensors* pytorch_model* *.py *token*.json vocab* merges.txt
    *.model chat_template* modules.json sentence_*_config.json config_sentence_transformers.json
    isthmus.json router_config.json [0-9]*_*/* query_*/* document_*/*""".split()

PROBES = (  # what the tokenizer is asked when a checkpoint is saved, and again when it is loaded
    "The quick brown fox jumps over the lazy dog.",
    "Déjà vu in the naïve Straße, 3.14159 and 10,000 km²",
    "机器学习 モデル 한국어 العربية",
    "<b>tags</b>\ttabs  spaces\u00a0[SEP] </s> 😀",
    "pneumonoultramicroscopicsilicovolcanoconiosis e-mail C++ don't",
)

# what is encoded before and after a save
TRIAL = [*(((), text) for text in PROBES), (("Ants",), PROBES[0] * 20), (("A title alone",), "")]


# ------------------------------------------------------------------------------------------------
# load


def _door(load: Callable) -> Callable:
    """load(model, ...), with whatever a damaged folder makes it raise as a UserError."""

    @functools.wraps(load)
    def checked(model, *args, **kwargs):
        with loading(model):
            return load(model, *args, **kwargs)

    return checked


@_door
def load_encoder(
    model, head=AS_STATED, overrides: dict | None = None, strict=False, trust_remote_code=False
) -> BiEncoder:
    """A bi-encoder in fp32 and eval mode from our folder, a sentence-transformers folder of these
    two kinds, a Hugging Face folder if the Head has a pooling or is sparse, or a name on the hub.
    New weights are drawn from torch's generator.

    overrides   fields of TextFormat in place of what the checkpoint states; None = as it states
    strict      what contradicts the checkpoint is an error, as in a stage that only uses it"""
    folder = checkpoint_folder(model)
    private = private_settings(folder)
    base, pooling, layers = read_head(folder)
    own = "sparse" if pooling == "max" else "dense"
    kind = (head.kind or own).removeprefix("new_")
    if pooling and kind != own and (strict or kind == "dense"):
        raise UserError(f"{folder}: a {own} checkpoint, not a {kind} one — add --head {own}")
    if kind == "sparse" and (head.pooling or head.projection or head.normalize):
        flags = "--pooling, --projection and --normalize"
        raise UserError(f"{folder}: a sparse head is pooled by max — leave out {flags}")
    if kind == "dense" and head.exclude_special_tokens:
        wrong = "a dense head, and --exclude_special_tokens is for sparse ones"
        raise UserError(f"{folder}: {wrong} — leave it out, or add --head sparse")
    if kind == "dense" and not (pooling or head.pooling):
        raise UserError(f"{folder}: states no pooling — add --pooling cls, mean or last_token")

    auto = AutoModelForMaskedLM if kind == "sparse" else AutoModel
    backbone, tokenizer, new_head = _load(base, auto, trust_remote_code=trust_remote_code)
    if new_head and head.kind != "new_sparse":
        raise UserError(f"{base}: no LM head for --head sparse — train one by --head new_sparse")
    if new_head:
        lower_bias(backbone)
    limit = positions(backbone)
    stated = {}
    if pooling:
        stated = stated_format(folder, base, own == "sparse", tokenizer, limit)
    if private:
        stated = {"query_prompt": "", "passage_prompt": "", **stated, "title": private["title"]}
        stated |= {name: private[name] for name in CUT if name in private}
        saved = private["tokenizer"]
        if saved["ids"] != fingerprint(tokenizer):
            what = "the tokenizer gives other ids than when the checkpoint was saved"
            version = f"{saved['version']} (now {tokenizers.__version__})"
            raise UserError(f"{folder}: {what} — install tokenizers {version}")
    form = text_format(folder, stated, overrides or {}, strict, limit)
    if form.title == "sep":
        _check_fit(folder, backbone, tokenizer, "sep_token")
    if form.max_chunks > 1 and (kind == "sparse" or not tokenizer.is_fast):
        why = "a sparse vector is one per text" if tokenizer.is_fast else "the tokenizer is slow"
        raise UserError(f"{folder}: max_chunks {form.max_chunks}, but {why} — give 1")
    if kind == "sparse":
        excluded = private.get("exclude_special_tokens", False)
        encoder = SparseBiEncoder(backbone, tokenizer, excluded, form)
        if pooling and (table := read_query_table(folder)):
            encoder.query_table = encoder.make_table(*table)
    else:
        encoder = BiEncoder(backbone, tokenizer, pooling or head.pooling, layers, form)
    extend(encoder, head, strict and pooling is not None, folder)
    nn.Sequential(*encoder.head)(torch.zeros(1, backbone.config.hidden_size))  # do they fit?
    return encoder.eval()


@_door
def private_settings(folder) -> dict:
    """The content of isthmus.json, {} without it."""
    path = Path(folder) / "isthmus.json"
    private = read_json(path) if path.is_file() else {}
    if private.get("version", VERSION) > VERSION:
        raise UserError(f"{folder}: written by a newer version of this project — update it")
    return private


def checkpoint_folder(model) -> Path:
    """The folder of a checkpoint: as given, or fetched by name from the hub or its cache."""
    folder = Path(model)
    if not folder.exists() and len(folder.parts) <= 2 and not folder.is_absolute():
        skip = ["*.onnx", "*.h5", "*.msgpack", "*.ot", "onnx/*", "openvino/*"]
        with loading(model, "give a folder or a name on the hub"):
            folder = Path(snapshot_download(str(model), ignore_patterns=skip))
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        found = "no config.json in it" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {found} — give the folder of a checkpoint")
    return folder


def loading(place, remedy: str = "give the folder of a complete checkpoint"):
    """A context: whatever a damaged folder makes the libraries raise becomes a UserError."""
    return one_line(f"{place}: cannot be loaded", remedy)


def _load(folder: Path, auto, *needed: str, trust_remote_code: bool = False) -> tuple:
    """(model in fp32, tokenizer, whether the weights of its head are new). auto: AutoModel, which
    gives a backbone without its pooler, or a class with a head; needed: see _check_fit"""
    remote = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, **remote)
    # of T5 the encoder alone; one that was saved alone says so in its `architectures`
    alone = (config.architectures or [""])[0].endswith("EncoderModel")
    if auto is AutoModel and (config.is_encoder_decoder or alone):
        auto = AutoModelForTextEncoding
    how = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    model, report = auto.from_pretrained(folder, **how, **remote)
    tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
    headless = model.base_model is model
    prefix = "" if headless else model.base_model_prefix
    missing = report["missing_keys"]
    lost = sorted(key for key in missing if key.startswith(prefix) and "pooler." not in key)
    if lost:
        what = f"{len(lost)} weights are missing ({lost[0]}, ...)"
        raise UserError(f"{folder}: {what} — give a complete {config.model_type} checkpoint")
    if headless and getattr(model, "pooler", None) is not None:
        model.pooler = None  # it would be a parameter without gradient
    # In a run of one process, from_pretrained leaves the weights in the mapped file. There they are
    # not aligned as those of several processes are, and MKL would add in another order.
    for weight in model.parameters():
        weight.data = weight.data.clone()
    _check_fit(folder, model, tokenizer, "pad_token", *needed)
    return model, tokenizer, bool(missing) and not headless


def _check_fit(place, model: nn.Module, tokenizer, *needed: str) -> None:
    """UserError: an LM head that we do not know, or a tokenizer of another model or without what is
    needed: special tokens, or is_fast."""
    kind = model.config.model_type
    if model.get_output_embeddings() is not None and kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{place}: the LM head of {kind} is not supported — use {known}")
    count = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > count:
        what = f"{count} embeddings for {len(tokenizer)} tokens of the tokenizer"
        raise UserError(f"{place}: {what} — give the tokenizer of the model")
    for name in needed:
        if not getattr(tokenizer, name):
            what = "is not a fast one" if name == "is_fast" else f"has no {name}"
            raise UserError(f"{place}: its tokenizer {what}, which is needed — give one")


@_door
def load_lm(model: str | None, model_config: str | None = None, tokenizer: str | None = None):
    """(masked LM in fp32, its tokenizer, what the echo says of its weights): those of a checkpoint,
    with a new LM head if it has none; or fresh ones, for a config file and a tokenizer's folder."""
    if (model is None) == (model_config is None) or (model_config is None) != (tokenizer is None):
        raise UserError("which model? — give --model, or --model_config and --tokenizer")
    if model:
        lm, tokenizer, new_head = _load(checkpoint_folder(model), AutoModelForMaskedLM)
        origin = f"{model}, new LM head" if new_head else model
    else:
        origin = "from scratch"
        with loading(model_config, "check --model_config and --tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
            stated = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
            stated |= read_json(model_config)
            config = AutoConfig.for_model(stated.pop("model_type", None), **stated)
            plain = {"dtype": torch.float32, "trust_remote_code": False}
            lm = AutoModelForMaskedLM.from_config(config, **plain)
    tokens = ("cls_token", "sep_token", "mask_token", "pad_token")
    _check_fit(model or model_config, lm, tokenizer, "is_fast", *tokens)
    tokenizer.padding_side = "right"  # slot 0 is the bottleneck
    return lm, tokenizer, origin


def load_decoder(model: nn.Module, folder: str | None) -> str:
    """Go on with the decoder that `folder` holds if it is one of the same objective -> what the
    echo says of it. UserError: its files are damaged."""
    settings = Path(folder or "") / "decoder.json"
    if not hasattr(model, "decoder"):
        return "none"
    if folder is None or not settings.is_file():
        return "new"
    with loading(f"{folder}, its decoder", f"remove {settings} to start a new one"):
        found = read_json(settings)
        if found.get("decoder", found["objective"]) != model.settings["decoder"]:
            return f"new, that of {folder} is of the objective {found['objective']}"
        model.decoder.load_state_dict(load_file(settings.with_suffix(".safetensors")))
    return f"that of {folder}"


# ------------------------------------------------------------------------------------------------
# save


def save_encoder(model: BiEncoder, folder, card: dict) -> None:
    """Write the checkpoint under a temporary name, read it back, and only then give it its name.
    For the main process alone. card: what the model card says (base, data, metrics). A folder that
    also holds other things, such as a log, keeps them. UserError: the folder, read again, does not
    give the same vectors; what was written is kept as FOLDER.refused."""
    private = {name: getattr(model.format, name) for name in CUT}
    if isinstance(model, SparseBiEncoder):
        private["exclude_special_tokens"] = model.exclude_special_tokens

    def is_same(written: Path) -> bool:
        again = load_encoder(written).to(next(model.parameters()).device)
        return torch.allclose(_trial(model), _trial(again), rtol=1e-4, atol=1e-5)

    with _taking_place_of(Path(folder), is_same) as temporary:
        write_head(model, temporary)
        _write(temporary, model.backbone, model.tokenizer, model.format.title, private)
        write_lines(temporary / "README.md", model_card(model, Path(folder).name, card))


def save_checkpoint(model: nn.Module, tokenizer, folder, title: str, card: dict) -> None:
    """The same for the masked LM of an objective, with its decoder; read again, it must have the
    same weights."""

    def is_same(written: Path) -> bool:
        again, _, new_head = _load(written, AutoModelForMaskedLM)
        there = again.state_dict()
        here = model.lm.state_dict().items()
        return not new_head and all(torch.equal(there[name], own.cpu()) for name, own in here)

    with _taking_place_of(Path(folder), is_same) as temporary:
        if hasattr(model, "decoder"):
            weights = model.decoder.state_dict().items()
            decoder = {name: tensor.contiguous().cpu() for name, tensor in weights}
            save_file(decoder, temporary / "decoder.safetensors", metadata={"format": "pt"})
            write_json(temporary / "decoder.json", model.settings)
        _write(temporary, model.lm, tokenizer, title, {})
        lines = [f"# {model.lm.config.model_type}, pre-trained: {model.settings['objective']}", ""]
        lines += [*card_facts(card | model.settings), "", "`AutoModelForMaskedLM` loads it."]
        write_lines(temporary / "README.md", lines)


def check_checkpoint(folder, save: Callable[[Path], None]) -> None:
    """Let `save` write the model into a folder and read it back, and remove that again: before the
    first step, so that a model which cannot be kept is refused at once. By the main process."""
    if world()[0] == 0:
        save(Path(folder) / REHEARSAL)
        shutil.rmtree(Path(folder) / REHEARSAL)


def _write(folder: Path, model: nn.Module, tokenizer, title: str, private: dict) -> None:
    """The files of transformers, and isthmus.json."""
    model.save_pretrained(folder)
    if tokenizer.is_fast:  # else the last cut would be stored as a setting
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    ids = {"ids": fingerprint(tokenizer), "version": tokenizers.__version__}
    content = {"version": VERSION, "title": title, "tokenizer": ids, **private}
    write_json(folder / "isthmus.json", content)
    mode = (folder / "isthmus.json").stat().st_mode
    for path in folder.rglob("*.safetensors"):  # which safetensors lets only the owner read
        path.chmod(mode)


@contextlib.contextmanager
def _taking_place_of(folder: Path, is_same: Callable[[Path], bool]) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well and is_same(it). If
    `folder` holds more than a checkpoint, its entries take the place of the old ones there."""
    old = {path.parts[0] for path in checkpoint_files(folder)} | {"README.md"}
    more = folder.is_dir() and not {path.name for path in folder.iterdir()} <= old
    staged = folder / ".tmp-checkpoint" if more else folder
    with atomic(staged) as temporary:
        temporary.mkdir()
        try:
            yield temporary
        except Exception as error:
            if type(error) in (SafetensorError, Exception):  # so Rust says that the disk is full
                raise OSError(f"{folder}: cannot be written ({error})") from error
            raise
        try:
            wrong = "" if is_same(temporary) else "is another model when it is read back"
        except UserError as error:
            wrong = f"cannot be read back ({error})"
        if wrong:  # it is moved to a name of its own, which no later run removes
            place = (folder.parent if folder.name == REHEARSAL else folder).absolute()
            names = (f"{place.name}.refused{number or ''}" for number in count())
            refused = next(path for path in map(place.with_name, names) if not path.exists())
            os.replace(temporary, refused)
            remedy = "look for NaN in training, or for code whose effect no file states"
            raise UserError(f"{place}: the checkpoint {wrong}; it is in {refused} — {remedy}")
    if more:
        for path in checkpoint_files(folder):
            (folder / path).unlink()
        for path in staged.iterdir():
            os.replace(path, folder / path.name)
        staged.rmdir()


def checkpoint_files(folder) -> list[Path]:
    """What decides the vectors of a checkpoint (weights, tokenizer, head, settings), relative to
    `folder`, in a fixed order; neither the model card nor what a training run keeps beside it."""
    found = [path for pattern in FILES for path in Path(folder).glob(pattern) if path.is_file()]
    return sorted({path.relative_to(folder) for path in found})


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


@torch.no_grad()
def _trial(model: BiEncoder) -> Tensor:
    """The vectors of TRIAL, as queries and as passages, in eval mode. By `encode`: Accelerate wraps
    `forward` in autocast."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    found = []
    for kind in ("query", "passage"):
        strings = format_texts(TRIAL, kind, model.format, model.tokenizer)
        ids = to_ids(strings, model.tokenizer, model.format.max_length(kind))
        found.append(model.encode(send_to_device(pad(ids, model.tokenizer), device), kind))
    model.train(training)
    return torch.cat(found).cpu()


# ------------------------------------------------------------------------------------------------
# cross-encoders


@_door
def load_cross_encoder(folder: Path, form: TextFormat) -> tuple[nn.Module, object]:
    """(sequence classifier in fp32 and eval mode, tokenizer). form: title, max_query_length, and in
    max_passage_length the tokens of a pair. UserError: no trained head of one or two labels, a
    tokenizer that is not fast, lengths that leave no room for the passage."""
    needed = ("is_fast", "sep_token") if form.title == "sep" else ("is_fast",)
    classifier, tokenizer, new_head = _load(folder, AutoModelForSequenceClassification, *needed)
    if new_head or classifier.config.num_labels > 2:
        what = "it has no trained head of one or two labels, so it is no cross-encoder"
        raise UserError(f"{folder}: {what} — train one with recipes/train_cross_encoder.py")
    query, pair, limit = form.max_query_length, form.max_passage_length, positions(classifier)
    if query + tokenizer.num_special_tokens_to_add(pair=True) >= pair or pair > limit:
        what = f"--max_query_length {query} in --max_length {pair} of {limit} positions"
        raise UserError(f"{folder}: {what} — the passage needs room beside the query")
    return classifier.eval(), tokenizer
