#!/bin/bash
# Several nodes under SLURM: edit the sizes and the exports, then run sbatch recipes/slurm.sh in the project's folder.
# The project, MODEL, TRAIN_DATA and OUTPUT_DIR must be on a disk that all nodes share.
#SBATCH --job-name=rlhf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail

export RLHF_TYPE=DPO TRAIN_MODE=full LAUNCH=zero3
export MODEL=Qwen/Qwen2.5-7B-Instruct
export TRAIN_DATA=data/preference.jsonl
export OUTPUT_DIR=output/slurm-$SLURM_JOB_ID
export NNODES=$SLURM_NNODES
export MASTER_ADDR MASTER_PORT=29500
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# one launcher per node; if a node fails, SLURM terminates the others
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID bash rlhf_run.sh "$@"' rlhf "$@"
