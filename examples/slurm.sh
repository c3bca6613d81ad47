#!/bin/bash
# One run on 2 machines with 4 GPUs each:  sbatch examples/slurm.sh
# srun starts torchrun once on each machine, and torchrun the ranks. All machines see the directory of the run.
#SBATCH --job-name=policygrad
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

RANKS=${RANKS:-4}                  # on each machine
OUT=${OUT:-runs/slurm-$SLURM_JOB_ID}
read -r HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
PORT=$((20000 + SLURM_JOB_ID % 20000))

# A job that was requeued goes on from its last checkpoint.
if [ -e "$OUT/config.json" ]; then
  COMMAND=(resume "$OUT" --trust)
else
  COMMAND=(train grpo arithmetic --device cuda --iterations 1000 --checkpoint-every 20 --out "$OUT")
fi

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$RANKS" --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" \
  -m policygrad "${COMMAND[@]}"
