"""pytest tests/test_ance.py — finetune_biencoder.py on refreshed training files, documents and
weighted groups."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib.files import read_training_file, write_json, write_training_file

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def train(script, tiny_collection, tiny_model_dir, tmp_path):
    """train(*flags, name=value, ...) -> the folder of a finished run of some seconds; name=None
    leaves a flag out."""

    def run(*flags, fails=False, **changes):
        files = {name: getattr(tiny_collection, name) for name in ("corpus", "queries", "train")}
        texts = {
            "model": tiny_model_dir,
            "pooling": "cls",
            "max_query_length": 16,
            "max_passage_length": 32,
        }
        steps = {
            "passages_per_query": 3,
            "per_device_batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": 12,
        }
        how = {
            "loss": "triplet",
            "log_every": 1,
            "save_every": 4,
            "num_workers": 0,
            "output_dir": tmp_path / "out",
        }
        options = files | texts | steps | how | changes
        words = []
        for name, value in options.items():
            if value is not None:
                words += [f"--{name}", *(value if isinstance(value, list) else [value])]
        status, shown, errors = script("finetune_biencoder", *words, *flags)
        if fails:
            assert status == 1
            return errors
        assert status == 0, errors
        return Path(options["output_dir"])

    return run


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(one, other, atol=0.0):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name in one | other:
        if atol and "key.bias" in name:  # its gradient is 0 but for rounding, which Adam blows up
            continue
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0, msg=name)


# ------------------------------------------------------------------------------------------------
# refreshed negatives


def rows_of(collection):
    return [row for _, row in read_training_file(collection.train)]


def generations(folder, collection, *steps):
    """One generation per step: the n-th has two negatives of every query, and skips every third
    one."""
    before = len(list(folder.glob("generation-*")))
    for number, step in enumerate(steps):
        path = folder / f"generation-{before + number + 1:04d}"
        rows = [
            row._replace(neg=row.neg[number : number + 2])
            for at, row in enumerate(rows_of(collection))
            if at % 3 != number
        ]
        write_training_file(path / "train.jsonl", rows)
        write_json(path / "manifest.json", {"step": step})


def test_the_newest_generation_of_its_own_past_is_used_and_a_resume_replays_it(
    train, tiny_collection, tmp_path
):
    folder = tmp_path / "generations"
    generations(folder, tiny_collection, 0, 3, 9)
    how = {"train": folder, "log_every": 2}
    whole = train(**how, output_dir=tmp_path / "whole")
    steps = [(line["step"], line["generation"], line["lag"]) for line in log_of(whole)]
    expected = [(2, 1, 2), (4, 1, 4), (6, 2, 3), (8, 2, 5), (10, 2, 7), (12, 3, 3)]
    assert steps == expected
    assert (whole / "generations.tsv").read_text() == "0\t1\n2\t1\n4\t2\n6\t2\n8\t2\n10\t3\n"
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == ["checkpoint-00000004", "checkpoint-00000008"]
    assert (whole / "checkpoints" / names[0] / "modules.json").is_file()

    # as a run that was killed after step 11, with its last state of step 8
    shutil.copytree(whole, tmp_path / "out")
    for name in ("done", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoints" / names[1])  # which is written after the state
    generations(folder, tiny_collection, 9, 9)  # which did not exist when the first run looked
    again = train("--resume", **how)
    same(whole, again)
    same(*(folder / "checkpoints" / names[1] for folder in (whole, again)))
    assert [line["generation"] for line in log_of(again)] == [g for _, g, _ in steps]
    new = train(**how, output_dir=tmp_path / "new")
    assert log_of(new)[-1]["generation"] == 5


def test_a_folder_without_a_generation_and_epochs_of_generations_are_refused(
    train, tiny_collection, tmp_path
):
    (tmp_path / "nothing").mkdir()
    errors = train(fails=True, train=tmp_path / "nothing", output_dir=tmp_path / "x")
    assert "no generation for step 0 — see recipes/ance.sh" in errors
    assert not (tmp_path / "x").exists()
    generations(tmp_path / "generations", tiny_collection, 0)
    how = {"train": tmp_path / "generations", "max_steps": None, "output_dir": tmp_path / "x"}
    assert "has no number of examples — give --max_steps" in train(fails=True, **how)


# ------------------------------------------------------------------------------------------------
# groups of queries


@pytest.fixture
def clusters(tiny_collection, tmp_path):
    """Three groups, one of a single query."""
    rows = rows_of(tiny_collection)
    clustered = [r._replace(cluster=0 if at == 0 else 1 + at % 2) for at, r in enumerate(rows)]
    write_training_file(tmp_path / "clusters.jsonl", clustered)
    return {"train": tmp_path / "clusters.jsonl"}


def without_dropout(model, folder):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    AutoModelForMaskedLM.from_pretrained(model, **none).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def test_two_processes_weight_groups_like_one(
    train, clusters, tiny_model_dir, tmp_path, two_processes
):
    how = clusters | {"model": without_dropout(tiny_model_dir, tmp_path / "model")}
    how |= {"max_steps": 6, "dro_ema": 0.5, "dro_rho": 0.5, "learning_rate": 1e-4}
    one = train("--dro", **how, per_device_batch_size=8, output_dir=tmp_path / "one")
    weights = [line["group_weights"] for line in log_of(one)]
    assert len({tuple(w) for w in weights}) == 6 and all(len(w) == 3 for w in weights)
    arguments = json.loads((one / "args.json").read_text())["arguments"]
    arguments |= {
        "per_device_batch_size": 4,
        "log_every": 1,
        "num_workers": 0,
        "output_dir": str(tmp_path / "two"),
    }
    words = [
        w
        for k, v in arguments.items()
        if v is not None and not isinstance(v, bool)
        for w in (f"--{k}", str(v))
    ]
    two_processes("finetune_biencoder.py", "--dro", *words)
    assert (tmp_path / "two" / "done").is_file()
    for line, other in zip(log_of(one), log_of(tmp_path / "two"), strict=True):
        assert other["group_weights"] == pytest.approx(line["group_weights"], rel=1e-4)
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)
    same(one, tmp_path / "two", atol=2e-5)


def test_weights_survive_a_resume(train, clusters, tmp_path):
    how = clusters | {"dro_eps": 0.0, "dro_rho": 1.0}
    how |= {"gradient_accumulation_steps": 2}
    whole = train("--dro", **how, output_dir=tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "out")
    for name in ("done", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    again = train("--dro", "--resume", **how)
    same(whole, again)
    lines = [[line["group_weights"] for line in log_of(folder)] for folder in (whole, again)]
    assert lines[0] == lines[1] and all(sum(w) == pytest.approx(1) for w in lines[0])


def test_dro_is_refused_where_no_loss_belongs_to_a_query(train, clusters, tmp_path):
    for changes in ({"loss": "info_nce"}, {"chunk_size": 4}, {"head": "sparse", "pooling": None}):
        errors = train("--dro", fails=True, **clusters | changes)
        assert "--dro needs a loss of each query alone" in errors
    assert "lines without clusters — add them" in train("--dro", fails=True)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------
# documents


def test_documents_train_by_their_best_chunk(train, script, tiny_collection, tmp_path):
    """What a run measures while it trains is what encode.py and evaluate.py find afterwards."""
    how = {"max_chunks": 3, "max_passage_length": 16, "title": "sep"}
    dev = [tiny_collection.queries, tiny_collection.qrels, tiny_collection.candidates]
    folder = train(**how, dev=dev, max_steps=4, eval_every=2)
    assert json.loads((folder / "isthmus.json").read_text())["max_chunks"] == 3
    logged = log_of(folder)[-1]["dev_mrr@10"]
    for kind, source in (("query", tiny_collection.queries), ("passage", tiny_collection.corpus)):
        out = tmp_path / kind
        status, _, errors = script(
            "encode", "--model", folder, "--input", source, "--kind", kind, "--output_dir", out
        )
        assert status == 0, errors
    ids = list(
        itertools.chain(
            *(p.read_text().split() for p in sorted((tmp_path / "passage").glob("*.ids.txt")))
        )
    )
    assert len(ids) > len(set(ids)) == 40
    flags = [
        "--queries_embeddings",
        tmp_path / "query",
        "--corpus_embeddings",
        tmp_path / "passage",
        "--metrics",
        "RR@10",
    ]
    flags += ["--qrels", tiny_collection.qrels, "--candidates", tiny_collection.candidates]
    status, _, errors = script("evaluate", *flags, "--output_dir", tmp_path / "evaluation")
    assert status == 0, errors
    (part,) = json.loads((tmp_path / "evaluation/metrics.json").read_text())["splits"].values()
    assert part["metrics"]["RR@10"] == pytest.approx(
        logged, abs=0.03
    )  # vectors are stored in float16
