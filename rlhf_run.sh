#!/usr/bin/env bash
# Trains a model on preferences: bash rlhf_run.sh. Every variable can be given from outside, and whatever follows goes
# to train_rlhf.py and wins: RLHF_TYPE=KTO TRAIN_MODE=qlora bash rlhf_run.sh --learning_rate 1e-5
set -euo pipefail
cd "$(dirname "$0")"

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

for ((i = 1; i < $#; i++)); do               # flags that decide what the variables below mean
  value=$((i + 1))
  case ${!i} in
    --rlhf_type) RLHF_TYPE=${!value} ;;
    --train_mode) TRAIN_MODE=${!value} ;;
    --train_data_path) TRAIN_DATA=${!value} ;;
    --eval_data_path) EVAL_FRACTION=0 ;;
    --reward_funcs | --reward_model_path) REWARD= GIVEN_REWARD=1 ;;
    --judge_model) GIVEN_REWARD=1 ;;         # beside REWARD where that is given
    --config) echo "refused: --config: a recipe has values of its own. Type: python -m utils.launch train_rlhf.py $*" >&2; exit 2 ;;
  esac
done
OUTPUT_DIR=${OUTPUT_DIR:-output/$RLHF_TYPE-$TRAIN_MODE}
if [ -z "$MODEL" ]; then
  MODEL=models/SmolLM2-135M-Instruct
  [ -e $MODEL ] || "$PYTHON" -m utils.demo_model $MODEL
fi
read -r sample batch accumulation reward taste < <("$PYTHON" -m rlhf_args.methods "$RLHF_TYPE")
if [ -n "$TRAIN_DATA" ]; then
  taste=
else
  TRAIN_DATA=$sample                         # with $taste: a run of minutes, the first flags; MAX_STEPS=-1 trains on all
  [ "$reward" = - ] || [ -n "${GIVEN_REWARD:-}" ] || REWARD=${REWARD:-$reward}
fi
BATCH_SIZE=${BATCH_SIZE:-$batch} ACCUMULATION=${ACCUMULATION:-$accumulation}
[ "$TRAIN_MODE" = full ] || LEARNING_RATE=${LEARNING_RATE:-1e-4}
case $REWARD in
  "") judge=() ;;
  *.py:*) judge=(--reward_funcs "$REWARD") ;;
  *) judge=(--reward_model_path "$REWARD") ;;
esac

job=(train_rlhf.py $taste --rlhf_type "$RLHF_TYPE" --train_mode "$TRAIN_MODE" --model_name_or_path "$MODEL"
  --train_data_path "$TRAIN_DATA" --eval_fraction "$EVAL_FRACTION" --output_dir "$OUTPUT_DIR"
  --per_device_train_batch_size "$BATCH_SIZE" --per_device_eval_batch_size 4 ${judge[@]+"${judge[@]}"}
  --gradient_accumulation_steps "$ACCUMULATION" --num_train_epochs "$EPOCHS" --logging_steps 1
  ${LEARNING_RATE:+--learning_rate "$LEARNING_RATE"} ${MAX_STEPS:+--max_steps "$MAX_STEPS"}
  --resume_from_checkpoint auto "$@")

export LAUNCH NUM_PROCESSES NNODES NODE_RANK MASTER_ADDR MASTER_PORT NODE_TIMEOUT
exec "$PYTHON" -m utils.launch "${job[@]}"
