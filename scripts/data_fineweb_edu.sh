#!/bin/sh
# FineWeb-Edu [Penedo et al. 2024, arXiv:2406.17557]: pages of the web that teach, as GPT-2's tokens
# in llm.c's shards. By default the first 10 billion tokens of the sample of 100 billion, in the
# order in which it is published (this is not the sample that is called 10BT).
#
#   scripts/data_fineweb_edu.sh [FOLDER [SHARDS]]     dev/data/fineweb_edu, 100 shards
#
# size      20 GB: 100 shards for training and one for validation, of 100 million tokens and 200 MB
# time      half an hour at 100 Mbit/s; SHARDS (1 to 1000) takes fewer or more
# licence   ODC-By 1.0, and the terms of use of CommonCrawl
#           (huggingface.co/datasets/HuggingFaceFW/fineweb-edu; shards: karpathy/fineweb-edu-100B-
#           gpt2-token-shards)
# hash      none is pinned; the revision is, and the hash of what came is printed; train_gpt2 checks
#           the header, the size and every id of a shard when it opens it
#
# BASE_URL=... takes another server. See fetch.sh for what happens when a connection is cut.
set -eu
fetch=$(dirname "$0")/fetch.sh
folder=${1:-dev/data/fineweb_edu}
shards=${2:-100}
case $shards in
'' | *[!0-9]* | ?????*) shards=0 ;;
esac
if [ "$shards" -lt 1 ] || [ "$shards" -gt 1000 ]; then
    echo "data_fineweb_edu: error: SHARDS must be a whole number from 1 to 1000" >&2
    exit 1
fi
hub=https://huggingface.co/datasets/karpathy
revision=a33f75d78c7f74236fb03754ec1eb3cc77507d64
base=${BASE_URL:-$hub/fineweb-edu-100B-gpt2-token-shards/resolve/$revision}
"$fetch" "$base/edu_fineweb_val_000000.bin" "$folder/val_000000.bin"
number=1
while [ $number -le "$shards" ]; do
    name=$(printf 'train_%06d.bin' $number)
    "$fetch" "$base/edu_fineweb_$name" "$folder/$name"
    number=$((number + 1))
done
echo "try: ./train_gpt2 train --data '$folder/train_*.bin' --val $folder/val_000000.bin" \
    "--model gpt2 --tokenizer gpt2"
