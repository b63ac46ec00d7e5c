#!/usr/bin/env bash
# A search engine for the documentation of your own Python, made with the five scripts: a collection from the docstrings
# of the standard library and of the installed packages, a small BERT from scratch, pre-training with DupMAE,
# fine-tuning in two stages, evaluation.
#
#     bash recipes/quickstart.sh [OUT]        OUT: default runs/quickstart
#
# Only Python packages are downloaded, into the active environment or into a .venv that is made here. To continue a
# stopped run, give the same command again: complete stages are skipped. SCALE=tiny tests in a minute that all stages
# fit together.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
setting SCALE tiny "tiny, or no value for the full size"
out=$(path "${1:-runs/quickstart}")
. recipes/setup.sh
setup
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false ISTHMUS_CACHE=${ISTHMUS_CACHE:-$out/cache}
if [ "$DEVICE" = gpu ]; then export ACCELERATE_MIXED_PRECISION=bf16; fi

# chosen for two CPU cores
collection=() vocabulary=8000 layers=2 pretrain_steps=240 finetune_steps=220 batch=64
if [ "${SCALE:-}" = tiny ]; then
    echo "SCALE=tiny: a test that the stages fit together; its numbers mean nothing"
    library=$(python -c 'import os; print(os.path.dirname(os.__file__))')
    collection=(--roots "$library" --max_passages 400 --eval_queries 50)
    vocabulary=1000 layers=1 pretrain_steps=5 finetune_steps=5 batch=8
fi

corpus=$out/collection/corpus.jsonl queries=$out/collection/queries.jsonl
test_queries=$out/collection/queries.test.jsonl
train=$out/collection/qrels/train.tsv test=$out/collection/qrels/test.tsv
stage() { printf '\n%s  %s\n' "$(date +%H:%M:%S)" "$*"; }

stage "1/8  The collection: query = first paragraph of a docstring, passage = the rest, title = qualified name"
python -m recipes.python_docs --output_dir "$out/collection" ${collection[@]+"${collection[@]}"}

stage "2/8  A tokenizer and a small BERT from scratch, pre-trained on the passages with DupMAE"
python -m recipes.train_tokenizer --corpus "$corpus" --vocab_size $vocabulary --output_dir "$out/tokenizer"
mkdir -p "$out"
cat >"$out/bert.json" <<END
{"model_type": "bert", "hidden_size": 256, "num_hidden_layers": $layers, "num_attention_heads": 4,
 "intermediate_size": 1024, "max_position_embeddings": 128}
END
python pretrain_mae.py --objective dupmae --model_config "$out/bert.json" --tokenizer "$out/tokenizer" \
    --corpus "$corpus" --max_length 64 --per_device_batch_size 32 --max_steps $pretrain_steps --learning_rate 5e-4 \
    --save_every 100 --output_dir "$out/pretrained" --resume

stage "3/8  BM25: the baseline, and the negatives of stage 1"
python evaluate.py --bm25 --queries "$test_queries" --corpus "$corpus" --qrels "$test" --bm25_index "$out/bm25-index" \
    --output_dir "$out/evaluation-bm25"
python mine_negatives.py --bm25 --queries "$queries" --corpus "$corpus" --qrels "$train" --depth 50 \
    --bm25_index "$out/bm25-index" --output_dir "$out/negatives-bm25"

finetune() { # MODEL TRAINING_FILE LEARNING_RATE OUTPUT
    python finetune_biencoder.py --model "$1" --corpus "$corpus" --queries "$queries" --train "$2" \
        --passages_per_query 2 --negatives_depth 50 --per_device_batch_size $batch --max_steps $finetune_steps \
        --learning_rate "$3" --pooling mean --normalize --max_query_length 32 --max_passage_length 64 \
        --save_every 100 --output_dir "$4" --resume
}

evaluate() { # STAGE QUERIES
    python encode.py --model "$out/$1" --input "$2" --kind query --output_dir "$out/$1-queries"
    python encode.py --model "$out/$1" --input "$corpus" --kind passage --output_dir "$out/$1-corpus"
    python evaluate.py --queries_embeddings "$out/$1-queries" --corpus_embeddings "$out/$1-corpus" --qrels "$test" \
        --compare "$out/evaluation-bm25/run.trec" --output_dir "$out/evaluation-$1"
}

stage "4/8  Stage 1: fine-tuning on BM25's negatives"
finetune "$out/pretrained" "$out/negatives-bm25/train.jsonl" 5e-4 "$out/stage1"

stage "5/8  Stage 1: encoding and evaluation"
evaluate stage1 "$queries"

stage "6/8  Negatives mined with stage 1"
python mine_negatives.py --queries_embeddings "$out/stage1-queries" --corpus_embeddings "$out/stage1-corpus" \
    --corpus "$corpus" --qrels "$train" --depth 50 --output_dir "$out/negatives-stage1"

# RetroMAE starts stage 2 from the pre-trained model again. With minutes of training instead of hours, it is better to
# continue stage 1.
stage "7/8  Stage 2: fine-tuning on the mined negatives"
finetune "$out/stage1" "$out/negatives-stage1/train.jsonl" 3e-4 "$out/stage2"

stage "8/8  Stage 2: encoding and evaluation"
evaluate stage2 "$test_queries"
python evaluate.py --run "$out/evaluation-stage2/run.trec" --qrels "$test" --compare "$out/evaluation-stage1/run.trec" \
    --output_dir "$out/evaluation-gain"
python evaluate.py --run "$out/evaluation-stage2/run.trec" "$out/evaluation-bm25/run.trec" --qrels "$test" \
    --compare "$out/evaluation-bm25/run.trec" --output_dir "$out/evaluation-fused"

stage "Done"
python -m recipes.quickstart_report --folder "$out"
