#!/usr/bin/env bash
# Adapt a model to a collection: go on pre-training it on texts that nobody has judged. The adapted model is the start
# of a fine-tuning. At the end stands whether the bottleneck has learned; with a few judgments, the ranking of the model
# and of the adapted model without any fine-tuning are compared.
#
#     bash recipes/adapt.sh CORPUS MODEL OUT [flags for pretrain_mae.py, such as --objective bow --max_steps 2000 ...]
#
# CORPUS           texts in any format that pretrain_mae.py reads
# MODEL            masked language model, or any dense or sparse retriever on one
# OUT              OUT/adapted is the adapted model; to continue a stopped run, give the same command again
# QUERIES, QRELS   optional: judged queries for the comparison
# HEAD             flags of encode.py for the comparison that say how both models make a vector, by default
#                  "--pooling cls"; "--pooling mean --normalize" for most models of sentence-transformers
# LAUNCH           how scripts are started. Without LAUNCH, "accelerate launch" is used if there are
#                  GPUs or `accelerate config` was run, else "python"
# To try it in minutes, on generated texts, call `python -m recipes.tiny_data`, and then
#     bash recipes/adapt.sh runs/tiny/beir/crafts/corpus.jsonl runs/tiny/model runs/tiny/adapt \
#         --max_steps 10
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
[ $# -ge 3 ] || usage
corpus=$(path "$1") model=$(model "$2") out=$(path "$3")
flags=("${@:4}")
judged=${QUERIES:-}${QRELS:-}
if [ -n "$judged" ]; then
    [ -n "${QUERIES:-}" ] && [ -n "${QRELS:-}" ] || stop "give both QUERIES and QRELS, or none of them"
    queries=$(path "$QUERIES") qrels=$(path "$QRELS")
    need "$queries" "$qrels"
fi
read -ra head <<<"${HEAD:---pooling cls}"

rank() { # MODEL NAME [flags of evaluate.py ...]
    [ -n "$judged" ] || return 0
    "${launch[@]}" encode.py --model "$1" --input "$queries" --kind query "${head[@]}" --output_dir "$out/queries-$2"
    "${launch[@]}" encode.py --model "$1" --input "$corpus" --kind passage "${head[@]}" --output_dir "$out/corpus-$2"
    "${launch[@]}" evaluate.py --queries_embeddings "$out/queries-$2" --corpus_embeddings "$out/corpus-$2" \
        --qrels "$qrels" --metrics RR@10 nDCG@10 R@100 --output_dir "$out/evaluation-$2" "${@:3}"
}

rank "$model" before # first, so that flags that do not fit the model stop it now
"${launch[@]}" pretrain_mae.py --model "$model" --corpus "$corpus" --max_length 150 --probe_every 100 \
    --output_dir "$out/adapted" --resume "${flags[@]}"
rank "$out/adapted" after --compare "$out/evaluation-before/run.trec"
python -m recipes.probe_report --output_dir "$out/adapted"
