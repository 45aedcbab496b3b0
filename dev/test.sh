#!/bin/sh
# Runs every part of the tests and adds up what they counted, for `make test`, `make soak` and
# `make sanitize`.
#
#   dev/test.sh test       the tests in float and double, with $CXX and with the other compiler; the
#                          comparison with PyTorch and transformers, where a Python ($PYTHON) has
#                          them; the CUDA program on the emulator, and compiled by nvcc where there
#                          is one; faults and kills; the build itself
#   dev/test.sh cuda       of these, what concerns the CUDA program
#   dev/test.sh soak       a fault at every call and every allocation, and a thousand kills: hours
#   dev/test.sh sanitize   the tests under the address, undefined-behaviour and thread sanitizers,
#                          with the kernels on the emulator; some thousand fuzzed files
#
# A part is a program whose last line is `N passed, N failed, N skipped`. One that ends without it,
# or in an error with no failure counted, counts as one failure. A part that cannot be run here says
# why and counts as one skip. The last line of this script is the sum, and its exit code is 0 only
# when nothing failed.
# shellcheck disable=SC2086  # make and $in_memory are words
cd "$(dirname "$0")/.." || exit 1

# Threads that wait for each other burn what the compiler beside them needs, unless they sleep.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

CXX=${CXX:-g++}
# (The compiler may be several words, of which the Makefile's folder bears the first: ccache g++.)
folder_of() { echo "build/$(basename "${1%% *}")${2:+-$2}"; }
make="${MAKE:-make} --no-print-directory"
log=build/test.part.$$
passed=0 failed=0 skipped=0
start=$(date +%s)
mkdir -p build

# ==== parts ======================================================================================

skip() {
    echo "-- skipped: $1"
    skipped=$((skipped + 1))
}

# check NAME COMMAND...: one test, which passes when the command succeeds.
check() {
    name=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        echo "-- FAILED: $name"
        failed=$((failed + 1))
    fi
}

# part NAME COMMAND...: runs a program that counts for itself.
part() {
    name=$1
    shift
    echo "== $name"
    began=$(date +%s)
    { "$@" 2>&1 </dev/null; echo $? >$log.status; } | tee $log
    echo "-- $(($(date +%s) - began)) s: $name, ended $(($(date +%s) - start)) s after the start"
    status=$(cat $log.status)
    counts=$(tail -n 1 $log | grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$')
    # shellcheck disable=SC2046  # the three numbers of the line
    set -- $(echo "${counts:-0 0 0}" | tr -dc '0-9 ')
    if [ -z "$counts" ] || { [ "$status" -ne 0 ] && [ "$2" -eq 0 ]; }; then
        echo "-- FAILED: $name: exit code $status"
        failed=$((failed + 1))
    fi
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + $3))
}

# build COMPILER VARIANT TARGET...
build() {
    compiler=$1 variant=$2
    shift 2
    $make -j "$(getconf _NPROCESSORS_ONLN)" CXX="$compiler" VARIANT="$variant" "$@"
}

# build_ahead: reads lines `STEP COMPILER VARIANT TARGET...` (- for $CXX, and for no variant), and
# builds them in this order beside the tests, most of which wait for a disk or use one core. It says
# nothing: who needs a step waits for it (built STEP) and builds it, which finds it done, or says
# what is wrong.
ahead=
build_ahead() {
    steps=$(cat)
    rm -rf build/ahead
    mkdir -p build/ahead
    build_steps >build/ahead.log 2>&1 <<EOF &
$steps
EOF
    ahead=$!
    trap 'kill "$ahead" 2>/dev/null' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}
build_steps() {
    trap 'kill "$!" 2>/dev/null; exit' TERM
    while read -r step compiler variant targets; do
        if [ "$compiler" = - ]; then compiler=$CXX; fi
        if command -v "${compiler%% *}" >/dev/null; then
            $make -j "$(getconf _NPROCESSORS_ONLN)" CXX="$compiler" VARIANT="${variant#-}" \
                $targets </dev/null &
            wait "$!"
        fi
        : >build/ahead/"$step"
    done
}
built() {
    while [ -n "$ahead" ] && [ ! -e build/ahead/"$1" ] && kill -0 "$ahead" 2>/dev/null; do
        sleep 0.5
    done
}

# Most tests write thousands of small files, and wait for the disk most of the time. What $CXX
# builds does so where people do; the others in memory, where two gigabytes of it are free.
in_memory=
if [ -w /dev/shm ] && [ "$(df -Pk /dev/shm | awk 'NR == 2 {print $4}')" -gt 2000000 ]; then
    in_memory=TMPDIR=/dev/shm
fi

# program_tests COMPILER VARIANT: builds the tests and the program in a variant of the Makefile's,
# and runs the first, which start the second at $GPT2_BINARY. In double the model alone is tested.
program_tests() {
    folder=$(folder_of "$1" "$2")
    where=$in_memory
    if [ "$1" = "$CXX" ] && [ -z "$2" ]; then where=; fi
    echo "== building $folder"
    built "$(basename "$folder")"
    if ! build "$1" "$2" programs; then
        echo "-- FAILED: $folder does not build"
        failed=$((failed + 1))
        return
    fi
    part "$folder/test_gpt2" env $where "$folder/test_gpt2"
    if [ "$2" = double ]; then return; fi
    part "$folder/test_gpt2, bf16" env GPT2_TEST_DTYPE=bf16 "$folder/test_gpt2" \
        --gtest_filter='Model.*:Golden.*'
    part "$folder/test_data" env $where "$folder/test_data"
    part "$folder/test_runs" env $where GPT2_BINARY="$folder/train_gpt2" "$folder/test_runs"
}

# ==== test =======================================================================================

# The products that oneDNN makes for a processor with AVX2 alone, and one thread.
narrow_tests() {
    folder=$(folder_of "$CXX")
    for dtype in fp32 bf16; do
        part "$folder/test_gpt2, $dtype, AVX2, one thread" env GPT2_TEST_DTYPE=$dtype \
            ONEDNN_MAX_CPU_ISA=AVX2 DNNL_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 \
            "$folder/test_gpt2" --gtest_filter='Model.*:Golden.*'
    done
}

# The products that train_gpt2.cpp makes itself on a processor with AMX, on any that can pack for
# them.
amx_tests() {
    folder=$(folder_of "$CXX")
    if ! grep -qs avx512bw /proc/cpuinfo; then
        skip "products on an emulated AMX: this processor has no AVX-512, which packs for them"
        return
    fi
    built amx
    if ! build "$CXX" "" "$folder/test_gpt2_amx"; then
        echo "-- FAILED: $folder/test_gpt2_amx does not build"
        failed=$((failed + 1))
        return
    fi
    if ! grep -q -- -DGPT2_ONEDNN "$folder/flags"; then
        skip "products on an emulated AMX: this build is without oneDNN, and without them"
        return
    fi
    part "$folder/test_gpt2_amx, bf16" env GPT2_TEST_DTYPE=bf16 "$folder/test_gpt2_amx" \
        --gtest_filter='Layer.*Products*:Layer.AFewRows*:Model.*:Golden.Loss*:Golden.Grad*'
}

# The compiler beside $CXX that the project supports, if it and its OpenMP can be used.
case $CXX in
*clang*) other=g++ ;;
*) other=clang++ ;;
esac
other_compiler_tests() {
    if ! command -v $other >/dev/null; then
        skip "the tests with $other, which is not installed (scripts/install_deps.sh clang does)"
    elif CXX=$other scripts/install_deps.sh missing | grep -q '^run:\|^test:'; then
        skip "the tests with $other, whose OpenMP is missing (scripts/install_deps.sh clang)"
    else
        program_tests $other ""
        program_tests $other double
    fi
}

# A Python that has PyTorch and transformers.
find_python() {
    needs='import numpy, safetensors, tokenizers, torch, transformers'
    for python in "${PYTHON:-}" python3 "$HOME/.peers/bin/python"; do
        if [ -n "$python" ] && "$python" -c "$needs" 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}

live_comparison() {
    python=$(find_python)
    if [ -z "$python" ]; then
        skip "the live comparison: no Python with torch and transformers (set PYTHON)"
    else
        part "comparison with PyTorch" "$python" dev/reference/compare.py --tests --random 20 \
            --train-gpt2 "$(folder_of "$CXX")/train_gpt2"
        part "HellaSwag by PyTorch" "$python" dev/reference/compare_hellaswag.py \
            --train-gpt2 "$(folder_of "$CXX")/train_gpt2"
    fi
}

# A header is a prerequisite of the program: taken as newer (-W), it makes the program out of date.
header_rebuilds() { ! $make -q -W "$1" train_gpt2; }

# The tests look for programs where the Makefile makes them, with a compiler of several words too.
several_words() {
    $make -n CXX="env $CXX" train_gpt2 | grep -qF -- "-o $(folder_of "env $CXX")/train_gpt2 "
}

# Every tracked text file is among those that `make train` trains on, bar fixtures.
own_text_complete() {
    $make own-text | sort >$log
    git ls-files | grep -v '^dev/reference/fixtures/' | while read -r file; do
        if grep -Iq . "$file" && ! grep -qxF "$file" $log; then echo "not in own-text: $file"; fi
    done | if grep .; then false; fi
}

# Beside the sources there may be files of any name, which are read too, and a virtual environment,
# with more files than a command line holds, which is not. (In a copy of what finds them.)
own_text_of_any_name() {
    tree=build/any_name odd="it's a text (1).txt" count=700
    rm -rf $tree
    mkdir -p $tree/scripts $tree/venv
    cp Makefile $tree && cp scripts/install_deps.sh $tree/scripts || return 1
    : >$tree/train_gpt2.cpp
    for file in "$odd" venv/pyvenv.cfg; do echo text >"$tree/$file"; done
    while [ $((count -= 1)) -gt 0 ]; do echo text >$tree/venv/"$(printf '%0200d' $count)"; done
    $make -C $tree build/source && cmp "$tree/$odd" "$tree/build/source/$odd" &&
        [ ! -e $tree/build/source/venv ] && $make -C $tree -n train DATA="$odd" >$log &&
        grep -qF -- "--data 'it'\\''s a text (1).txt' " $log
}

build_tests() {
    echo "== the build"
    $make train_gpt2 || true
    check "a second make does nothing" $make -q train_gpt2
    for header in *.h; do
        check "changing $header rebuilds the program" header_rebuilds "$header"
    done
    check "programs are where the tests look for them" several_words
    check "make train reads text files of any name" own_text_of_any_name
    # (git reads no checkout that belongs to somebody else.)
    if [ -e .git ] && git ls-files >/dev/null 2>&1; then
        check "make train reads every tracked text file" own_text_complete
    else
        skip "whether make train reads every tracked file: git reads no checkout here"
    fi
}

# ==== faults =====================================================================================

# build_faults: sets $folder; fails where faults cannot be injected.
build_faults() {
    folder=$(folder_of "$CXX")
    if [ "$(uname)" != Linux ] || ! getconf GNU_LIBC_VERSION >/dev/null 2>&1; then
        skip "faults: they are injected between a program and glibc, which is not here"
        return 1
    fi
    built faults
    build "$CXX" "" faults && return
    echo "-- FAILED: $folder/run_faults does not build"
    failed=$((failed + 1))
    return 1
}

# fault_tests WORD...: parts of run_faults (none: all of them) or --soak, a fault at every call in
# place of many. SEED chooses which.
fault_tests() {
    build_faults || return
    part "$folder/run_faults" "$folder/run_faults" "$folder/train_gpt2" --seed "${SEED:-1}" "$@"
}

# allocation_faults [--soak]: in the variant in double, which has no oneDNN: where the first
# allocations of that fail, it reads from a null pointer.
allocation_faults() {
    build_faults || return
    built allocations
    if ! build "$CXX" double "$folder-double/train_gpt2"; then
        echo "-- FAILED: $folder-double/train_gpt2 does not build"
        failed=$((failed + 1))
        return
    fi
    part "$folder/run_faults, allocations" "$folder/run_faults" "$folder-double/train_gpt2" \
        allocations --seed "${SEED:-1}" "$@"
}

# emulated_kills N: of the CUDA program, whose saves wait for a stream; in each precision.
emulated_kills() {
    build_faults || return
    for dtype in fp32 bf16; do
        emulated "$folder/run_faults train_gpt2cu_emu, $dtype" OMP_NUM_THREADS=1 \
            "$folder/run_faults" "$folder/train_gpt2cu_emu" kills --kills "$1" --dtype $dtype \
            --seed "${SEED:-1}"
    done
}

# ==== the CUDA program ===========================================================================

# emulated NAME [VARIABLE=VALUE...] PROGRAM...: a part, with a folder of its own for the
# cache of timed products.
emulated() {
    name=$1
    shift
    part "$name" env $in_memory XDG_CACHE_HOME="$PWD/build/cache" "$@"
}

# kernel_checks FOLDER ORDER [WORD...]: the kernels, one layer at a time against the CPU twin, in a
# thread order of the emulator's, the last on the card with the least shared memory; attention also
# as a Hopper card computes it.
kernel_checks() {
    checks=$1 order=$2
    if [ "$order" = 2 ]; then capability=8.6; else capability=8.0; fi
    shift 2
    for check in "$checks"/check_*; do
        case $check in *.d | *.o) continue ;; esac
        emulated "$check, thread order $order, capability $capability" EMU_ORDER="$order" \
            EMU_CAPABILITY="$capability" OMP_NUM_THREADS=1 "$check" check "$@"
    done
    emulated "$checks/check_attention, thread order $order, with wgmma" EMU_CAPABILITY=9.0 \
        EMU_ORDER="$order" OMP_NUM_THREADS=1 "$checks/check_attention" check --wgmma "$@"
}

# build_emulated COMPILER VARIANT: sets $folder; fails where there are no headers, or no program.
build_emulated() {
    folder=$(folder_of "$1" "$2")
    if [ -z "$($make -s cuda-headers)" ]; then
        skip "the kernels on the emulator: no NVIDIA headers (cublasLt.h of the CUDA toolkit, 12.8 or newer; set CUDA_HOME)"
        return 1
    fi
    echo "== building $folder, emulated"
    built emulated
    build "$1" "$2" emu-programs programs && return
    echo "-- FAILED: $folder, emulated, does not build"
    failed=$((failed + 1))
    return 1
}

# beside NAME WORD...: this script, with those words, on the core that the tests here leave free;
# `part TITLE beside_ended NAME` waits for it, prints what it said and counts what it counted.
beside() {
    name=$1
    shift
    { dev/test.sh "$@" >"build/beside.$name" 2>&1; echo $? >"build/beside.$name.status"; } </dev/null &
}

# What such a script printed, once it has ended, with its exit code.
beside_ended() {
    while [ ! -e "build/beside.$1.status" ]; do sleep 0.2; done
    cat "build/beside.$1"
    return "$(cat "build/beside.$1.status")"
}

# emulated_dtype DTYPE FOLDER: the model in three thread orders, and runs.
emulated_dtype() {
    for order in 0 1 2; do
        emulated "$2/test_gpt2cu_emu, $1, thread order $order" \
            GPT2_TEST_DTYPE="$1" EMU_ORDER=$order OMP_NUM_THREADS=1 "$2/test_gpt2cu_emu"
    done
    emulated "$2/test_runscu_emu, $1" GPT2_TEST_DTYPE="$1" OMP_NUM_THREADS=1 \
        GPT2_BINARY="$2/train_gpt2cu_emu" GPT2_OTHER_BINARY="$2/train_gpt2" EMU_ORDER=0 \
        "$2/test_runscu_emu"
}

emulated_tests() {
    rm -rf build/cache build/beside.*
    build_emulated "$CXX" "" || return
    beside others emulated-beside "$folder"
    kernel_checks "$folder" 0
    emulated_dtype fp32 "$folder"
    part "on the other core meanwhile: bf16, kernels in other orders, test_emu" beside_ended others
    emulated_kills 10
    # What a machine with a GPU will be asked; its checks have just been run.
    emulated "dev/bench/gpu.sh --emulated" CXX="$CXX" \
        dev/bench/gpu.sh --emulated environment training pytorch layers tests ranks sanitizer
}

# The same commands in both programs, and the same sections in both sources.
sections() { grep '^// ====' "$1" | tr -d '/= '; }
same_sections() { [ "$(sections train_gpt2.cpp)" = "$(sections train_gpt2.cu)" ]; }
same_words() {
    for command in train sample evaluate tokenizer shard dump export plan info; do
        for program in train_gpt2 train_gpt2cu_emu; do
            "$folder/$program" $command --help | sed 's/train_gpt2cu/train_gpt2/g' >$log.$program
        done
        cmp $log.train_gpt2 $log.train_gpt2cu_emu || return 1
    done
}

# What nvcc says of the kernels, and what it made of them.
compiled_tests() {
    if [ -z "$($make -s nvcc)" ]; then
        skip "the compile for GPUs: no nvcc (the CUDA toolkit; set CUDA_HOME)"
        return
    fi
    echo "== nvcc, for sm_80 and sm_90a"
    built cuda
    check "train_gpt2cu compiles" $make cuda
    check "no kernel spills registers" no_spills build/cuda/train_gpt2.ptxas
    check "without a GPU, one line says so and the exit code is 1" says_no_gpu
    cuobjdump=$(find_cuobjdump)
    if [ -z "$cuobjdump" ]; then
        skip "whether memory-bound kernels move 128 bits at a time: no cuobjdump (CUDA toolkit)"
    else
        check "memory-bound kernels move 128 bits at a time" wide_accesses "$cuobjdump"
    fi
}

no_spills() {
    grep -q 'bytes spill stores' "$1" || return 1
    ! grep 'bytes spill stores' "$1" | grep -v ' 0 bytes spill stores, 0 bytes spill loads'
}

says_no_gpu() {
    if [ -e /dev/nvidia0 ]; then return 0; fi
    build/cuda/train_gpt2cu plan >$log 2>&1
    [ $? -eq 1 ] && [ "$(wc -l <$log)" -eq 1 ] && grep -q 'no NVIDIA driver\|no GPU' $log
}

# cuobjdump comes with the toolkit, though not with every package of it, and with Triton.
find_cuobjdump() {
    python=$(find_python)
    for tool in cuobjdump "$(dirname "$($make -s nvcc)")/cuobjdump" \
        "$(${python:-false} -c 'import triton; print(triton.__path__[0])' 2>/dev/null)/backends/nvidia/bin/cuobjdump"; do
        if command -v "$tool"; then return; fi
    done
}

# The kernels whose time is that of their bytes, in the forms for aligned rows (Li4E and Li8E: four
# floats or eight bf16 at a time; three kernels have no other), load 128 bits at a time, and store
# so unless they write sums. $1: cuobjdump.
wide_accesses() {
    "$1" -sass build/cuda/train_gpt2.o | awk '
        /Function :/ {
            kernel = ""
            if ($3 ~ /(encoder|layernorm|gelu|dropout|bias).*_kernelI(f|13__nv_bfloat16)Li[48]E/ ||
                $3 ~ /(classifier_forward|global_norm|adamw_update)_kernel/) kernel = $3
            if (kernel != "") loads[kernel] += 0
        }
        /LDG\.E[^ ]*\.128/ { loads[kernel]++ }
        /STG\.E[^ ]*\.128/ { stores[kernel]++ }
        END {
            for (kernel in loads) {
                if (kernel == "") continue
                found++
                sums = kernel ~ /encoder_backward|bias_backward|global_norm/
                if (loads[kernel] == 0 || (!sums && stores[kernel] == 0)) {
                    print "not 128 bits at a time: " kernel
                    narrow = 1
                }
            }
            exit narrow || found < 20
        }'
}

cuda_tests() {
    emulated_tests
    check "both twins have the same sections in the same order" same_sections
    if [ -x "$(folder_of "$CXX")/train_gpt2cu_emu" ]; then
        check "both programs take the same words" same_words
    fi
    compiled_tests
}

# ==== sanitize ===================================================================================

# OpenMP's barriers must be visible to the thread sanitizer, or every parallel loop looks like a
# race. libgomp cannot show them; libomp does, through a library of its own named archer.
archer_works() {
    printf 'int main() {\n#pragma omp parallel\n    {}\n}\n' >build/archer.cpp
    clang++ -fopenmp -fsanitize=thread build/archer.cpp -o build/archer 2>/dev/null &&
        ARCHER_OPTIONS=verbose=1 build/archer 2>&1 | grep -q '^Archer detected'
}

thread_sanitizer_tests() {
    if ! command -v clang++ >/dev/null; then
        skip "the thread sanitizer: clang++ is not installed (scripts/install_deps.sh clang)"
    elif ! archer_works; then
        skip "the thread sanitizer: clang++ lacks it or archer (scripts/install_deps.sh clang)"
    else
        # Tests fork, and the children of some start threads.
        export TSAN_OPTIONS="ignore_noninstrumented_modules=1 die_after_fork=0 ${TSAN_OPTIONS:-}"
        program_tests clang++ tsan
    fi
}

# Every CUDA thread is a fiber that the thread sanitizer knows: a missing barrier is a race.
sanitized_kernels() {
    build_emulated "$1" "$2" || return
    emulated "$folder/test_emu" "$folder/test_emu"
    # clang++ adds up the twin's sums in lanes, which loses fewer digits than a kernel can keep.
    case $1 in *clang*) factor=4 ;; *) factor=2 ;; esac
    kernel_checks "$folder" 0 --factor $factor
    for dtype in fp32 bf16; do
        emulated "$folder/test_gpt2cu_emu, $dtype" GPT2_TEST_DTYPE=$dtype OMP_NUM_THREADS=1 \
            "$folder/test_gpt2cu_emu" --gtest_filter='Golden.*'
    done
    emulated "$folder/test_runscu_emu, ranks" GPT2_TEST_DTYPE=bf16 OMP_NUM_THREADS=1 \
        GPT2_BINARY="$folder/train_gpt2cu_emu" "$folder/test_runscu_emu" \
        --gtest_filter='Jobs.*Shard*:Jobs.*Bf16*:Jobs.OneTree*:Jobs.*ItsPart'
}

# ==== main =======================================================================================

case $1 in
test)
    own=$(folder_of "$CXX")
    build_ahead <<EOF
${own#build/} - - programs
${own#build/}-double - double programs
amx - - $own/test_gpt2_amx
$other $other - programs
$other-double $other double programs
faults - - faults
allocations - double $own-double/train_gpt2
emulated - - emu-programs
cuda - - cuda
EOF
    program_tests "$CXX" ""
    narrow_tests
    program_tests "$CXX" double
    amx_tests
    other_compiler_tests
    live_comparison
    part "scripts that fetch data, .ci/run" dev/test/test_scripts.sh
    fault_tests files kills signals disks
    allocation_faults
    cuda_tests
    build_tests
    ;;
emulated-beside)  # a part of `test`: see beside
    emulated_dtype bf16 "$2"
    for order in 1 2; do kernel_checks "$2" $order; done
    emulated "$2/test_emu" "$2/test_emu"
    rm -f $log $log.*
    echo "$passed passed, $failed failed, $skipped skipped"
    [ "$failed" -eq 0 ]
    exit
    ;;
cuda)
    $make programs
    cuda_tests
    ;;
soak)
    fault_tests files kills signals disks --soak
    allocation_faults --soak
    if build_emulated "$CXX" ""; then emulated_kills 100; fi
    ;;
sanitize)
    program_tests "$CXX" asan
    thread_sanitizer_tests
    sanitized_kernels "$CXX" asan
    if archer_works; then sanitized_kernels clang++ tsan; fi
    part "dev/fuzz/run.sh, a few inputs each" env FUZZ_RUNS=20000 dev/fuzz/run.sh
    ;;
*)
    echo "usage: dev/test.sh test|cuda|soak|sanitize" >&2
    exit 2
    ;;
esac
rm -f $log $log.*
echo "$passed passed, $failed failed, $skipped skipped" | tee build/test.log
[ "$failed" -eq 0 ]
