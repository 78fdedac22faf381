#!/usr/bin/env bash
# scripts/demo.sh [--quick]: the whole path on real SmolLM2-135M weights, from nothing to a measured release.
#
#   upcycle -> QAD of the experts -> DFlash drafter -> FP4-DFlash checkpoint -> runtime: quality and speed
#
# Sets up .venv by itself, uses a GPU if torch sees one, and ends with runs/demo/report.{md,json,png}. A step that is
# done is not done again; a killed one continues. Delete runs/demo (or runs/demo-quick) to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=runs/demo recipe=demo prompts=256 new_tokens=80 windows=12 bench_prompts=10 bench_tokens=64
if [ "${1:-}" = --quick ]; then
    out=runs/demo-quick recipe=demo-quick prompts=24 new_tokens=48 windows=4 bench_prompts=2 bench_tokens=24
elif [ $# -gt 0 ]; then
    echo "usage: bash scripts/demo.sh [--quick]" >&2
    exit 2
fi

mkdir -p $out/steps
started=$(date +%s)
bash scripts/setup.sh report,source
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=.:kernels:runtime
python=.venv/bin/python

# step NAME COMMAND...: runs the command, keeps its last line (one JSON document) and its seconds; skips what is done.
step() {
    local name=$1 began
    shift
    if [ -s $out/steps/$name.json ] && [ "$(cat $out/steps/$name.command)" = "$*" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name: $*"
    rm -f $out/steps/$name.json
    echo "$*" > $out/steps/$name.command
    began=$(date +%s)
    "$@" | tee $out/steps/$name.log
    tail -n 1 $out/steps/$name.log > $out/steps/$name.json.tmp
    echo $(($(date +%s) - began)) > $out/steps/$name.seconds
    mv $out/steps/$name.json.tmp $out/steps/$name.json
}

mimo-qat() { $python -m mimo_qat "$@"; }
mimo-runtime() { $python -m mimo_runtime "$@"; }

[ -s $out/steps/upcycle.json ] || rm -rf $out/moe
step upcycle mimo-qat upcycle --output_dir $out/moe
step qad mimo-qat qat --config recipes/qat/$recipe.yaml --model $out/moe --output_dir $out/qat
step answer mimo-qat generate-data --target $out/qat --prompts "[stdlib]" --output_dir $out/answers --limit $prompts \
    --temperatures "[0]" --held_out 0.1 --max_new_tokens $new_tokens --batch_size 64
step distill mimo-qat distill --config recipes/distill/$recipe.yaml --target $out/qat --data $out/answers \
    --output_dir $out/drafter
step convert mimo-qat convert --target $out/qat --drafter $out/drafter/dflash --out $out/release --overwrite true
step check mimo-qat check $out/release
step quality mimo-runtime quality $out/release --reference $out/moe --text $out/qat/held_out.jsonl --windows $windows
# The answers hold out the same prompts: the split is a hash of the prompt, so these are new to both trainings.
step bench mimo-runtime bench $out/release --prompts $out/qat/held_out.jsonl --limit $bench_prompts \
    --max_new_tokens $bench_tokens
$python scripts/report.py $out --seconds $(($(date +%s) - started))
