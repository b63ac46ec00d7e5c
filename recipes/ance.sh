#!/usr/bin/env bash
# ANCE (arXiv 2007.00808, figure 1): a trainer, and a miner that at the same time makes new negatives with its newest checkpoint.
#
#     bash recipes/ance.sh train|mine|both DATA MODEL OUT [flags for finetune_biencoder.py ...]
#
# train      fine-tunes MODEL on the newest negatives in OUT/generations (there must be one)       OUT/model, `done` last
# mine       newest checkpoint -> vectors of the corpus, of the dev queries and of a slice of the training queries -> negatives ->
#            a generation, until the trainer is done. The first is MODEL's own, with texts as the flags say: give them here too
# both       the first generation, then the two side by side on this machine
#
# DATA       corpus.*, queries.train.*, qrels.train.*, queries.dev.*, qrels.dev.* as recipes/get_msmarco.sh leaves them
# The two share OUT and nothing else: run them on other GPUs or machines, kill either and start it again by the same command; several
# generations may be skipped, or used for long.
#
# LAUNCH     how scripts are started, default "accelerate launch"; TRAIN_LAUNCH and MINE_LAUNCH for either side, which need different
#            GPUs (--gpu_ids) and, if each has several, different ports (--main_process_port)
# STEPS      between checkpoints for the miner, default 10000 (ANCE); flags after OUT may not have --save_every
# SLICES     of the training queries, one per generation, default 5 (ANCE); DEPTH 200 and NEGATIVES 20 (ANCE): 20 drawn from the
#            first 200; POLL 30 seconds
#
# Deviations from the official code: all judged positives are left out of the negatives (theirs: one); negatives of a query are drawn
# anew for each visit, and its visits are spread over the epoch; a slice is every n-th judged query, whatever the process count.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
[ $# -ge 4 ] && [[ $1 =~ ^(train|mine|both)$ ]] || usage 4,12
role=$1 data=$(path "$2") model=$(model "$3") out=$(path "$4")
flags=("${@:5}")
read -ra train_launch <<<"${TRAIN_LAUNCH:-${LAUNCH:-accelerate launch}}"
read -ra mine_launch <<<"${MINE_LAUNCH:-${LAUNCH:-accelerate launch}}"
file() { # NAME ...: the first DATA/NAME.* that is there
    local found
    for found in "${@/#/$data/}"; do
        found=$(compgen -G "$found.*" | head -1) || continue
        echo "$found"
        return
    done
    echo "ance: $data has no $1.* — DATA is what recipes/get_msmarco.sh fetches" >&2
    return 1
}
corpus=$(file corpus collection)
queries=$(file queries.train)
qrels=$(file qrels.train)
dev_queries=$(file queries.dev)
dev_qrels=$(file qrels.dev)
generations=$out/generations
mkdir -p "$generations"

texts=() query=() passage=() # how the run's checkpoints will have their texts; MODEL may state otherwise
for ((at = 0; at < ${#flags[@]}; at++)); do
    case ${flags[at]} in
        --title | --query_prompt | --passage_prompt | --max_chunks | --max_characters) texts+=("${flags[@]:at:2}") ;;
        --max_query_length) query=(--max_length "${flags[at + 1]}") ;;
        --max_passage_length) passage=(--max_length "${flags[at + 1]}") ;;
    esac
done

train() {
    "${train_launch[@]}" finetune_biencoder.py --model "$model" --corpus "$corpus" --queries "$queries" --qrels "$qrels" \
        --negatives_dir "$generations" --save_every "${STEPS:-10000}" --keep_checkpoints 2 --output_dir "$out/model" --resume "${flags[@]}"
}

over() { [ -f "$out/model/done" ]; }

tool() { python -m recipes.generations --negatives_dir "$generations" --work "$out/mining" --task "$@"; }

mine() { # [ROUNDS]: generations until the trainer is done, or so many; after a kill it goes on where it stopped
    local rounds=${1:-0} work encode
    while ! over; do
        work=$(tool next --run "$out/model" --initial "$model" --queries "$queries" --qrels "$qrels" --slices "${SLICES:-5}" --poll "${POLL:-30}")
        if [ -z "$work" ]; then break; fi
        encode=("${mine_launch[@]}" encode.py --model "$work/checkpoint" --override "${texts[@]}")
        "${encode[@]}" --input "$corpus" --kind passage "${passage[@]}" --output_dir "$work/corpus"
        if over; then break; fi
        "${encode[@]}" --input "$dev_queries" --kind query "${query[@]}" --output_dir "$work/dev"
        "${encode[@]}" --input "$work/queries.jsonl" --kind query "${query[@]}" --output_dir "$work/queries"
        "${mine_launch[@]}" evaluate.py --queries_embeddings "$work/dev" --corpus_embeddings "$work/corpus" --qrels "$dev_qrels" \
            --metrics RR@10 nDCG@10 Hole@10 --depth 100 --output_dir "$work/evaluation"
        "${mine_launch[@]}" mine_negatives.py --queries_embeddings "$work/queries" --corpus_embeddings "$work/corpus" --corpus "$corpus" \
            --qrels "$work/qrels.tsv" --depth "${DEPTH:-200}" --num_negatives "${NEGATIVES:-20}" --sample uniform \
            --output_dir "$work/negatives"
        tool publish
        rounds=$((rounds - 1))
        if [ $rounds = 0 ]; then break; fi
    done
    if over; then rm -rf "$out/mining"; fi
}

case $role in
    train) train ;;
    mine) mine ;;
    both)
        if ! ls "$generations"/generation-*/manifest.json >/dev/null 2>&1; then mine 1; fi
        set -m # each side and what it starts are a group, which ends with this script
        mine &
        miner=$!
        train &
        trainer=$!
        trap 'kill -- -$miner -$trainer 2>/dev/null || true' EXIT
        wait $trainer
        wait $miner || { echo "ance: the miner had stopped, so the last negatives are old: see above" >&2; exit 1; }
        ;;
esac
