"""pytest tests/test_get_msmarco.py — recipes/get_msmarco.sh with a curl that serves files of empty
lines."""

import gzip
import hashlib
import io
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "recipes" / "get_msmarco.sh"
TEXT = SCRIPT.read_text()
SUMS = SCRIPT.with_suffix(".md5")
CURL = """#!/usr/bin/env bash
while [ $# -gt 1 ]; do
    if [ "$1" = -o ]; then target=$2; fi
    shift
done
echo "$1" >>"$SERVED/asked"
[ -f "$SERVED/${1##*/}" ] || exit 22
cp "$SERVED/${1##*/}" "$target"
"""
MADE = {
    name: (int(count), source.split())
    for name, count, source in re.findall(r"\bmake (\S+\.\S+) (\d+) ([^;\n]+)", TEXT)
}
OPTIONAL = "corpus.tsv", "train.negatives.tsv", "triples.train.ids.tsv"


@pytest.fixture
def get(tmp_path, recipe):
    """get(flags ...) -> the finished process of a copy of the script, with a curl that serves
    tmp_path/served; the sums beside the copy are those of `right`, by default what is served."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "served").mkdir()
    (tmp_path / "bin" / "curl").write_text(CURL)
    (tmp_path / "bin" / "curl").chmod(0o755)
    shutil.copy(SCRIPT, tmp_path)

    def call(*flags, out="out", right=None):
        served = tmp_path / "served"
        right = right or {path.name: path.read_bytes() for path in served.iterdir()}
        sums = (f"{hashlib.md5(data).hexdigest()}  {name}\n" for name, data in right.items())
        (tmp_path / SUMS.name).write_text("".join(sums))
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        copy = tmp_path / SCRIPT.name
        return recipe(copy, out, *flags, cwd=tmp_path, PATH=path, SERVED=str(served))

    return call


def test_check_names_every_file_and_makes_none(get, tmp_path):
    done = get("--check")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{tmp_path}/out/{name}: not there" for name in MADE]
    assert not (tmp_path / "out").exists()
    documents = [name.removeprefix("documents/") for name in MADE if name.startswith("documents/")]
    assert {
        name for name in documents if not name.startswith("top")
    } <= MADE.keys()  # the names of the passages' files
    assert get("--nonsense").returncode == 1


def test_a_sum_is_known_of_every_download_but_that_of_rocketqa():
    known = dict(reversed(line.split("  ")) for line in SUMS.read_text().splitlines())
    asked = {address.rpartition("/")[2] for address in re.findall(r"\$(?:marco|trec)/\S+", TEXT)}
    assert known.keys() == asked and len(asked) == 21
    assert known["collectionandqueries.tar.gz"] == "31644046b18952c1386cd4564ba2ae69"
    assert all(re.fullmatch("[0-9a-f]{32}", value) for value in known.values())


def test_another_content_is_named_and_nothing_is_made_of_it(get, tmp_path):
    """In a folder that awk would take for an assignment, and tar for a host."""
    lines, out = {name: count for name, (count, _) in MADE.items()}, tmp_path / "a=b:c [d]"
    out.mkdir()
    for name in ("collection.tsv", "queries.train.tsv"):
        (out / name).write_bytes(b"\n" * lines[name])
    qrels = b"\n" * lines["qrels.train.tsv"]
    served = tmp_path / "served" / "qrels.train.tsv"
    served.write_bytes(qrels)
    known = {served.name: b"other"}
    done = get(out=out.name, right=known)
    wanted, found = hashlib.md5(b"other").hexdigest(), hashlib.md5(qrels).hexdigest()
    assert done.returncode == 1
    assert f"qrels.train.tsv: its MD5 sum is {found}, not {wanted} — remove it" in done.stderr
    assert not (out / "qrels.train.tsv").exists()
    done = get(out=out.name, right={"another": b""})
    assert "no MD5 sum of this file is known" in done.stderr
    assert f"{out}/qrels.train.tsv: {lines['qrels.train.tsv']} lines" in done.stdout
    assert done.returncode == 1 and "collectionandqueries.tar.gz does not answer" in done.stderr


@pytest.mark.slow
def test_documents_and_triples_come_with_as_many_lines_as_said(get, tmp_path):
    out, served = tmp_path / "out", tmp_path / "served"
    (out / "documents").mkdir(parents=True)
    wanted, addresses = [], set()
    for name, (count, source) in MADE.items():
        if name.startswith(("documents/", "triples.train.small")):
            kind, address, *member = source
            wanted.append(name)
            archive = served / address.rpartition("/")[2]
            addresses.add(archive.name)
            if kind == "member":
                entry = tarfile.TarInfo(member[0])
                entry.size = count
                with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
                    tar.addfile(entry, io.BytesIO(b"\n" * count))
            else:
                archive.write_bytes(
                    gzip.compress(b"\n" * count, 1) if kind == "unpacked" else b"\n" * count
                )
        elif name not in OPTIONAL:
            (out / name).write_bytes(b"\n" * count)  # the passages are there already
    done = get("--documents", "--triples")
    assert done.returncode == 0, done.stderr
    assert len(wanted) == 13 and all(
        f"{out}/{name}: {MADE[name][0]} lines\n" in done.stdout for name in wanted
    )
    asked = (served / "asked").read_text().split()
    assert {url.rpartition("/")[2] for url in asked} == addresses and len(asked) == len(addresses)
    places = (
        "https://msmarco.z22.web.core.windows.net/msmarcoranking/",
        "https://trec.nist.gov/data/deep/",
    )
    assert all(url.startswith(places) for url in asked)

    # a last line without its newline is a line; a missing one is noticed; what does not answer is
    # named
    queries = out / "documents/queries.dev.tsv"
    queries.write_bytes(b"\n" * 5192 + b"q")
    (out / "documents/qrels.dev.tsv").write_bytes(b"\n" * 5192)
    done = get("--documents")
    assert (
        f"{queries}: 5193 lines" in done.stdout
        and "qrels.dev.tsv: 5192 lines, not 5193" in done.stderr
    )
    assert done.returncode == 1 and len((served / "asked").read_text().split()) == len(asked)
    for gone in (
        out / "documents/qrels.dl20.txt",
        out / "download/2020qrels-docs.txt",
        served / "2020qrels-docs.txt",
    ):
        gone.unlink()
    (out / "documents/qrels.dev.tsv").write_bytes(b"\n" * 5193)
    done = get("--documents")
    assert done.returncode == 1 and "2020qrels-docs.txt does not answer" in done.stderr
    assert not (out / "documents/qrels.dl20.txt").exists()
