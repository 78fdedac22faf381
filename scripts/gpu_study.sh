#!/usr/bin/env bash
# scripts/gpu_study.sh WORK [SECONDS]: the runs behind docs/results/qad.md and dflash.md, on this machine's GPUs.
#
#   upcycle, pack -> continued training until experts differ -> QAD, its ablations, ModelOpt
#                 -> the target's own answers -> drafters, their ablations, peers, releases, benches
#
# Two lanes use a GPU each, or take turns on the only one; the teacher and the answers take both. A step that is done is not
# done again, and nothing starts that could not run before SECONDS are over, so the script may be called until it prints "all
# steps are done". Figures are in WORK/*.json after every arm; scripts/qad_report.py and scripts/dflash_report.py turn them
# into results.
# SOURCE (smollm2) is what is upcycled, MODULES (5500) how many Python modules of text are packed, TOKENIZER a folder with
# the source's tokenizer, so that packing need not wait.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bash scripts/gpu_study.sh WORK [SECONDS]" >&2; exit 2; }
work=$(realpath -m "$1") deadline=$(($(date +%s) + ${2:-36000}))
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
work=$(realpath -m --relative-base="$PWD" "$work") # the caller's folder; commands are recorded as short as they can be
case $work in *[[:space:]]*) echo "error: WORK $work has white space; choose another folder" >&2; exit 2 ;; esac
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

study="--teacher $work/teacher --data $work/packed.safetensors --short_steps 32 --long_steps 256"
answers="--target $work/qad-long/qad-long --prompts [$work/prompts.jsonl] --temperatures [0,0.7] --held_out_temperatures [0,0.7,1.0]
    --held_out 0.03 --max_prompt_length 255 --max_new_tokens 384 --batch_size 2048 --shard_prompts 2048
    --output_dir $work/answers"
drafters="--target $work/qad-long/qad-long --data $work/answers --raw $work/packed.safetensors"
diversify="--config recipes/qat/diversify.yaml --model $work/moe --dataset_name $work/packed.safetensors"
others='seed|quarter' # arms of lane B

qad_study() { # qad_study NAME GPU FLAGS...: arms of one lane -> WORK/NAME.json
    local name=$1 gpu=$2
    shift 2
    step "$name" $gpu $python scripts/qad_study.py $study --work "$work/$name" --out "$work/$name.json" \
        --seconds "$(left)" "$@"
}
drafter_study() {
    local name=$1 gpu=$2
    shift 2
    step "$name" $gpu $python scripts/dflash_study.py $drafters --work "$work/$name" --out "$work/$name.json" \
        --seconds "$(left)" "$@"
}
teacher() { # on all GPUs, which nothing else needs yet
    local launch=(-m mimo_qat qat) rows=32
    if [ "$gpus" -gt 1 ]; then
        launch=(-m accelerate.commands.launch --config_file recipes/accelerate/ddp.yaml -m mimo_qat.qat.train) rows=16
    fi
    step teacher - $python "${launch[@]}" $diversify --per_device_train_batch_size $rows --output_dir "$work/teacher"
}
answer() { # answer GPU PROCESS: that process's share of the prompts, which both GPUs answer
    step "answers-$2" $1 env RANK=$2 WORLD_SIZE=$((gpus > 1 ? 2 : 1)) LOCAL_RANK=0 $python -m mimo_qat generate-data $answers
}
release() { # release NAME DRAFTER GPU: the target with a drafter, decoded without, with chains and with trees
    step "release-$1" - $python -m mimo_qat convert --target "$work/qad-long/qad-long" --drafter "$2" --out "$work/release-$1" \
        --overwrite true &&
        step "bench-$1" $3 $python -m mimo_runtime bench "$work/release-$1" --prompts "$work/code.jsonl" --limit 12 \
            --max_new_tokens 192 --tree_budget 15 --cuda_graphs true --max_len 512 --output "$work/bench-$1.json"
}
prompts() { # what is asked for answers: read while the GPUs train -> WORK/prompts.jsonl
    step prompts - $python - "$work" "${TOKENIZER:-$work/moe}" <<'PYTHON'
import pathlib, sys
from mimo_qat.data import load_tokenizer, write_rows
from mimo_qat.distill.generate import GenerateDataConfig, read_prompts
work, sources = pathlib.Path(sys.argv[1]), ["functions", "prefixes", "reasoning", "questions"]
config = GenerateDataConfig(target=sys.argv[2], prompts=sources, output_dir="", limit=3000, max_prompt_length=255)
write_rows(work / "prompts.jsonl", [prompt.row for prompt in read_prompts(config, load_tokenizer(sys.argv[2]))[0]])
PYTHON
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
    teacher || return
    qad_study qad-main $1 --skip "$others|qad long"
    qad_study qad-times $1 --arms none --times
    await qad-long prompts || return
    answer $1 0
    [ "$gpus" -lt 2 ] || await answers-1 || return
    code_prompts
    drafter_study drafter-plain $1 --arms '^plain b8'
    release plain "$work/drafter-plain/plain-b8/dflash" $1
    step modelopt $1 $python scripts/compare_modelopt.py --model "$work/teacher" --data "$work/packed.safetensors" \
        --out "$work/modelopt.json" --steps 12 --batch 16 --learning_rate 1e-4
    step peers $1 $python scripts/compare_drafters.py --model "$work/qad-long/qad-long" --data "$work/packed.safetensors" \
        --out "$work/drafters.json" --block_sizes 16 --layouts packed --batch 16 --anchors 4096 --compile --cuda_graphs \
        --arms ours_adamw specforge speculators_eager speculators
    drafter_study drafter-short-b8 $1 --arms '^short b8'
    step parity $1 $python scripts/draft_parity.py "$work/release-plain" --prompts 4
}
lane_b() { # GPU
    [ -n "${TOKENIZER:-}" ] || await upcycle || return
    step pack - env TOKENIZERS_PARALLELISM=true $python -m mimo_qat pack --model "${TOKENIZER:-$work/moe}" \
        --dataset_name site-packages --limit "${MODULES:-5500}" --max_length 1024 --held_out 0.04 \
        --output "$work/packed.safetensors"
    prompts
    await teacher || return
    qad_study qad-long $1 --arms '^qad long$' || return
    [ "$gpus" -lt 2 ] || answer $1 1
    qad_study qad-others $1 --arms "$others"
    await answers-0 code-prompts || return
    drafter_study drafter-best $1 --arms '^best b16'
    release best "$work/drafter-best/best-b16/dflash" $1
    if [ -e "$work/done/release-best" ]; then
        step generate $1 $python scripts/compare_generate.py "$work/release-best" --reference "$work/qad-long/qad-long" \
            --prompts "$work/code.jsonl" --cuda_graphs --out "$work/generate.json"
        step lossless $1 $python scripts/lossless.py "$work/release-best" --prompts "$work/code.jsonl" --limit 50 \
            --max_new_tokens 256 --dtype bfloat16 --cuda_graphs --out "$work/lossless.json"
    fi
    drafter_study drafter-short-b16 $1 --arms '^short b16'
}

lane_a 0 &
lane_b $((gpus > 1)) &
wait
all="upcycle pack prompts teacher qad-main qad-long qad-others answers-0 code-prompts drafter-plain drafter-best release-plain bench-plain
    release-best bench-best generate lossless drafter-short-b8 drafter-short-b16 parity modelopt peers qad-times"
[ "$gpus" -lt 2 ] || all+=" answers-1"
missing=$(for name in $all; do [ -e "$work/done/$name" ] || echo -n " $name"; done)
for name in $all; do [ -e "$work/done/$name" ] && echo "$name: $(cat "$work/done/$name")"; done
[ -z "$missing" ] && echo "all steps are done" || { echo "not done:$missing"; exit 1; }
