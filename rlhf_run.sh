#!/usr/bin/env bash
# Trains a model on preferences: bash rlhf_run.sh. Set variables from outside; flags that follow go to train_rlhf.py:
#   RLHF_TYPE=KTO TRAIN_MODE=qlora bash rlhf_run.sh --learning_rate 1e-5
# A typed flag wins over a recipe (--config FILE), a recipe over a variable, a variable over its default.
set -euo pipefail
cd "$(dirname "$0")"
set -a                                       # export every variable below

RLHF_TYPE=${RLHF_TYPE:-DPO}                  # a row of rlhf_args/methods.py: DPO CPO SimPO CPOSimPO ORPO KTO Reward SFT RLOO GRPO PPO
TRAIN_MODE=${TRAIN_MODE:-lora}               # full, lora or qlora
MODEL=${MODEL:-}                             # model folder or Hub id; empty: SmolLM2-135M, made without a hub
TRAIN_DATA=${TRAIN_DATA:-}                   # file, folder or Hub id; empty: the method's sample in data/
REWARD=${REWARD:-}                           # RLOO, GRPO, PPO: FILE.py:FUNCTION or a reward model; empty: with the sample, one
EVAL_FRACTION=${EVAL_FRACTION:-0.07}         # share of the data held out, on which the result is measured
OUTPUT_DIR=${OUTPUT_DIR:-}                   # empty: output/METHOD-MODE
LEARNING_RATE=${LEARNING_RATE:-}             # empty: the method's own for full weights, 1e-4 for adapters
BATCH_SIZE=${BATCH_SIZE:-}                   # rows a device and forward pass; empty: 2, of sampled answers 8
ACCUMULATION=${ACCUMULATION:-}               # passes a step, empty: 2, or 1; rows a step = batch x accumulation x devices
EPOCHS=${EPOCHS:-1}                          # passes over the data
MAX_STEPS=${MAX_STEPS:-}                     # stop after so many steps; empty: all (of the shipped data a few)
LAUNCH=${LAUNCH:-auto}                       # a name in accelerate_configs/; auto: by the GPUs that are there
NUM_PROCESSES=${NUM_PROCESSES:-}             # on this node; empty: one for each GPU, or one
NNODES=${NNODES:-1}                          # nodes, each of which runs this script with its NODE_RANK from 0 on
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-}                 # the first node and a free port there; one node needs neither
MASTER_PORT=${MASTER_PORT:-}
NODE_TIMEOUT=${NODE_TIMEOUT:-600}            # seconds that the nodes wait for each other
PYTHON=${PYTHON:-$(command -v python || command -v python3)}

exec "$PYTHON" -m utils.launch --variables train_rlhf.py "$@"
