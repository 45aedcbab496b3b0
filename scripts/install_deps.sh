#!/bin/sh
# Installs what train_gpt2 is built with from the system's own packages: apt, dnf, pacman or brew.
#
#   scripts/install_deps.sh             installs what is missing; does nothing when all is there
#   scripts/install_deps.sh run|test|bench   the same, but only when that use lacks something
#   scripts/install_deps.sh clang       the same for clang++, the second compiler of `make test`
#   scripts/install_deps.sh missing     only names what is missing, a line NEED:HEADER each
#
# It never asks: it says in one line what it installs and why, and does it, through sudo when it is
# not root. `make train`, `make test`, `make bench` and `make sanitize` call it before they build.
# A library is there when the compiler ($CXX, with $CPPFLAGS) finds its header.
# Exit code 0: all that is needed is there; 1: it is not, and the last line says what to do.
#
# shellcheck disable=SC2086  # CXX, CPPFLAGS and lists of packages are words to be split
set -eu

CXX=${CXX:-g++}
CPPFLAGS=${CPPFLAGS:-}
job=${1:-all}
if [ "$job" = clang ]; then CXX=clang++; fi

fail() {
    echo "install_deps: error: $1" >&2
    exit 1
}

# A row: who needs it (`wish`: nobody, but without oneDNN the program falls back on a slower matrix
# product of its own, without zlib and zstd it reads no .gz and .zst, and without clang++'s
# sanitizers `make sanitize` skips a part), the header by which it is known, and its package under apt, dnf, pacman and brew.
table() {
    case $CXX in
    *clang*)
        echo 'run compiler clang      clang        clang  llvm'
        echo 'run omp.h    libomp-dev libomp-devel openmp libomp'
        if [ "$job" = clang ]; then
            echo 'wish sanitizers libclang-rt-dev compiler-rt compiler-rt llvm'
        fi
        ;;
    *)
        echo 'run compiler g++ gcc-c++ gcc gcc'
        ;;
    esac
    cat <<'END'
run   nlohmann/json.hpp      nlohmann-json3-dev json-devel             nlohmann-json nlohmann-json
run   CLI/CLI.hpp            libcli11-dev       cli11-devel            cli11         cli11
run   utf8proc.h             libutf8proc-dev    utf8proc-devel         libutf8proc   utf8proc
run   xxhash.h               libxxhash-dev      xxhash-devel           xxhash        xxhash
wish  oneapi/dnnl/dnnl.h     libdnnl-dev        onednn-devel           onednn        onednn
wish  zlib.h                 zlib1g-dev         zlib-devel             zlib          zlib
wish  zstd.h                 libzstd-dev        libzstd-devel          zstd          zstd
test  gtest/gtest.h          libgtest-dev       gtest-devel            gtest         googletest
bench benchmark/benchmark.h  libbenchmark-dev   google-benchmark-devel benchmark google-benchmark
END
}

# NEED:HEADER for each row that is not there. The preprocessor keeps a row's line when it finds no
# such header, which takes one run of it for the whole table, a few milliseconds.
missing() {
    if ! command -v "${CXX%% *}" >/dev/null; then
        table | while read -r need header _; do echo "$need:$header"; done
        return
    fi
    table | while read -r need header _; do
        case $header in compiler | sanitizers) continue ;; esac
        printf '#if !__has_include(<%s>)\n%s:%s\n#endif\n' "$header" "$need" "$header"
    done | $CXX $CPPFLAGS -std=c++20 -E -P -x c++ - | grep : || true
    if [ "$job" = clang ] && ! sanitizers_link; then echo wish:sanitizers; fi
}

sanitizers_link() {
    echo 'int main() {}' | $CXX -fsanitize=thread -x c++ - -o /dev/null 2>/dev/null
}

# ==== packages ===================================================================================

# The packages of the missing rows of which `grep $1` keeps NEED, in this machine's names.
packages() {
    { missing | grep "$@" || true; } | while IFS=: read -r _ absent; do
        table | while read -r _ header apt dnf pacman brew; do
            if [ "$header" != "$absent" ]; then continue; fi
            case $manager in
            apt-get) echo "$apt" ;;
            dnf) echo "$dnf" ;;
            pacman) echo "$pacman" ;;
            brew) echo "$brew" ;;
            esac
        done
    done | tr '\n' ' ' | sed 's/ $//'
}

# The command that installs packages without a question, and the one that refreshes the list of
# packages, which is tried only when installing fails without it.
set_commands() {
    case $manager in
    apt-get)
        install="env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0"
        install="$install install -y --no-install-recommends"
        refresh="apt-get -qq update"
        ;;
    dnf) install="dnf install -y" refresh="dnf makecache" ;;
    pacman) install="pacman -S --needed --noconfirm" refresh="pacman -Sy" ;;
    brew) install="brew install" refresh="brew update" ;;
    esac
    if [ "$manager" = brew ] || [ "$(id -u)" = 0 ]; then return; fi
    if ! command -v sudo >/dev/null; then
        fail "neither root nor sudo here: run this as root: $refresh && $install $needed $optional"
    fi
    # Without a terminal nobody could type a password, and sudo is told to fail instead of waiting.
    if [ -t 0 ]; then sudo=sudo; else sudo="sudo -n"; fi
    install="$sudo $install" refresh="$sudo $refresh"
}

# Whether the package lists of this machine name all of these packages.
known() {
    case $manager in
    apt-get) apt-cache show "$@" >/dev/null 2>&1 ;;
    *) true ;;
    esac
}

install_packages() {
    if ! known "$@"; then $refresh; fi
    $install "$@" || { $refresh && $install "$@"; }
}

# ==== main =======================================================================================

case $job in
all | clang) uses='.' ;;
run) uses='^run:' ;;
test | bench) uses="^run:\\|^$job:" ;;
missing)
    missing
    exit 0
    ;;
*) fail "unknown argument $job: use none, run, test, bench, clang or missing" ;;
esac
if ! missing | grep -q "$uses"; then exit 0; fi

manager=
for name in apt-get dnf pacman brew; do
    if command -v $name >/dev/null; then manager=$name && break; fi
done
if [ -z "$manager" ]; then
    fail "no apt, dnf, pacman or brew here: install by hand what lacks: $(missing | tr '\n' ' ')"
fi

needed=$(packages -v '^wish:')
optional=$(packages '^wish:')
set_commands
echo "install_deps: installing the compiler and libraries that train_gpt2 is built with:" \
    $needed $optional
if [ -n "$needed" ]; then
    install_packages $needed || fail "could not install: $install $needed"
fi
for package in $optional; do
    install_packages $package || echo "install_deps: no $package here: going on without it"
done

lacking=$(missing | grep -v '^wish:' | tr '\n' ' ' || true)
if [ -n "$lacking" ]; then fail "still missing after installing $needed: $lacking"; fi
