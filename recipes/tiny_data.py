"""A small collection in every layout that the recipes read, and a small BERT: with them each recipe
can be tried in minutes, without a download. The texts are made of lists of words. They mean
nothing, and neither do the numbers that a recipe prints for them.

A passage is about two things of a subject, and a query asks about two things. The passage about
both is the answer. In the sets of TREC it has the grade 2, and the passages of the same subject
about one of them have the grade 1. Every sixteenth document has four chunks.

Writes  --output_dir, the same each time:
        msmarco/               as recipes/get_msmarco.sh leaves it if it is given all its flags
        beir/crafts, nature    two collections in BEIR layout
        model/                 a BERT with random weights and its tokenizer
        retriever/             a dense retriever on it, untrained
        done                   last

    python -m recipes.tiny_data --output_dir runs/tiny
    SCALE=tiny bash recipes/retromae_msmarco.sh runs/tiny/msmarco runs/tiny/retromae
"""

import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from lib.arguments import arg, identity, parse_args
from lib.checkpoint import load_encoder, save_encoder
from lib.encoder import Head
from lib.files import write_lines, write_qrels, write_run
from lib.launch import claim_output, make_accelerator, run
from lib.texts import write_texts
from recipes.train_tokenizer import train

SUBJECTS = {
    "ants": "colony queen worker nest soldier larvae trail sugar",
    "volcanoes": "lava crater eruption magma ash basalt plume vent",
    "violins": "string bow bridge maple varnish tuning orchestra pitch",
    "glaciers": "ice moraine valley snow crevasse meltwater fjord retreat",
    "bread": "flour yeast dough oven crust crumb sourdough salt",
    "comets": "tail orbit nucleus dust perihelion telescope coma sun",
    "whales": "baleen pod song krill ocean calf blubber migration",
    "bridges": "cable arch span pier truss river traffic steel",
    "cheese": "milk rennet curd whey cellar rind mould goat",
    "maps": "scale compass atlas border projection legend contour north",
}
COLLECTIONS = {
    "crafts": "violins bread bridges cheese maps".split(),
    "nature": "ants volcanoes glaciers comets whales".split(),
}
SENTENCES = (
    "In {subject}, a {quality} {one} {verb} the {other} {time}.",
    "Without the {other}, no {one} {verb} anything {time}.",
    "A {quality} {other} is what people notice first.",
    "Some say that the {one} {verb} {subject} {time}.",
    "The {one} and the {other} are seldom {quality} {time}.",
)
VERBS = "carries holds shapes follows covers changes protects reaches".split()
QUALITIES = "tall quiet heavy narrow warm pale rough damp".split()
TIMES = "in spring", "after rain", "at night", "for many years", "once a day", "in the north"
PAIRS = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 0)]  # of a subject's words
SETS = {"train": 2, "dev": 2, "dl19": 2, "dl20": 2}  # queries of a subject, one for each pair
LONG = 240  # sentences of every sixteenth document


@dataclass(kw_only=True)
class Args:
    output_dir: str = arg("runs/tiny", help="folder for the collections and the model")


@dataclass(frozen=True)
class Passage:
    pid: str
    subject: str
    words: tuple[str, str]  # the two things that it is about
    text: str

    @property
    def title(self) -> str:
        return f"{self.subject.title()}: {' and '.join(self.words)}"


@dataclass(frozen=True)
class Query:
    qid: str
    text: str
    about: Passage  # its answer


def write_about(subject: str, words: tuple[str, str], count: int, seed: int) -> str:
    """A text of `count` sentences."""
    draw, sentences = random.Random(seed), []
    for _ in range(count):
        one, other = draw.sample(words, 2)
        sentence = draw.choice(SENTENCES).format(
            subject=subject,
            one=one,
            other=other,
            verb=draw.choice(VERBS),
            quality=draw.choice(QUALITIES),
            time=draw.choice(TIMES),
        )
        sentences.append(sentence)
    return " ".join(sentences)


def make_passages() -> list[Passage]:
    passages = []
    for subject, things in SUBJECTS.items():
        things = things.split()
        for one, other in PAIRS:
            words = things[one], things[other]
            number = len(passages)
            text = write_about(subject, words, 4 + number % 3, number)
            passages.append(Passage(f"p{number}", subject, words, text))
    return passages


def make_queries(passages: list[Passage]) -> dict[str, list[Query]]:
    """The queries of each set."""
    sets = {name: [] for name in SETS}
    for first in range(0, len(passages), len(PAIRS)):
        answers = iter(passages[first : first + len(PAIRS)])
        verb = VERBS[first // len(PAIRS) % len(VERBS)]
        for name, count in SETS.items():
            for _ in range(count):
                answer = next(answers)
                text = f"what {verb} the {' and the '.join(answer.words)}?"
                sets[name].append(Query(f"q{answer.pid[1:]}", text, answer))
    return sets


def grades(query: Query, passages: list[Passage], graded: bool) -> dict[str, int]:
    """The judgments of a query; graded: as those of TREC."""
    if not graded:
        return {query.about.pid: 1}
    same = [p for p in passages if p.subject == query.about.subject]
    return {p.pid: 2 if p is query.about else 1 for p in same if {*p.words} & {*query.about.words}}


def candidates(query: Query, passages: list[Passage]) -> list[Passage]:
    """The passages of its subject and of the next one, as if a search had found them."""
    start = passages.index(query.about) // len(PAIRS) * len(PAIRS)
    return (passages * 2)[start : start + 2 * len(PAIRS)]


def negatives(query: Query, passages: list[Passage]) -> list[Passage]:
    return [p for p in candidates(query, passages) if p is not query.about][:8]


def write_tsv(path: Path, rows: Iterable[tuple[str, ...]]) -> None:
    write_lines(path, map("\t".join, rows))


def write_msmarco(folder: Path, passages: list[Passage]) -> None:
    """What recipes/get_msmarco.sh leaves, documents too."""
    sets = make_queries(passages)
    write_tsv(folder / "collection.tsv", ((p.pid, p.text) for p in passages))
    write_tsv(folder / "corpus.tsv", ((p.pid, p.title, p.text) for p in passages))
    for name, queries in sets.items():
        trec = name.startswith("dl")
        qrels = {q.qid: grades(q, passages, graded=trec) for q in queries}
        write_tsv(folder / f"queries.{name}.tsv", ((q.qid, q.text) for q in queries))
        write_qrels(folder / f"qrels.{name}.{'txt' if trec else 'tsv'}", qrels)
        if name != "train":
            pairs = [(q, p) for q in queries for p in candidates(q, passages)]
            rows = ((q.qid, p.pid, q.text, p.text) for q, p in pairs)
            write_tsv(folder / f"top1000.{name}{'.tsv' if trec else ''}", rows)

    mined = [(q, negatives(q, passages)) for q in sets["train"]]
    triples = [(q, q.about, p) for q, found in mined for p in found]
    write_tsv(
        folder / "train.negatives.tsv",
        ((q.qid, ",".join(p.pid for p in found)) for q, found in mined),
    )
    write_tsv(folder / "triples.train.ids.tsv", ((q.qid, p.pid, n.pid) for q, p, n in triples))
    write_tsv(folder / "triples.train.small.tsv", ((q.text, p.text, n.text) for q, p, n in triples))
    write_documents(folder, passages, sets)


def write_documents(folder: Path, passages: list[Passage], sets: dict[str, list[Query]]) -> None:
    """Document ranking: the same queries and judgments; the documents are the passages, told at
    other lengths."""
    documents = folder / "documents"
    rows = []
    for number, p in enumerate(passages):
        count = LONG if number % 16 == 0 else 6
        body = write_about(p.subject, p.words, count, number)
        rows.append((p.pid, f"http://{p.subject}.org/{number}", p.title, body))
    write_tsv(documents / "corpus.tsv", rows)
    for name, queries in sets.items():
        for path in (*folder.glob(f"queries.{name}.*"), *folder.glob(f"qrels.{name}.*")):
            shutil.copy(path, documents / path.name)
        if name != "train":
            lists = ((q.qid, [p.pid for p in candidates(q, passages)]) for q in queries)
            run_lines = ((qid, pids, range(len(pids), 0, -1)) for qid, pids in lists)
            write_run(documents / f"top100.{name}.trec", run_lines)


def write_beir(folder: Path, passages: list[Passage]) -> None:
    """A collection in BEIR layout with the splits train, dev and test."""
    sets = make_queries(passages)
    splits = {"train": sets["train"], "dev": sets["dev"], "test": sets["dl19"] + sets["dl20"]}
    queries = [(q.qid, (), q.text) for found in splits.values() for q in found]
    write_texts(folder / "corpus.jsonl", ((p.pid, (p.title,), p.text) for p in passages))
    write_texts(folder / "queries.jsonl", queries)
    for name, found in splits.items():
        qrels = {q.qid: grades(q, passages, graded=False) for q in found}
        write_qrels(folder / "qrels" / f"{name}.tsv", qrels)


def write_model(
    folder: Path, texts: list[str], vocab_size: int = 400, max_length: int = 512
) -> None:
    """A BERT with random weights, and a tokenizer that is trained on the texts."""
    vocabulary = train(lambda: texts, vocab_size)
    tokenizer = BertTokenizerFast(vocab=vocabulary, model_max_length=max_length)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,  # vectors that differ clearly from text to text
    )
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write(folder: Path) -> None:
    passages = make_passages()
    write_msmarco(folder / "msmarco", passages)
    for name, subjects in COLLECTIONS.items():
        write_beir(folder / "beir" / name, [p for p in passages if p.subject in subjects])
    queries = [query.text for found in make_queries(passages).values() for query in found]
    write_model(folder / "model", [f"{p.title} {p.text}" for p in passages] + queries)
    save_encoder(load_encoder(folder / "model", Head("cls")), folder / "retriever", {})


def main():
    args = parse_args(Args)
    folder = Path(args.output_dir)
    if claim_output(make_accelerator(), folder, identity(args, {})):
        return
    write(folder)
    write_lines(folder / "done", [])
    for name in ("msmarco", "beir/crafts", "beir/nature", "model", "retriever"):
        print(f"   {folder / name}")


if __name__ == "__main__":
    run(main)
