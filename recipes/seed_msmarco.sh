#!/usr/bin/env bash
# SEED-Encoder (arXiv 2102.09206): pre-training with the weak decoder, then a retriever with its projection head.
#
#     bash recipes/seed_msmarco.sh [DATA] [OUT]
#
# DATA     what recipes/get_msmarco.sh fetches, default data/msmarco
# OUT      default runs/seed_msmarco; call it again to go on where it stopped
# LAUNCH   e.g. "accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16"
# MODEL    what it starts from, default bert-base-uncased
# WINDOW   2 (three decoder layers, the default) or 8 (one): the two published checkpoints
#
# The pre-training's corpus, optimizer, rates and steps were never published; masks, decoder, window, loss weights and length are theirs.
# Deviations:
#   1. It goes on from BERT, on MS MARCO's passages: theirs is from scratch, on Wikipedia and BookCorpus, with a vocabulary of its own.
#   2. AdamW at 1e-4, 8 epochs, batch 8 x 64 are ours.
#   3. Fine-tuning is one stage on BM25 negatives, ANCE's loss and head, AdamW (theirs: LAMB at 2e-4 on 35 M official triples,
#      then asynchronous ANCE).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=${1:-data/msmarco} out=${2:-runs/seed_msmarco}
corpus=$data/corpus.tsv train=(--queries "$data/queries.train.tsv" --qrels "$data/qrels.train.tsv")
mkdir -p "$out"
. recipes/scale.sh

"${launch[@]}" pretrain_mae.py --objective seed "${from[@]}" --corpus "$corpus" --title none --max_length 512 \
    --encoder_mask_ratio 0.15 --mask token --attention_window "${WINDOW:-2}" --per_device_batch_size 64 --learning_rate 1e-4 \
    --num_epochs 8 --save_every 10000 --output_dir "$out/pretrained" --resume "${short[@]}"
python mine_negatives.py --bm25 "${train[@]}" --corpus "$corpus" --depth 200 --output_dir "$out/negatives-bm25"
"${launch[@]}" finetune_biencoder.py --model "$out/pretrained" --pooling cls --projection 768 --title none --corpus "$corpus" \
    "${train[@]}" --negatives "$out/negatives-bm25/negatives.tsv" --passages_per_query 2 --loss triplet \
    --per_device_batch_size 32 --max_query_length 64 --max_passage_length 128 --learning_rate 2e-5 --num_epochs 4 \
    --output_dir "$out/retriever" --resume "${short[@]}"
"${launch[@]}" encode.py --model "$out/retriever" --input "$corpus" --kind passage --output_dir "$out/corpus"
"${launch[@]}" encode.py --model "$out/retriever" --input "$data/queries.dev.tsv" --kind query --output_dir "$out/dev"
"${launch[@]}" evaluate.py --queries_embeddings "$out/dev" --corpus_embeddings "$out/corpus" --qrels "$data"/qrels.dev.t* \
    --output_dir "$out/evaluation-dev"
