#!/usr/bin/env bash
# Does the bottleneck help? Every objective against MLM: the same initial weights, steps and batch, the same fine-tuning.
#
#     bash bench/objectives.sh DATA OUT [flags for every call of pretrain_mae.py ...]
#
# DATA         BEIR layout: corpus.jsonl[.gz], queries.jsonl[.gz], qrels/train.tsv, qrels/test*.tsv
# OUT          call it again to go on where it stopped
# OBJECTIVES   default: all         SEEDS   default: 0 1
# PRETRAIN, FINETUNE   optimizer steps, default 800 and 100        RATE, FINETUNE_RATE   learning rates, default 1e-3 and 5e-4
# MODEL        start from this checkpoint; default: a fresh BERT of two layers of 128 with a vocabulary of 5000
# LENGTH       of blocks and passages in tokens, default 64
# HEAD         flags for fine-tuning, default --pooling cls --normalize --temperature 0.05. Give others a name with AS: the same
#              pre-trained models are fine-tuned beside what is there
# Printed: MRR@10 and nDCG@10 of each objective on each test split, and the difference to mlm with an interval over queries (bench/seeds.py)
#
# Where `probe_rebuild` stays at its floor of 0.05 and the fine-tuned models at chance, it was too short to say anything.
# coCondenser has half as many documents as the others have blocks, of two spans each.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../recipes/paths.sh"
[ $# -ge 2 ] || usage
data=$(path "$1") out=$(path "$2")
flags=("${@:3}")
corpus=$(ls "$data"/corpus.jsonl* | head -1) queries=$(ls "$data"/queries.jsonl* | head -1)
read -ra objectives <<<"${OBJECTIVES:-mlm bow retromae dupmae lexmae seed condenser cocondenser}"
read -ra seeds <<<"${SEEDS:-0 1}"
read -ra head <<<"${HEAD:---pooling cls --normalize --temperature 0.05}"
as=${AS:+-$AS}
mkdir -p "$out"
start=(--model "${MODEL:-}")
if [ -z "${MODEL:-}" ]; then
    start=(--model_config "$out/bert.json" --tokenizer "$out/tokenizer")
    python -m recipes.train_tokenizer --corpus "$corpus" --vocab_size 5000 --output_dir "$out/tokenizer"
fi
echo '{"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}' >"$out/bert.json"
python mine_negatives.py --bm25 --corpus "$corpus" --queries "$queries" --qrels "$data/qrels/train.tsv" --depth 50 \
    --output_dir "$out/negatives"
awk 'NR == FNR { judged[$1]; next } match($0, /"_id": "[^"]*"/) && substr($0, RSTART + 8, RLENGTH - 9) in judged' \
    <(cat "$data"/qrels/test*.tsv) <(zcat -f "$queries") >"$out/queries.test.jsonl"

for seed in "${seeds[@]}"; do
    for objective in "${objectives[@]}"; do
        here=$out/$objective-$seed
        shape=(--per_device_batch_size 32)
        [ "$objective" != cocondenser ] || shape=(--per_device_batch_size 16)
        python pretrain_mae.py --objective "$objective" "${start[@]}" --corpus "$corpus" --max_length "${LENGTH:-64}" \
            --max_steps "${PRETRAIN:-800}" --learning_rate "${RATE:-1e-3}" "${shape[@]}" --seed "$seed" --probe_every 100 \
            --output_dir "$here/pretrained" --resume "${flags[@]}"
        python finetune_biencoder.py --model "$here/pretrained" --corpus "$corpus" --queries "$queries" \
            --train "$out/negatives/train.jsonl" --passages_per_query 2 \
            --per_device_batch_size 64 --max_steps "${FINETUNE:-100}" --learning_rate "${FINETUNE_RATE:-5e-4}" \
            "${head[@]}" --max_query_length 32 --max_passage_length "${LENGTH:-64}" --seed "$seed" \
            --output_dir "$here/model$as" --resume
        python encode.py --model "$here/model$as" --input "$out/queries.test.jsonl" --kind query --output_dir "$here/queries$as"
        python encode.py --model "$here/model$as" --input "$corpus" --kind passage --output_dir "$here/corpus$as"
        python evaluate.py --queries_embeddings "$here/queries$as" --corpus_embeddings "$here/corpus$as" \
            --qrels "$data"/qrels/test*.tsv --metrics RR@10 nDCG@10 --depth 100 --output_dir "$here/evaluation$as"
    done
done

python -m bench.seeds "$out/{}-{}/evaluation$as" --base mlm --others "${objectives[@]}" --seeds "${seeds[@]}"
