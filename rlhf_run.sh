#!/usr/bin/env bash
# Trains a model with one of the methods below: bash rlhf_run.sh. Set variables from outside; flags go to train_rlhf.py:
#   RLHF_TYPE=KTO TRAIN_MODE=qlora bash rlhf_run.sh --learning_rate 1e-5
# A typed flag wins over a recipe (--config FILE), a recipe over a variable, a variable over its default.
set -euo pipefail
cd "$(dirname "$0")"
set -a                                       # export every variable below

RLHF_TYPE=${RLHF_TYPE:-DPO}                  # DPO CPO SimPO CPOSimPO ORPO KTO Reward SFT RLOO GRPO PPO
TRAIN_MODE=${TRAIN_MODE:-lora}               # full, lora or qlora
MODEL=${MODEL:-}                             # model folder or Hub id; empty: SmolLM2-135M, made without a hub
TRAIN_DATA=${TRAIN_DATA:-}                   # file, folder or Hub id; empty: the method's sample in data/
REWARD=${REWARD:-}                           # RLOO, GRPO, PPO: FILE.py:FUNCTION or a reward model; empty: the sample's reward
EVAL_FRACTION=${EVAL_FRACTION:-0.07}         # share of the data that is held out to measure the result
OUTPUT_DIR=${OUTPUT_DIR:-}                   # empty: output/METHOD-MODE
LEARNING_RATE=${LEARNING_RATE:-}             # empty: the method's default for full weights, 1e-4 for adapters
BATCH_SIZE=${BATCH_SIZE:-}                   # rows per device and forward pass; empty: 2, online methods 8
ACCUMULATION=${ACCUMULATION:-}               # passes per step; empty: 2, online 1; rows per step = batch x accumulation x devices
EPOCHS=${EPOCHS:-1}                          # passes over the data
MAX_STEPS=${MAX_STEPS:-}                     # stop after this number of steps; empty: all, with the sample data a few
LAUNCH=${LAUNCH:-auto}                       # a file name in accelerate_configs/; auto: chosen by the number of GPUs
NUM_PROCESSES=${NUM_PROCESSES:-}             # processes on this node; empty: one per GPU, or one
NNODES=${NNODES:-1}                          # number of nodes; each node runs this script with its own NODE_RANK
NODE_RANK=${NODE_RANK:-0}                    # rank of this node, from 0
MASTER_ADDR=${MASTER_ADDR:-}                 # address of the first node; not used with one node
MASTER_PORT=${MASTER_PORT:-}                 # a free port on the first node; not used with one node
NODE_TIMEOUT=${NODE_TIMEOUT:-600}            # seconds that the nodes wait for each other
PYTHON=${PYTHON:-$(command -v python || command -v python3)}

exec "$PYTHON" -m utils.launch --variables train_rlhf.py "$@"
