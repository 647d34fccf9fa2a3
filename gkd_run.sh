#!/usr/bin/env bash
# Distils a teacher into a student: bash gkd_run.sh. Set variables from outside; flags that follow go to train_gkd.py:
#   MODEL=Qwen/Qwen2.5-0.5B-Instruct TEACHER=Qwen/Qwen2.5-7B-Instruct LMBDA=1 bash gkd_run.sh --max_length 512
# A typed flag wins over a recipe (--config FILE), a recipe over a variable, a variable over its default.
set -euo pipefail
cd "$(dirname "$0")"
set -a                                       # export every variable below

MODEL=${MODEL:-}                             # the student: folder or Hub id; empty: SmolLM2-135M without 8 of its 30 layers
TEACHER=${TEACHER:-}                         # the teacher; empty: SmolLM2-135M, made without a hub
TRAIN_MODE=${TRAIN_MODE:-full}               # of the student: full, lora or qlora
LMBDA=${LMBDA:-}                             # share of steps on the student's own answers, 0 to 1; empty: 0.5, SeqKD 0
BETA=${BETA:-}                               # 0 forward KL, 1 reverse KL, between them Jensen-Shannon; empty: 0.5
SEQ_KD=${SEQ_KD:-False}                      # True: learn from the teacher's answers, not from those in the data
TRAIN_DATA=${TRAIN_DATA:-}                   # file, folder or Hub id; empty: data/sft.jsonl
EVAL_FRACTION=${EVAL_FRACTION:-0.1}          # share of the data held out, on which both are compared
OUTPUT_DIR=${OUTPUT_DIR:-}                   # empty: output/GKD-MODE, by the kind
LEARNING_RATE=${LEARNING_RATE:-}             # empty: 2e-5 for full weights, 1e-4 for adapters
BATCH_SIZE=${BATCH_SIZE:-4}                  # rows a device and forward pass
ACCUMULATION=${ACCUMULATION:-1}              # passes a step; rows a step = batch x accumulation x devices
EPOCHS=${EPOCHS:-1}                          # passes over the data
MAX_STEPS=${MAX_STEPS:-}                     # stop after so many steps; empty: all
LAUNCH=${LAUNCH:-auto}                       # a name in accelerate_configs/; auto: by the GPUs that are there
NUM_PROCESSES=${NUM_PROCESSES:-}             # on this node; empty: one for each GPU, or one
NNODES=${NNODES:-1}                          # nodes, each of which runs this script with its NODE_RANK from 0 on
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-}                 # the first node and a free port there; one node needs neither
MASTER_PORT=${MASTER_PORT:-}
NODE_TIMEOUT=${NODE_TIMEOUT:-600}            # seconds that the nodes wait for each other
PYTHON=${PYTHON:-$(command -v python || command -v python3)}

exec "$PYTHON" -m utils.launch --variables train_gkd.py "$@"
