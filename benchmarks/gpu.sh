#!/usr/bin/env bash
# Everything that needs a GPU, in at most 10 minutes: builds the CUDA half here, runs the tests that are marked gpu (values,
# gradients, equal bits, graph capture, torch.compile, generation, every stage under ZeRO 0-3), the benchmarks of rollout and PPO
# on models of a billion weights, those of the ops, and compute-sanitizer on small cases. Writes benchmarks/results/<gpu>.json,
# a log of each step under $OUT (default: a new folder), and prints a short table last. Ends with an error if any step failed
# or found no time left; the others run all the same.
#
#   benchmarks/gpu.sh            # PYTHON=... for another interpreter than python3
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
logs=${OUT:-$(mktemp -d)}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=()
all_seconds=585 # the last table takes a few more

# step NAME SECONDS COMMAND...: its output goes to a log, the end of it to the terminal where it failed.
step() {
    local name=$1 seconds=$2 began=$SECONDS left=$((all_seconds - SECONDS))
    shift 2
    [ "$left" -gt 5 ] || { echo "$name: no time left" | tee "$logs/$name.log"; failed+=("$name"); return; }
    [ "$seconds" -lt "$left" ] || seconds=$left
    timeout "$seconds" "$@" >"$logs/$name.log" 2>&1
    local code=$?
    printf '%-28s %4d s%s\n' "$name" $((SECONDS - began)) "$([ $code -eq 0 ] || echo "  FAILED ($code), see $logs/$name.log")"
    [ $code -eq 0 ] || { tail -n 25 "$logs/$name.log"; failed+=("$name"); }
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || { echo "no GPU here" >&2; exit 2; }
arch=$("$python" -c 'import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}{minor}" + "a" * (major == 9))')
PYRLHF_CUDA=on PYRLHF_CUDA_ARCHS=$arch step build 180 "$python" setup.py -q build_ext --inplace
[ ${#failed[@]} -eq 0 ] || exit 1

step tests 200 "$python" -m pytest -q -m gpu -p no:cacheprovider tests --ignore tests/cuda/on_gpu/test_loop.py
step loop 150 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/cuda/on_gpu/test_loop.py
step rollout 90 "$python" benchmarks/bench_rollout.py
step ppo 150 "$python" benchmarks/bench_ppo.py --rounds 2
for benchmark in benchmarks/bench_{launch,gae,ppo_loss,ranking_loss,sample,decode_attention,rotary,rms_norm,layer_norm,activation,linear_logprob,attention}.py; do
    step "$(basename "$benchmark" .py)" 60 "$python" "$benchmark"
done
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --launch-timeout 60 \
            "$python" -m pytest -q -p no:cacheprovider tests/cuda/on_gpu/test_sanitized.py
    done
else
    echo "compute-sanitizer is not here: left out"
fi

name=$("$python" -c 'import sys; sys.path.insert(0, "benchmarks"); import common; print(common.machine())')
cp "benchmarks/results/$name.json" "$logs/" 2>/dev/null
"$python" benchmarks/summary.py "benchmarks/results/$name.json"
echo "all of it took $SECONDS s; logs: $logs"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
