#!/usr/bin/env bash
# A SPLADE baseline on MS MARCO passages (SPLADE-max with distillation: arXiv 2109.10086, 2205.04733): BM25 negatives, a
# cross-encoder, one training with in-batch softmax, margin-MSE and FLOPS, evaluation on dev, DL19 and DL20.
#
#     bash recipes/splade.sh [DATA] [OUT]
#
# DATA     folder that recipes/get_msmarco.sh --titles filled; default data/msmarco
# OUT      default runs/splade; to continue a stopped run, give the same command again
# LAUNCH   how scripts are started, for example "accelerate launch --multi_gpu --num_processes 4 --mixed_precision
#          fp16"; 4 x 32 = 128 queries is the published batch
# MODEL    a masked language model; default distilbert-base-uncased
# TEACHER  model that the cross-encoder starts from; default bert-base-uncased
#
# The checkpoint is a SparseEncoder folder: sentence_transformers.SparseEncoder(OUT/model) loads it.
# Steps and lengths are those of naver/splade: 150,000 steps, the FLOPS weights grow over 50,000 of them; learning rate
# 2e-5 after 6,000 steps of warm-up. Deviations:
#   1. Both losses are used at once, with one BM25 negative per query. In naver/splade, distillation has no in-batch
#      softmax and has negatives of its own.
#   2. The FLOPS weights, 0.01 for queries and 0.008 for passages, are of a training that adds up the FLOPS of positives
#      and of negatives. The trainer of 150,000 steps pairs margin-MSE with 0.1 and 0.08, and takes the mean,
#      (FLOPS(positives) + FLOPS(negatives)) / 2. Here FLOPS is of all passages of the batch together.
#   3. Titles stand before the passages.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
data=$(path "${1:-data/msmarco}") out=$(path "${2:-runs/splade}")
corpus=$data/corpus.tsv queries=$data/queries.train.tsv qrels=$data/qrels.train.tsv
need "$corpus" "$queries" "$qrels"
. recipes/scale.sh
start "${MODEL:-distilbert-base-uncased}"

python mine_negatives.py --bm25 --corpus "$corpus" --queries "$queries" --qrels "$qrels" --depth 100 \
    --output_dir "$out/negatives"
pairs=(--corpus "$corpus" --queries "$queries" --train "$out/negatives/train.jsonl")
"${launch[@]}" -m recipes.train_cross_encoder --model "$teacher" "${pairs[@]}" --max_length 256 \
    --passages_per_query 16 --per_device_batch_size 2 --num_epochs 2 --output_dir "$out/teacher" "${few[@]}"
"${launch[@]}" -m recipes.score_pairs --model "$out/teacher" "${pairs[@]}" --max_query_length 32 --max_length 256 \
    --output_dir "$out/scores"
"${launch[@]}" finetune_biencoder.py --head sparse --model "$model" --title space --corpus "$corpus" \
    --queries "$queries" --train "$out/scores/train.jsonl" --negatives_depth 100 --passages_per_query 2 \
    --per_device_batch_size 32 --contrastive_weight 1 --margin_mse_weight 1 --flops_queries 0.01 \
    --flops_passages 0.008 --max_query_length 256 --max_passage_length 256 --learning_rate 2e-5 --max_steps 150000 \
    --warmup_steps 6000 --flops_warmup_steps 50000 --output_dir "$out/model" --resume "${short[@]}"

bash recipes/msmarco_eval.sh "$out/model" "$data" "$out"
