#!/bin/sh
# What the scripts in this folder have in common: they source it, after they have set `script`, the
# name by which they complain, and `scripts`, the folder of the recipes.
#
# NCCL finds its way between machines by itself. Where it does not, or is slow, set in the
# environment of these scripts (they pass on every variable that begins with NCCL_):
#
#   NCCL_DEBUG=INFO           first of all: says on every rank which adapters and links it uses.
#                             Look for `NET/IB` (InfiniBand, RoCE) or `NET/Socket` (plain TCP,
#                             slower), and for `GDRDMA`. =WARN, for errors only, costs nothing
#   NCCL_SOCKET_IFNAME=eth0   the network interface for TCP, and for the first contact even under
#                             InfiniBand: where machines have several (docker0, virbr0, a public
#                             one) and ranks do not meet. =eth takes all that begin so, =^docker
#                             all that do not, ==eth0 that one. `ip -br address` lists them
#   NCCL_IB_HCA=mlx5          which InfiniBand or RoCE adapters: =mlx5 all that begin so,
#                             =mlx5_0,mlx5_3 some, =^mlx5_1 all but one, such as that of a storage
#                             network. `ibv_devinfo -l` lists them
#   NCCL_IB_DISABLE=1         TCP in place of InfiniBand and RoCE: to see whether these are at
#                             fault, or where there are none that work
#   NCCL_IB_GID_INDEX=3       RoCE only, where an older NCCL picks an address that the network does
#                             not route; `show_gids` lists them
#   NCCL_NET_GDR_LEVEL=PHB    how far adapter and GPU may be apart for the adapter to reach the
#                             GPU's memory itself: LOC never, PIX, PXB, PHB, SYS always
#   NCCL_P2P_DISABLE=1        no direct copies between GPUs of a machine: to see whether they are
#                             at fault, as in some virtual machines; very slow
#   NCCL_NVLS_ENABLE=0        no sums in NVLink's switches (H100 and newer), where they fail
#
# Leave out what is not needed: most of these switch something off. All of them: docs.nvidia.com/
# deeplearning/nccl/user-guide/docs/env.html. The ranks' own meeting place (--rendezvous, README
# "Many GPUs") is a TCP port of this program's and knows nothing of these.
# shellcheck disable=SC2034,SC2154

fail() {
    echo "$script: error: $1" >&2
    exit 2
}

# shellcheck source=scripts/words.sh
. "$scripts/words.sh"

# recipe_of SIZE: sets $recipe to the script of that size; $scripts is the folder with all of them.
recipe_of() {
    case $1 in
    124M | 350M | 774M | 1558M) recipe=$scripts/run_gpt2_$1.sh ;;
    *) fail "size '$1': must be 124M, 350M, 774M or 1558M" ;;
    esac
}

# Names of the variables of NCCL's that are set here.
nccl_variables() { env | sed -n 's/^\(NCCL_[A-Z0-9_]*\)=.*/\1/p' | LC_ALL=C sort; }

# Does the command, or prints it with $dry_run = yes.
run() {
    if [ "$dry_run" = yes ]; then
        quoted "$@"
        echo
        exit 0
    fi
    exec "$@"
}

# The first word of the command line may be --dry-run.
dry_run=no
if [ "${1:-}" = --dry-run ]; then
    dry_run=yes
    shift
fi
