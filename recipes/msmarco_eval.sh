#!/usr/bin/env bash
# Evaluation on MS MARCO as ANCE and SEED-Encoder do it: dev, TREC DL 2019 and 2020, full ranking
# and re-ranking, in one table.
#
#     bash recipes/msmarco_eval.sh MODEL DATA [OUT] [--documents] [flags for encode.py ...]
#
# MODEL        a checkpoint, or the word bm25 (the flags are then those of evaluate.py: --k1, --b)
# DATA         the folder of recipes/get_msmarco.sh; missing sets and candidates are skipped
# OUT          default runs/msmarco-<name of the model>; the same command continues a stopped run;
#              the result is OUT/table.tsv
# --documents  rank the documents in DATA/documents (get_msmarco.sh --documents); the default of OUT
#              then ends in -documents
# LAUNCH       how the scripts are started. Without LAUNCH, "accelerate launch" is used if there are
#              GPUs or `accelerate config` was run, else "python"
# To try it in minutes, on generated texts, call `python -m recipes.tiny_data`, and then
#     bash recipes/msmarco_eval.sh runs/tiny/retriever runs/tiny/msmarco runs/tiny/msmarco_eval
#
# Full ranking searches the corpus, 1000 passages or 100 documents deep. The corpus has titles where
# corpus.tsv is there; bm25 uses none, as published. Re-ranking orders the official candidates,
# top1000.* or top100.*. On the passages of TREC DL a passage is relevant from grade 2 on, elsewhere
# from grade 1 on; nDCG uses the grades. Differences from the notebook of ANCE and similar scripts:
#   1. A judged query without a result counts 0; theirs are averages over the queries of the run.
#   2. Hole@10 is the mean over queries of the share of the first 10 passages that nobody judged;
#      theirs pools the queries. The two are equal where every query has 10 results.
#   3. AP is over the whole list, as TREC reports it; theirs is over the first 10.
#   4. Their MRR on TREC DL takes every judged passage but pid 0 as relevant, whatever its grade.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
[ $# -ge 2 ] || usage
model=$(model "$1") data=$(path "$2") documents="" flags=()
for argument in "${@:3}"; do
    case $argument in
        --documents) documents=1 ;;
        *) flags+=("$argument") ;;
    esac
done
out=$(path "runs/msmarco-$(basename "$model")${documents:+-documents}")
case ${flags[0]:---} in
    --*) ;;
    *) out=$(path "${flags[0]}") flags=("${flags[@]:1}") ;;
esac

depth=1000 top=top1000 level=2 metrics=(RR@10 nDCG@10 AP R@1000 Hole@10)
if [ -n "$documents" ]; then
    data=$data/documents depth=100 top=top100 level=1
    metrics=(RR@10 RR@100 nDCG@10 AP R@100 Hole@10)
fi

encode() { # TEXTS KIND NAME
    "${launch[@]}" encode.py --model "$model" --input "$1" --kind "$2" --output_dir "$out/$3" \
        "${flags[@]}"
}
evaluate() { # NAME [flags ...]
    "${launch[@]}" evaluate.py "${source[@]}" --qrels "$qrels" --relevance_level $relevant \
        --depth $depth --metrics "${metrics[@]}" --output_dir "$out/evaluation-$1" "${@:2}"
    evaluated+=("$1")
}

corpus=$(first "$data"/{corpus,collection}.tsv)
if [ "$model" = bm25 ]; then corpus=$(first "$data"/{collection,corpus}.tsv); fi
[ -n "$corpus" ] || stop "$data: no corpus.tsv or collection.tsv in it — give the folder of get_msmarco.sh"
evaluated=()
for set in dev dl19 dl20; do
    queries=$data/queries.$set.tsv qrels=$(first "$data/qrels.$set".{tsv,txt}) relevant=$level
    if [ ! -f "$queries" ] || [ -z "$qrels" ]; then continue; fi
    if [ $set = dev ]; then relevant=1; fi
    if [ "$model" = bm25 ]; then
        source=(--bm25 --queries "$queries" --corpus "$corpus" --bm25_index "$out/bm25")
        source+=("${flags[@]}")
    else
        if [ ${#evaluated[@]} = 0 ]; then encode "$corpus" passage corpus; fi
        encode "$queries" query queries-$set
        source=(--queries_embeddings "$out/queries-$set" --corpus_embeddings "$out/corpus")
    fi
    evaluate $set
    candidates=$(first "$data/$top.$set"{,.tsv,.trec})
    if [ -n "$candidates" ]; then evaluate $set-reranked --candidates "$candidates"; fi
done
[ ${#evaluated[@]} -gt 0 ] || stop "$data: no queries of dev, dl19 or dl20 with their qrels — see get_msmarco.sh"

python - "$out" "${evaluated[@]}" <<'END'
import pathlib, sys
from lib.files import read_json, write_lines
out, rows = pathlib.Path(sys.argv[1]), []
for name in sys.argv[2:]:
    [part] = read_json(out / f"evaluation-{name}" / "metrics.json")["splits"].values()
    at, _, reranked = name.partition("-")
    values = [f"{value:.4f}" for value in part["metrics"].values()]
    rows.append([at, reranked or "full", str(part["queries"]), *values])
rows.insert(0, ["set", "ranking", "queries", *part["metrics"]])
write_lines(out / "table.tsv", map("\t".join, rows))
print()
for at, ranking, *numbers in rows:
    print(f"{at:<8}{ranking:<10}" + "".join(f"{number:>9}" for number in numbers))
END
