#!/usr/bin/env bash
# Group-robust training against plain training at equal steps, over three seeds, on every group's own queries.
#
#     bash bench/groups.sh DATA MODEL OUT [flags for finetune_biencoder.py ...]
#
# DATA   corpus.jsonl; queries.train.jsonl, qrels.train.tsv and clusters.tsv (`qid TAB cluster`); queries.test.jsonl, and a
#        qrels.NAME.tsv for each group's test queries
# DRO    flags of the robust run, default "--dro"; SEEDS default "0 1 2"
# Each model re-ranks the first 20 passages of BM25. Printed for every group: MRR@10 of both, means over the seeds, and their difference
# with a bootstrap interval over queries, each of which counts with the mean over its seeds.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../recipes/paths.sh"
[ $# -ge 3 ] || usage
data=$(path "$1") model=$(model "$2") out=$(path "$3") flags=("${@:4}")
read -ra robust <<<"${DRO:---dro}"
texts=(--corpus "$data/corpus.jsonl") train=(--queries "$data/queries.train.jsonl" --qrels "$data/qrels.train.tsv")
tests=() 
for file in "$data"/qrels.*.tsv; do if [ "$file" != "$data/qrels.train.tsv" ]; then tests+=("$file"); fi; done
python mine_negatives.py --bm25 "${texts[@]}" "${train[@]}" --depth 30 --bm25_index "$out/index" --output_dir "$out/negatives"
python evaluate.py --bm25 "${texts[@]}" --queries "$data/queries.test.jsonl" --qrels "${tests[@]}" --depth 20 --metrics RR@10 R@20 \
    --bm25_index "$out/index" --output_dir "$out/candidates"
awk 'NR == FNR { listed[$3]; next } match($0, /"_id": "[^"]*"/) && substr($0, RSTART + 8, RLENGTH - 9) in listed' \
    "$out/candidates/run.trec" "$data/corpus.jsonl" >"$out/candidates.jsonl"
python - "$out/negatives/train.jsonl" "$data/clusters.tsv" "$out/train.jsonl" <<'END'
import sys
from lib.files import lines, read_training_file, write_training_file
mined, clusters, output = sys.argv[1:]
of = dict(line.split("\t") for _, line in lines(clusters))
rows = (row._replace(cluster=int(of[row.qid])) for _, row in read_training_file(mined))
write_training_file(output, rows)
END
for seed in ${SEEDS:-0 1 2}; do
    for kind in plain robust; do
        here=$out/$kind-$seed more=()
        if [ $kind = robust ]; then more=("${robust[@]}"); fi
        python finetune_biencoder.py --model "$model" "${texts[@]}" --queries "$data/queries.train.jsonl" \
            --train "$out/train.jsonl" --passages_per_query 2 --negatives_depth 30 --loss triplet --seed $seed "${flags[@]}" "${more[@]}" --output_dir "$here" --resume
        python encode.py --model "$here" --input "$out/candidates.jsonl" --kind passage --output_dir "$here-corpus"
        python encode.py --model "$here" --input "$data/queries.test.jsonl" --kind query --output_dir "$here-queries"
        python evaluate.py --queries_embeddings "$here-queries" --corpus_embeddings "$here-corpus" --candidates "$out/candidates/run.trec" \
            --allow_unknown --qrels "${tests[@]}" --metrics RR@10 --depth 20 --output_dir "$here-evaluation"
    done
done
python -m bench.seeds "$out/{}-{}-evaluation" --base plain --others robust --seeds ${SEEDS:-0 1 2}
