#!/usr/bin/env bash
# Trains a model on preferences: bash rlhf_run.sh. Every variable can be given from outside, and whatever follows goes
# to train_rlhf.py and wins: RLHF_TYPE=KTO TRAIN_MODE=qlora bash rlhf_run.sh --learning_rate 1e-5
set -euo pipefail
cd "$(dirname "$0")"

RLHF_TYPE=${RLHF_TYPE:-DPO}                  # a row of rlhf_args/methods.py: DPO CPO SimPO CPOSimPO ORPO KTO Reward SFT
TRAIN_MODE=${TRAIN_MODE:-lora}               # full, lora or qlora
MODEL=${MODEL:-}                             # model folder or Hub id; empty: SmolLM2-135M, made without a hub
TRAIN_DATA=${TRAIN_DATA:-}                   # file, folder or Hub id; empty: the method's sample in data/
EVAL_FRACTION=${EVAL_FRACTION:-0.07}         # share of the data held out, on which the result is measured
OUTPUT_DIR=${OUTPUT_DIR:-output/$RLHF_TYPE-$TRAIN_MODE}
LEARNING_RATE=${LEARNING_RATE:-}             # empty: the method's own for full weights, 1e-4 for adapters
BATCH_SIZE=${BATCH_SIZE:-2}                  # rows a device and forward pass; KTO needs 2
ACCUMULATION=${ACCUMULATION:-2}              # forward passes a step; rows a step = batch x accumulation x devices
EPOCHS=${EPOCHS:-1}                          # passes over the data
MAX_STEPS=${MAX_STEPS:-}                     # stop after so many steps; empty: all (the shipped job on a CPU: 12)
LAUNCH=${LAUNCH:-auto}                       # a name in accelerate_configs/; auto: by the GPUs that are there
NUM_PROCESSES=${NUM_PROCESSES:-}             # empty: one for each GPU, or one
PYTHON=${PYTHON:-python}

gpus=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")
if [ "$LAUNCH" = auto ]; then
  case $gpus in 0) LAUNCH=cpu ;; 1) LAUNCH=single_gpu ;; *) LAUNCH=multi_gpu ;; esac
fi
if [ -z "$MODEL" ]; then
  MODEL=models/SmolLM2-135M-Instruct
  [ -e $MODEL ] || "$PYTHON" -m utils.demo_model $MODEL
fi
if [ -z "$TRAIN_DATA" ]; then
  TRAIN_DATA=$("$PYTHON" -m rlhf_args.methods "$RLHF_TYPE")
  [ "$gpus" != 0 ] || MAX_STEPS=${MAX_STEPS:-12}   # a taste within minutes; MAX_STEPS=-1 trains on all of it
fi
NUM_PROCESSES=${NUM_PROCESSES:-$((gpus > 1 ? gpus : 1))}
extra=()
if [ "$LAUNCH" = cpu ]; then
  [ "$NUM_PROCESSES" = 1 ] || { echo "refused: LAUNCH=cpu runs one process, not NUM_PROCESSES=$NUM_PROCESSES" >&2; exit 2; }
  # Large tensors come and go at every step: keep their memory instead of returning it (a fifth of the time).
  export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 DS_ACCELERATOR=cpu
  extra=(--gradient_checkpointing False)       # it buys GPU memory with time; here there is memory enough
fi
[ "$TRAIN_MODE" = full ] || LEARNING_RATE=${LEARNING_RATE:-1e-4}

job=(train_rlhf.py --rlhf_type "$RLHF_TYPE" --train_mode "$TRAIN_MODE" --model_name_or_path "$MODEL"
  --train_data_path "$TRAIN_DATA" --eval_fraction "$EVAL_FRACTION" --output_dir "$OUTPUT_DIR"
  --per_device_train_batch_size "$BATCH_SIZE" --per_device_eval_batch_size 4
  --gradient_accumulation_steps "$ACCUMULATION" --num_train_epochs "$EPOCHS" --logging_steps 1
  ${LEARNING_RATE:+--learning_rate "$LEARNING_RATE"} ${MAX_STEPS:+--max_steps "$MAX_STEPS"}
  "${extra[@]}" --resume_from_checkpoint auto "$@")

case " $* " in *" --check "* | *" --help "* | *" -h "*) exec "$PYTHON" "${job[@]}" ;; esac
"$PYTHON" "${job[@]}" --check > /dev/null      # a refusal is one message and status 2, however many processes follow
"$PYTHON" -m accelerate.commands.launch --config_file "accelerate_configs/$LAUNCH.yaml" \
  --num_processes "$NUM_PROCESSES" --num_cpu_threads_per_process "$((($(nproc) + NUM_PROCESSES - 1) / NUM_PROCESSES))" \
  "${job[@]}"
