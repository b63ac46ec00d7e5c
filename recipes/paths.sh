# Sourced first by the recipes and by bench/*.sh: goes to the root of the repository, where their commands run, and keeps
# the paths that the caller gave (flags handed on to a script excepted: give absolute paths there).
#   path FILE    FILE from the caller's folder
#   model NAME   the same for a model, which may also be a name of the hub, or bm25; MODEL and TEACHER are changed so here
#   usage A,B    show these lines of the script and stop
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
path() { case $1 in /*) printf '%s\n' "$1" ;; *) printf '%s\n' "$caller/$1" ;; esac; }
model() { if [ "$1" != bm25 ] && [ -e "$caller/$1" ]; then path "$1"; else printf '%s\n' "$1"; fi; }
usage() { sed -n "$1p" "$(path "$0")" >&2; exit 1; }
for name in MODEL TEACHER; do
    [ -z "${!name:-}" ] || export "$name=$(model "${!name}")"
done
