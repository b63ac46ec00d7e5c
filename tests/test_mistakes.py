"""A user's mistakes, one after another: each ends in one line that names place and remedy, exit
status 1, nothing half written. Run: python -m pytest tests/test_mistakes.py"""

import gzip
import json
import re
import shutil

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from transformers import BertConfig, BertForMaskedLM, ByT5Tokenizer

from lib import files
from lib.embeddings import finish_embeddings, write_shard


@pytest.fixture(scope="module")
def ground(tmp_path_factory, tiny_collection, tiny_model_dir):
    """A folder with what the cases spoil, each under a name of its own."""
    here = tmp_path_factory.mktemp("mistakes")
    good = tiny_collection.corpus.read_text().splitlines()

    def put(name, lines):
        (here / name).write_text("\n".join(lines) + "\n")

    put("malformed.jsonl", [*good[:2], good[2][:-5], *good[3:]])
    put("no_text.jsonl", [good[0], '{"_id": "x", "title": "a title", "body_text": "?"}'])
    put("twice.jsonl", [*good, good[3]])
    put("empty.jsonl", [""])
    put("one_column.tsv", ["q0 what about ants"])
    (here / "cut.jsonl.gz").write_bytes(gzip.compress("\n".join(good).encode())[:-200])
    (here / "latin.tsv").write_bytes("q0\tcafé\n".encode("latin-1"))
    qrels = tiny_collection.qrels.read_text().splitlines()
    put("unknown_passage.qrels", [*qrels, "q1\tp999\t1"])
    put("unknown_query.qrels", [*qrels, "q999\tp1\t1"])
    put("run_as.qrels", ["q1 Q0 p1 1 3.5 bm25"])
    put("headless.qrels", ["q1\tp1\t1"])
    put("irrelevant.qrels", ["q1 0 p1 0"])
    positives = files.read_qrels(tiny_collection.qrels)
    rows = [files.TrainingRow(qid, list(judged), list(judged)) for qid, judged in positives.items()]
    files.write_training_file(here / "positives.jsonl", rows)
    files.write_training_file(here / "unknown.jsonl", [files.TrainingRow("q1", ["p1"], ["p999"])])
    files.write_training_file(here / "others.jsonl", [files.TrainingRow("q77", ["p1"], ["p2"])])
    put("flag.jsonl", ['{"query": "q", "pos": ["a"], "neg": ["b"]}'])
    put("lists.tsv", ["q1\tp1,p2"])
    shutil.copytree(tiny_model_dir, here / "no_weights")
    (here / "no_weights" / "model.safetensors").unlink()
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    slow = BertConfig(vocab_size=400, num_hidden_layers=1, **sizes)
    BertForMaskedLM(slow).save_pretrained(here / "slow")
    ByT5Tokenizer().save_pretrained(here / "slow")
    shutil.copytree(tiny_model_dir, here / "sparse")
    (here / "sparse" / "modules.json").write_text(
        json.dumps(
            [
                {
                    "idx": 0,
                    "name": "0",
                    "path": "",
                    "type": "sentence_transformers.sparse_encoder.models.SpladePooling",
                }
            ]
        )
    )
    for name, kind, model in (
        ("vectors_q", "query", "1"),
        ("vectors_p", "passage", "2"),
        ("unfinished", "passage", "1"),
    ):
        write_shard(
            here / name, 0, np.ones((1, 2), np.float32), ["q0" if kind == "query" else "p0"]
        )
        if name != "unfinished":
            meta = {"model": "m", "model_hash": model, "dim": 2, "count": 1, "kind": kind}
            finish_embeddings(here / name, meta)
    write_shard(here / "vectors_s", 0, csr_matrix(np.ones((1, 2), np.float32)), ["p0"])
    meta = {
        "model": "m",
        "model_hash": "1",
        "dim": 2,
        "count": 1,
        "kind": "passage",
        "head": "sparse",
    }
    finish_embeddings(here / "vectors_s", meta)
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.tex").touch()
    return here


FINETUNE = "finetune_biencoder --model MODEL --pooling cls --corpus CORPUS --queries QUERIES "
FINETUNE += "--passages_per_query 2 --max_steps 2 --num_workers 0 --train "
ENCODE = "encode --model MODEL --pooling cls --kind passage --num_workers 0 --input "
PRETRAIN = "pretrain_mae --max_steps 2 --num_workers 0 --max_length 32 --corpus "
BM25 = "evaluate --bm25 --corpus CORPUS --queries QUERIES --qrels "
MINE = "mine_negatives --bm25 --corpus CORPUS --queries QUERIES --qrels "

MISTAKES = [
    # what is typed, what the line says
    (ENCODE + "malformed.jsonl", "malformed.jsonl:3: not JSON"),
    (ENCODE + "no_text.jsonl", "no_text.jsonl:2: no field has one of the names text"),
    (ENCODE + "twice.jsonl", "twice.jsonl: entries 4 and 41 have the same id"),
    (ENCODE + "empty.jsonl", "empty.jsonl: the file has no texts"),
    (ENCODE + "cut.jsonl.gz", "truncated or damaged gzip"),
    (ENCODE + "nowhere.jsonl", "nowhere.jsonl: no such file"),
    (ENCODE + "CORPUS --output_dir thesis", "thesis: it holds something else"),
    (ENCODE.replace("--pooling cls", "") + "CORPUS", "--pooling"),
    (ENCODE.replace("cls", "x") + "CORPUS", "--pooling x: unknown — give cls, mean, last_token"),
    (ENCODE.replace("MODEL", "no_weights") + "CORPUS", "no_weights"),
    (ENCODE.replace("MODEL --pooling cls", "sparse") + "CORPUS", "sparse"),
    (ENCODE + "CORPUS --batch_size 8", "unknown argument --batch_size"),
    (PRETRAIN + "CORPUS --model nowhere/", "nowhere"),
    (PRETRAIN + "CORPUS", "--model"),
    (
        PRETRAIN + "CORPUS --model MODEL --objective lexmoe",
        "argument --objective: invalid choice: 'lexmoe'",
    ),
    (PRETRAIN + "latin.tsv --model MODEL", "latin.tsv:1: not UTF-8"),
    (FINETUNE + "positives.jsonl", "positives.jsonl: passage"),
    (FINETUNE + "unknown.jsonl", "unknown.jsonl:1: passage p999 is not in"),
    (FINETUNE + "others.jsonl", "others.jsonl:1: query q77 is not in"),
    (FINETUNE + "flag.jsonl", "flag.jsonl:1: this is flagembedding data — convert it"),
    (FINETUNE + "lists.tsv", "lists.tsv:1: these are lists of negatives without positives"),
    (FINETUNE + "TRAIN --head sparse", "a sparse head is pooled by max — leave out --pooling"),
    (FINETUNE + "TRAIN --head lexical", "argument --head: invalid choice: 'lexical'"),
    (FINETUNE + "TRAIN --kl_weight 1", "lines without scores — add them"),
    (ENCODE + "CORPUS --head sparse", "a sparse head is pooled by max"),
    (FINETUNE + "QRELS", "it has no negatives for --passages_per_query 2"),
    (FINETUNE.replace("QUERIES", "one_column.tsv") + "TRAIN", "one_column.tsv:1: 1 columns"),
    (FINETUNE + "unknown_passage.qrels", "passage p999 is not in"),
    (PRETRAIN + "CORPUS --model slow", "slow: its tokenizer is not a fast one"),
    (FINETUNE + "irrelevant.qrels", "irrelevant.qrels: no query has a positive"),
    (
        FINETUNE + "TRAIN --learning_rate 1e30 --warmup_steps 0 --max_steps 9",
        "step 2: the loss or gradient is not finite",
    ),
    (MINE + "run_as.qrels", "run_as.qrels:1: 6 columns — judgments have 4"),
    (MINE + "headless.qrels", "headless.qrels:1: 3 columns — judgments have 4"),
    (MINE + "QRELS --depth 0", "--depth 0 — give a finite number at least 1"),
    (BM25 + "unknown_query.qrels", "query q999 is not in"),
    (
        "evaluate --queries_embeddings vectors_q --corpus_embeddings vectors_p "
        "--allow_unknown --qrels QRELS",
        "another checkpoint",
    ),
    (
        "evaluate --queries_embeddings vectors_q --corpus_embeddings vectors_s "
        "--allow_unknown --qrels QRELS",
        "another checkpoint or --head than vectors_s",
    ),
    (
        "evaluate --queries_embeddings vectors_q --corpus_embeddings unfinished --qrels QRELS",
        "no meta.json",
    ),
    (
        "evaluate --queries_embeddings vectors_p --corpus_embeddings vectors_q "
        "--allow_unknown --qrels QRELS",
        "of kind passage",
    ),
    ("evaluate --run QRELS --qrels QRELS", "qrels.tsv:1: a header with other columns"),
]


@pytest.mark.parametrize(("typed", "said"), MISTAKES, ids=lambda value: value[-60:])
def test_mistake(script, ground, tiny_collection, tiny_model_dir, monkeypatch, typed, said):
    monkeypatch.chdir(ground)
    places = {
        "MODEL": tiny_model_dir,
        **{
            name.upper(): getattr(tiny_collection, name)
            for name in ("corpus", "queries", "qrels", "train")
        },
    }
    name, *flags = [str(places.get(word, word)) for word in typed.split()]
    if "--output_dir" not in flags:
        flags += ["--output_dir", "out"]
    before = set(ground.iterdir())
    status, _, error = script(name, *flags)
    line = next(
        (line for line in re.split("[\\r\\n]", error) if line.startswith(f"{name}.py: ")), ""
    )
    assert status == 1 and said in line and " — " in line, error
    assert "Traceback" not in error
    made = set(ground.iterdir()) - before
    assert not [
        p
        for folder in made
        for p in folder.rglob("*")
        if p.name in ("done", "meta.json", "metrics.json", "audit.json", "model.safetensors")
    ]
    for folder in made:
        shutil.rmtree(folder)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "typed",
    [
        "encode --model MODEL --pooling cls --input CORPUS --kind passage --dry_run",
        FINETUNE.replace("--train", "--dry_run --train") + "TRAIN",
        PRETRAIN + "CORPUS --model MODEL --dry_run",
        PRETRAIN + "CORPUS --model_config MODEL/config.json --tokenizer MODEL --dry_run",
        "recipes.score_pairs --model MODEL --corpus CORPUS --queries QUERIES --train TRAIN",
        "recipes.export_anserini --embeddings vectors_s --model MODEL",
    ],
    ids=lambda value: value[:60],
)
def test_no_code_of_a_checkpoint_runs(
    script, ground, tiny_collection, tiny_model_dir, monkeypatch, tmp_path, typed, known
):
    """Not even when transformers asks and standard input says yes."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        autos = ("Model", "Config", "ModelForMaskedLM", "ModelForSequenceClassification")
        content["auto_map"] = {f"Auto{auto}": "code.X" for auto in autos}
        if name != "config.json":
            content["auto_map"] = {"AutoTokenizer": ["code.X", "code.X"]}
        if not known:
            content |= {"model_type": "own", "tokenizer_class": "Own"}
        (folder / name).write_text(json.dumps(content))
    if not known:
        (folder / "tokenizer.json").unlink()
    monkeypatch.chdir(ground)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    places = {n.upper(): getattr(tiny_collection, n) for n in ("corpus", "queries", "train")}
    words = [str(places.get(word, word)).replace("MODEL", str(folder)) for word in typed.split()]
    name, *flags = words
    status, _, error = script(name, *flags, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "ran").exists() and "Traceback" not in error
    assert status == 1 or known, error
