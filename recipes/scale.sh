# Sourced by the recipes of published pipelines, from the root of the repository, after corpus= and out= are set.
#   launch   how the scripts are started: $LAUNCH, default "accelerate launch" with what `accelerate config` says
#   from     the model that pre-training starts from: $MODEL, default bert-base-uncased
#   short    flags for the end of each training command; empty but for SCALE=tiny
# SCALE=tiny: two steps from a one-layer BERT of its own vocabulary; a test of the plumbing on a small collection.
read -ra launch <<<"${LAUNCH:-accelerate launch}"
from=(--model "${MODEL:-bert-base-uncased}") short=()
if [ "${SCALE:-}" = tiny ]; then
    python -m recipes.train_tokenizer --corpus "$corpus" --vocab_size 1000 --output_dir "$out/tokenizer"
    echo '{"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}' \
        >"$out/bert.json"
    from=(--model_config "$out/bert.json" --tokenizer "$out/tokenizer")
    short=(--max_steps 2 --per_device_batch_size 4 --num_workers 0)
fi
