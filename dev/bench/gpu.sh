#!/bin/sh
# All that is asked of a machine with a GPU, in one run of at most ten minutes, and one table.
#
#   dev/bench/gpu.sh [PART...]      environment checks training profile pytorch layers tests ranks
#                                   sanitizer; all
#   dev/bench/gpu.sh --emulated     the same flow on the emulator, at tiny size: no figure is real
#
# It needs no network. The programs are those of build/gpu-portable, brought along or built here
# (make gpu-portable). Logs go to $OUT, else build/gpu; what is not to be kept goes to a temporary
# folder. A part that fails or runs out of time does not stop the others; one that cannot run here
# says why and is a skip. After the table comes `N passed, N failed, N skipped`; exit code 0 only
# when nothing failed. The settings of the card are left as they are.
cd "$(dirname "$0")/../.." || exit 1

PARTS="environment checks training profile pytorch layers tests ranks sanitizer"
emulated=no
if [ "$1" = --emulated ]; then emulated=yes && shift; fi
for word in "$@"; do
    case " $PARTS " in
    *" $word "*) ;;
    *)
        echo "usage: dev/bench/gpu.sh [--emulated] [PART...], of: $PARTS" >&2
        exit 2
        ;;
    esac
done
wanted=${*:-$PARTS}
if [ $emulated = yes ]; then logs=build/gpu-emulated; else logs=${OUT:-build/gpu}; fi
mkdir -p "$logs" || exit 1
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
passed=0 failed=0 skipped=0
deadline=$(($(date +%s) + 570)) # the ten minutes, less what ends the script

# ==== helpers ====================================================================================

wants() {
    case " $wanted " in *" $1 "*) return 0 ;; esac
    return 1
}

skip() {
    echo "-- skipped: $1"
    skipped=$((skipped + 1))
}

# count NAME STATUS: a test that passed when STATUS is 0.
count() {
    if [ "$2" -eq 0 ]; then
        passed=$((passed + 1))
    else
        echo "-- FAILED: $1: exit code $2"
        failed=$((failed + 1))
    fi
}

# limited SECONDS LOG COMMAND...: runs a command for so long, or until the script's time is up, and
# appends what it prints to LOG. Exit code 124: it was stopped.
limited() {
    seconds=$1 log=$2
    shift 2
    left=$((deadline - $(date +%s)))
    if [ "$seconds" -gt "$left" ]; then seconds=$left; fi
    echo "\$ $*" >>"$log"
    if [ "$seconds" -lt 2 ]; then
        echo "(no time left)" | tee -a "$log"
        return 124
    fi
    timeout -k 5 "$seconds" "$@" </dev/null >>"$log" 2>&1
}

# counted SECONDS LOG NAME COMMAND...: runs a program that ends on a line of counts, and adds them.
counted() {
    seconds=$1 log=$2 name=$3
    shift 3
    limited "$seconds" "$log" "$@"
    status=$?
    counts=$(tail -n 1 "$log" | grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$')
    echo "$name: ${counts:-no counts, exit code $status}"
    if [ -z "$counts" ]; then
        failed=$((failed + 1))
        return
    fi
    # shellcheck disable=SC2046  # the three numbers of the line
    set -- $(echo "$counts" | tr -dc '0-9 ')
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + $3))
    if [ "$status" -ne 0 ] && [ "$2" -eq 0 ]; then failed=$((failed + 1)); fi
}

# ==== programs ===================================================================================

# Sets program, test_programs, cpu_program and prefix (of the layers' programs).
find_programs() {
    if [ $emulated = yes ]; then
        compiler=${CXX:-g++}
        folder=build/$(basename "${compiler%% *}")
        program=$folder/train_gpt2cu_emu
        test_programs="$folder/test_gpt2cu_emu $folder/test_runscu_emu"
        cpu_program=$folder/train_gpt2 prefix=$folder/check_
        export OMP_NUM_THREADS=1
        return
    fi
    folder=build/gpu-portable
    program=$folder/train_gpt2cu test_programs="$folder/test_gpt2cu $folder/test_runscu"
    cpu_program=$folder/train_gpt2 prefix=$folder/
    if [ ! -x $program ]; then
        echo "== building $folder for this card, because none was brought along"
        limited 300 "$logs/environment.log" make -j "$(getconf _NPROCESSORS_ONLN)" \
            CUDA_ARCH=native gpu-portable
        count "make gpu-portable" $?
    fi
    # cuBLASLt and NCCL are not linked in, and cuDNN is opened by attention's benchmark alone.
    # PyTorch has all of them where no toolkit is installed. (It is not to be given ours: see pytorch.)
    for name in libcublasLt.so.13 libnccl.so.2 libcudnn.so.9; do
        if ldconfig -p 2>/dev/null | grep -q "$name"; then continue; fi
        for library in "${CUDA_HOME:-/usr/local/cuda}/lib64/$name" \
            $(find /usr /opt -name "$name" 2>/dev/null); do
            if [ -e "$library" ]; then
                LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$(dirname "$library")
                export LD_LIBRARY_PATH
                break
            fi
        done
    done
}

layers() {
    for source in dev/cuda/*.cu; do basename "$source" .cu; done
}

# $1 random token ids as a .npy file. Each byte is below 128, so that each id is below 32,768.
write_tokens() {
    printf '\223NUMPY\001\000v\000'
    printf '%-117s\n' "{'descr': '<u2', 'fortran_order': False, 'shape': ($1,), }"
    head -c $((2 * $1)) /dev/urandom | LC_ALL=C tr '\200-\377' '\000-\177'
}

# A Python that has PyTorch.
find_python() {
    for python in "${PYTHON:-}" python3 "$HOME/.peers/bin/python"; do
        if [ -n "$python" ] && "$python" -c 'import numpy, torch' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}

# ==== parts ======================================================================================

environment() {
    log=$logs/environment.log
    {
        date -u '+%Y-%m-%d %H:%M UTC'
        uname -srm
        grep -m1 'model name' /proc/cpuinfo
        nvidia-smi 2>&1
        nvcc --version 2>&1 | tail -n 2
        ldd "$program" 2>&1 | grep 'cublas\|not found'
        git rev-parse --short HEAD 2>/dev/null
    } >>"$log"
    if [ $emulated = yes ]; then
        card="the emulator (no card: every time below is meaningless)"
    else
        card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null |
            head -n 1)
    fi
    card="${card:-no GPU}, $(date -u +%Y-%m-%d)"
    echo "$card"
}

# Every kernel against the CPU twin.
checks() {
    for layer in $(layers); do
        counted 60 "$logs/checks.log" "$layer" "$prefix$layer" check
    done
}

# The median time of a run's steps, but for the first five (two at tiny size), in which
# memory and caches are new, and for the last, behind which no other step is queued.
median_step_ms() {
    first=6
    if [ $emulated = yes ]; then first=3; fi
    sed -n 's/.*"step_ms":\([0-9.e+-]*\).*/\1/p' "$1" | sed '$d' | tail -n +$first | sort -g |
        awk '{ ms[NR] = $1 } END { if (NR > 0) print ms[int((NR + 1) / 2)] }'
}

# GPT-2 124M in bf16, a line `B T ms tokens/s share` for each batch size that fits.
training() {
    log=$logs/training.log sizes="4 8 16 32 64" steps=30 T=1024
    model="--model gpt2"
    if [ $emulated = yes ]; then
        sizes="1 2" steps=4 T=32 model="--model gpt2 --layers 1 --heads 2 --channels 32"
    fi
    for B in $sizes; do
        # shellcheck disable=SC2086  # words
        limited 60 "$log" "$program" train --data "$scratch/train.npy" --val "$scratch/val.npy" \
            $model --batch-size "$B" --sequence-length $T --steps $steps --dtype bf16 \
            --eval-every 0 --sample-every 0 --save-every 0 --resume never --out "$scratch/run"
        status=$?
        count "training at B=$B" $status
        if [ $status -eq 0 ]; then
            share=$(grep -o '[0-9]*% of peak' "$log" | tail -n 1)
            median_step_ms "$scratch/run/log.jsonl" | awk -v B="$B" -v T=$T -v share="$share" \
                '{ printf "%d %d %.3f %.0f %s\n", B, T, $1, B * T / $1 * 1e3, share }' |
                tee -a "$scratch/ours"
        else
            tail -n 1 "$log"
        fi
        rm -rf "$scratch/run"
    done
}

# What the kernels of a step take, by name: `kernel NAME calls us share`, of four steps under ncu, one
# kernel at a time.
profile() {
    if [ $emulated = yes ] || ! command -v ncu >/dev/null; then
        skip "the profile: $(if [ $emulated = yes ]; then echo "it needs a GPU"
        else echo "ncu is not installed"; fi)"
        return
    fi
    write_tokens 1025 >"$scratch/window.npy"
    limited 90 "$logs/profile.log" ncu --clock-control none --cache-control none \
        --print-kernel-base function --metrics gpu__time_duration.sum --csv \
        --log-file "$logs/profile.csv" "$program" train --data "$scratch/train.npy" \
        --val "$scratch/window.npy" --model gpt2 --batch-size 32 --sequence-length 1024 --steps 4 \
        --dtype bf16 --eval-every 0 --sample-every 0 --save-every 0 --resume never \
        --out "$scratch/run"
    count "ncu" $?
    rm -rf "$scratch/run"
    awk -F '","' '
        /gpu__time_duration/ {
            gsub(/"|,/, "", $NF)
            us = $NF * ($(NF - 1) ~ /^(ns|nsecond)$/ ? 1e-3 : $(NF - 1) ~ /^m/ ? 1e3 : 1)
            calls[$5]++; sum[$5] += us; all += us
        }
        END {
            for (name in sum)
                printf "kernel %s %.1f %.1f %.1f%%\n", name, calls[name] / 4, sum[name] / 4,
                       100 * sum[name] / all
        }' "$logs/profile.csv" | sort -k 4 -g -r
}

pytorch() {
    log=$logs/pytorch.log python=$(find_python)
    if [ -z "$python" ]; then
        skip "PyTorch: no Python that has it (set PYTHON)"
        return
    fi
    if [ $emulated = yes ]; then words="--tiny --batch-sizes 1,2"; else words="--time-limit 140"; fi
    # shellcheck disable=SC2086  # words
    limited 180 "$log" env LD_LIBRARY_PATH="$own_libraries" "$python" -u dev/bench/torch_step.py \
        --data "$scratch/train.npy" $words
    count "dev/bench/torch_step.py" $?
    grep '^step \|^attention \|error' "$log" | tee "$scratch/torch"
}

layer_benchmarks() {
    words=
    if [ $emulated = yes ]; then words=--tiny; fi
    for layer in $(layers); do
        # shellcheck disable=SC2086  # none or one word
        limited 60 "$logs/layers.log" "$prefix$layer" bench $words
        status=$?
        count "$layer bench" $status
        if [ $status -ne 0 ]; then tail -n 1 "$logs/layers.log"; fi
    done
    grep '^attention.*cuDNN' "$logs/layers.log" # what went wrong there, if anything did
}

# What the tests say of either twin, in both types. (Those of the command line start hundreds of
# programs, each of which opens the card; what they test does not depend on it.)
whole_model_tests() {
    filter='Model.*:Golden.*:Run.*:Evaluate.*:Sampling.*:Plan.*:Cuda.*'
    if [ $emulated = yes ]; then filter='Golden.LossAndLogits*:Plan.Numbers*'; fi
    for dtype in fp32 bf16; do
        for test_program in $test_programs; do
            counted 90 "$logs/tests.log" "$(basename "$test_program"), $dtype" \
                env GPT2_TEST_DTYPE=$dtype GPT2_BINARY="$program" GPT2_OTHER_BINARY="$cpu_program" \
                "$test_program" "--gtest_filter=$filter"
        done
    done
}

# A model whose states are sharded, through NCCL: over the one card that is here, where what is sent
# comes back, or over two of the emulator's. The losses are those of a model that is not.
ranks() {
    log=$logs/ranks.log gpus=1
    if [ $emulated = yes ]; then export EMU_DEVICES=2 EMU_NCCL_ORDER=plain gpus=2; fi
    for zero in 0 1 2; do
        limited 60 "$log" "$program" train --data README.md --tokenizer bytes --layers 2 --heads 2 \
            --channels 64 --context 64 --batch-size 4 --steps 5 --dtype bf16 --eval-every 0 \
            --sample-every 0 --save-every 3 --resume never --gpus $gpus --zero $zero \
            --out "$scratch/zero$zero"
        count "--gpus $gpus --zero $zero" $?
        grep -o '"train_loss":[^,]*' "$scratch/zero$zero/log.jsonl" >"$scratch/losses$zero"
    done
    for zero in 1 2; do
        cmp -s "$scratch/losses0" "$scratch/losses$zero"
        count "--zero $zero has the losses of --zero 0" $?
    done
    rm -rf "$scratch"/zero?
}

# A few steps of a tiny model under each tool of compute-sanitizer.
sanitizer() {
    if [ $emulated = yes ] || ! command -v compute-sanitizer >/dev/null; then
        skip "compute-sanitizer: $(if [ $emulated = yes ]; then echo "it needs a GPU"
        else echo "not installed"; fi)"
        return
    fi
    for tool in memcheck racecheck initcheck synccheck; do
        for dtype in bf16 fp32; do
            limited 60 "$logs/sanitizer.log" compute-sanitizer --tool $tool --error-exitcode 9 \
                "$program" train --data README.md --tokenizer bytes --layers 2 --heads 2 \
                --channels 64 --sequence-length 65 --context 65 --batch-size 3 --steps 2 \
                --dropout 0.1 --dtype $dtype --eval-every 0 --sample-every 0 --save-every 0 \
                --resume never --out "$scratch/run"
            status=$?
            count "$tool, $dtype" $status
            echo "$tool, $dtype: $(grep 'ERROR SUMMARY' "$logs/sanitizer.log" | tail -n 1)"
            rm -rf "$scratch/run"
        done
    done
}

# ==== the table ==================================================================================

# A line a batch size, beside PyTorch's of the same size: `ours` and `torch` as the parts left them.
training_table() {
    echo "| GPT-2 124M, bf16 | ms a step | tokens/s | of peak | PyTorch, tokens/s | ratio |"
    echo "| --- | --- | --- | --- | --- | --- |"
    awk 'FILENAME == ARGV[1] { if ($1 == "step" && NF == 6) torch[$2, $3, $4] = $6; next }
        {
            peer = torch["autocast", $1, $2]; ratio = peer > 0 ? sprintf("%.2f", $4 / peer) : ""
            share = $5; if (share == "") share = "unknown"
            size = "B=" $1 ", T=" $2
            printf "| %s | %.1f | %.0f | %s | %s | %s |\n", size, $3, $4, share, peer, ratio
            peer = torch["bf16", $1, $2]
            if (peer > 0)
                printf "| %s, PyTorch all in bf16 | | | | %s | %.2f |\n", size, peer, $4 / peer
        }' "$scratch/torch" "$scratch/ours"
}

# The layers' own tables as one. PyTorch's attention of the same size goes beside ours, with the
# ratio of the times: above 1 where ours is faster.
layers_table() {
    grep -h -m 2 '^| kernel\|^| ---' "$logs/layers.log" | head -n 2
    awk 'FILENAME == ARGV[1] {
            if ($1 != "attention" || NF != 8) next
            at = $3 sprintf(", B=%d, T=%d, NH=%d, HS=%d ", $4, $5, $6, $7)
            us[at, $2] = $8; next
        }
        /^\| `/ {
            split($0, cell, "|")
            for (way in ways) {
                if (index(cell[2], "`attention_" way "`") == 0 || cell[3] !~ /bf16/) continue
                size = cell[4]; sub(/^[^,]*/, way, size)
                for (peer in peers)
                    if ((size, peer) in us)
                        cell[9] = cell[9] sprintf("PyTorch %s %.1f us (%.2f) ", peer,
                                                  us[size, peer], us[size, peer] / cell[6])
            }
            line = ""
            for (i = 2; i <= 9; i++) line = line "|" cell[i]
            print line "|"
        }
        BEGIN { ways["forward"]; ways["backward"]; peers["flash"]; peers["cudnn"]; peers["math"] }
        ' "$scratch/torch" "$logs/layers.log"
}

table() {
    echo
    echo "## $card"
    if [ -s "$scratch/ours" ]; then
        echo
        training_table
    fi
    if [ -s "$logs/layers.log" ]; then
        echo
        layers_table
    fi
    echo
}

# On the emulator the table is looked at, and not shown: each part that ran must be in it.
check_table() {
    missing=0
    has() {
        grep -q "$1" "$logs/table.md" && return
        echo "not in the table: $1"
        missing=1
    }
    if wants training; then
        for B in 1 2; do has "^| B=$B, T=32 | [0-9.]*[1-9]"; done
    fi
    if wants layers; then
        for layer in $(layers); do has "^| \`[a-z_]*$layer"; done
    fi
    if wants layers && grep -q '^attention' "$scratch/torch"; then
        has 'attention_forward.* math '
    fi
    count "the table, in $logs/table.md" $missing
}

# ==== main =======================================================================================

for name in $PARTS; do
    rm -f "$logs/$name.log"
done
touch "$scratch/ours" "$scratch/torch"
export XDG_CACHE_HOME="$scratch/cache"
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
own_libraries=${LD_LIBRARY_PATH:-}
if [ $emulated = no ] && ! nvidia-smi >/dev/null 2>&1; then
    skip "everything: no GPU here, or no driver (nvidia-smi)"
    echo "$passed passed, $failed failed, $skipped skipped"
    exit 0
fi
find_programs
environment
if wants training || wants profile || wants pytorch; then
    if [ $emulated = yes ]; then tokens=8192 windows=65; else tokens=4194304 windows=65537; fi
    write_tokens $tokens >"$scratch/train.npy"
    write_tokens $windows >"$scratch/val.npy"
fi
if wants checks; then echo "== checks" && checks; fi
if wants training; then echo "== training" && training; fi
if wants profile; then echo "== profile" && profile; fi
if wants pytorch; then echo "== pytorch" && pytorch; fi
if wants layers; then echo "== layers" && layer_benchmarks; fi
if wants tests; then echo "== tests" && whole_model_tests; fi
if wants ranks; then echo "== ranks" && ranks; fi
if wants sanitizer; then echo "== sanitizer" && sanitizer; fi
table >"$logs/table.md"
if [ $emulated = yes ]; then
    check_table
else
    cat "$logs/table.md"
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
