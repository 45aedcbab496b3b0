#!/bin/sh
# Fuzzes what reads the files of strangers, with libFuzzer under the address and undefined-behaviour
# sanitizers: every target in this folder, or those that are named.
#
#   dev/fuzz/run.sh [TARGET...]     FUZZ_TIME seconds each (20), or FUZZ_RUNS inputs each
#
# Each starts from the seeds that make_seeds writes and from what earlier runs found, which is kept
# in build/fuzz/corpus. An input that breaks a target's property is kept in build/fuzz/failures;
# `build/fuzz/fuzz_TARGET FILE` tries it again. Where clang++ or its fuzzer is missing it says so.
# The last line is `N passed, N failed, N skipped`.
# shellcheck disable=SC2086  # make is words
cd "$(dirname "$0")/../.." || exit 1

make="${MAKE:-make} --no-print-directory"
out=build/fuzz
passed=0 failed=0 skipped=0
mkdir -p $out/failures

can_fuzz() {
    command -v clang++ >/dev/null || return 1
    printf 'extern "C" int LLVMFuzzerTestOneInput(const char *, unsigned long) { return 0; }\n' \
        >$out/probe.cpp
    clang++ -fsanitize=fuzzer,address $out/probe.cpp -o $out/probe 2>/dev/null
}

# fuzz TARGET: one target, in a folder of its own that goes afterwards.
fuzz() {
    mkdir -p "$out/corpus/$1"
    if [ -n "${FUZZ_RUNS:-}" ]; then limit=-runs=$FUZZ_RUNS; else limit=-max_total_time=${FUZZ_TIME:-20}; fi
    FUZZ_FOLDER=$(mktemp -d -p "$([ -w /dev/shm ] && echo /dev/shm || echo /tmp)") || return 1
    export FUZZ_FOLDER
    OMP_NUM_THREADS=1 "$out/fuzz_$1" "$limit" -rss_limit_mb=2048 -malloc_limit_mb=512 \
        -timeout=20 -max_len=16384 -print_funcs=0 -print_final_stats=1 -artifact_prefix="$out/failures/$1-" \
        "$out/corpus/$1" "$out/seeds/$1" >"$out/$1.log" 2>&1
    status=$?
    rm -rf "$FUZZ_FOLDER"
    return $status
}

if ! can_fuzz; then
    echo "-- skipped: fuzzing: clang++ or its fuzzer is missing (scripts/install_deps.sh clang)"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
targets=${*:-$(ls dev/fuzz/fuzz_*.cpp | sed 's/.*fuzz_\(.*\)\.cpp/\1/')}
if ! $make -j "$(getconf _NPROCESSORS_ONLN)" fuzz-programs; then
    echo "-- FAILED: the fuzz targets do not build"
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
fi
rm -rf $out/seeds
$out/make_seeds $out/seeds || exit 1
for target in $targets; do
    if fuzz "$target"; then
        passed=$((passed + 1))
    else
        echo "-- FAILED: $target:"
        grep -v '^#\|^stat::' "$out/$target.log" | tail -n 40
        failed=$((failed + 1))
    fi
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$out/$target.log")
    echo "$target: ${runs:-0} inputs tried, $(ls "$out/corpus/$target" | wc -l) kept"
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
