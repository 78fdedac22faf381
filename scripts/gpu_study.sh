#!/usr/bin/env bash
# scripts/gpu_study.sh WORK [SECONDS]: the runs behind docs/results/qad.md and dflash.md, on this machine's GPUs.
#
#   upcycle, pack -> continued training until experts differ -> QAD, its ablations, ModelOpt
#                 -> the target's own answers -> drafters, their ablations, peers, releases, benches
#
# Two lanes use a GPU each, or take turns on the only one. A step that is done is not done again, and nothing starts that
# could not run before SECONDS are over, so the script may be called until it prints "all steps are done". Figures are in
# WORK/*.json after every arm; scripts/qad_report.py and scripts/dflash_report.py turn them into results.
# SOURCE (smollm2) is what is upcycled, MODULES (5500) how many Python modules of text are packed, TOKENIZER a folder with
# the source's tokenizer, so that packing need not wait.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bash scripts/gpu_study.sh WORK [SECONDS]" >&2; exit 2; }
work=$1 deadline=$(($(date +%s) + ${2:-36000}))
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH=.:kernels:runtime${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$gpus" -ge 1 ] || { echo "error: no GPU found; the study needs one or two" >&2; exit 1; }
mkdir -p "$work/done" "$work/logs"
left() { echo $((deadline - $(date +%s))); }

# step NAME GPU COMMAND...: once, alone on its GPU ("-" for none), within the time that is left; -> WORK/logs/NAME.log.
step() {
    local name=$1 gpu=$2 began lock=()
    shift 2
    [ -e "$work/done/$name" ] && return 0
    [ "$gpu" = - ] || lock=(flock "$work/gpu$gpu.lock" env "CUDA_VISIBLE_DEVICES=$gpu")
    [ "$(left)" -gt 20 ] || { echo "$(date +%T) $name: no time left"; return 1; }
    began=$(date +%s)
    echo "$(date +%T) $name"
    if timeout "$(left)" "${lock[@]}" "$@" > "$work/logs/$name.log" 2>&1; then
        echo "$(($(date +%s) - began)) s" > "$work/done/$name"
    else
        echo "$(date +%T) $name did not end: $(tr '\r' '\n' < "$work/logs/$name.log" | grep -v '^$' | tail -n 1 | cut -c1-200)"
        return 1
    fi
}
await() { # await NAME...: until those steps are done or the time is over
    local name
    for name in "$@"; do
        until [ -e "$work/done/$name" ]; do
            [ "$(left)" -gt 0 ] || return 1
            sleep 0.5
        done
    done
}

teacher="--teacher $work/teacher --data $work/packed.safetensors --short_steps 32 --long_steps 256"
answers="--target $work/target --prompts [functions,prefixes,reasoning,questions] --limit 3000 --temperatures [0,0.7]
    --held_out_temperatures [0,0.7,1.0] --held_out 0.03 --max_prompt_length 255 --max_new_tokens 384 --batch_size 2048
    --shard_prompts 1024 --output_dir $work/answers"
drafters="--target $work/target --data $work/answers --raw $work/packed.safetensors"
diversify="--config recipes/qat/diversify.yaml --model $work/moe --dataset_name $work/packed.safetensors"
ablations='rceil|lr x|floor|mse|bf16|kl \+|router|body|quarter|seed'

qad_study() { # qad_study NAME GPU FLAGS...: arms of one lane -> WORK/NAME.json
    local name=$1 gpu=$2
    shift 2
    step "$name" $gpu $python scripts/qad_study.py $teacher --work "$work/$name" --out "$work/$name.json" \
        --seconds "$(left)" "$@"
}
drafter_study() {
    local name=$1 gpu=$2
    shift 2
    step "$name" $gpu $python scripts/dflash_study.py $drafters --work "$work/$name" --out "$work/$name.json" \
        --seconds "$(left)" "$@"
}
release() { # release NAME DRAFTER GPU: the target with a drafter, decoded without, with chains and with trees
    step "release-$1" - $python -m mimo_qat convert --target "$work/target" --drafter "$2" --out "$work/release-$1" \
        --overwrite true &&
        step "bench-$1" $3 $python -m mimo_runtime bench "$work/release-$1" --prompts "$work/code.jsonl" --limit 12 \
            --max_new_tokens 192 --tree_budget 32 --cuda_graphs true --max_len 512 --output "$work/bench-$1.json"
}
code_prompts() { # questions for code that no drafter was trained on -> WORK/code.jsonl
    step code-prompts - $python - "$work" <<'PYTHON'
import pathlib, sys
from mimo_qat.data import read_rows, write_rows
work = pathlib.Path(sys.argv[1])
rows = [r for path in sorted(work.glob("answers/held_out-*.jsonl")) for r in read_rows(str(path))]
write_rows(work / "code.jsonl", [r for r in rows if "messages" in r and r["domain"] == "code" and r["temperature"] == 0])
PYTHON
}

lane_a() { # GPU
    step upcycle - $python -m mimo_qat upcycle --source "${SOURCE:-smollm2}" --experts 8 --output_dir "$work/moe"
    await pack || return
    step teacher $1 $python -m mimo_qat qat $diversify --output_dir "$work/teacher" || return
    qad_study qad-main $1 --arms '^(qad short|ce short)$' --times
    qad_study qad-ablations $1 --arms "$ablations"
    await answers || return
    drafter_study drafter-plain $1 --arms '^plain b8'
    release plain "$work/drafter-plain/plain-b8/dflash" $1 &&
        step parity $1 $python scripts/draft_parity.py "$work/release-plain" --prompts 4
    step modelopt $1 $python scripts/compare_modelopt.py --model "$work/teacher" --data "$work/packed.safetensors" \
        --out "$work/modelopt.json" --steps 12 --batch 16 --learning_rate 1e-4
    drafter_study drafter-short-b8 $1 --arms '^short b8'
}
lane_b() { # GPU
    [ -n "${TOKENIZER:-}" ] || await upcycle || return
    step pack - env TOKENIZERS_PARALLELISM=true $python -m mimo_qat pack --model "${TOKENIZER:-$work/moe}" \
        --dataset_name site-packages --limit "${MODULES:-5500}" --max_length 1024 --held_out 0.04 \
        --output "$work/packed.safetensors"
    await teacher || return
    qad_study qad-long $1 --arms '^qad long$' || return
    ln -sfn "$(cd "$work/qad-long/qad-long" && pwd)" "$work/target"
    step answers $1 $python -m mimo_qat generate-data $answers || return
    code_prompts
    drafter_study drafter-best $1 --arms '^best b16'
    release best "$work/drafter-best/best-b16/dflash" $1
    step peers $1 $python scripts/compare_drafters.py --model "$work/target" --data "$work/packed.safetensors" \
        --out "$work/drafters.json" --block_sizes 16 --arms ours_adamw specforge speculators \
        --steps 12 --warm_up 4 --compile
    drafter_study drafter-short-b16 $1 --arms '^short b16'
}

lane_a 0 &
lane_b $((gpus > 1)) &
wait
all="upcycle pack teacher qad-main qad-ablations qad-long answers code-prompts drafter-plain drafter-best release-plain
    bench-plain release-best bench-best parity modelopt peers drafter-short-b8 drafter-short-b16"
missing=$(for name in $all; do [ -e "$work/done/$name" ] || echo -n " $name"; done)
for name in $all; do [ -e "$work/done/$name" ] && echo "$name: $(cat "$work/done/$name")"; done
[ -z "$missing" ] && echo "all steps are done" || { echo "not done:$missing"; exit 1; }
