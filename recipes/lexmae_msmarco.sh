#!/usr/bin/env bash
# LexMAE on MS MARCO passages (arXiv 2208.14754): the pre-training, with the values of the authors' README.
#
#     bash recipes/lexmae_msmarco.sh [DATA] [OUT]
#
# DATA     what recipes/get_msmarco.sh --titles fetches, default data/msmarco
# OUT      default runs/lexmae_msmarco; call it again to go on where it stopped
# LAUNCH   e.g. "accelerate launch --multi_gpu --num_processes 8 --mixed_precision fp16", the published setting: 8 x 256 = 2048
# MODEL    what it starts from, default bert-base-uncased as published
#
# The checkpoint keeps the LM head, from which the sparse retriever is fine-tuned: [CLS] title [SEP] passage [SEP], as here.
# Deviation: a passage without title has no separator; the authors put "-" for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=${1:-data/msmarco} out=${2:-runs/lexmae_msmarco}
corpus=$data/corpus.tsv
mkdir -p "$out"
. recipes/scale.sh

"${launch[@]}" pretrain_mae.py --objective lexmae "${from[@]}" --corpus "$corpus" --title sep --max_length 144 \
    --encoder_mask_ratio 0.3 --decoder_mask_ratio 0.5 --mask token --decoder_layers 2 --per_device_batch_size 256 \
    --learning_rate 3e-4 --num_epochs 20 --warmup_ratio 0.05 --weight_decay 0.01 --max_grad_norm 0 --save_every 4000 \
    --output_dir "$out/pretrained" --resume "${short[@]}"
