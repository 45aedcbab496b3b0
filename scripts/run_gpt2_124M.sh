#!/bin/sh
# GPT-2 124M on 10 billion tokens of FineWeb-Edu, with llm.c's settings: rate and batch are those
# of GPT-3 Small [Brown et al. 2020, arXiv:2005.14165, table 2.1].
#
#   scripts/data_fineweb_edu.sh                       once: 100 shards, 20 GB
#   scripts/data_gpt2.sh                              once: its vocabulary, in 548 MB
#   scripts/run_gpt2_124M.sh [--dry-run] [OPTION...]  further options of `train_gpt2cu train`
#
# tokens      18,865 steps of 524,288: 9.9 billion
# loss        none published for these settings on FineWeb-Edu. On FineWeb llm.c's came to 3.2847
#             nats a token (KellerJordan/modded-nanogpt, README of its first version). OpenAI's
#             own 124M has 3.2924 on FineWeb-Edu (karpathy/build-nanogpt play.ipynb) and 3.425 on
#             FineWeb (karpathy/llm.c dev/vislog.ipynb)
# HellaSwag   29.9% by llm.c on FineWeb (llm.c discussion 481); 29.45% by OpenAI's (vislog.ipynb)
# time        94 minutes on 8 A100 80 GB at 300 ms a step (llm.c scripts/run_gpt2_124M.sh), 45
#             minutes on 8 H100 (modded-nanogpt README). Of this program: not measured; `plan` says
#             283 and 113 ms a step, 1:29 and 0:35
# cost        $20 at $14 an hour for 8 A100 (llm.c's script, in 2024)
#
# --dry-run prints the plan and the command, and needs no GPU and no data. Under mpirun, srun or
# torchrun (scripts/multi_node) each rank runs this; otherwise it starts one process for each GPU.
#   GPUS=N    GPUs of this machine, where nvidia-smi does not count them; --gpus N is the same
#   DATA=, OUT=, TRAIN_GPT2=     the shards' folder, the run folder, the program
#   CARD=H100, NODES=1           what --dry-run plans for
# `train_gpt2cu evaluate --model runs/gpt2_124M --hellaswag FILE` scores it (data_hellaswag.sh)
set -eu
name=gpt2_124M shards=100 batch_size=64 total_batch_tokens=524288
settings="--model gpt2 --steps 18865
    --learning-rate 6e-4 --schedule cosine --warmup 700 --final-lr-fraction 0
    --weight-decay 0.1 --beta1 0.9 --beta2 0.95 --epsilon 1e-8 --grad-clip 1
    --eval-every 250 --eval-batches 20 --sample-every 5000 --save-every 5000"
# shellcheck source=scripts/recipe.sh
. "$(dirname "$0")/recipe.sh"
