#!/usr/bin/env bash
# scripts/gpu_check.sh OUT [SECONDS]: every test and every bench that needs a GPU, on this machine's GPUs.
#
#   tests (kernels, rounds, synthetic models, launch modes) -> kernels against their roofline -> a slice of both published
#   geometries, one rank's share on one GPU -> contexts of 32K and 256K without their prefill -> 10,000 rounds, memory sampled
#   -> a release of LOAD_GB (60) GB written to SCRATCH (OUT) and loaded, from memory and from the disk -> the Flash geometry
#   over all GPUs, plain and with a forced acceptance of 6.3, and ranks compared bit for bit after every round -> from
#   eight GPUs on the same of V2.5-Pro
#
# A step runs once: call again to go on where it stopped. Nothing starts after SECONDS. Logs, documents and charts are in OUT;
# the last lines are a table of what held. No weights are needed: models are synthetic and labelled so.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bash scripts/gpu_check.sh OUT [SECONDS]" >&2; exit 2; }
out=$(realpath -m "$1") deadline=$(($(date +%s) + ${2:-36000}))
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$gpus" -ge 1 ] || { echo "error: no GPU found" >&2; exit 1; }
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=.:kernels:runtime${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

step() { # step NAME COMMAND...: once, within the time that is left; -> OUT/NAME.log, and OUT/NAME.failed where it fails
    local name=$1 left=$((deadline - $(date +%s)))
    shift
    [ -e "$out/$name.done" ] && return
    [ $left -gt 10 ] || { echo "$name: no time left"; return; }
    rm -f "$out/$name.failed"
    echo "$(date +%T) $name"
    timeout $left "$@" > "$out/$name.log" 2>&1 && touch "$out/$name.done" || touch "$out/$name.failed"
}
tests() { step "test-$1" $python -m pytest -q -s -p no:cacheprovider "${@:2}"; }
kernels() { # kernels OPERATOR [SUFFIX]
    step "kernels-$1${2:-}" $python -m mimo_kernels.bench recipes/model/mimo-v2.5.json recipes/model/mimo-v2.5-pro.json \
        --tp 1 2 4 8 --only "$1"
}
bench() { # bench NAME PROCESSES FLAGS...
    local name=$1 launch=(-m mimo_runtime)
    [ "$2" -eq 1 ] || launch=(-m torch.distributed.run --nproc_per_node "$2" -m mimo_runtime)
    step "$name" $python "${launch[@]}" bench --uniform_routing true --prompt_tokens 384 --max_new_tokens 256 \
        --max_len 1024 --cuda_graphs true --forced_acceptance 6.3 --output "$out/$name.json" --plot "$out/$name.png" "${@:3}"
}

# Tests compile more than they compute, and say nothing about time: all at once.
tests rounds tests/gpu/test_rounds_gpu.py -k "not tree" &
tests trees tests/gpu/test_rounds_gpu.py -k tree &
tests decoder tests/gpu/test_decoder_gpu.py tests/runtime/test_cuda.py &
tests moe tests/gpu/test_moe_gpu.py &
tests attention tests/gpu/test_attention_gpu.py tests/gpu/test_window_gpu.py &
tests linear tests/gpu/test_linear_gpu.py &
tests between tests/gpu/test_residual_gpu.py tests/gpu/test_heads_gpu.py tests/gpu/test_router_gpu.py &
tests launch-order tests/gpu/test_launch_order_gpu.py &
tests synthetic tests/gpu/test_synthetic_gpu.py &
tests small tests/gpu/test_choice_gpu.py tests/gpu/test_rows_gpu.py tests/gpu/test_swiglu_gpu.py tests/gpu/test_moe_pack_gpu.py &
tests symmetric tests/gpu/test_symmetric_gpu.py &
for tool in memcheck racecheck; do
    command -v compute-sanitizer > /dev/null || { echo "sanitize-$tool: no compute-sanitizer here"; continue; }
    step sanitize-$tool compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 $python scripts/sanitize.py &
done
tests distill tests/gpu/test_head_loss_gpu.py tests/gpu/test_distill_gpu.py &
tests training -m gpu tests/qat/test_dflash_model.py tests/qat/test_distill.py tests/qat/test_training.py &
tests codec tests/gpu/test_mxfp4_gpu.py tests/gpu/test_transcode_gpu.py &
wait
for operator in moe prompt attention linear norm heads router layer codec; do kernels $operator; done
MIMO_KERNELS_PDL=0 kernels layer -late # every kernel after the end of the one before
bench flash-slice 1 --synthetic flash --layers 12
MIMO_KERNELS_PDL=0 bench flash-slice-late 1 --synthetic flash --layers 12
bench flash-slice-plain-attention 1 --synthetic flash --layers 12 --attention plain
bench flash-slice-plain-linears 1 --synthetic flash --layers 12 --linears plain
bench flash-slice-plain-fusions 1 --synthetic flash --layers 12 --fusions plain
bench flash-rank-of-4 1 --synthetic flash --ranks 4
bench pro-rank-of-8 1 --synthetic pro --ranks 8
bench context-32k 1 --synthetic flash --ranks 4 --context 32768 --max_len 33024
bench context-256k 1 --synthetic flash --ranks 4 --context 262144 --max_len 262400
launch=($python)
[ "$gpus" -eq 1 ] || launch=($python -m torch.distributed.run --nproc_per_node "$gpus")
step soak "${launch[@]}" scripts/soak.py --synthetic flash --layers 4 --rounds 10000
step soak-graphs "${launch[@]}" scripts/soak.py --synthetic flash --layers 4 --rounds 10000 --cuda_graphs
rm -rf "${SCRATCH:-$out}/load-release" # of a run that was killed
load=($python scripts/bench_load.py --model flash --gb "${LOAD_GB:-60}" --out "${SCRATCH:-$out}/load-release")
step load "${load[@]}" --json "$out/load.json"
step load-cold "${load[@]}" --cold --json "$out/load-cold.json"
if [ "$gpus" -ge 2 ]; then
    step topology nvidia-smi topo -m
    bench "flash-tp$gpus" "$gpus" --synthetic flash --collectives nccl
    bench "flash-tp$gpus-symmetric" "$gpus" --synthetic flash --collectives symmetric --trace "$out/flash-tp$gpus-trace.json"
    step soak-checked "${launch[@]}" scripts/soak.py --synthetic flash --layers 4 --rounds 2000 --collectives symmetric
    tests launch tests/gpu/test_launch_gpu.py
fi
if [ "$gpus" -ge 8 ]; then # what holds the trillion parameters
    bench "pro-tp$gpus-symmetric" "$gpus" --synthetic pro --collectives symmetric --trace "$out/pro-tp$gpus-trace.json"
    for context in 8192 131072; do
        bench "pro-tp$gpus-context-$context" "$gpus" --synthetic pro --collectives symmetric --context $context --max_len $((context + 256))
    done
    step soak-pro-checked "${launch[@]}" scripts/soak.py --synthetic pro --layers 4 --rounds 2000 --collectives symmetric
fi
echo
for file in "$out"/*.done "$out"/*.failed; do
    [ -e "$file" ] || continue
    name=$(basename "${file%.*}")
    echo "${file##*.} $name: $(tr '\r' '\n' < "$out/$name.log" | grep -v '^{' | grep . | tail -n 1 | cut -c1-140)"
done
! ls "$out"/*.failed > /dev/null 2>&1
