#!/bin/sh
# What scripts/run_gpt2_*.sh have in common. They source this with the words of their command line,
# after they have set
#   name                             of the run folder and in messages
#   shards                           of FineWeb-Edu that the run reads, of 100 million tokens each
#   batch_size, total_batch_tokens   sequences of a GPU at a time, tokens of a step
#   settings                         further options of `train`, none with a space in it
# shellcheck disable=SC2154  # those are set there

fail() {
    echo "run_$name: error: $1" >&2
    exit 2
}

# shellcheck source=scripts/words.sh
. "$(dirname "$0")/words.sh"

# Whether a launcher started this process, once for each GPU; sets $world to how many it started.
# What is the only one, such as the shell of `srun --pty`, starts the others where GPUS asks for it.
# (A batch script of Slurm's that is no step has most of its variables too.)
launched() {
    world=${GPT2_WORLD:-}
    if [ -n "${TORCHELASTIC_RUN_ID:-}" ]; then world=${WORLD_SIZE:-}; fi
    world=${world:-${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-}}}
    case ${SLURM_STEP_ID:-} in
    '' | -* | 42949672??) ;;
    *) world=${world:-${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-}}} ;;
    esac
    case $world-${gpus:-1} in
    -* | 1-[2-9]* | 1-1?*) false ;;
    esac
}

# The program that TRAIN_GPT2 names or, without it, the first of these that is here.
first_program() {
    if [ -n "${TRAIN_GPT2:-}" ]; then set -- "$TRAIN_GPT2"; fi
    for program in "$@"; do
        if command -v "$program" >/dev/null; then return; fi
    done
    case $1 in *cu) builds='make cuda' ;; *) builds=make ;; esac
    fail "there is no $1: $builds builds it; TRAIN_GPT2=... names another"
}

# ==== the command line ===========================================================================

# What is typed here goes before the recipe: an option of both has the value that was typed.
dry_run=no gpus=${GPUS:-} nodes=${NODES:-1} given=' ' previous='' count=$#
while [ "$count" -gt 0 ]; do
    word=$1
    shift
    count=$((count - 1))
    case $word in
    --dry-run)
        dry_run=yes
        continue
        ;;
    --help | -h)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "$0"
        exit 0
        ;;
    --gpus=*) gpus=${word#*=} ;;
    esac
    case $word in --*) given="$given${word%%=*} " ;; esac
    if [ "$previous" = --gpus ]; then gpus=$word; fi
    previous=$word
    set -- "$@" "$word"
done
is_given() { case $given in *" $1 "*) true ;; *) false ;; esac }
whole NODES "$nodes" 1
if [ -n "$gpus" ]; then whole GPUS "$gpus" 1; fi

# ==== how many GPUs ==============================================================================

starts_ranks=no
if launched; then
    whole "ranks of the launcher:" "$world" 1
else
    if [ -z "$gpus" ] && command -v nvidia-smi >/dev/null; then
        gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || gpus=''
    fi
    if [ -z "$gpus" ] && [ $dry_run = yes ]; then gpus=8; fi  # as the recipe's figures are for
    if [ -z "$gpus" ]; then fail "no GPU found here; GPUS=N says how many there are"; fi
    world=$((gpus * nodes))
    if [ "$nodes" -eq 1 ]; then
        starts_ranks=yes
    elif [ $dry_run = no ]; then
        fail "NODES=$nodes: several need a launcher, as in scripts/multi_node"
    fi
fi

# The most sequences a GPU, up to the recipe's, with which whole batches make up a step.
while [ "$batch_size" -gt 1 ] &&
    [ $((total_batch_tokens % (batch_size * 1024 * world))) -ne 0 ]; do
    batch_size=$((batch_size - 1))
done

option=''
for word in --tokenizer gpt2 --sequence-length 1024 --batch-size "$batch_size" \
    --total-batch-tokens "$total_batch_tokens" $settings; do
    if [ -z "$option" ]; then
        option=$word
    else
        if ! is_given "$option"; then set -- "$@" "$option" "$word"; fi
        option=''
    fi
done

# ==== the plan ===================================================================================

if [ $dry_run = yes ]; then
    first_program ./train_gpt2 ./train_gpt2cu
    plan="--card ${CARD:-H100} --nodes $nodes"
    if ! is_given --gpus; then plan="$plan --gpus $((world / nodes))"; fi
    # shellcheck disable=SC2086  # words of options
    "$program" plan $plan "$@"
fi

data=${DATA:-dev/data/fineweb_edu}
if ! is_given --data; then
    set -- --data "$data/train_*.bin" --val "$data/val_000000.bin" "$@"
fi
if ! is_given --out; then set -- "$@" --out "${OUT:-runs/$name}"; fi
if [ $starts_ranks = yes ] && ! is_given --gpus; then set -- "$@" --gpus "$gpus"; fi
if [ $dry_run = yes ]; then
    echo "command    $(quoted "${TRAIN_GPT2:-./train_gpt2cu}" train "$@")"
    exit 0
fi

# ==== the run ====================================================================================

first_program ./train_gpt2cu
last=$(printf '%s/train_%06d.bin' "$data" "$shards")
for file in "$data/val_000000.bin" "$last"; do
    if ! is_given --data && [ ! -e "$file" ]; then
        fail "$file: is not there; scripts/data_fineweb_edu.sh '$data' $shards fetches it"
    fi
done
exec "$program" train "$@"
