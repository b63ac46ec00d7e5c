#!/usr/bin/env bash
# Zero-shot evaluation on a folder of collections in BEIR layout, with the average.
#
#     bash recipes/beir.sh MODEL FOLDER [OUT] [flags for encode.py ...]
#
# MODEL      a checkpoint, or the word bm25
# FOLDER     holds collections, or is one: corpus.jsonl[.gz], queries.jsonl[.gz], qrels/test*.tsv (every such file is a split)
# OUT        default runs/beir-<name of the model>; call it again to go on where it stopped
# LAUNCH     how the scripts are started, default "accelerate launch" with what `accelerate config` says
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
[ $# -ge 2 ] || usage 4,9
model=$(model "$1") folder=$(path "$2")
out=$(path "${3:-runs/beir-$(basename "$model")}")
flags=("${@:4}")
read -ra launch <<<"${LAUNCH:-accelerate launch}"

found=0
for collection in "$folder" "$folder"/*/; do
    collection=${collection%/}
    corpus=$(ls "$collection"/corpus.jsonl* 2>/dev/null | head -1) || true
    [ -n "$corpus" ] || continue
    queries=$(ls "$collection"/queries.jsonl* | head -1)
    splits=("$collection"/qrels/test*.tsv)
    [ -e "${splits[0]}" ] || continue
    found=1 here=$out/$(basename "$collection")
    if [ "$model" = bm25 ]; then
        source=(--bm25 --queries "$queries" --corpus "$corpus")
    else
        "${launch[@]}" encode.py --model "$model" --input "$queries" --kind query --output_dir "$here/queries" "${flags[@]}"
        "${launch[@]}" encode.py --model "$model" --input "$corpus" --kind passage --output_dir "$here/corpus" "${flags[@]}"
        source=(--queries_embeddings "$here/queries" --corpus_embeddings "$here/corpus")
    fi
    # retrieved passages with the id of the query are the query itself (ArguAna, Quora)
    "${launch[@]}" evaluate.py "${source[@]}" --qrels "${splits[@]}" --ignore_identical_ids \
        --metrics nDCG@10 RR@10 R@100 --output_dir "$here/evaluation"
done
[ $found = 1 ] || { echo "$folder: no collection in it — BEIR layout is corpus.jsonl, queries.jsonl, qrels/test.tsv" >&2; exit 1; }

python - "$out" <<'END'
import json, pathlib, sys
rows = []
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/evaluation/metrics.json")):
    for split, part in json.loads(path.read_text())["splits"].items():
        rows.append((path.parts[-3] + ("" if split == "test" else f"/{split}"), part["queries"], part["metrics"]))
print(f"\n{'collection':<32}{'queries':>8}{'nDCG@10':>10}{'RR@10':>10}{'R@100':>10}")
for name, queries, metrics in rows:
    print(f"{name:<32}{queries:>8}" + "".join(f"{metrics[m]:>10.4f}" for m in ("nDCG@10", "RR@10", "R@100")))
print(f"{'average of the rows':<40}" + "".join(f"{sum(r[2][m] for r in rows) / len(rows):>10.4f}" for m in ("nDCG@10", "RR@10", "R@100")))
END
