#!/usr/bin/env bash
# Distils a teacher into a student: bash gkd_run.sh. Set variables from outside; flags go to train_gkd.py:
#   MODEL=Qwen/Qwen2.5-0.5B-Instruct TEACHER=Qwen/Qwen2.5-7B-Instruct LMBDA=1 bash gkd_run.sh --max_length 512
# A typed flag wins over a recipe (--config FILE), a recipe over a variable, a variable over its default.
set -euo pipefail
cd "$(dirname "$0")"
set -a                                       # export every variable below

MODEL=${MODEL:-}                             # the student: folder or Hub id; empty: SmolLM2-135M without 8 of its 30 layers
TEACHER=${TEACHER:-}                         # the teacher: folder or Hub id; empty: SmolLM2-135M, made without a hub
TRAIN_MODE=${TRAIN_MODE:-full}               # train mode of the student: full, lora or qlora
LMBDA=${LMBDA:-}                             # share of steps on the student's own answers, 0 to 1; empty: 0.5, with SEQ_KD 0
BETA=${BETA:-}                               # 0: forward KL; 1: reverse KL; between: Jensen-Shannon; empty: 0.5
SEQ_KD=${SEQ_KD:-False}                      # True: learn from the teacher's answers instead of the answers in the data
TRAIN_DATA=${TRAIN_DATA:-}                   # file, folder or Hub id; empty: data/sft.jsonl
EVAL_FRACTION=${EVAL_FRACTION:-0.1}          # share of the data that is held out to compare student and teacher
OUTPUT_DIR=${OUTPUT_DIR:-}                   # empty: output/GKD-MODE or SeqKD-MODE, followed by LMBDA and BETA if given
LEARNING_RATE=${LEARNING_RATE:-}             # empty: 2e-5 for full weights, 1e-4 for adapters and for the demo models
BATCH_SIZE=${BATCH_SIZE:-4}                  # rows per device and forward pass
ACCUMULATION=${ACCUMULATION:-1}              # passes per step; rows per step = batch x accumulation x devices
EPOCHS=${EPOCHS:-1}                          # passes over the data
MAX_STEPS=${MAX_STEPS:-}                     # stop after this number of steps; empty: all, with the demo models 16
LAUNCH=${LAUNCH:-auto}                       # a file name in accelerate_configs/; auto: chosen by the number of GPUs
NUM_PROCESSES=${NUM_PROCESSES:-}             # processes on this node; empty: one per GPU, or one
NNODES=${NNODES:-1}                          # number of nodes; each node runs this script with its own NODE_RANK
NODE_RANK=${NODE_RANK:-0}                    # rank of this node, from 0
MASTER_ADDR=${MASTER_ADDR:-}                 # address of the first node; not used with one node
MASTER_PORT=${MASTER_PORT:-}                 # a free port on the first node; not used with one node
NODE_TIMEOUT=${NODE_TIMEOUT:-600}            # seconds that the nodes wait for each other
PYTHON=${PYTHON:-$(command -v python || command -v python3)}

exec "$PYTHON" -m utils.launch --variables train_gkd.py "$@"
