#!/usr/bin/env bash
# Where negatives come from, at equal steps: the batch alone, BM25, or a miner that follows the model (ANCE).
#
#     bash bench/negatives.sh DATA MODEL OUT [flags for finetune_biencoder.py ...]
#
# DATA    corpus.*, queries.{train,dev,test}.*, qrels.{train,dev,test}.*
# MODEL   a checkpoint
# STEPS, SLICES, DEPTH, NEGATIVES, POLL   of recipes/ance.sh; the trainer and the miner run side by side on this machine
# The flags need --max_steps. Printed: MRR@10, nDCG@10 and R@100 on test, and the differences to the batch alone and to BM25.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../recipes/paths.sh"
[ $# -ge 3 ] || usage
data=$(path "$1") model=$(model "$2") out=$(path "$3") flags=("${@:4}")
file() { ls "$data/$1".* | head -1; }
corpus=$(file corpus) queries=$(file queries.train) qrels=$(file qrels.train)
python mine_negatives.py --bm25 --queries "$queries" --qrels "$qrels" --corpus "$corpus" --depth "${DEPTH:-200}" \
    --output_dir "$out/negatives"
finetune=(python finetune_biencoder.py --model "$model" --corpus "$corpus" --queries "$queries" "${flags[@]}" --resume)
"${finetune[@]}" --passages_per_query 1 --train "$qrels" --output_dir "$out/batch"
"${finetune[@]}" --passages_per_query 2 --train "$out/negatives/train.jsonl" --output_dir "$out/bm25"
LAUNCH=python bash recipes/ance.sh both "$data" "$model" "$out/ance" --passages_per_query 2 "${flags[@]}"
for name in batch bm25 ance; do
    checkpoint=$out/$name
    if [ $name = ance ]; then checkpoint=$out/ance/model; fi
    python encode.py --model "$checkpoint" --input "$corpus" --kind passage --output_dir "$out/$name-corpus"
    python encode.py --model "$checkpoint" --input "$(file queries.test)" --kind query --output_dir "$out/$name-queries"
done
for pair in batch: bm25:batch ance:batch ance:bm25; do
    name=${pair%:*} other=${pair#*:}
    python evaluate.py --queries_embeddings "$out/$name-queries" --corpus_embeddings "$out/$name-corpus" --qrels "$(file qrels.test)" \
        --metrics RR@10 nDCG@10 R@100 ${other:+--compare "$out/evaluation-$other/run.trec"} \
        --output_dir "$out/evaluation-$name${other:+-against-$other}"
    if [ -n "$other" ] && [ ! -e "$out/evaluation-$name" ]; then ln -s "evaluation-$name-against-$other" "$out/evaluation-$name"; fi
done
