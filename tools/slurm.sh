#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, one task per node:
#
#     sbatch --nodes=4 tools/slurm.sh configs/oreal_7b.py --set model=DIR
#
# The checkout and the run directory must be on a file system that all nodes share.
# Before the time limit, or when the job is preempted, the run is saved and the job
# queued again.
#SBATCH --job-name=oreal
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --open-mode=append
set -uo pipefail

# A task has all GPUs of its node: an engine of several GPUs (decode_tensor) uses those
# of one task. SLURM's variables tell each task its index.
again=false
stop() {
  again=true
  scancel --signal=TERM "$SLURM_JOB_ID" # the tasks, not this script
}
trap stop USR1

# Since SLURM 22.05 srun does not take --cpus-per-task from sbatch's environment; without
# it a task may be bound to one core.
srun --kill-on-bad-exit=0 \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  .venv/bin/oreal train "$@" &
step=$!
wait "$step"
code=$?
if $again; then
  wait "$step" # the trap ended the first wait
  code=$?
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
