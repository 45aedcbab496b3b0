#!/bin/sh
# Runs every part of the tests and adds up what they counted, for `make test` and `make sanitize`.
#
#   dev/test.sh test       the tests in float and double, with $CXX and with the other compiler; the
#                          comparison with PyTorch and transformers, where a Python ($PYTHON) has
#                          them; the build itself
#   dev/test.sh sanitize   the tests under the address, undefined-behaviour and thread sanitizers
#
# A part is a program whose last line is `N passed, N failed, N skipped`. One that ends without it,
# or in an error with no failure counted, counts as one failure. A part that cannot be run here says
# why and counts as one skip. The last line of this script is the sum, and its exit code is 0 only
# when nothing failed.
# shellcheck disable=SC2086  # make is words
cd "$(dirname "$0")/.." || exit 1

CXX=${CXX:-g++}
make="${MAKE:-make} --no-print-directory"
log=build/test.part
passed=0 failed=0 skipped=0
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
    { "$@" 2>&1 </dev/null; echo $? >$log.status; } | tee $log
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

# program_tests COMPILER VARIANT: builds the tests and the program in a variant of the Makefile's,
# and runs the first, which starts the second at $GPT2_BINARY.
program_tests() {
    folder=build/$(basename "$1")${2:+-$2}
    echo "== building $folder"
    if ! $make -j "$(getconf _NPROCESSORS_ONLN)" CXX="$1" VARIANT="$2" programs
    then
        echo "-- FAILED: $folder does not build"
        failed=$((failed + 1))
        return
    fi
    part "$folder/test_gpt2" env GPT2_BINARY="$folder/train_gpt2" "$folder/test_gpt2"
}

# ==== test =======================================================================================

# The compiler beside $CXX that the project supports, if it and its OpenMP can be used.
other_compiler_tests() {
    case $CXX in
    *clang*) other=g++ ;;
    *) other=clang++ ;;
    esac
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
            --train-gpt2 "build/$(basename "$CXX")/train_gpt2"
    fi
}

# A header is a prerequisite of the program: taken as newer (-W), it makes the program out of date.
header_rebuilds() { ! $make -q -W "$1" train_gpt2; }

# Every tracked text file is among those that `make train` trains on, bar fixtures.
own_text_complete() {
    $make own-text | sort >$log
    git ls-files | grep -v '^dev/reference/fixtures/' | while read -r file; do
        if grep -Iq . "$file" && ! grep -qxF "$file" $log; then echo "not in own-text: $file"; fi
    done | if grep .; then false; fi
}

build_tests() {
    echo "== the build"
    $make train_gpt2 || true
    check "a second make does nothing" $make -q train_gpt2
    for header in *.h; do
        check "changing $header rebuilds the program" header_rebuilds "$header"
    done
    if [ -d .git ] && command -v git >/dev/null; then
        check "make train reads every tracked text file" own_text_complete
    else
        skip "whether make train reads every tracked file: this is no git checkout"
    fi
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
        export TSAN_OPTIONS="ignore_noninstrumented_modules=1 ${TSAN_OPTIONS:-}"
        program_tests clang++ tsan
    fi
}

# ==== main =======================================================================================

case $1 in
test)
    program_tests "$CXX" ""
    program_tests "$CXX" double
    other_compiler_tests
    live_comparison
    build_tests
    ;;
sanitize)
    program_tests "$CXX" asan
    thread_sanitizer_tests
    ;;
*)
    echo "usage: dev/test.sh test|sanitize" >&2
    exit 2
    ;;
esac
echo "$passed passed, $failed failed, $skipped skipped" | tee build/test.log
[ "$failed" -eq 0 ]
