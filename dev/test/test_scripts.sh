#!/bin/sh
# Tries scripts/fetch.sh and scripts/data_*.sh against a server on this machine, which cuts
# connections, begins in the middle or cannot, and has the wrong files. Nothing goes out. Then what
# .ci/run says of tests that fail.
#
#   dev/test/test_scripts.sh        the last line is `N passed, N failed, N skipped`
# shellcheck disable=SC2317  # functions are called through check
cd "$(dirname "$0")/../.." || exit 1

passed=0 failed=0
end() {
    echo "$passed passed, $failed failed, $1 skipped"
    [ $failed -eq 0 ]
    exit
}
for tool in python3 curl; do
    if ! command -v $tool >/dev/null; then
        echo "-- skipped: the scripts that fetch data: no $tool here"
        end 1
    fi
done

work=$(mktemp -d) || exit 1
server=
trap 'if [ -n "$server" ]; then kill "$server"; fi; rm -rf "$work"' EXIT
mkdir "$work/www" "$work/here"
fetch=scripts/fetch.sh
export FETCH_PAUSE=0 no_proxy='*'

# check NAME COMMAND...: one test, which passes when the command succeeds.
check() {
    name=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        echo "-- FAILED: $name"
        sed 's/^/   /' "$work/said"
        failed=$((failed + 1))
    fi
}

# ==== the server =================================================================================

# /files/X gives X, from any byte on; /cut/X closes after half of what it still has, the first
# two times; /always-cut/X each time; /whole/X begins at the start whatever it is asked; /busy/X
# says 503 the first time. Every request is a line of $work/requests: its path, and where it begins.
cat >"$work/server.py" <<'END'
import http.server
import os
import sys

work = sys.argv[1]
seen = {}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        _, mode, name = self.path.split("/", 2)
        begin = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        with open(work + "/requests", "a") as log:
            log.write(f"{self.path} {begin}\n")
        seen[self.path] = seen.get(self.path, 0) + 1
        path = os.path.join(work, "www", name)
        if not os.path.exists(path):
            return self.send_error(404)
        if mode == "busy" and seen[self.path] == 1:
            return self.send_error(503)
        content = open(path, "rb").read()
        if mode == "whole":
            begin = 0
        if begin > 0 and begin >= len(content):
            return self.send_error(416)
        rest = content[begin:]
        self.send_response(206 if begin > 0 else 200)
        if begin > 0:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        cut = mode == "always-cut" or mode == "cut" and seen[self.path] <= 2
        self.wfile.write(rest[: len(rest) // 2] if cut else rest)
        self.close_connection = True

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
with open(work + "/port.part", "w") as file:
    file.write(str(server.server_address[1]))
os.rename(work + "/port.part", work + "/port")
server.serve_forever()
END
python3 "$work/server.py" "$work" 2>"$work/server.log" &
server=$!
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    [ -e "$work/port" ] || sleep 0.25
done
if [ ! -e "$work/port" ]; then
    echo "-- skipped: the scripts that fetch data: no server can be started here:"
    cat "$work/server.log"
    end 1
fi
url=http://127.0.0.1:$(cat "$work/port")

# ==== fetch.sh ===================================================================================

python3 -c "import random, sys
sys.stdout.buffer.write(random.Random(1).randbytes(1000000))" >"$work/www/data"
hash=$(python3 -c "import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())" "$work/www/data")
other=$(echo "$hash" | tr 0-9a-f 1-9a-f0)
file=$work/here/sub/data

# run CODE TEXT COMMAND...: whether it ends with the code and says the text.
run() {
    code=$1 text=$2
    shift 2
    : >"$work/requests"
    "$@" >"$work/said" 2>&1
    [ $? -eq "$code" ] && grep -qF -- "$text" "$work/said"
}
clear_away() { rm -rf "$work/here"; }
is_whole() { cmp -s "$file" "$work/www/data" && [ ! -e "$file.part" ]; }
is_absent() { [ ! -e "$file" ]; }
has_part() { [ "$(wc -c <"$file.part")" -eq "$1" ]; }
requests() { [ "$(tr '\n' ';' <"$work/requests")" = "$1" ]; }

check "a file is fetched" run 0 "its hash is right" $fetch "$url/files/data" "$file" "$hash"
check "and is whole" is_whole
check "what is there is not fetched again" run 0 "is there" $fetch "$url/files/data" "$file" "$hash"
check "and nobody is asked" requests ""
check "another file of the name is refused" run 1 "not $other" \
    $fetch "$url/files/data" "$file" "$other"
check "and stays" is_whole

clear_away
check "a cut connection is taken up again" run 0 "its hash is right" \
    $fetch "$url/cut/data" "$file" "$hash"
check "where it stopped" requests "/cut/data 0;/cut/data 500000;/cut/data 750000;"
check "to the whole file" is_whole

clear_away
check "tries come to an end" run 1 "cut off or not reached" \
    env FETCH_TRIES=2 $fetch "$url/always-cut/data" "$file" "$hash"
check "with no file" is_absent
check "and a part" has_part 750000
check "from which the next call goes on" run 0 "its hash is right" \
    $fetch "$url/files/data" "$file" "$hash"
check "and fetches only what lacks" requests "/files/data 750000;"
check "to the whole file again" is_whole

clear_away
mkdir -p "$work/here/sub"
head -c 400000 "$work/www/data" >"$file.part"
check "a server that cannot begin in the middle gives all" run 0 "its hash is right" \
    $fetch "$url/whole/data" "$file" "$hash"
check "which is the whole file" is_whole

clear_away
mkdir -p "$work/here/sub"
cp "$work/www/data" "$file.part"
check "a part that is whole is only renamed" run 0 "its hash is right" \
    $fetch "$url/files/data" "$file" "$hash"
check "after one question" requests "/files/data 1000000;"
clear_away
mkdir -p "$work/here/sub"
head -c 1000000 /dev/zero >"$file.part"
check "a part of another file is fetched anew" run 0 "its hash is right" \
    $fetch "$url/files/data" "$file" "$hash"
check "as the whole file" is_whole
clear_away
mkdir -p "$work/here/sub"
head -c 999 /dev/zero >"$file.part"
check "a part that only looks right is found by the hash" run 1 "it was removed" \
    $fetch "$url/files/data" "$file" "$hash"
check "and the next call begins anew" run 0 "its hash is right" \
    $fetch "$url/files/data" "$file" "$hash"

clear_away
check "a wrong hash is an error" run 1 "has the hash $hash, not $other; it was removed" \
    $fetch "$url/files/data" "$file" "$other"
check "that leaves no file" is_absent
check "and no part" test ! -e "$file.part"
check "without a hash, that of the file is said" run 0 "it has sha256 $hash" \
    $fetch "$url/files/data" "$file"
clear_away
check "a server that is busy is asked again" run 0 "its hash is right" \
    $fetch "$url/busy/data" "$file" "$hash"
clear_away
check "a file that is not there is an error at once" run 1 "the server says 404" \
    $fetch "$url/files/none" "$file" "$hash"
check "after one request" requests "/files/none 0;"
check "no server is an error" run 1 "cut off or not reached" \
    env FETCH_TRIES=2 $fetch http://127.0.0.1:1/data "$file"
clear_away
mkdir -p "$file.part"
check "what cannot be written is said to be so" run 1 "$file.part: cannot be written" \
    $fetch "$url/files/data" "$file" "$hash"
check "words are checked" run 1 "usage:" $fetch "$url/files/data"

# ==== data_*.sh ==================================================================================

# Stand-ins: what matters is that each script asks for the files that it says, and keeps them.
for name in input.txt TinyStoriesV2-GPT4-valid.txt TinyStoriesV2-GPT4-train.txt \
    edu_fineweb_val_000000.bin edu_fineweb_train_000001.bin edu_fineweb_train_000002.bin \
    hellaswag_val.jsonl vocab.json merges.txt config.json model.safetensors; do
    echo "a stand-in for $name" >"$work/www/$name"
done

# data_script NAME FILES WORD...: the script fetches FILES through connections that are cut.
data_script() {
    script=scripts/data_$1.sh files=$2
    shift 2
    clear_away
    run 0 "try: " env BASE_URL="$url/cut" FETCH_CHECK=no "$script" "$work/here" "$@" || return 1
    [ "$(cd "$work/here" && echo *)" = "$files" ] || return 1
    for kept in "$work"/here/*; do
        grep -q '^a stand-in for ' "$kept" || return 1
    done
}
check "data_tinyshakespeare.sh" data_script tinyshakespeare "tinyshakespeare.txt"
check "data_tinystories.sh" data_script tinystories "train.txt valid.txt"
check "data_fineweb_edu.sh" data_script fineweb_edu \
    "train_000001.bin train_000002.bin val_000000.bin" 2
check "data_hellaswag.sh" data_script hellaswag "hellaswag_val.jsonl"
check "data_gpt2.sh" data_script gpt2 "config.json merges.txt model.safetensors vocab.json"

# pinned NAME: the script refuses a stand-in by its hash.
pinned() {
    clear_away
    run 1 "it was removed" env BASE_URL="$url/files" "scripts/data_$1.sh" "$work/here"
}
for name in tinyshakespeare hellaswag gpt2; do
    check "data_$name.sh refuses another file" pinned $name
done
check "data_fineweb_edu.sh checks its number" run 1 "from 1 to 1000" \
    scripts/data_fineweb_edu.sh "$work/here" 0

# says FILE WORD...: every header says size, time, licence and hash.
says() {
    for word in size time licence hash; do
        grep -q "^# $word  *[^ ]" "$1" || return 1
    done
}
for script in scripts/data_*.sh; do
    check "$script says size, time, licence and hash" says "$script"
done

# ==== .ci/run ====================================================================================

# ci TEXT COMMANDS: in a folder with the counts of an earlier run, the last line is TEXT where make
# does COMMANDS and fails.
mkdir -p "$work/ci/.ci" "$work/ci/build" "$work/bin"
cp .ci/run "$work/ci/.ci"
ci() {
    echo "9 passed, 0 failed, 0 skipped" >"$work/ci/build/test.log"
    printf '#!/bin/sh\n%s\nexit 2\n' "$2" >"$work/bin/make"
    chmod +x "$work/bin/make"
    PATH="$work/bin:$PATH" "$work/ci/.ci/run" >"$work/said" 2>&1
    [ $? -eq 2 ] && [ "$(tail -n 1 "$work/said")" = "$1" ]
}
check ".ci/run repeats the counts of tests that failed" ci "4 passed, 3 failed, 0 skipped" \
    'echo "4 passed, 3 failed, 0 skipped" >build/test.log'
check ".ci/run takes tests that did not get as far for a failure" \
    ci "0 passed, 1 failed, 0 skipped" :

# ==== the pinned hashes ==========================================================================

# The real ones, where they are: what the scripts pin is what they have.
data=../shared/data
skipped=0
if [ -e $data/tinyshakespeare.txt ]; then
    cp $data/tinyshakespeare.txt "$work/www/input.txt"
    cp $data/gpt2_encoder.json "$work/www/vocab.json"
    cp $data/gpt2_vocab.bpe "$work/www/merges.txt"
    clear_away
    check "tiny Shakespeare has the hash that is pinned" run 0 "its hash is right" \
        env BASE_URL="$url/files" scripts/data_tinyshakespeare.sh "$work/here"
    check "GPT-2's vocabulary has" run 0 "merges.txt: fetched; its hash is right" \
        env BASE_URL="$url/files" scripts/data_gpt2.sh "$work/here" vocabulary
else
    echo "-- skipped: the pinned hashes of real files: no $data"
    skipped=2
fi
end $skipped
