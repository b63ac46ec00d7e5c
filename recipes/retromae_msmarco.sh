#!/usr/bin/env bash
# RetroMAE on MS MARCO passages (arXiv 2205.12035): pre-training on the passages, BM25 negatives, stage 1, mined
# negatives, stage 2, evaluation on dev, DL19 and DL20. Published on dev: MRR@10 0.393, R@1000 0.985.
#
#     bash recipes/retromae_msmarco.sh [DATA] [OUT]
#
# DATA     folder that recipes/get_msmarco.sh --titles filled; default data/msmarco
# OUT      default runs/retromae_msmarco; to continue a stopped run, give the same command again
# LAUNCH   how scripts are started, for example "accelerate launch --multi_gpu --num_processes 8
#          --mixed_precision bf16". That is the published setting, except that the authors used
#          fp16. Without LAUNCH, "accelerate launch" is used if there are GPUs or `accelerate
#          config` was run, else "python"
# MODEL    model that pre-training starts from; default bert-base-uncased
# To try it in minutes, on generated texts, call `python -m recipes.tiny_data`, and then
#     SCALE=tiny bash recipes/retromae_msmarco.sh runs/tiny/msmarco runs/tiny/retromae
#
# Batch sizes are per process, for eight processes. With fewer processes, keep the product of processes, batch size and
# accumulation steps in pre-training. In fine-tuning, raise --per_device_batch_size and set --chunk_size 64, because
# accumulation does not add negatives.
# Deviations from the authors' recipe:
#   1. They start from their checkpoint of Wikipedia and BookCorpus (MODEL=Shitao/RetroMAE); the default here is BERT.
#   2. Our BM25 mines the negatives of stage 1 from all passages; they take the official BM25 triples.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
data=$(path "${1:-data/msmarco}") out=$(path "${2:-runs/retromae_msmarco}")
corpus=$data/corpus.tsv queries=$data/queries.train.tsv qrels=$data/qrels.train.tsv
need "$corpus" "$queries" "$qrels"
. recipes/scale.sh

encode() { # MODEL TEXTS KIND OUTPUT
    "${launch[@]}" encode.py --model "$1" --input "$2" --kind "$3" --output_dir "$4"
}
finetune() { # TRAINING_FILE OUTPUT
    "${launch[@]}" finetune_biencoder.py --model "$out/pretrained" --pooling cls --title sep --corpus "$corpus" \
        --queries "$queries" --train "$1" --negatives_depth 200 --passages_per_query 16 --per_device_batch_size 16 \
        --max_query_length 32 --max_passage_length 140 --learning_rate 2e-5 --num_epochs 4 --weight_decay 0 \
        --warmup_steps 0 --output_dir "$2" --resume "${short[@]}"
}

"${launch[@]}" pretrain_mae.py --objective retromae "${from[@]}" --corpus "$corpus" --title space --max_length 150 \
    --per_device_batch_size 128 --learning_rate 1e-4 --num_epochs 20 --warmup_steps 0.1 --save_every 10000 \
    --output_dir "$out/pretrained" --resume "${short[@]}"
python mine_negatives.py --bm25 --corpus "$corpus" --queries "$queries" --qrels "$qrels" --depth 200 \
    --output_dir "$out/negatives-bm25"
finetune "$out/negatives-bm25/train.jsonl" "$out/stage1"

encode "$out/stage1" "$corpus" passage "$out/stage1-corpus"
encode "$out/stage1" "$queries" query "$out/stage1-train"
"${launch[@]}" mine_negatives.py --queries_embeddings "$out/stage1-train" --corpus_embeddings "$out/stage1-corpus" \
    --corpus "$corpus" --qrels "$qrels" --depth 200 --output_dir "$out/negatives-stage1"
finetune "$out/negatives-stage1/train.jsonl" "$out/stage2"

bash recipes/msmarco_eval.sh "$out/stage2" "$data" "$out"
