#!/bin/sh
# Starts the ranks of one machine by PyTorch's torchrun, for clusters that come with it: this script
# runs on every machine, with the same words but for NODE. The program itself needs no Python.
#
#   scripts/multi_node/torchrun.sh [--dry-run] NODES NODE MASTER SIZE [OPTION...]
#   scripts/multi_node/torchrun.sh 2 0 node1 124M      on node1
#   scripts/multi_node/torchrun.sh 2 1 node1 124M      on the other
#
# NODE counts from 0, which is MASTER: the machine where all meet. SIZE is 124M, 350M, 774M or
# 1558M; the options are those of `train_gpt2cu train`. torchrun listens at PORT (29500) of MASTER,
# ranks meet at the port after it. GPUS=8 are those of each machine. --dry-run prints the command
# and needs nothing. What to set where NCCL is slow or ranks do not meet: see common.sh here.
#
# A rank that fails ends the job everywhere; it is not started again (--max-restarts 0), because the
# program resumes by itself when the same commands are given once more.
set -eu
script=torchrun.sh
scripts=$(CDPATH='' cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/multi_node/common.sh
. "$(dirname "$0")/common.sh"
if [ $# -lt 4 ]; then fail "usage: torchrun.sh [--dry-run] NODES NODE MASTER SIZE [OPTION...]"; fi
nodes=$1 node=$2 master=$3
whole NODES "$nodes" 1
whole NODE "$node" 0
if [ "$node" -ge "$nodes" ]; then fail "NODE $node: must be less than NODES, which is $nodes"; fi
recipe_of "$4"
shift 4
gpus=${GPUS:-8} port=${PORT:-29500}
whole GPUS "$gpus" 1
whole PORT "$port" 1
if [ "$dry_run" = no ] && ! command -v torchrun >/dev/null; then
    fail "torchrun is not installed"
fi
run torchrun --nnodes "$nodes" --node-rank "$node" --nproc-per-node "$gpus" --max-restarts 0 \
    --master-addr "$master" --master-port "$port" --no-python \
    "$recipe" --rendezvous "$master:$((port + 1))" "$@"
