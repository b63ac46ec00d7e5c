# The recipes of published pipelines source this file, after they have set corpus= and out=. It makes the folder $out,
# and sets
#   from      the flags that name the model to pre-train: $MODEL, by default bert-base-uncased
#   teacher   the model that a cross-encoder starts from: $TEACHER, by default bert-base-uncased
#   short     flags for the end of each training command: empty, except with SCALE=tiny
#   few       the same for recipes/train_cross_encoder.py
# SCALE=tiny trains a small BERT with a vocabulary of its own for two steps. It tests that the stages fit together, for
# example on the data of recipes/tiny_data.py. The cross-encoder starts from this BERT, and so does a recipe that calls
# `start MODEL`: it sets model to MODEL, or to this BERT.
setting SCALE tiny "tiny, or no value for the published size"
mkdir -p "$out"
from=(--model "${MODEL:-bert-base-uncased}") teacher=${TEACHER:-bert-base-uncased} short=() few=()
if [ "${SCALE:-}" = tiny ]; then
    echo "SCALE=tiny: a test that the stages fit together, with two steps each; its numbers mean nothing"
    python -m recipes.train_tokenizer --corpus "$corpus" --vocab_size 1000 --output_dir "$out/tokenizer"
    cat >"$out/bert.json" <<'END'
{"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
END
    from=(--model_config "$out/bert.json" --tokenizer "$out/tokenizer") teacher=$out/pretrained
    short=(--max_steps 2 --per_device_batch_size 4 --num_workers 0) few=(--max_steps 2 --per_device_batch_size 4)
fi
start() {
    model=$1
    [ "${SCALE:-}" = tiny ] || return 0
    model=$out/pretrained
    python pretrain_mae.py --objective mlm "${from[@]}" --corpus "$corpus" --output_dir "$model" --resume "${short[@]}"
}
