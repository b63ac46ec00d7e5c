#!/usr/bin/env bash
# Run the tests: bash tests/run.sh [pytest arguments]. Sets up a Python first, as quickstart.sh does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. recipes/setup.sh
setup requirements-dev.txt

# no network; one thread each, since tests start several processes, and up to four tests at a time
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -q -n auto --maxprocesses 4 --dist worksteal "$@"
