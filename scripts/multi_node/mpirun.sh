#!/bin/sh
# Starts a recipe on several machines by OpenMPI's mpirun, which needs ssh between them without a
# password, and this folder, the data and the run folder at the same path on each (NFS, say).
#
#   scripts/multi_node/mpirun.sh [--dry-run] HOST:GPUS,HOST:GPUS,... SIZE [OPTION...]
#   scripts/multi_node/mpirun.sh node1:8,node2:8 124M --save-every 1000
#
# SIZE is 124M, 350M, 774M or 1558M; the options are those of `train_gpt2cu train`. Ranks meet at
# the first host, which all must reach, at PORT (29500). --dry-run prints the command and needs
# nothing. What to set where NCCL is slow or ranks do not meet: see common.sh here.
set -eu
script=mpirun.sh
scripts=$(CDPATH='' cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/multi_node/common.sh
. "$(dirname "$0")/common.sh"
if [ $# -lt 2 ]; then fail "usage: mpirun.sh [--dry-run] HOST:GPUS,... SIZE [OPTION...]"; fi
hosts=$1
recipe_of "$2"
shift 2

ranks=0 rest=$hosts,
while [ -n "$rest" ]; do
    entry=${rest%%,*} rest=${rest#*,}
    case $entry in
    ?*:*) whole "GPUs of ${entry%:*}:" "${entry##*:}" 1 ;;
    *) fail "hosts '$hosts': must be HOST:GPUS with commas between, as in node1:8,node2:8" ;;
    esac
    ranks=$((ranks + ${entry##*:}))
done
first=${hosts%%:*} port=${PORT:-29500}
whole PORT "$port" 1
if [ "$dry_run" = no ] && ! command -v mpirun >/dev/null; then fail "mpirun is not installed"; fi

# By slot, so that the ranks of a machine follow each other; unbound, because a rank has threads of
# its own. mpirun passes no variables on but those that -x names; by LD_LIBRARY_PATH many clusters
# say where CUDA and NCCL are.
set -- "$recipe" --rendezvous "$first:$port" "$@"
for name in $(nccl_variables) ${DATA:+DATA} ${OUT:+OUT} ${TRAIN_GPT2:+TRAIN_GPT2} \
    ${LD_LIBRARY_PATH:+LD_LIBRARY_PATH}; do
    set -- -x "$name" "$@"
done
run mpirun -np "$ranks" --host "$hosts" --map-by slot --bind-to none "$@"
