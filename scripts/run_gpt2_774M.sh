#!/bin/sh
# GPT-2 774M (GPT-2 large) on 150 billion tokens of FineWeb-Edu, with llm.c's settings: rate and
# batch are those of GPT-3 Large [Brown et al. 2020, arXiv:2005.14165, table 2.1].
#
#   scripts/data_fineweb_edu.sh dev/data/fineweb_edu 1000  once: 1,000 shards, 200 GB
#   scripts/data_gpt2.sh                                   once: its vocabulary, in 548 MB
#   scripts/run_gpt2_774M.sh [--dry-run] [OPTION...]       further options of `train_gpt2cu train`
#
# tokens      286,102 steps of 524,288: 150 billion, one and a half times the sample of 100 billion
# loss        none published for these settings. OpenAI's own 774M has 3.0006 on FineWeb
#             (karpathy/llm.c dev/vislog.ipynb), which is another validation set than this
# HellaSwag   by llm.c on FineWeb 57.8% in the harness's way, with 10 examples shown (llm.c
#             dev/eval/README.md); in our way, with none, no figure was found; 43.20% by OpenAI's
#             (vislog.ipynb)
# time        5.6 days on 8 A100 80 GB at 1.7 s a step (llm.c scripts/run_gpt2_774M.sh; about 6,
#             says discussion 580). Of this program: not measured; `plan` says 1.74 s, 5.8 days,
#             and on 8 H100 690 ms, 2.3 days
# cost        $2,000 at $14 an hour for 8 A100 (llm.c's script, in 2024)
#
# --dry-run prints the plan and the command, and needs no GPU and no data. Under mpirun, srun or
# torchrun (scripts/multi_node) each rank runs this; otherwise it starts one process for each GPU.
#   GPUS=N    GPUs of this machine, where nvidia-smi does not count them; --gpus N is the same
#   DATA=, OUT=, TRAIN_GPT2=     the shards' folder, the run folder, the program
#   CARD=H100, NODES=1           what --dry-run plans for
# `train_gpt2cu evaluate --model runs/gpt2_774M --hellaswag FILE` scores it (data_hellaswag.sh)
set -eu
name=gpt2_774M shards=1000 batch_size=32 total_batch_tokens=524288
settings="--model gpt2-large --steps 286102
    --learning-rate 2.5e-4 --schedule cosine --warmup 700 --final-lr-fraction 0
    --weight-decay 0.1 --beta1 0.9 --beta2 0.95 --epsilon 1e-8 --grad-clip 1
    --eval-every 250 --eval-batches 20 --sample-every 5000 --save-every 4000"
# shellcheck source=scripts/recipe.sh
. "$(dirname "$0")/recipe.sh"
