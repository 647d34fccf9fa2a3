#!/usr/bin/env bash
# Samples answers, scores them, selects: bash rejection_run.sh. Set variables from outside; flags that follow go to
# rejection_sampling.py: MODEL=Qwen/Qwen2.5-7B-Instruct TRAIN_DATA=my_prompts.jsonl \
#   REWARD=output/Reward-lora THEN=DPO bash rejection_run.sh --rounds 2
# A typed flag wins over a recipe (--config FILE), a recipe over a variable, a variable over its default.
set -euo pipefail
cd "$(dirname "$0")"
set -a                                       # export every variable below

MODEL=${MODEL:-}                             # model folder or Hub id; empty: SmolLM2-135M, made without a hub
TRAIN_DATA=${TRAIN_DATA:-}                   # prompts: file, folder or Hub id; empty: data/prompts.jsonl
REWARD=${REWARD:-}                           # FILE.py:FUNCTION or a reward model; empty: with the sample, brevity
COMPLETIONS=${COMPLETIONS:-}                 # answers to a prompt; empty: 8
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-}           # longest answer; empty: 512, of the sample 64
SELECT=${SELECT:-best}                       # best, top_k, threshold or pairs
WRITE=${WRITE:-SFT,DPO,KTO,Reward}           # files to write
THEN=${THEN:-}                               # a method of rlhf_run.sh to train with on the result; empty: none
ROUNDS=${ROUNDS:-1}                          # with THEN: how often
TRAIN_MODE=${TRAIN_MODE:-lora}               # with THEN: full, lora or qlora
EPOCHS=${EPOCHS:-}                           # with THEN: passes over the result; empty: 1, of the sample 2
EVAL_FRACTION=${EVAL_FRACTION:-}             # share of the prompts on which THEN's models are measured; empty: 0.1, of the sample 0.2
OUTPUT_DIR=${OUTPUT_DIR:-}                   # empty: output/rejection, output/rejection-THEN
LAUNCH=${LAUNCH:-auto}                       # a name in accelerate_configs/; auto: by the GPUs that are there
NUM_PROCESSES=${NUM_PROCESSES:-}             # on this node; empty: one for each GPU, or one
PYTHON=${PYTHON:-$(command -v python || command -v python3)}

exec "$PYTHON" -m utils.launch --variables rejection_sampling.py "$@"
