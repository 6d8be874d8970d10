#!/usr/bin/env bash
# One process a node under Slurm. usage: sbatch -N 2 --gpus-per-node=8 launch/slurm.sh CONFIG WORKDIR [FLAGS ...]
# WORKDIR must be on storage that every node sees. JAX finds the coordinator from Slurm's variables.
# DRY=1 launch/slurm.sh CONFIG WORKDIR prints the command and runs nothing.
#
# Two minutes before the time limit every process gets SIGUSR1, and SIGTERM when the job is preempted: the run saves,
# exits with 143, and the job goes back into the queue, where the same command goes on from the checkpoint. So it does
# after status 75, of a run that stood still. RESTARTS (100) is how often at most. A node that fails brings the job back
# by itself (--requeue).
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
config=${1:?config file}
workdir=${2:?run folder on shared storage}
shift 2
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

command=(srun --ntasks-per-node=1 --kill-on-bad-exit=0
  "${PYTHON:-.venv/bin/python}" launch/train.py --config="$config" --workdir="$workdir" --distributed "$@")
if [ -n "${DRY:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi

# The shell outlives the signals that end its processes, since it has to put the job back.
trap '' USR1 TERM
status=0
"${command[@]}" || status=$?
if [[ "$status" =~ ^(143|75)$ ]] && [ -n "${SLURM_JOB_ID:-}" ] &&
  [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-100}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
