#!/usr/bin/env bash
# scripts/node_check.sh RELEASE [--reference FOLDER] [--out FOLDER] [--quick] [-- FLAGS OF mimo-runtime bench]
#
# Are a release's speed, acceptance and quality on this node what was published? Environment, `mimo-qat check`,
# `mimo-runtime bench` on the bundled code, reasoning and chat prompts, `mimo-runtime quality` where the unquantised
# reference is given; then a table with a verdict for each claim, and one JSON document last. Exits with 1 where a step
# failed, not where a claim is not reached. Uses $PYTHON if it is set, else .venv, which it makes. Works on a CPU, too,
# slowly: --quick takes 6 prompts and 32 tokens each.
set -uo pipefail
usage="usage: bash scripts/node_check.sh RELEASE [--reference FOLDER] [--out FOLDER] [--quick] [-- BENCH FLAGS]"
release="" reference="" out=runs/node-check bench=(--max_new_tokens 256) quality=()
while [ $# -gt 0 ]; do
    case $1 in
        --reference) reference=${2:?$usage}; shift 2 ;;
        --out) out=${2:?$usage}; shift 2 ;;
        --quick) bench=(--limit 6 --max_new_tokens 32) quality=(--windows 4 --length 64); shift ;;
        --) shift; bench+=("$@"); break ;;
        -*) echo "$usage" >&2; exit 2 ;;
        *) [ -z "$release" ] || { echo "$usage" >&2; exit 2; }; release=$1; shift ;;
    esac
done
[ -n "$release" ] || { echo "$usage" >&2; exit 2; }
# Paths are the caller's; the commands run from the tree.
release=$(realpath -m "$release") reference=${reference:+$(realpath -m "$reference")} out=$(realpath -m "$out")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || bash scripts/setup.sh || exit 1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=.:kernels:runtime
mkdir -p "$out" || exit 1
rm -f "$out"/{env,check,bench,quality}.{command,log}

# step NAME COMMAND...: runs a command and keeps all that it prints; the next ones run even where it fails.
step() {
    local name=$1
    shift
    printf '%q ' "$@" > "$out/$name.command"
    echo "== $name: $*"
    "$python" -m "${1//-/_}" "${@:2}" 2>&1 | tee "$out/$name.log" | sed '/^{/d'  # the document goes into the last one
}

step env mimo-qat env
step check mimo-qat check "$release"
step bench mimo-runtime bench "$release" "${bench[@]}"
[ -z "$reference" ] || step quality mimo-runtime quality "$release" --reference "$reference" "${quality[@]}"
echo
exec "$python" -m mimo_runtime.verdict --folder "$out"
