#!/usr/bin/env bash
# Run a recipe on several machines. Start it with the same words on every one of them; NODE_RANK says which it is.
#
#   NODE_RANK=0 recipes/run_multinode.sh HOSTFILE MASTER_ADDR RECIPE.yaml [what `pyrlhf run` takes ...]
#   NODE_RANK=1 recipes/run_multinode.sh HOSTFILE MASTER_ADDR RECIPE.yaml [the same]
#
# HOSTFILE has a line a machine, in the order of NODE_RANK: its name and its ranks ("node-0 slots=8"). MASTER_ADDR is the
# address at which the others reach machine 0, MASTER_PORT (29500) a free port there. Under Slurm: export
# NODE_RANK=$SLURM_NODEID in what `srun` starts once a machine. Recipe, data and `output` lie in a folder that all
# machines share: rank 0 writes results, and every rank its part of a checkpoint.
#
# One command instead of one a machine: with pdsh and ssh between the machines,
#   deepspeed --hostfile HOSTFILE --module pyrlhf run RECIPE.yaml
set -euo pipefail

if [[ $# -lt 3 || ! ${NODE_RANK:-} =~ ^[0-9]+$ ]]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
hostfile=$1 master=$2
shift 2
if [[ ! -r $hostfile ]]; then
    echo "$0: cannot read the hostfile $hostfile" >&2
    exit 2
fi

if ! command -v nvidia-smi >/dev/null; then
    export DS_ACCELERATOR=cpu
    slots=$(awk -v n="$NODE_RANK" '/slots=/ { if (i++ == n) { sub(/.*slots=/, ""); print $1 + 0 } }' "$hostfile")
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > slots ? cores / slots : 1))}
fi

exec deepspeed -q --hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" --master_addr "$master" \
    --master_port "${MASTER_PORT:-29500}" --module pyrlhf run "$@"
