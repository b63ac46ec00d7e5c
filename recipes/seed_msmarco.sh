#!/usr/bin/env bash
# SEED-Encoder (arXiv 2102.09206): pre-training with the weak decoder, then, with the authors' values, warm-up on BM25 triples and
# ANCE (recipes/ance.sh) with its projection head, evaluation. Published: on the passages of dev MRR@10 0.329 and R@1000 0.953
# after the warm-up, 0.334 and 0.961 after ANCE; on documents MRR 0.394 on dev, at 10 they say, at 100 by their code.
#
#     bash recipes/seed_msmarco.sh [DATA] [OUT]
#
# DATA     what recipes/get_msmarco.sh --titles --triples fetches, for documents also --documents; default data/msmarco
# OUT      default runs/seed_msmarco; call it again to go on where it stopped. Each part leaves OUT/PART/model and OUT/PART/table.tsv
# PARTS    of passages and documents, which both start from the warm-up; default "passages"
# LAUNCH   e.g. "accelerate launch --multi_gpu --num_processes 8 --mixed_precision fp16"; the published warm-up had 8 GPUs
# TRAIN_LAUNCH, MINE_LAUNCH   of the two sides of ANCE, as in recipes/ance_msmarco.sh; published on 4 GPUs each in fp32
# MODEL    what it starts from, default bert-base-uncased
# WINDOW   2 (three decoder layers, the default) or 8 (one): the two published checkpoints
#
# The pre-training's corpus, optimizer, rates and steps were never published; masks, decoder, window, loss weights and length are theirs.
# The miner gets a checkpoint every 10,000 steps (STEPS of recipes/ance.sh), and both parts start from the warm-up, as in the authors'
# repository. Copies of its README have --save_steps 100000000, with which no checkpoint is written and negatives are never refreshed, and
# start from ANCE's own final checkpoints.
# Deviations, beside those of recipes/ance.sh:
#   1. It goes on from BERT, on MS MARCO's passages: theirs is from scratch, on Wikipedia and BookCorpus, with a vocabulary of its own.
#   2. AdamW at 1e-4, 8 epochs, batch 8 x 64 are ours.
#   3. Learning rates fall to zero at the step of the published checkpoint; theirs would at 1,000,000 (warm-up: two epochs, 273,436).
#   4. Triples are shuffled, 32,768 at a time; theirs come in the order of the file.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
data=$(path "${1:-data/msmarco}") out=$(path "${2:-runs/seed_msmarco}") parts=${PARTS:-passages}
[[ $parts =~ ^((passages|documents)( |$))+$ ]] || usage 6,10
corpus=$data/corpus.tsv triplets=(--loss triplet --optimizer lamb --weight_decay 0)
mkdir -p "$out"
. recipes/scale.sh

part() { # NAME [flags ...]: train from the warm-up, and evaluate
    local texts=$data documents=()
    if [ "$1" != passages ]; then texts=$data/documents documents=(--documents); fi
    bash recipes/ance.sh both "$texts" "$out/warm-up" "$out/$1" "${triplets[@]}" --passages_per_query 2 --max_query_length 64 \
        --max_passage_length 512 "${@:2}" "${short[@]}"
    bash recipes/msmarco_eval.sh "$out/$1/model" "$data" "$out/$1" "${documents[@]}"
}

"${launch[@]}" pretrain_mae.py --objective seed "${from[@]}" --corpus "$corpus" --title none --max_length 512 \
    --encoder_mask_ratio 0.15 --mask token --attention_window "${WINDOW:-2}" --per_device_batch_size 64 --learning_rate 1e-4 \
    --num_epochs 8 --save_every 10000 --output_dir "$out/pretrained" --resume "${short[@]}"
"${launch[@]}" finetune_biencoder.py --model "$out/pretrained" --pooling cls --projection 768 --title none \
    --triples "$data/triples.train.small.tsv" "${triplets[@]}" --max_query_length 128 --max_passage_length 128 \
    --per_device_batch_size 32 --learning_rate 2e-4 --warmup_steps 1000 --max_steps 90000 --save_every 10000 \
    --output_dir "$out/warm-up" --resume "${short[@]}"

for name in $parts; do
    case $name in
        passages) part $name --per_device_batch_size 16 --learning_rate 1e-6 --warmup_steps 5000 --max_steps 440000 ;;
        documents) part $name --title sep --max_characters 10000 --per_device_batch_size 4 --gradient_accumulation_steps 4 \
            --learning_rate 5e-6 --warmup_steps 3000 --max_steps 800000 ;;
    esac
done
