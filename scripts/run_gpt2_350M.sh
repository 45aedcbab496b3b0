#!/bin/sh
# GPT-2 350M (GPT-2 medium) on 31 billion tokens of FineWeb-Edu, with llm.c's settings: rate and
# batch are those of GPT-3 Medium [Brown et al. 2020, arXiv:2005.14165, table 2.1].
#
#   scripts/data_fineweb_edu.sh dev/data/fineweb_edu 315  once: 315 shards, 63 GB
#   scripts/data_gpt2.sh                                  once: its vocabulary, in 548 MB
#   scripts/run_gpt2_350M.sh [--dry-run] [OPTION...]      further options of `train_gpt2cu train`
#
# tokens      60,000 steps of 524,288: 31.5 billion
# loss        none published for these settings. OpenAI's own 350M has 3.083 on FineWeb
#             (karpathy/llm.c dev/vislog.ipynb), which is another validation set than this
# HellaSwag   none found for llm.c's run; 37.52% by OpenAI's (vislog.ipynb)
# time        13.7 hours on 8 A100 80 GB at 820 ms a step (llm.c scripts/run_gpt2_350M.sh). Of this
#             program: not measured; `plan` says 805 ms, 13:25, and on 8 H100 320 ms, 5:19
# cost        $200 at $14 an hour for 8 A100 (llm.c's script, in 2024)
#
# --dry-run prints the plan and the command, and needs no GPU and no data. Under mpirun, srun or
# torchrun (scripts/multi_node) each rank runs this; otherwise it starts one process for each GPU.
#   GPUS=N    GPUs of this machine, where nvidia-smi does not count them; --gpus N is the same
#   DATA=, OUT=, TRAIN_GPT2=     the shards' folder, the run folder, the program
#   CARD=H100, NODES=1           what --dry-run plans for
# `train_gpt2cu evaluate --model runs/gpt2_350M --hellaswag FILE` scores it (data_hellaswag.sh)
set -eu
name=gpt2_350M shards=315 batch_size=64 total_batch_tokens=524288
settings="--model gpt2-medium --steps 60000
    --learning-rate 3e-4 --schedule cosine --warmup 700 --final-lr-fraction 0
    --weight-decay 0.1 --beta1 0.9 --beta2 0.95 --epsilon 1e-8 --grad-clip 1
    --eval-every 250 --eval-batches 20 --sample-every 5000 --save-every 2000"
# shellcheck source=scripts/recipe.sh
. "$(dirname "$0")/recipe.sh"
