#!/usr/bin/env bash
# One process per GPU node under Slurm. usage: sbatch -N 2 --gpus-per-node=8 launch/gpu_nodes.sh CONFIG WORKDIR [FLAGS ...]
# WORKDIR must be on storage that every node sees. JAX finds the coordinator from Slurm's variables.
set -euo pipefail
config=${1:?config file}
workdir=${2:?run folder on shared storage}
shift 2
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
  "${PYTHON:-.venv/bin/python}" launch/train.py --config="$config" --workdir="$workdir" --distributed "$@"
