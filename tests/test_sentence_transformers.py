"""pytest tests/test_sentence_transformers.py — our folders loaded there, theirs loaded here: the
same vectors."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lib.checkpoint import load_encoder, save_encoder
from lib.encoder import Head
from lib.files import UserError
from lib.text import TextFormat, format_texts, pad, to_ids

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import modules as st  # noqa: E402

TEXTS = [
    "ants and sugar",
    "The lava of a crater, " * 30,
    "bow",
    "Orchestra: mould, curd & whey",
    "ice and snow " * 6,
    "query: bow",
]


@torch.no_grad()
def ours(folder, kind, **loading):
    model = load_encoder(folder, **loading)
    strings = format_texts([("", text) for text in TEXTS], kind, model.format, model.tokenizer)
    return model.encode(
        pad(to_ids(strings, model.tokenizer, model.format.max_length(kind)), model.tokenizer)
    )


def theirs(folder, how="encode", **kwargs):
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return getattr(model, how)(TEXTS, convert_to_tensor=True, batch_size=3, **kwargs)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    assert (a[0] - a[1]).abs().max() > 1e-3  # not all texts alike


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    "head", [{}, {"normalize": True}, {"projection": 24}, {"projection": 24, "normalize": True}]
)
@pytest.mark.parametrize("prompts", [{}, {"query_prompt": "query: ", "passage_prompt": "bow of "}])
def test_ours_there(tiny_model_dir, tmp_path, pooling, head, prompts):
    lengths = {"max_query_length": 12, "max_passage_length": 40}
    head = Head(pooling, **head)
    save_encoder(load_encoder(tiny_model_dir, head, {**lengths, **prompts}), tmp_path / "a", {})
    same(theirs(tmp_path / "a", "encode_query"), ours(tmp_path / "a", "query"))
    same(theirs(tmp_path / "a", "encode_document"), ours(tmp_path / "a", "passage"))
    if not prompts:
        same(theirs(tmp_path / "a"), ours(tmp_path / "a", "passage"))
    model = SentenceTransformer(
        str(tmp_path / "a"), device="cpu"
    )  # and back: what they save of it is read here
    model.save(str(tmp_path / "b"))
    same(ours(tmp_path / "b", "query"), ours(tmp_path / "a", "query"))
    same(ours(tmp_path / "b", "passage"), ours(tmp_path / "a", "passage"))


def build(tiny_model_dir, pooling, *more, **kwargs):
    transformer = st.Transformer(str(tiny_model_dir))
    transformer.max_seq_length = 30
    return SentenceTransformer(
        modules=[transformer, st.Pooling(32, pooling), *more], device="cpu", **kwargs
    )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("spelling", ["new", "old"])
def test_theirs_here(tiny_model_dir, tmp_path, pooling, spelling):
    torch.manual_seed(0)
    more = [
        st.Dense(32, 20),
        st.Dense(20, 16, bias=False, activation_function=torch.nn.ReLU()),
        st.LayerNorm(16),
    ]
    build(tiny_model_dir, pooling, *more, st.Normalize(), prompts={"query": "what: "}).save(
        str(tmp_path)
    )
    if spelling == "old":  # as releases before 5.4 wrote it, and all-MiniLM-L6-v2 has it
        names = ["Transformer", "Pooling", "Dense", "Dense", "LayerNorm", "Normalize"]
        modules = json.loads((tmp_path / "modules.json").read_text())
        for module, name in zip(modules, names, strict=True):
            module["type"] = f"sentence_transformers.models.{name}"
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        (tmp_path / "sentence_bert_config.json").write_text(
            '{"max_seq_length": 30, "do_lower_case": false}'
        )
        flags = {
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
        }
        (tmp_path / "1_Pooling/config.json").write_text(
            json.dumps({"word_embedding_dimension": 32, **flags})
        )
        (tmp_path / "5_Normalize/config.json").unlink()
    model = load_encoder(tmp_path)
    assert model.pooling == pooling and model.dim == 16 and model.normalized
    lengths = {"max_query_length": 30, "max_passage_length": 30}
    assert model.format == TextFormat(query_prompt="what: ", **lengths)
    with pytest.raises(UserError, match="its query_prompt is 'what: ', not ''"):
        load_encoder(tmp_path, overrides={"query_prompt": ""}, strict=True)
    load_encoder(tmp_path, overrides={"title": "none", **lengths}, strict=True)
    same(ours(tmp_path, "query"), theirs(tmp_path, "encode_query"))
    same(ours(tmp_path, "passage"), theirs(tmp_path, "encode_document"))


def test_lower_casing_and_named_prompts(tiny_model_dir, tmp_path):
    build(tiny_model_dir, "mean", prompts={"query": "", "passage": "bow of ", "rest": "x"}).save(
        str(tmp_path)
    )
    same(
        ours(tmp_path, "passage"), theirs(tmp_path, prompt_name="passage")
    )  # their encode_document takes "" here
    path = tmp_path / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"do_lower_case": true', '"do_lower_case": false'))
    cased = ours(tmp_path, "query")
    (tmp_path / "sentence_bert_config.json").write_text(
        '{"max_seq_length": 30, "do_lower_case": true}'
    )
    same(ours(tmp_path, "query"), theirs(tmp_path))
    assert (cased[3] - ours(tmp_path, "query")[3]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["max", "weightedmean", ("cls", "mean")])
def test_other_poolings_are_refused(tiny_model_dir, tmp_path, mode):
    build(tiny_model_dir, mode).save(str(tmp_path))
    with pytest.raises(UserError, match="not cls, mean, last_token"):
        load_encoder(tmp_path)


def test_sep_titles_are_joined_by_the_caller_there(tiny_model_dir, tmp_path):
    save_encoder(load_encoder(tiny_model_dir, Head("cls"), {"title": "sep"}), tmp_path / "a", {})
    model = load_encoder(tmp_path / "a")
    assert model.format.title == "sep"
    rows = [(("Ants",), "Ants sleep."), ((), "Bees fly."), (("Bread",), "")]
    strings = format_texts(rows, "passage", model.format, model.tokenizer)
    assert strings[0] == f"Ants{model.tokenizer.sep_token}Ants sleep."
    batch = pad(to_ids(strings, model.tokenizer, 256), model.tokenizer)
    with torch.no_grad():
        same(
            model.encode(batch),
            torch.tensor(
                SentenceTransformer(str(tmp_path / "a"), device="cpu").encode_document(strings)
            ),
        )
    line = "'[SEP]'.join(filter(None, (title, text)))"
    assert line in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize("form", [{"max_chunks": 3}, {"max_characters": 50}])
def test_what_they_cannot_express_fails_there(tiny_model_dir, tmp_path, form):
    save_encoder(load_encoder(tiny_model_dir, Head("cls"), form), tmp_path / "a", {})
    assert (tmp_path / "a" / "modules.json").exists()
    with pytest.raises((ImportError, ValueError, OSError)):
        SentenceTransformer(str(tmp_path / "a"), device="cpu")
    assert load_encoder(tmp_path / "a").format.max_chunks == form.get("max_chunks", 1)


@pytest.fixture(scope="module")
def t5(tiny_model_dir, tmp_path_factory):
    """A folder as sentence-transformers saves GTR and Sentence-T5: the encoder alone, mean pooling,
    a projection without bias, unit vectors. The feed-forward is gated, as in T5 1.1."""
    from transformers import AutoTokenizer, T5Config, T5Model

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    how = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    torch.manual_seed(0)
    plain = tmp_path_factory.mktemp("t5")
    T5Model(T5Config(vocab_size=len(tokenizer), **sizes, **how)).save_pretrained(plain / "plain")
    tokenizer.save_pretrained(plain / "plain")
    dense = st.Dense(32, 24, bias=False, activation_function=torch.nn.Identity())
    build(plain / "plain", "mean", dense, st.Normalize()).save(str(plain / "saved"))
    return plain


def test_t5_encoders(t5, tmp_path, tiny_collection, script, monkeypatch):
    """Read, encoded on a CPU in both precisions, trained and saved: the same vectors there."""
    config = json.loads((t5 / "saved" / "config.json").read_text())
    assert config["architectures"] == ["T5EncoderModel"] and not config["is_encoder_decoder"]
    assert any(file.startswith("decoder") for file in load_file(t5 / "plain/model.safetensors"))
    same(ours(t5 / "saved", "passage"), theirs(t5 / "saved"))

    def encoded(folder, name, precision="no"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        out = tmp_path / f"{name}-{precision}"
        flags = {"model": folder, "input": tiny_collection.corpus, "kind": "passage"}
        flags |= {"output_dir": out, "num_workers": 0, "dtype": "float32", "title": "space"}
        status, _, error = script("encode", *(w for k, v in flags.items() for w in (f"--{k}", v)))
        assert status == 0, error
        return torch.from_numpy(np.load(out / "shard-00000.npy"))

    rows = [json.loads(line) for line in tiny_collection.corpus.read_text().splitlines()]
    texts = [f"{row['title']} {row['text']}".strip() for row in rows]

    def there(folder):
        model = SentenceTransformer(str(folder), device="cpu")
        return model.encode(texts, convert_to_tensor=True, batch_size=8)

    same(encoded(t5 / "saved", "saved"), there(t5 / "saved"))
    low = encoded(t5 / "saved", "saved", "bf16")
    torch.testing.assert_close(low, there(t5 / "saved"), atol=0.03, rtol=0)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    for model, flags in (("saved", ()), ("plain", ("--pooling", "mean"))):
        files = {k: getattr(tiny_collection, k) for k in ("corpus", "queries", "train")}
        how = files | {"model": t5 / model, "max_steps": 2, "per_device_batch_size": 4}
        how |= {"passages_per_query": 2, "num_workers": 0, "output_dir": tmp_path / model}
        how |= {"max_query_length": 16, "max_passage_length": 30}
        words = [word for k, v in how.items() for word in (f"--{k}", v)]
        status, _, error = script("finetune_biencoder", *words, *flags)
        assert status == 0, error
        same(encoded(tmp_path / model, f"trained-{model}"), there(tmp_path / model))
