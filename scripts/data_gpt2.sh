#!/bin/sh
# GPT-2 [Radford et al. 2019], 124M: the weights that OpenAI published, and the vocabulary, which is
# that of all four sizes. `--tokenizer gpt2` and models of 50,257 tokens find it in dev/data/gpt2.
#
#   scripts/data_gpt2.sh [FOLDER [vocabulary]]   dev/data/gpt2; `vocabulary`: without the weights
#
# size      548 MB of weights, 1.5 MB of vocabulary
# time      a minute at 100 Mbit/s
# licence   MIT, modified (github.com/openai/gpt-2); huggingface.co/openai-community/gpt2
# hash      pinned: sha256 of weights, vocab.json and merges.txt; of config.json (665 bytes) none is
#           but the revision
#
# BASE_URL=... takes another server. See fetch.sh for what happens when a connection is cut.
set -eu
fetch=$(dirname "$0")/fetch.sh
folder=${1:-dev/data/gpt2}
revision=607a30d783dfa663caf39e06633721c8d4cfcd7e
base=${BASE_URL:-https://huggingface.co/openai-community/gpt2/resolve/$revision}
"$fetch" "$base/vocab.json" "$folder/vocab.json" \
    196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783
"$fetch" "$base/merges.txt" "$folder/merges.txt" \
    1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5
if [ "${2:-}" = vocabulary ]; then exit 0; fi
"$fetch" "$base/config.json" "$folder/config.json"
"$fetch" "$base/model.safetensors" "$folder/model.safetensors" \
    248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707
echo "try: ./train_gpt2 sample --model $folder --prompt 'The meaning of life is'"
