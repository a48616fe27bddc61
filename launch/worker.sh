#!/usr/bin/env bash
# What each worker of a pod runs: a perl_jax command as one process of the job (launch/tpu.sh run starts it).
#
#   launch/worker.sh [--env NAME[=VALUE]]... [--env_file=FILE] policy --gin_file=... --gin.MODEL_DIR=...
#
# A file ~/perl_jax.env is launch/tpu.sh's: it is read and removed. Exit code 75 says that the job was preempted and has
# saved. If the machine stays after all, it goes on at once; launch/tpu.sh stop leaves the file ~/perl_jax.stop, which
# says not to. 76 says that another worker was lost: nothing is to be gained before that one is back.
set -uo pipefail

die() { echo "launch/worker.sh: $1" >&2; exit 2; }

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
# shellcheck source=launch/env.sh
source "$checkout/launch/env.sh"
while [[ $# -gt 0 ]]; do
  case $1 in
    --env=*) add_env "${1#*=}" ;;
    --env) [[ $# -ge 2 ]] || die '--env: give NAME or NAME=VALUE'; shift; add_env "$1" ;;
    --env_file=*)
      if [[ ${1#*=} -ef ~/perl_jax.env ]]; then trap 'rm -f ~/perl_jax.env' EXIT; fi # whatever is in it
      add_env_file "${1#*=}"
      ;;
    --*) die "unknown flag '$1'" ;;
    *) break ;;
  esac
  shift
done
[[ $# -gt 0 ]] || die 'give what perl_jax is to do, such as policy --gin_file=...'
# In a shell of its own, so that no variable of the job is one of this script's.
perl_jax() (
  for _place in "${!env_names[@]}"; do
    export "${env_names[_place]}=${env_values[_place]}" || die "--env ${env_names[_place]}: a shell cannot set it"
  done
  exec .venv/bin/perl_jax "$@" --distributed
)

cd "$checkout" || exit 2
[[ -x .venv/bin/perl_jax ]] || die "there is no $checkout/.venv/bin/perl_jax; install it first (launch/tpu.sh install)"
rm -f ~/perl_jax.stop ~/perl_jax.env
while :; do
  perl_jax "$@"
  code=$?
  echo "launch/worker.sh: exit code $code"
  if [[ $code -ne 75 || -e ~/perl_jax.stop ]]; then
    exit "$code"
  fi
done
