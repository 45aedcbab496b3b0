#!/bin/sh
# TinyStories [Eldan & Li 2023, arXiv:2305.07759], second version: short stories in the words of a
# small child, written by GPT-4, with a line <|endoftext|> between two of them.
#
#   scripts/data_tinystories.sh [FOLDER]         dev/data/tinystories
#
# size      2.2 GB for training, 22 MB for validation
# time      minutes: 2.2 GB at what the connection gives
# licence   CDLA-Sharing-1.0 (huggingface.co/datasets/roneneldan/TinyStories)
# hash      none is pinned; the revision of the data set is, and the hash of what came is printed
#
# BASE_URL=... takes another server. See fetch.sh for what happens when a connection is cut.
set -eu
fetch=$(dirname "$0")/fetch.sh
folder=${1:-dev/data/tinystories}
revision=f54c09fd23315a6f9c86f9dc80f725de7d8f9c64
base=${BASE_URL:-https://huggingface.co/datasets/roneneldan/TinyStories/resolve/$revision}
"$fetch" "$base/TinyStoriesV2-GPT4-valid.txt" "$folder/valid.txt"
"$fetch" "$base/TinyStoriesV2-GPT4-train.txt" "$folder/train.txt"
echo "try: ./train_gpt2 train --data $folder/train.txt --val $folder/valid.txt"
