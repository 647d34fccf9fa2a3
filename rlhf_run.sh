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
OUTPUT_DIR=${OUTPUT_DIR:-}                   # empty: output/METHOD-MODE
LEARNING_RATE=${LEARNING_RATE:-}             # empty: the method's own for full weights, 1e-4 for adapters
BATCH_SIZE=${BATCH_SIZE:-2}                  # rows a device and forward pass; KTO needs 2
ACCUMULATION=${ACCUMULATION:-2}              # forward passes a step; rows a step = batch x accumulation x devices
EPOCHS=${EPOCHS:-1}                          # passes over the data
MAX_STEPS=${MAX_STEPS:-}                     # stop after so many steps; empty: all (the shipped job on a CPU: 12)
LAUNCH=${LAUNCH:-auto}                       # a name in accelerate_configs/; auto: by the GPUs that are there
NUM_PROCESSES=${NUM_PROCESSES:-}             # empty: one for each GPU, or one
PYTHON=${PYTHON:-$(command -v python || command -v python3)}

for ((i = 1; i < $#; i++)); do               # flags that decide what the variables below mean
  value=$((i + 1))
  case ${!i} in
    --rlhf_type) RLHF_TYPE=${!value} ;;
    --train_mode) TRAIN_MODE=${!value} ;;
    --train_data_path) TRAIN_DATA=${!value} ;;
    --eval_data_path) EVAL_FRACTION=0 ;;
    --config) echo "refused: --config: a recipe has values of its own. Type: accelerate launch train_rlhf.py $*" >&2; exit 2 ;;
  esac
done
OUTPUT_DIR=${OUTPUT_DIR:-output/$RLHF_TYPE-$TRAIN_MODE}
found=$("$PYTHON" -c "import os, torch; print(torch.cuda.device_count(), os.cpu_count())")
read -r gpus cores <<< "$found"
if [ "$LAUNCH" = auto ]; then
  case $gpus in 0) LAUNCH=cpu ;; 1) LAUNCH=single_gpu ;; *) LAUNCH=multi_gpu ;; esac
fi
if [ ! -e "accelerate_configs/$LAUNCH.yaml" ]; then
  echo "refused: LAUNCH=$LAUNCH: no such file in accelerate_configs/. There are auto $(ls accelerate_configs | sed 's/\.yaml//' | xargs)" >&2
  exit 2
fi
devices=$gpus
case $LAUNCH in cpu | single_gpu) devices=1 ;; esac
NUM_PROCESSES=${NUM_PROCESSES:-$devices}
if [ "$NUM_PROCESSES" -lt 1 ] || [ "$NUM_PROCESSES" -gt "$devices" ]; then
  echo "refused: LAUNCH=$LAUNCH with NUM_PROCESSES=$NUM_PROCESSES: from 1 to $devices processes, as $gpus GPUs are visible" >&2
  exit 2
fi
if [ -z "$MODEL" ]; then
  MODEL=models/SmolLM2-135M-Instruct
  [ -e $MODEL ] || "$PYTHON" -m utils.demo_model $MODEL
fi
if [ -z "$TRAIN_DATA" ]; then
  TRAIN_DATA=$("$PYTHON" -m rlhf_args.methods "$RLHF_TYPE")
  [ "$gpus" != 0 ] || MAX_STEPS=${MAX_STEPS:-12}   # a taste within minutes; MAX_STEPS=-1 trains on all of it
fi
extra=()
case $LAUNCH in
  cpu)
    # Large tensors come and go at every step: keep their memory instead of returning it (a fifth of the time).
    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
    extra=(--gradient_checkpointing False) ;;  # it buys GPU memory with time; here there is memory enough
  single_gpu) CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}; export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*} ;;
esac
[ "$TRAIN_MODE" = full ] || LEARNING_RATE=${LEARNING_RATE:-1e-4}

job=(train_rlhf.py --rlhf_type "$RLHF_TYPE" --train_mode "$TRAIN_MODE" --model_name_or_path "$MODEL"
  --train_data_path "$TRAIN_DATA" --eval_fraction "$EVAL_FRACTION" --output_dir "$OUTPUT_DIR"
  --per_device_train_batch_size "$BATCH_SIZE" --per_device_eval_batch_size 4
  --gradient_accumulation_steps "$ACCUMULATION" --num_train_epochs "$EPOCHS" --logging_steps 1
  ${LEARNING_RATE:+--learning_rate "$LEARNING_RATE"} ${MAX_STEPS:+--max_steps "$MAX_STEPS"}
  ${extra[@]+"${extra[@]}"} --resume_from_checkpoint auto "$@")

case " $* " in *" --check "* | *" --help "* | *" -h "*) exec "$PYTHON" "${job[@]}" ;; esac
"$PYTHON" "${job[@]}" --check > /dev/null      # a refusal is one message and status 2, however many processes follow
"$PYTHON" -m accelerate.commands.launch --config_file "accelerate_configs/$LAUNCH.yaml" \
  --num_processes "$NUM_PROCESSES" --num_cpu_threads_per_process "$(((cores + NUM_PROCESSES - 1) / NUM_PROCESSES))" \
  "${job[@]}"
