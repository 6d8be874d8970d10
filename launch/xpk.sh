#!/usr/bin/env bash
# One process a TPU host on GKE, by XPK (pip install xpk), which makes a JobSet of it.
# usage: IMAGE=gcr.io/PROJECT/rljax launch/xpk.sh NAME CLUSTER TPU_TYPE SLICES CONFIG WORKDIR [FLAGS ...]
#   e.g. launch/xpk.sh run1 my-cluster v5p-128 1 quickstart gs://bucket/runs/x
# IMAGE holds the repository in its working folder with rljax installed for TPU. WORKDIR is a bucket. GKE tells each
# host its place (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES, and MEGASCALE_* for several slices), from which JAX finds the
# coordinator. DRY=1 prints the command and runs nothing.
#
# A host that is taken away gets SIGTERM and two minutes: the run saves and exits with 143. That, and a host that dies,
# starts all of them anew, RESTARTS times at most, and the run goes on from its newest checkpoint. XPK does so on
# statuses from 127 on; 75 is that of a run that stood still; 1 and 2, with which a run fails by itself, end it.
set -euo pipefail
name=${1:?name of the workload}
cluster=${2:?cluster}
type=${3:?TPU type, such as v5p-128}
slices=${4:?number of slices}
config=${5:?config file}
workdir=${6:?run folder in a bucket}
shift 6

# `exec`, so that the signal reaches the run and not a shell around it.
train="exec ${PYTHON:-python3} launch/train.py $(printf '%q ' --config="$config" --workdir="$workdir" --distributed "$@")"
command=(xpk workload create
  --workload="$name" --cluster="$cluster" --tpu-type="$type" --num-slices="$slices"
  --docker-image="${IMAGE:?image with the repository and rljax, such as gcr.io/PROJECT/rljax}"
  --max-restarts="${RESTARTS:-100}" --restart-on-exit-codes=75 --termination-grace-period-seconds=120
  --command="$train")
if [ -n "${DRY:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
"${command[@]}"
