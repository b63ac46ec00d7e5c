# Other scripts source this file in the root of the repository and call `setup [MORE_REQUIREMENTS...]`. It puts a Python
# with all required packages first in PATH: that of the active virtual or conda environment, or of .venv, which it makes
# here if no environment is active. It installs requirements.txt if there is a GPU, else requirements-cpu.txt, and says
# which. It leaves a stamp in the environment, so that later calls return at once. It sets DEVICE to gpu or cpu.

setup() {
    local recent='import sys; sys.exit(sys.version_info < (3, 10))'
    local active='import os, sys; sys.exit(sys.prefix == sys.base_prefix and not os.environ.get("CONDA_PREFIX"))'
    local base stamp torch files
    if python -c "$active" 2>/dev/null; then
        python -c "$recent" ||
            stop "the Python of the active environment is older than 3.10 — leave it (deactivate) or renew it"
    else
        if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
            for base in python3 python python3.13 python3.12 python3.11 python3.10 ""; do
                [ -n "$base" ] ||
                    stop "there is no Python >= 3.10 in PATH — install one, or activate an environment that has one"
                if "$base" -c "$recent" 2>/dev/null; then break; fi
            done
            echo "setup: making .venv with $("$base" --version)"
            "$base" -m venv --clear .venv ||
                stop "this Python cannot make virtual environments — install its venv module (Debian: python3-venv)" \
                    "or activate an environment"
        fi
        export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
    fi

    DEVICE=cpu files=(requirements-cpu.txt "$@")
    if nvidia-smi -L 2>/dev/null | grep -q GPU; then DEVICE=gpu files=(requirements.txt "$@"); fi
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
        # The torch of PyPI for Linux brings gigabytes of CUDA; PyTorch's own index has the same version for the CPU. If
        # that index cannot be reached, this costs two short tries, and pip uses its own sources.
        torch=$(grep -o '^torch==[0-9.]*' requirements-common.txt)
        python -m pip install -q --no-deps --retries 1 --timeout 10 --index-url https://download.pytorch.org/whl/cpu \
            "$torch" >/dev/null 2>&1 ||
            echo "setup: PyTorch's index of CPU builds does not answer; pip installs $torch from its own sources"
    fi
    python -m pip install -q --disable-pip-version-check "${files[@]/#/-r}" ||
        stop "pip could not install ${files[*]} — its message is above; give the same command to try again"
    touch "$stamp"
}

stop() {
    echo "setup: $*" >&2
    exit 1
}
