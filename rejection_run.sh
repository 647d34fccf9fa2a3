#!/usr/bin/env bash
# Samples, scores and selects answers: bash rejection_run.sh. Set variables from outside; flags go to
# rejection_sampling.py: MODEL=Qwen/Qwen2.5-7B-Instruct TRAIN_DATA=my_prompts.jsonl \
#   REWARD=output/Reward-lora THEN=DPO bash rejection_run.sh --rounds 2
# A typed flag wins over a recipe (--config FILE), a recipe over a variable, a variable over its default.
set -euo pipefail
cd "$(dirname "$0")"
set -a                                       # export every variable below

MODEL=${MODEL:-}                             # model folder or Hub id; empty: SmolLM2-135M, made without a hub
TRAIN_DATA=${TRAIN_DATA:-}                   # prompts: file, folder or Hub id; empty: data/prompts.jsonl
REWARD=${REWARD:-}                           # FILE.py:FUNCTION or a reward model; empty: the sample's reward
COMPLETIONS=${COMPLETIONS:-}                 # answers per prompt; empty: 8
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-}           # maximum tokens of an answer; empty: 512, with the sample data 64
SELECT=${SELECT:-best}                       # best, top_k, threshold or pairs
WRITE=${WRITE:-SFT,DPO,KTO,Reward}           # files to write
THEN=${THEN:-}                               # method of rlhf_run.sh that trains on the result; empty: no training
ROUNDS=${ROUNDS:-1}                          # with THEN: rounds of sampling and training
TRAIN_MODE=${TRAIN_MODE:-lora}               # with THEN: full, lora or qlora
EPOCHS=${EPOCHS:-}                           # with THEN: passes over the selected data; empty: 1, with the sample data 2
EVAL_FRACTION=${EVAL_FRACTION:-}             # with THEN: share of the prompts held out; empty: 0.1, with the sample data 0.2
OUTPUT_DIR=${OUTPUT_DIR:-}                   # empty: output/rejection, with THEN output/rejection-METHOD
LAUNCH=${LAUNCH:-auto}                       # a file name in accelerate_configs/; auto: chosen by the number of GPUs
NUM_PROCESSES=${NUM_PROCESSES:-}             # processes on this node; empty: one per GPU, or one
PYTHON=${PYTHON:-$(command -v python || command -v python3)}

exec "$PYTHON" -m utils.launch --variables rejection_sampling.py "$@"
