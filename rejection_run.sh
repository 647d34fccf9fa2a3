#!/usr/bin/env bash
# Samples answers, scores them, selects: bash rejection_run.sh. Every variable can be given from outside, and whatever
# follows goes to rejection_sampling.py and wins: MODEL=Qwen/Qwen2.5-7B-Instruct TRAIN_DATA=my_prompts.jsonl \
#   REWARD=output/Reward-lora THEN=DPO bash rejection_run.sh --rounds 2
set -euo pipefail
cd "$(dirname "$0")"

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
EVAL_FRACTION=${EVAL_FRACTION:-}             # share of the prompts on which THEN's models are measured; empty: 0.1, of the sample 0.2
OUTPUT_DIR=${OUTPUT_DIR:-}                   # empty: output/rejection, output/rejection-THEN
LAUNCH=${LAUNCH:-auto}                       # a name in accelerate_configs/; auto: by the GPUs that are there
NUM_PROCESSES=${NUM_PROCESSES:-}             # on this node; empty: one for each GPU, or one
PYTHON=${PYTHON:-$(command -v python || command -v python3)}

for ((i = 1; i < $#; i++)); do               # flags that decide what the variables above mean
  value=$((i + 1))
  case ${!i} in
    --model_name_or_path) MODEL=${!value} ;;
    --train_data_path) TRAIN_DATA=${!value} ;;
    --reward_funcs | --reward_model_path) REWARD= GIVEN_REWARD=1 ;;
    --judge_model) GIVEN_REWARD=1 ;;         # beside REWARD where that is given
    --then) THEN=${!value} ;;
    --eval_data_path) EVAL_FRACTION=0 ;;
    --select) SELECT=${!value} ;;
    --config) echo "refused: --config: a recipe has values of its own. Type: python rejection_sampling.py $*" >&2; exit 2 ;;
  esac
done
OUTPUT_DIR=${OUTPUT_DIR:-output/rejection${THEN:+-$THEN}}
if [ -z "$MODEL" ]; then
  MODEL=models/SmolLM2-135M-Instruct
  [ -e $MODEL ] || "$PYTHON" -m utils.demo_model $MODEL
fi
taste=()
if [ -z "$TRAIN_DATA" ]; then                # a run of minutes
  TRAIN_DATA=data/prompts.jsonl EVAL_FRACTION=${EVAL_FRACTION:-0.2} MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-64}
  taste=(--max_samples 40 --system_prompt "Answer in one short sentence.")
  export EPOCHS=${EPOCHS:-2}                 # of the training, should there be one
  [ -n "${GIVEN_REWARD:-}" ] || REWARD=${REWARD:-data/rewards.py:brevity}
fi
case $REWARD in
  "") judge=() ;;
  *.py:*) judge=(--reward_funcs "$REWARD") ;;
  *) judge=(--reward_model_path "$REWARD") ;;
esac
then=()
[ -z "$THEN" ] || then=(--then "$THEN" --rounds "$ROUNDS" --train_mode "$TRAIN_MODE" --eval_fraction "${EVAL_FRACTION:-0.1}")

job=(rejection_sampling.py ${taste[@]+"${taste[@]}"} --model_name_or_path "$MODEL" --train_data_path "$TRAIN_DATA"
  ${judge[@]+"${judge[@]}"} --select "$SELECT" --write "$WRITE" --output_dir "$OUTPUT_DIR"
  ${COMPLETIONS:+--num_completions "$COMPLETIONS"} ${MAX_NEW_TOKENS:+--max_new_tokens "$MAX_NEW_TOKENS"}
  ${then[@]+"${then[@]}"} "$@")

export LAUNCH NUM_PROCESSES
[ -z "$THEN" ] || exec "$PYTHON" "${job[@]}"
exec "$PYTHON" -m utils.launch "${job[@]}"
