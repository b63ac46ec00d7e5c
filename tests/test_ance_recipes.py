"""pytest tests/test_ance_recipes.py — ANCE, SEED-Encoder, COCO-DR from end to end at SCALE=tiny,
with their values."""

import json
import shutil

import pytest

from lib.checkpoint import load_encoder, save_encoder
from lib.encoder import Head
from lib.files import TrainingRow, read_json, read_qrels, write_training_file
from recipes.generations import publish

pytestmark = pytest.mark.slow
RATES = (
    "learning_rate",
    "warmup_steps",
    "max_steps",
    "per_device_batch_size",
    "gradient_accumulation_steps",
)
TEXTS = "title", "max_query_length", "max_passage_length", "max_characters", "max_chunks"
KIND = "loss", "optimizer", "weight_decay"


@pytest.fixture
def data(tiny_data, tmp_path):
    """What get_msmarco.sh --triples --documents leaves, without the sets of TREC and without
    candidates."""
    without = shutil.ignore_patterns("*.dl*", "top*")
    return shutil.copytree(tiny_data / "msmarco", tmp_path / "msmarco", ignore=without)


def asked(folder, *names):
    """The values that a recipe gave a finished run, before those that SCALE=tiny put at the end of
    the command."""
    args = read_json(folder / "args.json")
    assert (folder / "done").is_file()
    assert (
        args["arguments"]["max_steps"] == 2 and args["arguments"]["per_device_batch_size"] == 4
    )  # the last counts
    words, first = args["command"], {}
    for flag, value in zip(words, words[1:], strict=False):
        first.setdefault(flag, value)
    return tuple(first.get(f"--{name}") for name in names)


def check_warm_up(folder, model, rates, projection):
    """Trained on the triples of texts, with these values."""
    assert asked(folder, "train") == (str(folder.parent / "triples" / "train.jsonl"),)
    assert asked(folder, *RATES) == (*rates, None) and asked(folder, *TEXTS) == (
        "none",
        "128",
        "128",
        None,
        None,
    )
    assert asked(folder, "model", "pooling", "projection") == (str(model), "cls", projection)
    assert asked(folder, *KIND) == ("triplet", "lamb", "0")


def check_part(folder, data, model, rates, *texts):
    """Trained from this model with these values, on the negatives of the first generation, and
    evaluated."""
    run = folder / "model"
    assert asked(run, *RATES) == rates and asked(run, *TEXTS) == (texts[0], "64", "512", *texts[1:])
    assert asked(run, "model", "corpus") == (str(model), str(data / "corpus.tsv"))
    assert asked(run, *KIND, "passages_per_query") == ("triplet", "lamb", "0", "2")
    assert asked(run, "save_every", "train") == ("10000", str(folder / "generations"))
    assert (run / "generations.tsv").read_text() == "0\t1\n" and not (folder / "mining").exists()
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["generation"] == 1
    check_evaluation(folder, "R@100" if texts[0] == "sep" else "R@1000")


def check_evaluation(folder, recall):
    (part,) = read_json(folder / "evaluation-dev" / "metrics.json")["splits"].values()
    assert part["queries"] == 20 and recall in part["metrics"] and (folder / "table.tsv").is_file()


def mined_before(out, data, *parts):
    """First generations, as if the miner had run elsewhere."""
    lists = (line.split("\t") for line in (data / "train.negatives.tsv").read_text().splitlines())
    negatives = {qid: pids.split(",") for qid, pids in lists}
    rows = [
        TrainingRow(qid, list(judged), negatives[qid])
        for qid, judged in read_qrels(data / "qrels.train.tsv").items()
    ]
    out.mkdir(exist_ok=True)
    write_training_file(out / "mined.jsonl", rows)
    for part in parts:
        publish(out / part / "generations", out / "mined.jsonl", {"step": 0})


def test_ance_on_passages(recipe, data, tmp_path):
    out = tmp_path / "out"
    done = recipe("ance_msmarco.sh", data, out, SCALE="tiny", POLL="1")
    assert done.returncode == 0, done.stderr
    check_warm_up(out / "warm-up", out / "pretrained", ("2e-4", "1000", "60000", "32"), "768")
    rates = "1e-6", "5000", "600000", "8", "2"
    check_part(out / "passages", data, out / "warm-up", rates, None, None, None)
    manifest = read_json(out / "passages" / "generations" / "generation-0001" / "manifest.json")
    assert manifest["step"] == 0 and manifest["queries"] == 4 and "RR@10" in manifest["dev"]
    assert not (out / "documents").exists()


def test_ance_on_documents(recipe, data, tiny_data, tmp_path):
    out = tmp_path / "out"
    wrong = recipe("ance_msmarco.sh", data, out, PARTS="passages document")
    assert wrong.returncode == 1 and "# PARTS " in wrong.stderr and not out.exists()
    head = Head("cls", projection=768)
    passages = load_encoder(tiny_data / "model", head, {"title": "none"})
    save_encoder(passages, out / "passages" / "model", {})
    mined_before(out, data, "documents", "maxp")
    done = recipe("ance_msmarco.sh", data, out, SCALE="tiny", POLL="1", PARTS="documents maxp")
    assert done.returncode == 0, done.stderr
    start, data = out / "passages" / "model", data / "documents"
    check_part(
        out / "documents", data, start, ("5e-6", "3000", "210000", "8", "2"), "sep", "10000", None
    )
    check_part(out / "maxp", data, start, ("1e-5", "500", "139000", "2", "8"), "sep", "10000", "4")
    ids = [
        (out / part / "corpus" / "shard-00000.ids.txt").read_text().split()
        for part in ("documents", "maxp")
    ]
    assert len(ids[0]) == len(set(ids[1])) == 80  # of which 5 have four chunks
    assert len(ids[1]) == 80 + 5 * 3


def test_seed_encoder(recipe, data, tmp_path):
    out = tmp_path / "out"
    mined_before(out, data, "passages", "documents")
    done = recipe("seed_msmarco.sh", data, out, SCALE="tiny", POLL="1", PARTS="passages documents")
    assert done.returncode == 0, done.stderr
    assert read_json(out / "pretrained" / "decoder.json")["objective"] == "seed"
    check_warm_up(out / "warm-up", out / "pretrained", ("2e-4", "1000", "90000", "32"), "768")
    start = out / "warm-up"
    check_part(
        out / "passages", data, start, ("1e-6", "5000", "440000", "16", None), None, None, None
    )
    rates = "5e-6", "3000", "800000", "4", "4"
    check_part(out / "documents", data / "documents", start, rates, "sep", "10000", None)


def test_coco_dr_by_episodes(recipe, data, tiny_data, tmp_path):
    out = tmp_path / "out"
    beir = tmp_path / "beir"
    shutil.copytree(tiny_data / "beir" / "crafts", beir / "crafts")
    done = recipe("coco_dr.sh", beir, data, out, SCALE="tiny", EPISODES="2")
    assert done.returncode == 0, done.stderr
    check_warm_up(
        out / "warm-up", out / "coco" / "pretrained", ("2e-4", "1000", "51267", "256"), None
    )
    model, clusters = out / "warm-up", []
    for episode, rate in ((1, 5e-6), (2, 5e-6 * (1 - 45000 / 300000))):
        here = out / f"episode-{episode}"
        run = here / "model"
        assert float(asked(run, "learning_rate")[0]) == pytest.approx(rate, rel=1e-12)
        assert asked(run, *RATES[1:]) == ("3000", "45000", "64", None)
        assert asked(run, *TEXTS) == (None, "64", "256", None, None)
        assert asked(run, *KIND, "passages_per_query") == ("triplet", "lamb", "0", "2")
        training_file = here / "clusters" / "train.jsonl"
        assert asked(run, "model", "train") == (str(model), str(training_file))
        assert read_json(run / "args.json")["arguments"]["dro"]
        assert asked(run, "dro_alpha", "dro_ema") == ("0.25", "0.1")
        assert asked(run, "dro_rho", "dro_eps") == ("0.05", "0.01")
        mining = read_json(here / "negatives" / "args.json")["arguments"]
        assert [mining[name] for name in ("depth", "num_negatives", "sample")] == [
            200,
            30,
            "uniform",
        ]
        assert read_json(here / "corpus" / "meta.json")["max_length"] == 256
        meta = read_json(here / "queries" / "meta.json")
        assert (meta["max_length"], meta["dtype"], meta["model"]) == (64, "float32", str(model))
        clusters.append(read_json(here / "clusters" / "meta.json"))
        assert len(clusters[-1]["sizes"]) == 5 and sum(clusters[-1]["sizes"]) == 20
        weights = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["group_weights"]
        assert (
            len(weights) == 5
            and len(set(weights)) > 1
            and sum(weights) == pytest.approx(1, abs=0.03)
        )
        model = run
    assert clusters[0]["source"]["model_hash"] != clusters[1]["source"]["model_hash"]
    check_evaluation(here / "msmarco", "R@1000")
    assert (here / "beir" / "crafts" / "evaluation" / "metrics.json").is_file()
    assert read_json(here / "beir" / "crafts" / "corpus" / "meta.json")["title"] == "space"
