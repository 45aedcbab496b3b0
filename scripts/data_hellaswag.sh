#!/bin/sh
# HellaSwag [Zellers et al. 2019, arXiv:1905.07830], validation: 10,042 beginnings with four endings
# each, of which one is right, for `evaluate --hellaswag`.
#
#   scripts/data_hellaswag.sh [FOLDER]           dev/data/hellaswag
#
# size      12,246,618 bytes, one file of JSON lines
# time      seconds
# licence   MIT (github.com/rowanz/hellaswag); the texts come from ActivityNet and WikiHow
# hash      pinned: sha256 of the file
#
# BASE_URL=... takes another server. See fetch.sh for what happens when a connection is cut.
set -eu
fetch=$(dirname "$0")/fetch.sh
folder=${1:-dev/data/hellaswag}
base=${BASE_URL:-https://raw.githubusercontent.com/rowanz/hellaswag/master/data}
"$fetch" "$base/hellaswag_val.jsonl" "$folder/hellaswag_val.jsonl" \
    0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588
echo "try: ./train_gpt2 evaluate --model dev/data/gpt2 --hellaswag $folder/hellaswag_val.jsonl"
