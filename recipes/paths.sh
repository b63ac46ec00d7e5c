# The recipes and bench/*.sh source this file first. It changes to the root of the repository, where their commands run,
# and it keeps relative paths relative to the folder where the user called the recipe. It cannot do that for flags that
# a recipe hands on to a script: give absolute paths there.
#   path FILE       prints FILE as an absolute path
#   model NAME      does the same for a model, which may also be a name on the hub or the word bm25
#   first FILE ...  prints the first of the files that is there; nothing if none is
#   need FILE ...   stops unless all of them are there
#   usage           prints the commands and arguments in the header of the recipe and stops
#   stop WORDS      prints one line, with the name of the recipe, and stops
#   setting NAME PATTERN MEANING   stops if the environment variable NAME has a value that is not of the pattern
#   whole NAME ...  stops unless these environment variables are whole numbers from 1 on, or have no value
#   ance_settings ROLE   checks those of recipes/ance.sh; sets the arrays train_launch, mine_launch
#   gpus            prints the number of GPUs of this machine, or of those in $CUDA_VISIBLE_DEVICES
#   launcher        prints how a script is started if LAUNCH has no value: "accelerate launch" as
#                   `accelerate config` configured it; without its file "accelerate launch" on all
#                   GPUs, with the values that it would else warn about; without a GPU "python"
#   launch          the array of words that start a script: $LAUNCH, by default those of `launcher`
# The environment variables MODEL and TEACHER are made absolute too.
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
path() { case $1 in /*) printf '%s\n' "$1" ;; *) printf '%s\n' "$caller/$1" ;; esac; }
model() { if [ "$1" != bm25 ] && [ -e "$caller/$1" ]; then path "$1"; else printf '%s\n' "$1"; fi; }
first() {
    local file
    for file in "$@"; do
        if [ -e "$file" ]; then printf '%s\n' "$file"; return; fi
    done
}
need() {
    local file
    for file in "$@"; do [ -e "$file" ] || stop "$file: no such file — see the lines on DATA in recipes/${0##*/}"; done
}
usage() {
    awk '/^#     bash / { on = 1 } on && /^#$/ { gaps++ } on && (gaps == 2 || !/^#/) { exit } on' \
        "$(path "$0")" >&2
    exit 1
}
stop() { printf '%s\n' "${0##*/}: $*" >&2; exit 1; }
setting() { [[ -z ${!1:-} || ${!1} =~ ^($2)$ ]] || stop "$1=${!1} — give $3"; }
whole() {
    local name
    for name in "$@"; do setting "$name" '[1-9][0-9]{0,8}' "a whole number from 1 to 999999999"; done
}
ance_settings() {
    whole STEPS SLICES DEPTH NEGATIVES
    setting POLL '[0-9]{1,4}(\.[0-9]+)?' "a number of seconds, from 0 to 9999"
    read -ra train_launch <<<"${TRAIN_LAUNCH:-${launch[*]}}"
    read -ra mine_launch <<<"${MINE_LAUNCH:-${launch[*]}}"
    if [ "$1" = both ] && [[ ${train_launch[*]} = *--multi_gpu* && ${train_launch[*]} = "${mine_launch[*]}" ]]; then
        stop "the trainer and the miner would use the same GPUs —" \
            "set TRAIN_LAUNCH and MINE_LAUNCH, as recipes/ance.sh explains"
    fi
}
gpus() {
    local listed
    listed=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    if [ "$listed" != 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+x}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cvE '^ *(-1)?$' || true
    else
        echo "$listed"
    fi
}
launcher() {
    local cache=${HF_HOME:-${XDG_CACHE_HOME:-~/.cache}/huggingface} # where Accelerate looks
    local processes
    if [ -f "${cache/#\~/$HOME}/accelerate/default_config.yaml" ]; then echo accelerate launch; return; fi
    processes=$(gpus)
    if [ "$processes" = 0 ]; then echo python; return; fi
    echo accelerate launch $([ "$processes" = 1 ] || echo --multi_gpu) --num_processes "$processes" \
        --num_machines 1 --mixed_precision "${ACCELERATE_MIXED_PRECISION:-no}" --dynamo_backend no
}
read -ra launch <<<"${LAUNCH:-$(launcher)}"
for name in MODEL TEACHER; do
    [ -z "${!name:-}" ] || export "$name=$(model "${!name}")"
done
