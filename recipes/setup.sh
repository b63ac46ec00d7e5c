# Sourced from the root of the repository; then `setup [MORE_REQUIREMENTS...]` puts a Python with all we need first in PATH.
# It uses the virtual or conda environment that is active, else makes .venv here; installs requirements.txt if a GPU is
# there, else requirements-cpu.txt, and says which. A stamp in the environment lets later calls pass at once.
# Leaves DEVICE = gpu | cpu.

setup() {
    local recent='import sys; sys.exit(sys.version_info < (3, 10))'
    local active='import os, sys; sys.exit(sys.prefix == sys.base_prefix and not os.environ.get("CONDA_PREFIX"))'
    local base stamp torch files
    if python -c "$active" 2>/dev/null; then
        python -c "$recent" || stop "the active environment's Python is older than 3.10 — leave it (deactivate) or renew it"
    else
        if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
            for base in python3 python python3.13 python3.12 python3.11 python3.10 ""; do
                [ -n "$base" ] || stop "no Python >= 3.10 in PATH — install one, or activate an environment that has one"
                if "$base" -c "$recent" 2>/dev/null; then break; fi
            done
            echo "setup: making .venv with $("$base" --version)"
            "$base" -m venv --clear .venv || stop "this Python makes no virtual environments — install its venv module" \
                "(Debian: python3-venv), or activate an environment"
        fi
        export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
    fi

    if nvidia-smi -L 2>/dev/null | grep -q GPU; then DEVICE=gpu files=(requirements.txt "$@"); else DEVICE=cpu files=(requirements-cpu.txt "$@"); fi
    stamp=$(python -c 'import hashlib, pathlib, sys
digest = hashlib.sha256(b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])).hexdigest()
print(pathlib.Path(sys.prefix, f".isthmus-{digest[:16]}"))' requirements-common.txt "${files[@]}")
    if [ -f "$stamp" ]; then
        echo "setup: ${files[*]} ($DEVICE): installed in ${stamp%/*}"
        return
    fi
    echo "setup: installing ${files[*]} ($DEVICE) into ${stamp%/*}"
    python -m pip --version >/dev/null 2>&1 || python -m ensurepip >/dev/null
    if [ "$DEVICE" = cpu ] && [ "$(uname)" = Linux ]; then
        # PyPI's torch for Linux brings gigabytes of CUDA; PyTorch's own index has the same version for the CPU. Where it
        # cannot be reached, two short tries are all it costs, and pip's own sources are asked.
        torch=$(grep -o '^torch==[0-9.]*' requirements-common.txt)
        python -m pip install -q --no-deps --retries 1 --timeout 10 --index-url https://download.pytorch.org/whl/cpu \
            "$torch" >/dev/null 2>&1 || echo "setup: no answer from PyTorch's index of CPU builds; $torch as pip is configured"
    fi
    python -m pip install -q --disable-pip-version-check "${files[@]/#/-r}" ||
        stop "pip could not install ${files[*]} — its message is above; the same command tries again"
    touch "$stamp"
}

stop() {
    echo "setup: $*" >&2
    exit 1
}
