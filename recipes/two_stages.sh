#!/usr/bin/env bash
# Train a dense retriever in two stages on a collection in BEIR layout, as RetroMAE does. Stage 1 learns from BM25
# negatives. Stage 2 starts from the same model again and learns from negatives that stage 1 mined. The end is a table
# for every qrels/test*.tsv: BM25, stage 1, stage 2, and the fusion of stage 2 with BM25 by reciprocal rank. Before any
# work begins, the model, the files and the flags are checked.
#
#     bash recipes/two_stages.sh DATA MODEL OUT [flags for both calls of finetune_biencoder.py ...]
#
# DATA       corpus.jsonl[.gz], queries.jsonl[.gz], qrels/train.tsv, qrels/test*.tsv. With qrels/dev.tsv, each stage
#            keeps its best checkpoint in best/
# OUT        to continue a stopped run, give the same command again
# LAUNCH     how scripts are started. Without LAUNCH, "accelerate launch" is used if there are GPUs
#            or `accelerate config` was run, else "python"
# To try it in minutes, on generated texts, call `python -m recipes.tiny_data`, and then
#     bash recipes/two_stages.sh runs/tiny/beir/crafts runs/tiny/model runs/tiny/two_stages \
#         --pooling cls --max_steps 10
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
[ $# -ge 3 ] || usage
data=$(path "$1") model=$(model "$2") out=$(path "$3")
flags=("${@:4}")
corpus=$(first "$data"/corpus.jsonl{,.gz}) queries=$(first "$data"/queries.jsonl{,.gz})
tests=("$data"/qrels/test*.tsv)
need "${corpus:-$data/corpus.jsonl}" "${queries:-$data/queries.jsonl}" "$data/qrels/train.tsv" "${tests[0]}"
texts=(--corpus "$corpus" --queries "$queries")

# the check: a dry run on the judgments, as there are no negatives and no candidates yet
if [ ! -f "$out/stage1/args.json" ]; then
    temporary=$(mktemp -d)
    trap 'rm -rf "$temporary"' EXIT
    dev=()
    if [ -f "$data/qrels/dev.tsv" ]; then
        awk 'NR == 1 && NF > 2 && $NF !~ /^[0-9]+$/ { next }
            { print $1, "Q0", (NF == 2 ? $2 : $(NF - 1)), 1, 1, "judged" }' \
            "$data/qrels/dev.tsv" >"$temporary/dev.trec"
        dev=(--dev "$queries" "$data/qrels/dev.tsv" "$temporary/dev.trec")
    fi
    "${launch[@]}" finetune_biencoder.py --model "$model" "${texts[@]}" "${dev[@]}" "${flags[@]}" \
        --train "$data/qrels/train.tsv" --passages_per_query 1 --loss info_nce \
        --per_device_batch_size 2 --output_dir "$out/stage1" --dry_run >/dev/null
    rm -r "$temporary"
    echo "The model, the files and the flags fit together."
fi

# BM25: the baseline, negatives for stage 1, and the candidates of the development set
"${launch[@]}" evaluate.py --bm25 "${texts[@]}" --qrels "${tests[@]}" --bm25_index "$out/bm25-index" \
    --output_dir "$out/evaluation-bm25"
"${launch[@]}" mine_negatives.py --bm25 "${texts[@]}" --qrels "$data/qrels/train.tsv" --depth 200 \
    --bm25_index "$out/bm25-index" --output_dir "$out/negatives-bm25"
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
"${launch[@]}" evaluate.py --run "$out/evaluation-stage2/run.trec" "$out/evaluation-bm25/run.trec" \
    --qrels "${tests[@]}" --compare "$out/evaluation-bm25/run.trec" --output_dir "$out/evaluation-fused"
python -m recipes.quickstart_report --folder "$out" --table
