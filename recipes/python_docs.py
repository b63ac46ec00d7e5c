"""A retrieval collection out of the documentation of the Python that runs this: the docstrings of
the standard library and of the installed packages. Sources are parsed with `ast`; nothing is
imported or executed.

query = first paragraph of a docstring, passage = the rest, title = qualified name. What happens to
each docstring, in this order, with the counts in stats.json:
  1. those without a rest are left out, then those whose query or passage is too short, too long or
     mostly symbols
  2. exact duplicates of a passage (white space, case and punctuation apart) and near duplicates
     (Jaccard similarity of their word trigrams >= 0.7, found with MinHash) are left out: only the
     first in order of file and line stays
  3. a query that words two or more passages alike (same words, order and plural s apart) has no
     single answer: it is left out, its passages stay
  4. test, dev and train are made of whole modules, so that what stands in one file never straddles
     two of them
The same environment always gives the same files.

Reads   the standard library's and the installed packages' .py files (--roots for other folders)
Writes  corpus.jsonl, queries.jsonl, queries.{train,dev,test}.jsonl, qrels/{train,dev,test}.tsv,
        stats.json (last)

    python -m recipes.python_docs --output_dir runs/quickstart/collection
"""

import ast
import hashlib
import inspect
import multiprocessing
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from lib.arguments import arg, identity, parse_args
from lib.files import UserError, write_json, write_qrels
from lib.launch import claim_output, end_with_parent, make_accelerator, run
from lib.texts import write_texts

# tests, other people's code carried along, and what is not meant to be read
SKIPPED_FOLDERS = set(
    "test tests testing idle_test _vendor vendor vendored _vendored_packages _distutils "
    "third_party externals extern site-packages dist-packages node_modules".split()
)
SMALL_WORDS = set(
    "a an and are as be by for from in into is it its of on or that the this to with".split()
)
QUERY_WORDS = (4, 48)  # least and most words of a query
PASSAGE_WORDS = 15  # least words of a passage
CUT = 200  # most words of a passage
SHINGLE = 3  # words in a shingle
SIMILAR = 0.7  # Jaccard similarity of shingles from which two passages count as one
BANDS = 16  # MinHash: of two passages at the bound, 99 % meet in at least one band
ROWS = 4  # hashes in a band
GROUP = 60  # a package with more queries than this is split by its next level of modules


@dataclass(kw_only=True)
class Args:
    output_dir: str = arg("runs/quickstart/collection", help="folder for the collection")
    roots: list[str] = arg([], help="folders of packages; default: those of this Python")
    max_passages: int = arg(
        40_000, least=100, help="keep at most N passages, by a hash of their names"
    )
    eval_queries: int = arg(1000, least=1, help="about N test queries; dev has half as many")


class Entry(NamedTuple):
    module: str
    name: str  # qualified, unique
    query: str
    passage: str


# ------------------------------------------------------------------------------------------------
# docstrings


def source_files(root: Path) -> list[tuple[str, Path]]:
    """(module name, file) of all Python files under root but tests and vendored copies, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        wanted = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        subfolders[:] = sorted(name for name in wanted if name.isidentifier())
        for name in names:
            stem = name.removesuffix(".py")
            is_test = stem.startswith(("test_", "conftest")) or stem.endswith("_test")
            if stem != name and not is_test:
                parts = Path(folder, stem).relative_to(root).parts
                module = ".".join(parts[:-1] if stem == "__init__" else parts)
                found.append((module, Path(folder, name)))
    return sorted(item for item in found if item[0])  # no name: an __init__.py at the root itself


def docstrings(item: tuple[str, Path]) -> list[tuple[str, str]] | None:
    """(qualified name, docstring) of one file's module, classes and functions, in order; None if it
    does not parse."""
    module, path = item
    try:
        source = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, OSError):
        return None
    found = []
    functions = ast.FunctionDef | ast.AsyncFunctionDef

    def visit(node, name):
        text = ast.get_docstring(node, clean=False)
        if text:
            found.append((name, inspect.cleandoc(text)))
        if isinstance(node, functions):
            return
        for child in node.body:
            if isinstance(child, ast.ClassDef | functions):
                visit(child, f"{name}.{child.name}")

    visit(tree, module)
    return found


def plain(text: str) -> str:
    """One line of words: rST roles, back quotes and rulers taken off."""
    # the rulers under headings, and table borders
    text = re.sub(r"^[^\w\n]{3,}$", "", text, flags=re.MULTILINE)
    # :class:`~io.StringIO` -> io.StringIO
    text = re.sub(r":[\w:]+:`~?([^`<]*)(?:<[^`]*>)?`", r"\1", text)
    return " ".join(text.replace("`", "").split())


def split_docstring(text: str) -> tuple[str, str]:
    """(first paragraph, the rest), both plain. A first paragraph that is only a signature is passed
    over."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    signature = re.compile(r"[\w.]+\(.*\)(\s*->.*)?", re.DOTALL)
    if len(paragraphs) > 2 and signature.fullmatch(paragraphs[0]):
        del paragraphs[0]
    return plain(paragraphs[0]), plain("\n\n".join(paragraphs[1:]))


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def fault(query: str, passage: str) -> str | None:
    """Why a docstring makes no good pair."""
    if not passage:
        return "without a rest"
    least, most = QUERY_WORDS
    if not least <= len(words(query)) <= most or len(words(passage)) < PASSAGE_WORDS:
        return "too short or too long"
    if ">>>" in query:
        return "mostly symbols"
    letters = sum(c.isascii() and (c.isalpha() or c.isspace()) for c in passage)
    return None if letters > 0.7 * len(passage) else "mostly symbols"


# ------------------------------------------------------------------------------------------------
# duplicates


def without_duplicates(entries: list[Entry], counts: Counter) -> list[Entry]:
    draw = np.random.default_rng(0)
    factors = draw.integers(1 << 63, size=(BANDS * ROWS, 1), dtype=np.uint64) * 2 + 1
    offsets = draw.integers(1 << 63, size=(BANDS * ROWS, 1), dtype=np.uint64)
    exact, kept, shingles, buckets = set(), [], [], defaultdict(list)
    for entry in entries:
        tokens = words(entry.passage)
        key = xxhash.xxh3_128_digest(" ".join(tokens).encode())
        if key in exact:
            counts["exact duplicates"] += 1
            continue
        exact.add(key)
        grams = {" ".join(tokens[i : i + SHINGLE]) for i in range(len(tokens) - SHINGLE + 1)}
        hashes = [xxhash.xxh3_64_intdigest(gram.encode()) for gram in grams]
        grams = np.sort(np.array(hashes, dtype=np.uint64))
        mixed = (grams ^ offsets) * factors
        bands = (mixed ^ (mixed >> np.uint64(32))).min(axis=1).reshape(BANDS, ROWS)
        keys = [(number, band.tobytes()) for number, band in enumerate(bands)]
        for other in {other for key in keys for other in buckets[key]}:
            common = len(np.intersect1d(grams, shingles[other], assume_unique=True))
            if common >= SIMILAR * (len(grams) + len(shingles[other]) - common):
                counts["near duplicates"] += 1
                break
        else:
            for key in keys:
                buckets[key].append(len(kept))
            kept.append(entry)
            shingles.append(grams)
    return kept


def one_answer(entries: list[Entry], counts: Counter) -> list[Entry]:
    """The entries whose query is worded like no other one's."""

    def key(query: str) -> frozenset:
        return frozenset(word.rstrip("s") for word in words(query) if word not in SMALL_WORDS)

    keys = [key(entry.query) for entry in entries]
    times = Counter(keys)
    counts["ambiguous queries"] = sum(times[k] > 1 for k in keys)
    return [e for e, k in zip(entries, keys, strict=True) if times[k] == 1]


# ------------------------------------------------------------------------------------------------
# splits


def place(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def groups(entries: list[Entry], level: int = 1) -> dict[str, list[Entry]]:
    """Entries by package, and where that is more than GROUP of them, by the next level of modules;
    a file is never split."""
    parts = defaultdict(list)
    for entry in entries:
        parts[".".join(entry.module.split(".")[:level])].append(entry)
    result = {}
    for prefix, members in parts.items():
        deeper = len(members) > GROUP and any(e.module.count(".") >= level for e in members)
        result.update(groups(members, level + 1) if deeper else {f"{prefix}@{level}": members})
    return result


def split(entries: list[Entry], eval_queries: int) -> dict[str, list[Entry]]:
    """Whole groups in an order drawn by hash fill test, then dev (at most a fifth and a tenth of
    all); the rest is train."""
    parts = {"train": [], "dev": [], "test": []}
    wanted = {
        "test": min(eval_queries, len(entries) // 5),
        "dev": min(eval_queries // 2, len(entries) // 10),
    }
    by_group = groups(entries)
    for name in sorted(by_group, key=place):
        members = by_group[name]
        fits = [p for p, size in wanted.items() if len(parts[p]) + len(members) <= 1.1 * size]
        parts[[*fits, "train"][0]] += members
    return parts


# ------------------------------------------------------------------------------------------------


def main():
    args = parse_args(Args)
    folder, counts = Path(args.output_dir), Counter()
    for root in args.roots:
        if not Path(root).is_dir():
            raise UserError(f"{root}: no such folder — check --roots")
    if claim_output(make_accelerator(), folder, identity(args, {}), "stats.json"):
        return
    paths = [sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")]
    roots = args.roots or sorted({str(Path(path).resolve()) for path in paths})
    files = [item for root in roots for item in source_files(Path(root))]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
        parsed = list(pool.map(docstrings, files, chunksize=64))
    counts["files"] = len(files)
    counts["files that do not parse"] = parsed.count(None)

    entries, names = [], Counter()
    for (module, _), found in zip(files, parsed, strict=True):
        for name, text in found or ():
            counts["docstrings"] += 1
            query, passage = split_docstring(text)
            reason = fault(query, passage)
            if reason:
                counts[reason] += 1
                continue
            names[name] += 1  # a property's getter and setter share a name
            name = name if names[name] == 1 else f"{name}:{names[name]}"
            entries.append(Entry(module, name, query, " ".join(passage.split()[:CUT])))
    entries = without_duplicates(entries, counts)
    if len(entries) > args.max_passages:
        counts["beyond --max_passages"] = len(entries) - args.max_passages
        chosen = set(sorted((e.name for e in entries), key=place)[: args.max_passages])
        entries = [e for e in entries if e.name in chosen]
    if len(entries) < 100:
        wrong = f"{', '.join(roots)}: only {len(entries)} usable docstrings"
        raise UserError(f"{wrong} — name folders with more in --roots")
    counts["passages"] = len(entries)
    parts = split(one_answer(entries, counts), args.eval_queries)

    write_texts(folder / "corpus.jsonl", ((e.name, (e.name,), e.passage) for e in entries))
    queries = []
    for part, members in parts.items():
        counts[f"{part} queries"] = len(members)
        rows = [(f"q:{e.name}", (), e.query) for e in members]
        queries += rows
        write_texts(folder / f"queries.{part}.jsonl", rows)
        write_qrels(folder / "qrels" / f"{part}.tsv", {f"q:{e.name}": {e.name: 1} for e in members})
    write_texts(folder / "queries.jsonl", queries)
    stats = {"python": sys.version.split()[0], "roots": roots, "counts": counts}
    write_json(folder / "stats.json", stats)
    for name, value in counts.items():
        print(f"   {name:<24} {value:>7,}")


if __name__ == "__main__":
    run(main)
