#!/usr/bin/env bash
# What each worker of a pod runs: a perl_jax command as one process of the job (launch/tpu.sh run starts it).
#
# Exit code 75 says that the job was preempted and has saved. If the machine stays after all, it goes on at once;
# launch/tpu.sh stop leaves the file ~/perl_jax.stop, which says not to.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
rm -f ~/perl_jax.stop
while :; do
  .venv/bin/perl_jax "$@" --distributed
  code=$?
  echo "launch/worker.sh: exit code $code"
  if [[ $code -ne 75 || -e ~/perl_jax.stop ]]; then
    exit "$code"
  fi
done
