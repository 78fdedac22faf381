#!/usr/bin/env bash
# scripts/test.sh [PYTEST ARGUMENTS]: sets everything up and runs lint, types and all tests that need no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
# Tiny models: a second thread only waits at barriers, and on a busy machine it waits long.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
fi
# Half of the time goes into processes that tests start and wait for, so two at a time; a file stays in one process.
workers=$(env -u OMP_NUM_THREADS nproc)
.venv/bin/python -m pytest -q --numprocesses $((workers < 4 ? workers : 4)) --dist loadfile "$@"
