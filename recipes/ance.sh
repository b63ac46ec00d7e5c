#!/usr/bin/env bash
# ANCE (arXiv 2007.00808, figure 1): a trainer, and a miner that finds new negatives with the trainer's newest
# checkpoint while the training runs.
#
#     bash recipes/ance.sh train|mine|both DATA MODEL OUT [flags for finetune_biencoder.py ...]
#
# train      fine-tunes MODEL on the newest generation in OUT/generations (there must be one); writes OUT/model
# mine       makes generations until the trainer is done: it encodes the corpus, the dev queries and a slice of the
#            training queries with the newest checkpoint, and mines negatives. MODEL itself makes the first generation,
#            with the text flags that stand after OUT: give the miner the same flags as the trainer
# both       makes the first generation, then runs the two at the same time on this machine
# DATA       corpus.*, queries.train.*, qrels.train.*, queries.dev.*, qrels.dev.*, as recipes/get_msmarco.sh leaves them
# OUT        all that the two share. They may run on other GPUs or other machines. To continue one that was stopped,
#            give the same command again. The trainer may skip generations, and may use one for a long time
# To try it in minutes, on generated texts, call `python -m recipes.tiny_data`, and then
#     STEPS=5 bash recipes/ance.sh both runs/tiny/msmarco runs/tiny/retriever runs/tiny/ance \
#         --loss triplet --passages_per_query 2 --max_steps 10
#
# LAUNCH     how scripts are started; TRAIN_LAUNCH and MINE_LAUNCH say it for each side. Without LAUNCH,
#            "accelerate launch" is used if there are GPUs or `accelerate config` was run, else
#            "python". The sides need different GPUs (--gpu_ids) and, with several GPUs each, different
#            ports (--main_process_port)
# STEPS      steps between two checkpoints for the miner, default 10000 (ANCE); do not give --save_every after OUT
# SLICES     number of slices of the training queries, one for each generation, default 5 (ANCE)
# DEPTH      ranks from which negatives are drawn, default 200 (ANCE); NEGATIVES: how many are drawn, default 20 (ANCE)
# POLL       seconds between two looks of the miner for a new checkpoint, default 30
#
# Deviations from the official code: no judged positive is a negative (the official code leaves out one of them); the
# negatives of a query are drawn anew for each visit, and its visits are spread over the epoch; a slice is every n-th
# judged query, whatever the number of processes.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
[ $# -ge 4 ] && [[ $1 =~ ^(train|mine|both)$ ]] || usage
role=$1 data=$(path "$2") model=$(model "$3") out=$(path "$4")
flags=("${@:5}")
ance_settings "$role"
corpus=$(first "$data"/corpus.* "$data"/collection.*)
queries=$(first "$data"/queries.train.*) qrels=$(first "$data"/qrels.train.*)
dev_queries=$(first "$data"/queries.dev.*) dev_qrels=$(first "$data"/qrels.dev.*)
need "${corpus:-$data/corpus.tsv}" "${queries:-$data/queries.train.tsv}" "${qrels:-$data/qrels.train.tsv}" \
    "${dev_queries:-$data/queries.dev.tsv}" "${dev_qrels:-$data/qrels.dev.tsv}"
generations=$out/generations
mkdir -p "$generations"

texts=() query=() passage=() # the text flags for encode.py; MODEL may state other values than the run's checkpoints
for ((at = 0; at < ${#flags[@]}; at++)); do
    flag=${flags[at]%%=*} value=${flags[at + 1]:-}
    if [[ ${flags[at]} = --*=* ]]; then value=${flags[at]#*=}; fi
    case $flag in
        --title | --query_prompt | --passage_prompt | --max_chunks | --max_characters) texts+=("$flag" "$value") ;;
        --max_query_length) query=(--max_length "$value") ;;
        --max_passage_length) passage=(--max_length "$value") ;;
    esac
done

train() {
    "${train_launch[@]}" finetune_biencoder.py --model "$model" --corpus "$corpus" --queries "$queries" \
        --train "$generations" --save_every "${STEPS:-10000}" --output_dir "$out/model" --resume "${flags[@]}"
}

over() { [ -f "$out/model/done" ]; }

tool() { python -m recipes.generations --generations "$generations" --work "$out/mining" --task "$@"; }

mine() { # [ROUNDS]: makes generations until the trainer is done, or ROUNDS of them; a killed miner continues here
    local rounds=${1:-0} work encode
    while ! over; do
        work=$(tool next --run "$out/model" --initial "$model" --queries "$queries" --qrels "$qrels" \
            --slices "${SLICES:-5}" --poll "${POLL:-30}")
        if [ -z "$work" ]; then break; fi
        encode=("${mine_launch[@]}" encode.py --model "$work/checkpoint" --override "${texts[@]}")
        "${encode[@]}" --input "$corpus" --kind passage "${passage[@]}" --output_dir "$work/corpus"
        if over; then break; fi
        "${encode[@]}" --input "$dev_queries" --kind query "${query[@]}" --output_dir "$work/dev"
        "${encode[@]}" --input "$work/queries.jsonl" --kind query "${query[@]}" --output_dir "$work/queries"
        "${mine_launch[@]}" evaluate.py --queries_embeddings "$work/dev" --corpus_embeddings "$work/corpus" \
            --qrels "$dev_qrels" --metrics RR@10 nDCG@10 Hole@10 --depth 100 --output_dir "$work/evaluation"
        "${mine_launch[@]}" mine_negatives.py --queries_embeddings "$work/queries" --corpus_embeddings "$work/corpus" \
            --corpus "$corpus" --qrels "$work/qrels.tsv" --depth "${DEPTH:-200}" \
            --num_negatives "${NEGATIVES:-20}" --sample uniform --output_dir "$work/negatives"
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
        set -m # each side and the processes it starts form a group, which ends when this script ends
        mine &
        miner=$!
        train &
        trainer=$!
        trap 'kill -- -$miner -$trainer 2>/dev/null || true' EXIT
        wait $trainer
        wait $miner || stop "the miner had failed, so the last negatives are old — see above, and give the command again"
        ;;
esac
