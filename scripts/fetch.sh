#!/bin/sh
# Fetches one file over HTTP, so that under its name there is the whole file or none.
#
#   scripts/fetch.sh URL FILE [SHA256]
#
# What comes goes to FILE.part, which is renamed when all of it is there and its hash is right. A
# connection that is cut is taken up again where it stopped (as far as the server can), five times;
# so is the download of a call before. A FILE that is there already is checked and left as it is. A
# wrong hash removes what was fetched. Needs curl, and sha256sum or shasum.
#
#   FETCH_TRIES=5    connections before giving up      FETCH_PAUSE=2    seconds between them
#   FETCH_CHECK=no   takes whatever hash a file has: for mirrors of other content, and tests
#
# Exit code 0: FILE is there and right; 1: it is not, and the last line says why.
set -eu

fail() {
    echo "fetch: error: $1" >&2
    exit 1
}

hash_of() {
    if command -v sha256sum >/dev/null; then
        sha256sum <"$1" | cut -d ' ' -f 1
    else
        shasum -a 256 <"$1" | cut -d ' ' -f 1
    fi
}

# is_right FILE: whether it has the hash; sets $hash.
is_right() {
    hash=$(hash_of "$1")
    [ -z "$expected" ] || [ "$hash" = "$expected" ]
}

# One connection. Sets $status to curl's exit code and $code to that of HTTP.
connect() {
    show=--silent
    if [ -t 2 ]; then show=--progress-bar; fi
    status=0
    code=$(curl $show --show-error --fail --location --connect-timeout 30 --speed-limit 1 \
        --speed-time 60 --continue-at - --output "$part" --write-out '%{http_code}' "$url") ||
        status=$?
}

# Until $part is whole.
fetch() {
    tries=${FETCH_TRIES:-5}
    while :; do
        connect
        case $status:$code in
        *:416)
            # Nothing is missing behind $part: it is whole, or of another file.
            if [ -n "$expected" ] && is_right "$part"; then return; fi
            rm -f "$part"
            ;;
        0:*) return ;;
        23:*) fail "$part: cannot be written; is the disk full?" ;;
        33:* | 36:*)
            # The server cannot begin in the middle.
            rm -f "$part"
            ;;
        *:4[0-9][0-9]) if [ "$code" != 408 ] && [ "$code" != 429 ]; then
            fail "$url: the server says $code; has it moved?"
        fi ;;
        esac
        tries=$((tries - 1))
        if [ $tries -le 0 ]; then
            fail "$url: cut off or not reached; the same command goes on where it stopped"
        fi
        sleep "${FETCH_PAUSE:-2}"
    done
}

if [ $# -lt 2 ] || [ $# -gt 3 ]; then fail "usage: scripts/fetch.sh URL FILE [SHA256]"; fi
command -v curl >/dev/null || fail "curl is not installed"
url=$1 file=$2 expected=${3:-} part=$2.part
if [ "${FETCH_CHECK:-yes}" = no ]; then expected=; fi

if [ -e "$file" ]; then
    if ! is_right "$file"; then
        fail "$file: is there with the hash $hash, not $expected; remove it to fetch it again"
    fi
    echo "$file: is there"
    exit 0
fi
mkdir -p "$(dirname "$file")"
fetch
if ! is_right "$part"; then
    rm -f "$part"
    fail "$file: what $url gave has the hash $hash, not $expected; it was removed"
fi
mv "$part" "$file"
if [ -n "$expected" ]; then
    echo "$file: fetched; its hash is right"
else
    echo "$file: fetched; no hash is known for it; it has sha256 $hash"
fi
