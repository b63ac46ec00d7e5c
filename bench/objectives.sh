#!/usr/bin/env bash
# Does the bottleneck help? Every objective against MLM: the same initial weights, steps and batch, the same fine-tuning.
#
#     bash bench/objectives.sh DATA OUT [flags for every call of pretrain_mae.py ...]
#
# DATA         BEIR layout: corpus.jsonl[.gz], queries.jsonl[.gz], qrels/train.tsv, qrels/test*.tsv
# OUT          call it again to go on where it stopped
# OBJECTIVES   default: all         SEEDS   default: 0 1
# PRETRAIN, FINETUNE   optimizer steps, default 300 and 100        RATE     the learning rate of both, default 5e-4
# MODEL        start from this checkpoint; default: a fresh BERT of two layers of 256 with a vocabulary of its own
#
# Where `probe_rebuild` stays at its floor of 0.05, pre-training was too short to say anything: a fresh BERT needs thousands of steps.
# coCondenser has half as many documents as the others have blocks, of two spans each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { sed -n '4,10p' "$0" >&2; exit 1; }
data=$1 out=$2
flags=("${@:3}")
corpus=$(ls "$data"/corpus.jsonl* | head -1) queries=$(ls "$data"/queries.jsonl* | head -1)
read -ra objectives <<<"${OBJECTIVES:-mlm retromae dupmae lexmae seed condenser cocondenser}"
read -ra seeds <<<"${SEEDS:-0 1}"
mkdir -p "$out"
start=(--model "${MODEL:-}")
if [ -z "${MODEL:-}" ]; then
    start=(--model_config "$out/bert.json" --tokenizer "$out/tokenizer")
    python -m recipes.train_tokenizer --corpus "$corpus" --vocab_size 12000 --output_dir "$out/tokenizer"
fi
echo '{"model_type": "bert", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}' >"$out/bert.json"
python mine_negatives.py --bm25 --corpus "$corpus" --queries "$queries" --qrels "$data/qrels/train.tsv" --depth 50 \
    --output_dir "$out/negatives"

for seed in "${seeds[@]}"; do
    for objective in "${objectives[@]}"; do
        here=$out/$objective-$seed
        shape=(--per_device_batch_size 32)
        [ "$objective" != cocondenser ] || shape=(--per_device_batch_size 16 --spans cocondenser)
        python pretrain_mae.py --objective "$objective" "${start[@]}" --corpus "$corpus" --max_length 128 \
            --max_steps "${PRETRAIN:-300}" --learning_rate "${RATE:-5e-4}" "${shape[@]}" --seed "$seed" --probe_every 100 \
            --output_dir "$here/pretrained" --resume "${flags[@]}"
        python finetune_biencoder.py --model "$here/pretrained" --corpus "$corpus" --queries "$queries" \
            --qrels "$data/qrels/train.tsv" --negatives "$out/negatives/negatives.tsv" --passages_per_query 2 \
            --per_device_batch_size 64 --max_steps "${FINETUNE:-100}" --learning_rate "${RATE:-5e-4}" --pooling cls --normalize \
            --temperature 0.05 --max_query_length 32 --max_passage_length 128 --seed "$seed" --output_dir "$here/model" --resume
        python encode.py --model "$here/model" --input "$queries" --kind query --output_dir "$here/queries"
        python encode.py --model "$here/model" --input "$corpus" --kind passage --output_dir "$here/corpus"
        compare=()
        [ "$objective" = mlm ] || [ ! -d "$out/mlm-$seed/evaluation" ] || compare=(--compare "$out/mlm-$seed/evaluation/run.trec")
        python evaluate.py --queries_embeddings "$here/queries" --corpus_embeddings "$here/corpus" \
            --qrels "$data"/qrels/test*.tsv --metrics RR@10 nDCG@10 --depth 100 "${compare[@]}" --output_dir "$here/evaluation"
    done
done

python - "$out" <<'END'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
print(f"\n{'objective':<14}{'seed':>5}  {'split':<16}{'RR@10':>8}{'nDCG@10':>9}   RR@10 less that of mlm (95 %, p)")
for path in sorted(out.glob("*/evaluation/metrics.json")):
    name, _, seed = path.parts[-3].rpartition("-")
    for split, found in json.loads(path.read_text())["splits"].items():
        m, versus = found["metrics"], found.get("compare", {}).get("RR@10")
        beside = f"{versus['difference']:+.4f} ({versus['interval'][0]:+.4f} to {versus['interval'][1]:+.4f}, p {versus['p']:.3f})" if versus else ""
        print(f"{name:<14}{seed:>5}  {split:<16}{m['RR@10']:>8.4f}{m['nDCG@10']:>9.4f}   {beside}")
END
