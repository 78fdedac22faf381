#!/usr/bin/env bash
# scripts/release.sh TARGET DRAFTER OUT [ORG/NAME]: from trained folders to a release on the hub.
#
#   convert -> check (every weight, every checksum) -> quality against the target -> push, as a dry run unless PUSH=1
#
# DRAFTER may be "" for a release without one. Safe to run again: a step whose inputs did not change is not done again,
# a killed conversion or upload continues. What the steps printed stays in OUT.steps/.
#
#   PUSH=1 LICENSE=mit BASE_MODEL=XiaomiMiMo/MiMo-V2.5 bash scripts/release.sh qat drafter/dflash release org/name
#
# Environment: LICENSE and BASE_MODEL for the model card, REFERENCE (quality's reference, TARGET without it),
# CONVERT_ARGS, QUALITY_ARGS and PUSH_ARGS for more options of those commands, PYTHON for another interpreter.
set -euo pipefail
if [ $# -lt 3 ] || [ $# -gt 4 ]; then
    sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
target=$(realpath "$1") drafter=${2:+$(realpath "$2")} out=$(realpath -m "$3") repo=${4:-}
reference=$(realpath "${REFERENCE:-$target}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
export PYTHONPATH="$root:$root/kernels:$root/runtime" TOKENIZERS_PARALLELISM=false
steps=$out.steps
mkdir -p "$steps"

# state FILE: changes when FILE does; inputs: changes when a file of the sources does.
state() { stat -c '%Y %s' "$1" 2>/dev/null || true; }
inputs=$(find "$target" ${drafter:+"$drafter"} "$reference" -type f -printf '%p %s %T@\n' | sort | sha256sum)
extra=()

# step NAME COMMAND...: runs the command and `extra`, unless it ran before on the same inputs and OUT is what it was.
step() {
    local name=$1
    shift
    if [ "$(cat "$steps/$name.stamp" 2>/dev/null)" = "$* $inputs $(state "$out/conversion.json")" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name: $* ${extra[*]}"
    "$@" "${extra[@]}" | tee "$steps/$name.log"
    tail -n 1 "$steps/$name.log" > "$steps/$name.json"
    echo "$* $inputs $(state "$out/conversion.json")" > "$steps/$name.stamp"
    echo "$(state "$out/conversion.json")" > "$steps/ours"
}

# Only an OUT that this script made is replaced; convert refuses any other.
if [ -f "$out/conversion.json" ] && [ "$(cat "$steps/ours" 2>/dev/null)" = "$(state "$out/conversion.json")" ]; then
    extra=(--overwrite true)
fi
# shellcheck disable=SC2086  # the *_ARGS are lists of words
step convert "$python" -m mimo_qat convert --target "$target" --out "$out" ${drafter:+--drafter "$drafter"} \
    ${CONVERT_ARGS:-}
extra=()
step check "$python" -m mimo_qat check "$out" --samples -1
# shellcheck disable=SC2086
step quality "$python" -m mimo_runtime quality "$out" --reference "$reference" \
    --output "$steps/results.json" ${QUALITY_ARGS:-}

if [ -z "$repo" ]; then
    echo "== push: no ORG/NAME given; $out is complete"
    exit 0
fi
dry=true
[ "${PUSH:-0}" != 1 ] || dry=false
echo "== push: $repo$([ $dry = false ] || echo ' (dry run; PUSH=1 sends it)')"
# shellcheck disable=SC2086
"$python" -m mimo_qat push "$out" --repo "$repo" --dry_run $dry --samples 0 --results "[\"$steps/results.json\"]" \
    ${LICENSE:+--license "$LICENSE"} ${BASE_MODEL:+--base_model "$BASE_MODEL"} ${PUSH_ARGS:-} | tee "$steps/push.log"
