#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, a task a GPU:
#
#     sbatch --nodes=4 tools/slurm.sh configs/oreal_7b.py --set model=DIR
#
# The checkout and the run directory lie on a file system that all nodes share. Before
# the time limit, or when the job is preempted, the run saves itself and is queued again.
#SBATCH --job-name=oreal
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --open-mode=append
set -uo pipefail

# Every task must see all GPUs of its node, of which JAX then takes one: no
# --gpus-per-task, no --gpu-bind. Each finds its place among the others by itself.
again=false
stop() {
  again=true
  scancel --signal=TERM "$SLURM_JOB_ID" # the tasks, not this script
}
trap stop USR1

srun --kill-on-bad-exit=0 .venv/bin/oreal train "$@" &
step=$!
wait "$step"
code=$?
if $again; then
  wait "$step" # the trap ended the first wait
  code=$?
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
