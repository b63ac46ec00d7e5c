#!/usr/bin/env bash
# Train a dense retriever in two stages on a collection in BEIR layout, as RetroMAE does. Stage 1 learns from BM25
# negatives. Stage 2 starts from the same model again and learns from negatives that stage 1 mined. Then BM25, stage 1
# and stage 2 are evaluated on every qrels/test*.tsv.
#
#     bash recipes/two_stages.sh DATA MODEL OUT [flags for both calls of finetune_biencoder.py ...]
#
# DATA       corpus.jsonl[.gz], queries.jsonl[.gz], qrels/train.tsv, qrels/test*.tsv. With qrels/dev.tsv, each stage
#            keeps its best checkpoint in best/
# OUT        to continue a stopped run, give the same command again
# LAUNCH     how scripts are started, by default "accelerate launch" as `accelerate config` configured it
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
[ $# -ge 3 ] || usage 6,11
data=$(path "$1") model=$(model "$2") out=$(path "$3")
flags=("${@:4}")
corpus=$(first "$data"/corpus.jsonl{,.gz}) queries=$(first "$data"/queries.jsonl{,.gz})
tests=("$data"/qrels/test*.tsv)
need "${corpus:-$data/corpus.jsonl}" "${queries:-$data/queries.jsonl}" "$data/qrels/train.tsv" "${tests[0]}"
texts=(--corpus "$corpus" --queries "$queries")

# BM25: negatives for stage 1, the baseline, and the candidates of the development set
"${launch[@]}" mine_negatives.py --bm25 "${texts[@]}" --qrels "$data/qrels/train.tsv" --depth 200 \
    --bm25_index "$out/bm25-index" --output_dir "$out/negatives-bm25"
"${launch[@]}" evaluate.py --bm25 "${texts[@]}" --qrels "${tests[@]}" --bm25_index "$out/bm25-index" \
    --output_dir "$out/evaluation-bm25"
dev=() chosen=""
if [ -f "$data/qrels/dev.tsv" ]; then
    "${launch[@]}" evaluate.py --bm25 "${texts[@]}" --qrels "$data/qrels/dev.tsv" --bm25_index "$out/bm25-index" \
        --depth 100 --output_dir "$out/candidates-dev"
    dev=(--dev "$queries" "$data/qrels/dev.tsv" "$out/candidates-dev/run.trec")
    chosen=/best
fi

for stage in 1 2; do
    negatives=$out/negatives-$([ $stage = 1 ] && echo bm25 || echo mined)
    "${launch[@]}" finetune_biencoder.py --model "$model" "${texts[@]}" --train "$negatives/train.jsonl" "${dev[@]}" \
        --output_dir "$out/stage$stage" --resume "${flags[@]}"
    checkpoint=$out/stage$stage$chosen
    "${launch[@]}" encode.py --model "$checkpoint" --input "$queries" --kind query --output_dir "$out/queries$stage"
    "${launch[@]}" encode.py --model "$checkpoint" --input "$corpus" --kind passage --output_dir "$out/corpus$stage"
    vectors=(--queries_embeddings "$out/queries$stage" --corpus_embeddings "$out/corpus$stage")
    "${launch[@]}" evaluate.py "${vectors[@]}" --qrels "${tests[@]}" \
        --compare "$out/evaluation-bm25/run.trec" --output_dir "$out/evaluation-stage$stage"
    if [ $stage = 1 ]; then
        "${launch[@]}" mine_negatives.py "${vectors[@]}" --corpus "$corpus" --qrels "$data/qrels/train.tsv" \
            --depth 200 --output_dir "$out/negatives-mined"
    fi
done
