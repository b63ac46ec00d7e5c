#!/usr/bin/env bash
# SPLADE++ and SPLADE-v3 on MS MARCO passages (arXiv 2205.04733, 2403.06789): BM25 negatives, a cross-encoder, SPLADE++ by
# margin-MSE; from there, with the negatives that it mines, v3 by KL and margin-MSE; evaluation of v3 on dev, DL19, DL20.
# Published on dev, MRR@10: SPLADE++ with one GPU 0.372, v3 0.402.
#
#     bash recipes/splade.sh [DATA] [OUT]
#
# DATA     folder that recipes/get_msmarco.sh filled; default data/msmarco
# OUT      default runs/splade: OUT/plusplus, OUT/v3; to continue a stopped run, give the same command again
# LAUNCH   how scripts are started, for example "accelerate launch --multi_gpu --num_processes 4
#          --mixed_precision fp16"; 4 x 32 = 128 queries is the published batch. Without LAUNCH,
#          "accelerate launch" is used if there are GPUs or `accelerate config` was run, else
#          "python"
# MODEL    a masked language model; default distilbert-base-uncased
# TEACHER  model that the cross-encoder starts from; default bert-base-uncased
# To try it in minutes, on generated texts, call `python -m recipes.tiny_data`, and then
#     SCALE=tiny bash recipes/splade.sh runs/tiny/msmarco runs/tiny/splade
#
# Both checkpoints are SparseEncoder folders: sentence_transformers.SparseEncoder(OUT/v3) loads one.
# SPLADE++ has the values of naver/splade's 150,000-step trainer: one negative, learning rate 2e-5 after 6,000 steps of
# warm-up, FLOPS weights 0.1 for queries and 0.08 for passages, which grow over 50,000 steps. v3 has 8 negatives out of
# 100, KL with the weight 1 and margin-MSE with 0.05, five epochs. Deviations:
#   1. Negatives of SPLADE++ are BM25's and the teacher is the one trained here (theirs: published negatives of several
#      retrievers, with the scores of an ensemble).
#   2. FLOPS is of all passages of the batch together (theirs: the mean of that of positives and that of negatives).
#   3. v3 draws its 100 negatives from the first 1,000 ranks (theirs: 50 of them are the first 50).
#   4. Margin-MSE compares the positive with each negative (theirs in v3: every passage with every other).
#   5. The paper states no FLOPS weights of v3: 0.005 for both sides are those of its authors' trainer.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
data=$(path "${1:-data/msmarco}") out=$(path "${2:-runs/splade}")
corpus=$data/corpus.tsv queries=$data/queries.train.tsv qrels=$data/qrels.train.tsv
need "$corpus" "$queries" "$qrels"
. recipes/scale.sh
start "${MODEL:-distilbert-base-uncased}"

teach() { # TRAINING_FILE OUT
    "${launch[@]}" -m recipes.score_pairs --model "$out/teacher" --corpus "$corpus" --queries "$queries" --train "$1" \
        --max_query_length 32 --max_length 256 --output_dir "$2"
}
finetune() { # MODEL TRAINING_FILE OUT [flags ...]
    "${launch[@]}" finetune_biencoder.py --head sparse --model "$1" --title none --corpus "$corpus" \
        --queries "$queries" --train "$2" --negatives_depth 100 --contrastive_weight 0 --learning_rate 2e-5 \
        --max_query_length 256 --max_passage_length 256 --output_dir "$3" --resume "${@:4}" "${short[@]}"
}

python mine_negatives.py --bm25 --corpus "$corpus" --queries "$queries" --qrels "$qrels" --depth 100 \
    --output_dir "$out/negatives-bm25"
"${launch[@]}" -m recipes.train_cross_encoder --model "$teacher" --corpus "$corpus" --queries "$queries" \
    --train "$out/negatives-bm25/train.jsonl" --max_length 256 --passages_per_query 16 --per_device_batch_size 2 \
    --num_epochs 2 --output_dir "$out/teacher" "${few[@]}"
teach "$out/negatives-bm25/train.jsonl" "$out/scores-bm25"
finetune "$model" "$out/scores-bm25/train.jsonl" "$out/plusplus" --passages_per_query 2 --per_device_batch_size 32 \
    --margin_mse_weight 1 --flops_queries 0.1 --flops_passages 0.08 --flops_warmup_steps 50000 --max_steps 150000 \
    --warmup_steps 6000

for texts in corpus queries; do
    kind=$([ $texts = corpus ] && echo passage || echo query)
    "${launch[@]}" encode.py --model "$out/plusplus" --input "${!texts}" --kind "$kind" --output_dir "$out/plusplus-$texts"
done
"${launch[@]}" mine_negatives.py --queries_embeddings "$out/plusplus-queries" \
    --corpus_embeddings "$out/plusplus-corpus" --corpus "$corpus" --qrels "$qrels" --depth 1000 --num_negatives 100 \
    --sample uniform --output_dir "$out/negatives-plusplus"
teach "$out/negatives-plusplus/train.jsonl" "$out/scores-plusplus"
finetune "$out/plusplus" "$out/scores-plusplus/train.jsonl" "$out/v3" --passages_per_query 9 \
    --per_device_batch_size 8 --kl_weight 1 --margin_mse_weight 0.05 --flops_queries 0.005 --flops_passages 0.005 \
    --num_epochs 5 --warmup_steps 0.01

bash recipes/msmarco_eval.sh "$out/v3" "$data" "$out"
