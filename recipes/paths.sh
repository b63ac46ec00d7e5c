# The recipes and bench/*.sh source this file first. It changes to the root of the repository, where their commands run,
# and it keeps relative paths relative to the folder where the user called the recipe. It cannot do that for flags that
# a recipe hands on to a script: give absolute paths there.
#   path FILE    prints FILE as an absolute path
#   model NAME   does the same for a model, which may also be a name on the hub or the word bm25
#   usage A,B    prints the lines A to B of the recipe and stops
#   launch       the array of words that start a script: $LAUNCH, by default "accelerate launch" as `accelerate config`
#                configured it
# The environment variables MODEL and TEACHER are made absolute too.
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
path() { case $1 in /*) printf '%s\n' "$1" ;; *) printf '%s\n' "$caller/$1" ;; esac; }
model() { if [ "$1" != bm25 ] && [ -e "$caller/$1" ]; then path "$1"; else printf '%s\n' "$1"; fi; }
read -ra launch <<<"${LAUNCH:-accelerate launch}"
usage() { sed -n "$1p" "$(path "$0")" >&2; exit 1; }
for name in MODEL TEACHER; do
    [ -z "${!name:-}" ] || export "$name=$(model "${!name}")"
done
