#!/usr/bin/env bash
# The pre-training of COCO-DR on the target corpora (arXiv 2210.15212): coCondenser on two spans of each document of
# every collection, then zero-shot evaluation without fine-tuning. Published: nDCG@10 0.288 over BEIR before fine-tuning
# (base).
#
#     bash recipes/coco_beir.sh FOLDER [OUT]
#
# FOLDER   collections in BEIR layout (corpus.jsonl[.gz], queries.jsonl[.gz], qrels/test*.tsv); the paper takes 18
# OUT      default runs/coco_beir; to continue a stopped run, give the same command again
# LAUNCH   how scripts are started, for example "accelerate launch --multi_gpu --num_processes 8
#          --mixed_precision fp16"; the paper has 200 documents per GPU. Without LAUNCH, "accelerate
#          launch" is used if there are GPUs or `accelerate config` was run, else "python"
# MODEL    model that pre-training starts from; default Luyu/condenser. Its folder has no Condenser head, so the head is
#          new
# BALANCE  temperature between the corpora; default 1, as published: each corpus counts by its number of documents
# To try it in minutes, on generated texts, call `python -m recipes.tiny_data`, and then
#     SCALE=tiny bash recipes/coco_beir.sh runs/tiny/beir runs/tiny/coco_beir
#
# Deviations:
#   1. The authors start from Condenser and its head; its README says that a random head "will likely corrupt" the
#      encoder. To have a trained head, pre-train with `--objective condenser` first, and give that folder as MODEL.
#   2. The authors do not publish --max_length. Spans have about 30 tokens; longer sentences are cut at the end here,
#      and to a random window by the authors.
#   3. A document of a single span is left out; the authors pair it with itself.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
[ $# -ge 1 ] || usage
folder=$(path "$1") out=$(path "${2:-runs/coco_beir}")
setting BALANCE '[1-9][0-9]{0,8}(\.[0-9]+)?' "a number from 1 on"
corpora=()
for collection in "$folder"/*/; do
    corpus=$(first "$collection"corpus.jsonl{,.gz})
    if [ -n "$corpus" ]; then corpora+=("$corpus"); fi
done
[ ${#corpora[@]} -gt 0 ] || stop "$folder: no collection in it — BEIR layout is NAME/corpus.jsonl"
corpus=${corpora[0]}
MODEL=${MODEL:-Luyu/condenser}
. recipes/scale.sh

"${launch[@]}" pretrain_mae.py --objective cocondenser "${from[@]}" --corpus "${corpora[@]}" --balance "${BALANCE:-1}" \
    --title none --span_tokens 30 --max_length 128 --no_encoder_dropout --per_device_batch_size 200 \
    --learning_rate 1e-4 --num_epochs 8 --warmup_steps 0.1 --weight_decay 0.01 --save_every 10000 \
    --output_dir "$out/pretrained" --resume "${short[@]}"
bash recipes/beir.sh "$out/pretrained" "$folder" "$out/zero-shot" --pooling cls
