#!/usr/bin/env bash
# Zero-shot evaluation on a folder of collections in BEIR layout, with the average.
#
#     bash recipes/beir.sh MODEL FOLDER [OUT] [flags for encode.py ...]
#
# MODEL      a checkpoint, or the word bm25
# FOLDER     a collection, or a folder of collections: corpus.jsonl[.gz], queries.jsonl[.gz], qrels/test*.tsv (every
#            such file is a split). In collections named arguana or quora, a passage with the id of the query is not
#            retrieved
# OUT        default runs/beir-<name of the model>; to continue a stopped run, give the same command again
# LAUNCH     how scripts are started. Without LAUNCH, "accelerate launch" is used if there are GPUs
#            or `accelerate config` was run, else "python"
# To try it in minutes, on generated texts, call `python -m recipes.tiny_data`, and then
#     bash recipes/beir.sh runs/tiny/retriever runs/tiny/beir runs/tiny/zero-shot
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
[ $# -ge 2 ] || usage
model=$(model "$1") folder=$(path "$2") flags=("${@:3}")
out=$(path "runs/beir-$(basename "$model")")
case ${flags[0]:---} in
    --*) ;;
    *) out=$(path "${flags[0]}") flags=("${flags[@]:1}") ;;
esac

found=0
for collection in "$folder" "$folder"/*/; do
    collection=${collection%/}
    corpus=$(first "$collection"/corpus.jsonl{,.gz}) queries=$(first "$collection"/queries.jsonl{,.gz})
    splits=("$collection"/qrels/test*.tsv)
    if [ -z "$corpus" ] || [ -z "$queries" ] || [ ! -e "${splits[0]}" ]; then continue; fi
    found=1 name=$(basename "$collection")
    here=$out/$name
    if [ "$model" = bm25 ]; then
        source=(--bm25 --queries "$queries" --corpus "$corpus")
    else
        encode=("${launch[@]}" encode.py --model "$model")
        "${encode[@]}" --input "$queries" --kind query --output_dir "$here/queries" "${flags[@]}"
        "${encode[@]}" --input "$corpus" --kind passage --output_dir "$here/corpus" "${flags[@]}"
        source=(--queries_embeddings "$here/queries" --corpus_embeddings "$here/corpus")
    fi
    itself=() # in ArguAna and Quora the queries are passages of the corpus, with the same ids
    case $name in arguana | quora) itself=(--ignore_identical_ids) ;; esac
    "${launch[@]}" evaluate.py "${source[@]}" --qrels "${splits[@]}" "${itself[@]}" --metrics nDCG@10 RR@10 R@100 \
        --output_dir "$here/evaluation"
done
[ $found = 1 ] || stop "$folder: no collection in it — BEIR layout is corpus.jsonl, queries.jsonl, qrels/test.tsv"

python - "$out" <<'END'
import json, pathlib, sys
METRICS = "nDCG@10", "RR@10", "R@100"
rows = []
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/evaluation/metrics.json")):
    for split, part in json.loads(path.read_text())["splits"].items():
        name = path.parts[-3] + ("" if split == "test" else f"/{split}")
        rows.append((name, part["queries"], [part["metrics"][metric] for metric in METRICS]))
print(f"\n{'collection':<32}{'queries':>8}" + "".join(f"{metric:>10}" for metric in METRICS))
for name, queries, values in rows:
    print(f"{name:<32}{queries:>8}" + "".join(f"{value:>10.4f}" for value in values))
means = [sum(column) / len(rows) for column in zip(*(values for *_, values in rows))]
print(f"{'average of the rows':<40}" + "".join(f"{mean:>10.4f}" for mean in means))
END
