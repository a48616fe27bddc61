#!/usr/bin/env bash
# Runs a perl_jax command as one process of a job, on each worker of a pod (started by launch/tpu.sh run).
#
#   launch/worker.sh [--env NAME[=VALUE]]... [--env_file=FILE] policy --gin_file=... --gin.MODEL_DIR=...
#
# The file ~/perl_jax.env comes from launch/tpu.sh; it is read and removed. Exit code 75 means that the job was preempted
# and has saved. If the machine still runs then, the job is restarted at once, unless launch/tpu.sh stop has created
# ~/perl_jax.stop. 76 means that another worker was lost; the job cannot resume before that worker is back.
set -uo pipefail

die() { printf 'launch/worker.sh: %s\n' "${1//[[:cntrl:]]/?}" >&2; exit 2; } # one line, whatever it quotes

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
# shellcheck source=launch/env.sh
source "$checkout/launch/env.sh"
while [[ $# -gt 0 ]]; do
  case $1 in
    --env=*) add_env "${1#*=}" ;;
    --env) [[ $# -ge 2 ]] || die '--env: give NAME or NAME=VALUE'; shift; add_env "$1" ;;
    --env_file=*)
      if [[ ${1#*=} -ef ~/perl_jax.env ]]; then trap 'rm -f ~/perl_jax.env' EXIT; fi # even if it is invalid
      add_env_file "${1#*=}"
      ;;
    --*) die "unknown flag '$1'" ;;
    *) break ;;
  esac
  shift
done
[[ $# -gt 0 ]] || die 'give a perl_jax command, such as policy --gin_file=...'
# In a subshell, so that the job's variables cannot overwrite those of this script.
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
  perl_jax "$@" &
  echo "$!" > ~/perl_jax.pid # for launch/tpu.sh stop
  wait "$!"
  code=$?
  rm -f ~/perl_jax.pid
  echo "launch/worker.sh: exit code $code"
  [[ $code -ne 143 ]] || code=75 # SIGTERM came before perl_jax could handle it: nothing is lost
  if [[ $code -ne 75 || -e ~/perl_jax.stop ]]; then
    exit "$code"
  fi
done
