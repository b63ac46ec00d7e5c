#!/usr/bin/env bash
# SEED-Encoder (arXiv 2102.09206): pre-training with the weak decoder, then, with the authors' values, warm-up on BM25
# triples and ANCE (recipes/ance.sh) with the projection head, evaluation. Published: on the passages of dev MRR@10
# 0.329 and R@1000 0.953 after the warm-up, 0.334 and 0.961 after ANCE; on the documents of dev MRR 0.394 (the paper
# says at 10, the code computes it at 100).
#
#     bash recipes/seed_msmarco.sh [DATA] [OUT]
#
# DATA     folder that recipes/get_msmarco.sh --titles --triples filled, for documents with --documents too; default
#          data/msmarco
# OUT      default runs/seed_msmarco; to continue a stopped run, give the same command again. Each part writes
#          OUT/PART/model and OUT/PART/table.tsv
# PARTS    a list of passages and documents, which both start from the warm-up; default "passages"
# LAUNCH   how scripts are started, for example "accelerate launch --multi_gpu --num_processes 8
#          --mixed_precision fp16"; the published warm-up ran on 8 GPUs. Without LAUNCH, "accelerate
#          launch" is used if there are GPUs or `accelerate config` was run, else "python"
# TRAIN_LAUNCH, MINE_LAUNCH   how the two sides of ANCE are started, as in recipes/ance_msmarco.sh; the authors used 4
#          GPUs for each in fp32
# MODEL    model that pre-training starts from; default bert-base-uncased
# WINDOW   2 (three decoder layers, the default) or 8 (one layer): the two published checkpoints
# To try it in minutes, on generated texts, call `python -m recipes.tiny_data`, and then
#     SCALE=tiny bash recipes/seed_msmarco.sh runs/tiny/msmarco runs/tiny/seed
#
# Corpus, optimizer, learning rate and steps of the pre-training were never published. Masks, decoder, window, loss
# weights and length are the authors'. The miner gets a checkpoint every 10,000 steps (STEPS of recipes/ance.sh), and
# both parts start from the warm-up, as in the authors' repository. Some copies of its README have --save_steps
# 100000000: then no checkpoint is written and the negatives are never refreshed; they also start from the final
# checkpoints of ANCE.
# Deviations, beside those of recipes/ance.sh:
#   1. Pre-training continues BERT on the passages of MS MARCO; the authors train from scratch, on Wikipedia and
#      BookCorpus, with a vocabulary of their own.
#   2. AdamW at 1e-4, 8 epochs and the batch of 8 x 64 are our choice.
#   3. Learning rates reach zero at the step of the published checkpoint; the authors' rates would reach it at step
#      1,000,000 (warm-up: after two epochs, 273,436 steps).
#   4. In the warm-up, each visit of a positive draws one of its negatives; the authors read the triples in file order.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
data=$(path "${1:-data/msmarco}") out=$(path "${2:-runs/seed_msmarco}") parts=${PARTS:-passages}
[[ $parts =~ ^((passages|documents)( |$))+$ ]] || usage
ance_settings both
whole WINDOW
corpus=$data/corpus.tsv
need "$corpus" "$data/triples.train.small.tsv"
triplets=(--loss triplet --passages_per_query 2 --optimizer lamb --weight_decay 0)
. recipes/scale.sh

part() { # NAME [flags ...]: trains from the warm-up, and evaluates
    local texts=$data documents=()
    if [ "$1" != passages ]; then texts=$data/documents documents=(--documents); fi
    bash recipes/ance.sh both "$texts" "$out/warm-up" "$out/$1" "${triplets[@]}" --max_query_length 64 \
        --max_passage_length 512 "${@:2}" "${short[@]}"
    bash recipes/msmarco_eval.sh "$out/$1/model" "$data" "$out/$1" "${documents[@]}"
}

"${launch[@]}" pretrain_mae.py --objective seed "${from[@]}" --corpus "$corpus" --title none --max_length 512 \
    --encoder_mask_ratio 0.15 --mask token --attention_window "${WINDOW:-2}" --per_device_batch_size 64 \
    --learning_rate 1e-4 --num_epochs 8 --save_every 10000 --output_dir "$out/pretrained" --resume "${short[@]}"
python -m recipes.import_training_data --input "$data/triples.train.small.tsv" --output_dir "$out/triples"
"${launch[@]}" finetune_biencoder.py --model "$out/pretrained" --pooling cls --projection 768 --title none \
    --corpus "$out/triples/corpus.jsonl" --queries "$out/triples/queries.jsonl" --train "$out/triples/train.jsonl" \
    "${triplets[@]}" --max_query_length 128 --max_passage_length 128 --per_device_batch_size 32 --learning_rate 2e-4 \
    --warmup_steps 1000 --max_steps 90000 --save_every 10000 --output_dir "$out/warm-up" --resume "${short[@]}"

for name in $parts; do
    case $name in
        passages) part $name --per_device_batch_size 16 --learning_rate 1e-6 --warmup_steps 5000 --max_steps 440000 ;;
        documents) part $name --title sep --max_characters 10000 --per_device_batch_size 4 \
            --gradient_accumulation_steps 4 --learning_rate 5e-6 --warmup_steps 3000 --max_steps 800000 ;;
    esac
done
