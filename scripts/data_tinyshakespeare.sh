#!/bin/sh
# Tiny Shakespeare: 40,000 lines from the plays, the text of many first lessons.
#
#   scripts/data_tinyshakespeare.sh [FOLDER]     dev/data/tinyshakespeare
#
# size      1,115,394 bytes, one file
# time      a second
# licence   the plays are in the public domain; github.com/karpathy/char-rnn selected them
# hash      pinned: sha256 of the file
#
# BASE_URL=... takes another server. See fetch.sh for what happens when a connection is cut.
set -eu
fetch=$(dirname "$0")/fetch.sh
folder=${1:-dev/data/tinyshakespeare}
base=${BASE_URL:-https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare}
"$fetch" "$base/input.txt" "$folder/tinyshakespeare.txt" \
    86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
echo "try: ./train_gpt2 train --data $folder/tinyshakespeare.txt --time-limit 120"
