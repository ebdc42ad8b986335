#!/usr/bin/env bash
# Run a recipe on several ranks of this machine: one rank a GPU, or, without GPUs, ranks that share the processor.
#
#   recipes/run_deepspeed.sh RANKS RECIPE.yaml [what `pyrlhf run` takes ...]
#   recipes/run_deepspeed.sh 8 recipes/stories.yaml engine.zero_stage=2
#
# Ranks change the speed, not the result: a batch is shared by all of them. MASTER_PORT (29500) must be free.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
ranks=$1
shift

if ! command -v nvidia-smi >/dev/null; then
    export DS_ACCELERATOR=cpu
    # Threads of all ranks together = cores; more of them wait for each other.
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
fi

exec deepspeed -q --master_port "${MASTER_PORT:-29500}" --num_gpus "$ranks" --module pyrlhf run "$@"
