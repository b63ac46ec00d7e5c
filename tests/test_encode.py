"""pytest tests/test_encode.py — encode.py by subprocess on a random BERT: order, resumption,
processes, refusals."""

import contextlib
import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from scipy.sparse import load_npz

from encode import cut, main
from lib import launch
from lib.checkpoint import load_encoder, save_encoder
from lib.embeddings import Embeddings
from lib.encoder import Head
from lib.files import UserError
from lib.text import format_texts, to_ids, token_batches
from lib.texts import open_texts, write_texts

ROOT = Path(__file__).parents[1]
SMALL = [
    "--shard_rows",
    "9",
    "--tokens_per_batch",
    "100",
    "--num_workers",
    "1",
]  # 40 texts: 5 shards


@pytest.fixture(scope="module")
def checkpoint(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    texts = {"query_prompt": "what: ", "max_query_length": 8, "max_passage_length": 40}
    save_encoder(load_encoder(tiny_model_dir, Head("mean"), texts), folder, {})
    return folder


@pytest.fixture(scope="module")
def sparse(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse") / "model"
    model = load_encoder(
        tiny_model_dir, Head(kind="sparse"), {"max_query_length": 8, "max_passage_length": 40}
    )
    save_encoder(model, folder, {})
    return folder


def command(checkpoint, source, output, *flags, kind="passage"):
    arguments = [
        "--model",
        checkpoint,
        "--input",
        source,
        "--kind",
        kind,
        "--output_dir",
        output,
        *SMALL,
        *flags,
    ]
    return [sys.executable, "encode.py", *map(str, arguments)]


def encode(*args, **kwargs):
    """In this process; gives what it prints. For what is about processes, see the tests with
    `command`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", command(*args, **kwargs)[1:])
        try:
            main()
        finally:
            launch.release_output()
    return printed.getvalue()


def content(folder):
    return {
        path.name: path.read_bytes()
        for path in sorted(Path(folder).iterdir())
        if path.name not in ("args.json", ".lock")  # a killed run leaves its lock
    }


@pytest.fixture(scope="module")
def encoded(checkpoint, tiny_collection, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded") / "passages"
    return folder, encode(checkpoint, tiny_collection.corpus, folder, "--dtype", "float32")


def reference(checkpoint, source, kind):
    model, texts = load_encoder(checkpoint), open_texts(source)
    rows = format_texts([texts[r] for r in range(len(texts))], kind, model.format, model.tokenizer)
    with torch.no_grad():  # one by one: neither order nor padding nor batches
        ids = [
            torch.tensor([one])
            for one in to_ids(rows, model.tokenizer, model.format.max_length(kind))
        ]
        reps = [
            model.encode({"input_ids": one, "attention_mask": torch.ones_like(one)}) for one in ids
        ]
    return texts.ids(range(len(texts))), torch.cat(reps).numpy()


def test_rows_keep_the_order_of_the_input(encoded, checkpoint, tiny_collection):
    folder, printed = encoded
    ids, expected = reference(checkpoint, tiny_collection.corpus, "passage")
    embeddings = Embeddings(folder)
    assert embeddings.ids(range(40)) == ids and embeddings.meta["count"] == 40
    np.testing.assert_allclose(embeddings.take(range(40)), expected, atol=2e-5)
    assert sorted(path.name for path in folder.glob("*.npy"))[-1] == "shard-00004.npy"
    assert "[CLS]" in printed and "max_length               40" in printed and "fp32" in printed


def test_rows_keep_their_order_through_the_windows_of_a_shard(
    checkpoint, sparse, tiny_collection, tmp_path, monkeypatch
):
    monkeypatch.setattr("encode.WINDOW", 4)  # of 9 texts
    for name, model in (("dense", checkpoint), ("sparse", sparse)):
        encode(model, tiny_collection.corpus, tmp_path / name, "--dtype", "float32")
        ids, expected = reference(model, tiny_collection.corpus, "passage")
        embeddings = Embeddings(tmp_path / name)
        found = embeddings.take(range(40))
        assert embeddings.ids(range(40)) == ids
        found = found.toarray() if name == "sparse" else found
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_progress_bar_moves_with_every_batch(
    checkpoint, tiny_collection, tmp_path, monkeypatch
):
    moves = []

    class Bar:
        def __init__(self, total, **_):
            self.total = total

        def update(self, texts):
            moves.append(texts)

        def close(self):
            assert sum(moves) == self.total == 40

    monkeypatch.setattr("encode.tqdm", Bar)
    encode(checkpoint, tiny_collection.corpus, tmp_path / "a", "--shard_rows", 40)
    assert sum(map(bool, moves)) > 9  # a batch has at most 100 tokens


def test_queries_take_prompt_and_length_of_their_own(checkpoint, tiny_collection, tmp_path):
    printed = encode(checkpoint, tiny_collection.queries, tmp_path / "q", kind="query")
    _, expected = reference(checkpoint, tiny_collection.queries, "query")
    embeddings = Embeddings(tmp_path / "q")
    np.testing.assert_allclose(embeddings.take(range(20)), expected, atol=2e-3)  # stored as float16
    assert (
        embeddings.meta["prompt"] == "what: "
        and embeddings.meta["max_length"] == 8
        and "what :" in printed
    )
    assert np.load(tmp_path / "q" / "shard-00000.npy").dtype == np.float16


def test_two_processes_write_the_same_bytes(
    encoded, checkpoint, tiny_collection, tmp_path, two_processes
):
    flags = command(checkpoint, tiny_collection.corpus, tmp_path / "a", "--dtype", "float32")[2:]
    assert "40 texts" in two_processes("encode.py", *flags)
    assert content(tmp_path / "a") == content(encoded[0])


def test_a_lost_shard_is_made_again_and_a_complete_folder_left_alone(
    encoded, checkpoint, tiny_collection, tmp_path
):
    flags = checkpoint, tiny_collection.corpus, tmp_path / "a", "--dtype", "float32"
    encode(*flags)
    for name in ("meta.json", "shard-00001.npy", "shard-00003.npy", "shard-00003.ids.txt"):
        (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / ".tmp-1-shard-00001.npy").write_bytes(b"half")
    kept = (tmp_path / "a" / "shard-00000.npy").stat().st_mtime_ns
    assert "18 texts" in encode(*flags)
    assert content(tmp_path / "a") == content(encoded[0])
    assert (tmp_path / "a" / "shard-00000.npy").stat().st_mtime_ns == kept
    assert "is complete" in encode(*flags, "--num_workers", "0")


def test_killed_at_any_moment(encoded, checkpoint, tiny_collection, tmp_path):
    for name in range(15):  # 600 texts, 67 shards: something to kill
        (tmp_path / "many.jsonl").open("a").write(
            tiny_collection.corpus.read_text().replace('"p', f'"{name}-p')
        )
    flags = checkpoint, tmp_path / "many.jsonl"
    encode(*flags, tmp_path / "whole")
    kills, cut = 0, tmp_path / "cut"
    while not (cut / "meta.json").exists():
        shards = len(list(cut.glob("*.npy")))
        started = subprocess.Popen(
            command(*flags, cut), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while started.poll() is None and len(list(cut.glob("*.npy"))) < shards + 25:
            time.sleep(0.001)
        kills += started.poll() is None
        started.kill()
        assert started.wait() in (0, -signal.SIGKILL)  # one that fails would fail for ever
    assert kills >= 2 and content(cut) == content(tmp_path / "whole")


def test_sparse_vectors_in_csr_shards(sparse, tiny_collection, tmp_path):
    printed = encode(sparse, tiny_collection.corpus, tmp_path / "whole")
    ids, expected = reference(sparse, tiny_collection.corpus, "passage")
    whole = Embeddings(tmp_path / "whole")
    assert (
        whole.ids(range(40)) == ids
        and whole.meta["head"] == "sparse"
        and whole.dim == expected.shape[1]
    )
    np.testing.assert_allclose(whole.take(range(40)).toarray(), expected, atol=2e-5)
    assert (
        len(list((tmp_path / "whole").glob("*.npz"))) == 5
        and load_npz(whole.paths[0]).dtype == np.float32
    )
    assert f"{(expected > 0).sum() / 40:.1f} terms each" in printed
    encode(sparse, tiny_collection.corpus, tmp_path / "half", "--dtype", "float16")
    assert load_npz(tmp_path / "half" / "shard-00000.npz").dtype == np.float16
    np.testing.assert_allclose(
        Embeddings(tmp_path / "half").take(range(40)).toarray(), expected, rtol=1e-3, atol=1e-4
    )


def test_pruned_vectors_keep_their_highest_weights(sparse, tiny_collection, tmp_path):
    _, expected = reference(sparse, tiny_collection.queries, "query")
    encode(
        sparse,
        tiny_collection.queries,
        tmp_path / "q",
        "--max_terms",
        7,
        "--min_weight",
        0.5,
        kind="query",
    )
    for row, vector in zip(
        Embeddings(tmp_path / "q").take(range(20)).toarray(), expected, strict=True
    ):
        kept = [v for v in np.argsort(-vector, kind="stable")[:7] if vector[v] > 0.5]
        assert np.flatnonzero(row).tolist() == sorted(kept)
        np.testing.assert_allclose(row[kept], vector[kept], atol=2e-5)


def test_sparse_shards_of_two_processes_and_of_a_resumed_run(
    sparse, tiny_collection, tmp_path, two_processes
):
    encode(sparse, tiny_collection.corpus, tmp_path / "one")
    two_processes("encode.py", *command(sparse, tiny_collection.corpus, tmp_path / "two")[2:])
    assert content(tmp_path / "one") == content(tmp_path / "two")
    for name in ("shard-00001.npz", "shard-00003.npz"):
        (tmp_path / "two" / name).unlink()
    (tmp_path / "two" / "meta.json").unlink()
    assert "18 texts" in encode(sparse, tiny_collection.corpus, tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    with pytest.raises(UserError, match="made with --max_terms 0, now 5"):
        encode(sparse, tiny_collection.corpus, tmp_path / "two", "--max_terms", 5)


def test_a_sparse_vector_that_is_no_number_is_named(sparse, tiny_collection, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(sparse, tmp_path / "model")
    weights = load_file(sparse / "model.safetensors")
    weights["cls.predictions.bias"][3] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="vector of p0 is not finite — check the checkpoint"):
        encode(tmp_path / "model", tiny_collection.corpus, tmp_path / "out")


def test_what_is_refused(encoded, checkpoint, tiny_model_dir, tiny_collection, tmp_path):
    corpus, output = tiny_collection.corpus, tmp_path / "x"

    def refused(message, *args):
        with pytest.raises(UserError, match=message):
            encode(*args)

    refused("states no pooling", tiny_model_dir, corpus, output)
    refused("a dense checkpoint — leave --max_terms", checkpoint, corpus, output, "--max_terms", 3)
    refused("its title is 'space'", checkpoint, corpus, output, "--title", "none")
    refused("128 positions", checkpoint, corpus, output, "--max_length", "129", "--override")
    refused("made with --dtype float32", checkpoint, corpus, encoded[0])
    other, moved = tmp_path / "other", tmp_path / "corpus.jsonl"
    save_encoder(load_encoder(tiny_model_dir, Head("mean")), other, {})
    refused("made with --model", other, corpus, encoded[0], "--dtype", "float32")
    assert not output.exists()
    write_texts(moved, [("1", "", "ants"), ("2", "", "bees")])
    encode(other, moved, tmp_path / "a")
    save_encoder(load_encoder(checkpoint), other, {})  # another model under the same name
    refused("made with model_hash", other, moved, tmp_path / "a")
    encode(checkpoint, moved, tmp_path / "b")
    write_texts(moved, [("1", "", "ants"), ("2", "", "wasps")])  # other texts under the same name
    refused("made with input_fingerprint", checkpoint, moved, tmp_path / "b")
    model = load_encoder(checkpoint)
    model.backbone.encoder.layer[1].output.LayerNorm.weight.data.mul_(1e6)
    save_encoder(model, tmp_path / "huge", {})
    refused("vector of 1 is not finite — add --dtype float32", tmp_path / "huge", moved, output)
    assert not (output / "meta.json").exists()


def test_dry_run_and_override(checkpoint, tiny_collection, tmp_path):
    printed = encode(
        checkpoint,
        tiny_collection.corpus,
        tmp_path / "x",
        "--dry_run",
        "--title",
        "none",
        "--override",
    )
    assert (
        "disk" in printed
        and "title                    none" in printed
        and not (tmp_path / "x").exists()
    )


def test_batches_cover_all_rows_within_the_budget():
    lengths = np.random.default_rng(0).integers(3, 50, 300).astype(np.int32)
    batches = token_batches(lengths, 120, 49)
    assert sorted(np.concatenate([rows for rows, _ in batches])) == list(range(300))
    assert all(
        len(rows) * width <= 120 and lengths[rows].max() <= width <= 49 for rows, width in batches
    )
    assert max(len(rows) for rows, _ in batches) > 10
    assert [width for _, width in token_batches(np.array([9, 9]), 1, 9)] == [9, 9]
    assert [width for _, width in token_batches(np.array([0, 0]), 8, 9)] == [1]


def test_batches_have_few_shapes():
    draw, shapes = np.random.default_rng(0), set()
    for size in range(50, 150):
        lengths = draw.integers(3, 513, size)
        for rows, width in token_batches(lengths, 2048, 512):
            assert width - lengths[rows].max() <= width / 8
            shapes.add((len(rows), width))
    assert len({width for _, width in shapes}) <= 56 and len(shapes) < 150, len(shapes)


@pytest.mark.parametrize(
    ("start", "stop", "window"), [(0, 1, 1), (3, 20, 5), (0, 100, 32), (7, 9, 8192)]
)
def test_spans_cover_a_shard_in_order(start, stop, window):
    spans = cut(start, stop, window)
    assert [row for a, b in spans for row in range(a, b)] == list(range(start, stop))
    assert all(0 < b - a <= window for a, b in spans)
