#!/usr/bin/env bash
# COCO-DR (arXiv 2210.15212), with the values of the authors' repository: contrastive pre-training on the target
# collections (recipes/coco_beir.sh), warm-up on the BM25 triples of MS MARCO, episodes of ANCE with iDRO over clusters
# of queries, evaluation on MS MARCO and, zero-shot, on the collections. Published nDCG@10 over BEIR (base): 0.461;
# 0.457 without iDRO, 0.447 without the pre-training on the collections, 0.435 after the warm-up, 0.288 before it.
#
#     bash recipes/coco_dr.sh FOLDER [DATA] [OUT]
#
# FOLDER         collections in BEIR layout, see recipes/coco_beir.sh
# DATA           folder that recipes/get_msmarco.sh --titles --triples filled; default data/msmarco
# OUT            default runs/coco_dr; to continue a stopped run, give the same command again. The vectors of an episode
#                take 15 GB, those of its evaluation 14 GB
# LAUNCH         how scripts are started; published: "accelerate launch --multi_gpu --num_processes
#                8 --mixed_precision fp16". Without LAUNCH, "accelerate launch" is used if there are
#                GPUs or `accelerate config` was run, else "python"
# MODEL          model that pre-training starts from; default Luyu/condenser
# EPISODES       default 3; the authors do not publish their number. The last one is evaluated; you can add more later
# EPISODE_STEPS  default 45000, as published
# CLUSTERS       default 50, as published; 5 with SCALE=tiny
# To try it in minutes, on generated texts, call `python -m recipes.tiny_data`, and then
#     SCALE=tiny bash recipes/coco_dr.sh runs/tiny/beir runs/tiny/msmarco runs/tiny/coco_dr
#
# Batch sizes are per process. Each episode continues the model of the one before, with new negatives, new clusters,
# equal weights of the clusters, and a new optimizer. Deviations, beside those of recipes/coco_beir.sh,
# recipes/cluster_queries.py and lib/dro.py:
#   1. The learning rate of an episode reaches zero at its end; the authors' rate would reach it at step 60,000.
#   2. The warm-up takes its three epochs (of 35 M triples, 17,089 steps each), and draws a negative for each visit of a
#      positive. The authors do not publish which checkpoint they continued. Their README has the rate 2e-4, their
#      script has 1e-4.
#   3. Each judged positive is an example, and one of its 30 negatives is drawn anew each time. The authors have one
#      positive per query, and take its negatives in five passes of six.
#   4. BEIR has 64 and 256 tokens throughout. The authors have 128 for passages except in three collections, and 128 for
#      the queries of ArguAna.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
[ $# -ge 1 ] || usage
folder=$(path "$1") data=$(path "${2:-data/msmarco}") out=$(path "${3:-runs/coco_dr}")
whole EPISODES EPISODE_STEPS
setting CLUSTERS '[2-9]|[1-9][0-9]{1,8}' "a whole number from 2 on"
setting BALANCE '[1-9][0-9]{0,8}(\.[0-9]+)?' "a number from 1 on"
steps=${EPISODE_STEPS:-45000}
K=${CLUSTERS:-$([ "${SCALE:-}" = tiny ] && echo 5 || echo 50)}
corpus=$data/corpus.tsv queries=$data/queries.train.tsv qrels=$data/qrels.train.tsv
need "$corpus" "$queries" "$qrels" "$data/triples.train.small.tsv"
. recipes/scale.sh
triplets=(--loss triplet --passages_per_query 2 --optimizer lamb --weight_decay 0)
dro=(--dro --dro_alpha 0.25 --dro_ema 0.1 --dro_rho 0.05 --dro_eps 0.01)

bash recipes/coco_beir.sh "$folder" "$out/coco"
python -m recipes.import_training_data --input "$data/triples.train.small.tsv" --output_dir "$out/triples"
"${launch[@]}" finetune_biencoder.py --model "$out/coco/pretrained" --pooling cls --title none \
    --corpus "$out/triples/corpus.jsonl" --queries "$out/triples/queries.jsonl" --train "$out/triples/train.jsonl" \
    "${triplets[@]}" --max_query_length 128 --max_passage_length 128 --per_device_batch_size 256 --learning_rate 2e-4 \
    --warmup_steps 1000 --max_steps 51267 --save_every 5000 --output_dir "$out/warm-up" --resume "${short[@]}"

model=$out/warm-up
for ((episode = 1; episode <= ${EPISODES:-3}; episode++)); do
    here=$out/episode-$episode
    encode=("${launch[@]}" encode.py --model "$model" --override)
    "${encode[@]}" --input "$corpus" --kind passage --max_length 256 --output_dir "$here/corpus"
    "${encode[@]}" --input "$queries" --kind query --max_length 64 --dtype float32 --output_dir "$here/queries"
    "${launch[@]}" mine_negatives.py --queries_embeddings "$here/queries" --corpus_embeddings "$here/corpus" \
        --corpus "$corpus" --qrels "$qrels" --depth 200 --num_negatives 30 --sample uniform \
        --output_dir "$here/negatives"
    python -m recipes.cluster_queries --train "$here/negatives/train.jsonl" --queries_embeddings "$here/queries" \
        --queries "$queries" --clusters "$K" --niter 500 --nredo 5 --output_dir "$here/clusters"
    rate=$(python -c 'import sys
episode, steps = map(int, sys.argv[1:])
print(5e-6 * max(0.2, 1 - (episode - 1) * steps / 300_000))' "$episode" "$steps")
    "${launch[@]}" finetune_biencoder.py --model "$model" --corpus "$corpus" --queries "$queries" \
        --train "$here/clusters/train.jsonl" "${triplets[@]}" "${dro[@]}" --max_query_length 64 \
        --max_passage_length 256 --per_device_batch_size 64 --learning_rate "$rate" --warmup_steps 3000 \
        --max_steps "$steps" --save_every 3000 --output_dir "$here/model" --resume "${short[@]}"
    model=$here/model
done

bash recipes/msmarco_eval.sh "$model" "$data" "$here/msmarco"
bash recipes/beir.sh "$model" "$folder" "$here/beir" --title space --override # the authors join title and text here
