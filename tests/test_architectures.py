"""pytest tests/test_architectures.py — every architecture from pre-training to vectors, in
transformers and sentence-transformers too."""

import pytest
import torch
from architectures import KINDS, tiny_config
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from lib import launch
from lib.checkpoint import load_encoder, save_encoder
from lib.encoder import Head
from lib.text import format_texts, pad, to_ids

sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = ["ants and sugar", "The lava of a crater, " * 10, "bow", "curd & whey", "what is it?"]
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


class Stopped(BaseException):
    """Nothing catches it."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model_dir):
    """{architecture: folder of a small random masked LM, without dropout}."""
    parent = tmp_path_factory.mktemp("architectures")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    for kind in KINDS:
        torch.manual_seed(0)
        lm = AutoModelForMaskedLM.from_config(tiny_config(kind, tokenizer, **DROPOUT))
        lm.save_pretrained(parent / kind)
        tokenizer.save_pretrained(parent / kind)
    return {kind: parent / kind for kind in KINDS}


@torch.no_grad()
def vectors(folder):
    model = load_encoder(folder)
    strings = format_texts([("", text) for text in TEXTS], "passage", model.format, model.tokenizer)
    ids = to_ids(strings, model.tokenizer, model.format.max_length("passage"))
    return model.encode(pad(ids, model.tokenizer))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["dense", "sparse"])
def test_vectors_are_those_of_sentence_transformers(folders, tmp_path, kind, head):
    how = Head(pooling="mean") if head == "dense" else Head(kind="sparse")
    save_encoder(load_encoder(folders[kind], how, {"max_passage_length": 40}), tmp_path / "a", {})
    cls = sentence_transformers.SentenceTransformer
    if head == "sparse":
        cls = sentence_transformers.SparseEncoder
    theirs = cls(str(tmp_path / "a"), device="cpu").encode_document(TEXTS, convert_to_tensor=True)
    theirs = theirs.to_dense() if theirs.is_sparse else theirs
    ours = vectors(tmp_path / "a")
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=2e-5)
    assert (ours[0] - ours[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("xlm-roberta", "dupmae"),
        ("camembert", "seed"),
        ("modernbert", "retromae"),
        ("modernbert", "lexmae"),
        ("modernbert", "bow"),
        ("modernbert", "condenser"),
    ],
)
def test_a_stopped_run_resumes_and_its_checkpoint_goes_on(
    folders, tmp_path, tiny_collection, script, monkeypatch, kind, objective
):
    """Pre-training stopped half way and resumed gives the bits of an uninterrupted run; the folder
    is whole for transformers; another run continues its decoder."""
    common = ["--corpus", tiny_collection.corpus, "--max_length", 40, "--num_workers", 0]
    common += ["--objective", objective, "--per_device_batch_size", 4, "--log_every", 1]
    common += ["--save_every", 2, "--learning_rate", 1e-3, "--model"]
    whole, resumed, further = (tmp_path / name for name in ("whole", "resumed", "further"))

    def pretrain(*flags):
        status, out, error = script("pretrain_mae", *common, *flags)
        assert status == 0, error
        return out

    pretrain(folders[kind], "--max_steps", 4, "--output_dir", whole)

    def save_and_stop(*state):
        save_state(*state)
        raise Stopped

    save_state = launch.save_state
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(launch, "save_state", save_and_stop)
        pretrain(folders[kind], "--max_steps", 4, "--output_dir", resumed)
    pretrain(folders[kind], "--max_steps", 4, "--output_dir", resumed, "--resume")
    names = ["model.safetensors"]
    if objective != "bow":
        names.append("decoder.safetensors")
    for name in names:
        found, expected = load_file(resumed / name), load_file(whole / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    for cls in (AutoModelForMaskedLM, AutoModel):
        info = cls.from_pretrained(whole, output_loading_info=True)[1]
        assert all(key.startswith("pooler.") for key in info["missing_keys"])
    out = pretrain(whole, "--max_steps", 1, "--output_dir", further)
    decoder = next(line for line in out.splitlines() if line.startswith("   decoder"))
    assert decoder.split(maxsplit=1)[1] == ("none" if names[1:] == [] else f"that of {whole}")


def test_modernbert_takes_texts_beyond_512_tokens(tiny_model_dir, tmp_path, script):
    """Trained on them, encoded, and equal in sentence-transformers."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    config = tiny_config("modernbert", tokenizer, max_position_embeddings=1024)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    texts = [f"{word} and lava " * 200 for word in ("ants", "ice", "bread")]
    (tmp_path / "corpus.tsv").write_text("".join(f"p{n}\t{t}\n" for n, t in enumerate(texts)))
    (tmp_path / "queries.tsv").write_text("q0\tants\nq1\tice\n")
    (tmp_path / "qrels.tsv").write_text("q0 0 p0 1\nq1 0 p1 1\n")
    flags = ["--model", tmp_path / "base", "--pooling", "mean", "--train", tmp_path / "qrels.tsv"]
    flags += ["--corpus", tmp_path / "corpus.tsv", "--queries", tmp_path / "queries.tsv"]
    flags += ["--max_passage_length", 700, "--max_steps", 2, "--per_device_batch_size", 2]
    status, _, error = script(
        "finetune_biencoder", *flags, "--num_workers", 0, "--output_dir", tmp_path / "model"
    )
    assert status == 0, error
    model = load_encoder(tmp_path / "model")
    ids = to_ids(texts, model.tokenizer, model.format.max_length("passage"))
    assert min(map(len, ids)) > 512
    with torch.no_grad():
        ours = model.encode(pad(ids, model.tokenizer))
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    theirs = theirs.encode_document(texts, convert_to_tensor=True)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=2e-5)
