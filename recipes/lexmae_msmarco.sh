#!/usr/bin/env bash
# LexMAE on MS MARCO passages (arXiv 2208.14754), with the values of the authors' README: pre-training, stage 1 on BM25
# negatives, mining, stage 2, mining, a cross-encoder, stage 3 with distillation, evaluation on dev, DL19 and DL20.
# Published on dev: MRR@10 0.426.
#
#     bash recipes/lexmae_msmarco.sh [DATA] [OUT]
#
# DATA     folder that recipes/get_msmarco.sh --titles filled; default data/msmarco
# OUT      default runs/lexmae_msmarco; to continue a stopped run, give the same command again
# LAUNCH   how scripts are started. The published setting of pre-training is "accelerate launch
#          --multi_gpu --num_processes 8 --mixed_precision fp16" (8 x 256 = 2048 passages). The
#          authors fine-tune on one GPU; the batch sizes of stages 1 to 3 here are per process, for
#          eight processes: 8 x 3, 8 x 3 and 8 x 2 queries. Without LAUNCH, "accelerate launch" is
#          used if there are GPUs or `accelerate config` was run, else "python"
# MODEL    model that pre-training starts from; default bert-base-uncased, as published
# TEACHER  model that the cross-encoder starts from; default bert-base-uncased
# To try it in minutes, on generated texts, call `python -m recipes.tiny_data`, and then
#     SCALE=tiny bash recipes/lexmae_msmarco.sh runs/tiny/msmarco runs/tiny/lexmae
#
# Every stage starts from the pre-trained model. Deviations from the authors' recipe:
#   1. A passage without a title has no separator; the authors write "-" as its title.
#   2. Our BM25 mines the negatives of stage 1 from all passages; they take Tevatron's train.negatives.tsv.
#   3. Stage 3 draws from the first 100 mined negatives, not from 512: the teacher scores them before the training, and
#      not while it runs.
#   4. The authors give no recipe for the cross-encoder. It is trained with RetroMAE's values, on groups of 16, not 65.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
data=$(path "${1:-data/msmarco}") out=$(path "${2:-runs/lexmae_msmarco}")
corpus=$data/corpus.tsv queries=$data/queries.train.tsv qrels=$data/qrels.train.tsv
need "$corpus" "$queries" "$qrels"
. recipes/scale.sh

finetune() { # STAGE TRAINING_FILE DEPTH GROUP BATCH FLOPS [flags ...]
    "${launch[@]}" finetune_biencoder.py --head sparse --exclude_special_tokens --model "$out/pretrained" --title sep \
        --corpus "$corpus" --queries "$queries" --train "$2" --negatives_depth "$3" --passages_per_query "$4" \
        --per_device_batch_size "$5" --flops_passages "$6" --max_query_length 32 --max_passage_length 144 \
        --learning_rate 2e-5 --num_epochs 3 --warmup_steps 0.05 --weight_decay 0.01 --output_dir "$out/stage$1" \
        --resume "${@:7}" "${short[@]}"
}
encode() { # STAGE TEXTS KIND NAME
    "${launch[@]}" encode.py --model "$out/stage$1" --input "$2" --kind "$3" --output_dir "$out/stage$1-$4"
}
mine() { # STAGE [flags ...]
    encode "$1" "$corpus" passage corpus
    encode "$1" "$queries" query train
    "${launch[@]}" mine_negatives.py --queries_embeddings "$out/stage$1-train" \
        --corpus_embeddings "$out/stage$1-corpus" --corpus "$corpus" --qrels "$qrels" --depth 512 \
        --output_dir "$out/negatives-stage$1"
}

"${launch[@]}" pretrain_mae.py --objective lexmae "${from[@]}" --corpus "$corpus" --title sep --max_length 144 \
    --encoder_mask_ratio 0.3 --decoder_mask_ratio 0.5 --mask token --decoder_layers 2 --per_device_batch_size 256 \
    --learning_rate 3e-4 --num_epochs 20 --warmup_steps 0.05 --weight_decay 0.01 --max_grad_norm 0 --save_every 4000 \
    --output_dir "$out/pretrained" --resume "${short[@]}"
python mine_negatives.py --bm25 --corpus "$corpus" --queries "$queries" --qrels "$qrels" --depth 1000 \
    --output_dir "$out/negatives-bm25"
finetune 1 "$out/negatives-bm25/train.jsonl" 1000 16 3 0.002
mine 1
finetune 2 "$out/negatives-stage1/train.jsonl" 200 16 3 0.008
mine 2 --num_negatives 100

pairs=(--corpus "$corpus" --queries "$queries" --train "$out/negatives-stage2/train.jsonl")
"${launch[@]}" -m recipes.train_cross_encoder --model "$teacher" "${pairs[@]}" --title sep --max_length 200 \
    --passages_per_query 16 --per_device_batch_size 2 --learning_rate 1e-5 --num_epochs 4 \
    --output_dir "$out/teacher" "${few[@]}"
"${launch[@]}" -m recipes.score_pairs --model "$out/teacher" "${pairs[@]}" --title sep --max_query_length 32 \
    --max_length 200 --output_dir "$out/scores"
finetune 3 "$out/scores/train.jsonl" 100 24 2 0.008 --kl_weight 1 --contrastive_weight 0.2

bash recipes/msmarco_eval.sh "$out/stage3" "$data" "$out"
