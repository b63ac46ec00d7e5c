#!/usr/bin/env bash
# ANCE on MS MARCO (arXiv 2007.00808), with the values of the authors' commands: warm-up on BM25 triples, then the
# asynchronous trainer and miner of recipes/ance.sh on passages and on documents (FirstP, MaxP), evaluation. Published:
#                         dev MRR@10   dev R@1000   DL19 nDCG@10   re-ranked
#     warm-up               0.311
#     passages              0.330        0.959         0.648         0.677
#     documents, FirstP                                0.615         0.641
#     documents, MaxP                                  0.628         0.671
#
#     bash recipes/ance_msmarco.sh [DATA] [OUT]
#
# DATA     folder that recipes/get_msmarco.sh --titles --triples filled, for documents with --documents too; default
#          data/msmarco
# OUT      default runs/ance_msmarco; to continue a stopped run, give the same command again. Each part writes
#          OUT/PART/model and OUT/PART/table.tsv
# PARTS    a list of passages, documents (FirstP) and maxp; default "passages". The other two start from its model
# LAUNCH   how warm-up and evaluation are started, for example "accelerate launch --mixed_precision
#          fp16"; the published warm-up ran on one GPU. Without LAUNCH, "accelerate launch" is used
#          if there are GPUs or `accelerate config` was run, else "python"
# TRAIN_LAUNCH, MINE_LAUNCH   how the two sides are started, default LAUNCH. The authors used 4 GPUs for each (MaxP: 8)
#          in fp32: "accelerate launch --multi_gpu --num_processes 4 --gpu_ids 0,1,2,3" for one side, and the same with
#          "--gpu_ids 4,5,6,7 --main_process_port 29501" for the other
# MODEL    model that the warm-up starts from; default roberta-base, as published
# To try it in minutes, on generated texts, call `python -m recipes.tiny_data`, and then
#     SCALE=tiny bash recipes/ance_msmarco.sh runs/tiny/msmarco runs/tiny/ance_msmarco
#
# Batch sizes are per process. With fewer GPUs, raise --gradient_accumulation_steps: a triplet has no in-batch
# negatives. The MRR@10 of the warm-up on dev is in OUT/passages/generations/generation-0001/manifest.json.
# Deviations, beside those of recipes/ance.sh:
#   1. Learning rates reach zero at the step of the published checkpoint; the authors' rates would reach it at step
#      1,000,000 (warm-up: after two epochs, 2.2 M steps).
#   2. In the warm-up, each visit of a positive draws one of its negatives; the authors read the triples in file order.
#   3. MaxP: each chunk has its own special tokens, and chunks of padding are not indexed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
data=$(path "${1:-data/msmarco}") out=$(path "${2:-runs/ance_msmarco}") parts=${PARTS:-passages}
[[ $parts =~ ^((passages|documents|maxp)( |$))+$ ]] || usage
ance_settings both
corpus=$data/corpus.tsv
need "$corpus" "$data/triples.train.small.tsv"
. recipes/scale.sh
start "${MODEL:-roberta-base}"
triplets=(--loss triplet --passages_per_query 2 --optimizer lamb --weight_decay 0)

part() { # NAME MODEL [flags ...]: trains from MODEL, and evaluates
    local texts=$data documents=()
    if [ "$1" != passages ]; then texts=$data/documents documents=(--documents); fi
    bash recipes/ance.sh both "$texts" "$2" "$out/$1" "${triplets[@]}" --max_query_length 64 --max_passage_length 512 \
        "${@:3}" "${short[@]}"
    bash recipes/msmarco_eval.sh "$out/$1/model" "$data" "$out/$1" "${documents[@]}"
}

python -m recipes.import_training_data --input "$data/triples.train.small.tsv" --output_dir "$out/triples"
"${launch[@]}" finetune_biencoder.py --model "$model" --pooling cls --projection 768 --title none \
    --corpus "$out/triples/corpus.jsonl" --queries "$out/triples/queries.jsonl" --train "$out/triples/train.jsonl" \
    "${triplets[@]}" --max_query_length 128 --max_passage_length 128 --per_device_batch_size 32 --learning_rate 2e-4 \
    --warmup_steps 1000 --max_steps 60000 --save_every 10000 --output_dir "$out/warm-up" --resume "${short[@]}"

for name in $parts; do
    case $name in
        passages) part $name "$out/warm-up" --per_device_batch_size 8 --gradient_accumulation_steps 2 \
            --learning_rate 1e-6 --warmup_steps 5000 --max_steps 600000 ;;
        documents) part $name "$out/passages/model" --title sep --max_characters 10000 --per_device_batch_size 8 \
            --gradient_accumulation_steps 2 --learning_rate 5e-6 --warmup_steps 3000 --max_steps 210000 ;;
        maxp) part $name "$out/passages/model" --title sep --max_characters 10000 --max_chunks 4 \
            --per_device_batch_size 2 --gradient_accumulation_steps 8 --learning_rate 1e-5 --warmup_steps 500 \
            --max_steps 139000 ;;
    esac
done
