"""pytest tests/test_probe.py — what the probe measures, by naive loops; that a rebuilt text has no
context left."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from lib import probe as module
from lib.blocks import Blocks, Corpora, Cut
from lib.files import UserError, read_qrels
from lib.objectives import MLM, SEED, Condenser, DupMAE, LexMAE, RetroMAE
from lib.probe import Probe
from lib.text import pad
from lib.texts import open_texts


@pytest.fixture
def setting(tiny_model_dir, tiny_collection):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    cut = Cut(tokenizer, 64)
    corpora = Corpora([Blocks(open_texts(tiny_collection.corpus), cut)], seed=0)
    return AutoModelForMaskedLM.from_pretrained(tiny_model_dir), tokenizer, corpora, cut.collate


@pytest.mark.parametrize("objective", [MLM, RetroMAE, LexMAE])
def test_recall_and_cosine_are_those_of_a_loop(setting, tiny_collection, monkeypatch, objective):
    monkeypatch.setattr(module, "BATCH", 7)
    lm, tokenizer, corpora, collate = setting
    model = objective(lm, tokenizer).train()
    model.lm.eval()
    probe = Probe(corpora, collate, tiny_collection.queries, tiny_collection.qrels)
    with torch.autocast("cpu", torch.bfloat16):
        low = probe(model, torch.device("cpu"))
    values = probe(model, torch.device("cpu"))
    assert low == pytest.approx(values, abs=0.1)
    assert model.training and not model.lm.training, "left as it was found"
    model.eval()

    def vectors(strings):
        found = []
        for string in strings:
            batch = pad(tokenizer([string], truncation=True, max_length=64)["input_ids"], tokenizer)
            found.append(model.represent(batch)[0].detach())
        return torch.stack(found)

    (blocks,) = corpora.parts
    texts, queries = blocks.texts, open_texts(tiny_collection.queries)
    v = torch.nn.functional.normalize(
        vectors([blocks.string(i) for i in range(len(blocks))]), dim=1
    )
    cosines = [float(v[i] @ v[j]) for i in range(len(v)) for j in range(len(v)) if i != j]
    assert values["probe_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
    assert ("probe_rebuild" in values) == (objective is not MLM)
    assert values["probe_recall@100"] == 1, "forty passages, all within the first hundred"

    monkeypatch.setattr(module, "PASSAGES", 35)
    probe = Probe(corpora, collate, tiny_collection.queries, tiny_collection.qrels)
    assert len(probe.passages) == 35 and len(probe.queries) == len(queries)
    monkeypatch.setattr(module, "DEPTH", 3)
    p = vectors(probe.passages)
    place = {string: row for row, string in enumerate(probe.passages)}
    recalls = []
    for qid, judged in read_qrels(tiny_collection.qrels).items():
        scores = p @ vectors([queries[int(queries.rows([qid])[0])][1]])[0]
        positives = {place[blocks.whole(int(texts.rows([pid])[0]))] for pid in judged}
        best = scores.sort(descending=True, stable=True).indices[:3].tolist()
        recalls.append(len(positives & {*best}) / len(positives))
    assert probe(model, torch.device("cpu"))["probe_recall@100"] == pytest.approx(
        sum(recalls) / len(recalls)
    )
    assert 0 < sum(recalls) < len(recalls)


@pytest.mark.parametrize("objective", [RetroMAE, DupMAE, LexMAE, SEED, Condenser])
def test_rebuilding_sees_nothing_but_the_bottleneck(setting, objective, monkeypatch):
    lm, tokenizer, *_ = setting
    model, h, seen = objective(lm, tokenizer).eval(), torch.randn(2, 32), []
    monkeypatch.setattr(model, "bottleneck", lambda hidden, batch: h)
    decoder = model.decoder["layers"] if objective is LexMAE else model.decoder
    decoder.register_forward_hook(lambda *call: seen.append(call[-1].detach()))
    batch = pad(tokenizer(["lava and ash of a volcano", "queen and nest"])["input_ids"], tokenizer)
    ordinary = model.words(batch) >= 0
    other = {
        **batch,
        "input_ids": torch.where(ordinary, int(model.ordinary_ids[7]), batch["input_ids"]),
    }
    assert model.rebuild(batch).labels == model.rebuild(other).labels == ordinary.sum()
    assert torch.equal(*seen) and len(seen[0]) == ordinary.sum()
    h += 1 + torch.rand(2, 32)
    model.rebuild(batch)
    assert (seen[2] - seen[0]).abs().amax(1).min() > 1e-4, "h reaches every position"


def test_files_that_do_not_match_stop(setting, tiny_collection, tmp_path):
    *_, corpora, collate = setting
    (tmp_path / "qrels.tsv").write_text("q0 0 nowhere 1\n")
    with pytest.raises(UserError, match="no positive is in the corpus"):
        Probe(corpora, collate, tiny_collection.queries, tmp_path / "qrels.tsv")
    (tmp_path / "qrels.tsv").write_text("nobody 0 p1 1\n")
    with pytest.raises(UserError, match="qrels.tsv:1: query nobody is not in"):
        Probe(corpora, collate, tiny_collection.queries, tmp_path / "qrels.tsv")
