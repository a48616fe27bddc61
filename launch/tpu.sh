#!/usr/bin/env bash
# From a TPU VM or pod slice to a finished run, with gcloud. In order:
#
#   launch/tpu.sh create  NAME --type=v5litepod-16 --zone=us-west4-a [--spot] [--queued] [--version=...]
#   launch/tpu.sh status  NAME --zone=...          wait until it is READY (ACTIVE, where it was queued)
#   launch/tpu.sh install NAME --zone=...          this checkout's last commit, on every worker
#   launch/tpu.sh run     NAME --zone=... -- policy --gin_file=... --gin.MODEL_DIR="'gs://BUCKET/run'"
#   launch/tpu.sh logs    NAME --zone=... [--worker=0]     follow it
#   launch/tpu.sh stop    NAME --zone=...          SIGTERM: it saves, and the same run goes on from there
#   launch/tpu.sh collect gs://BUCKET/run DIR      the run, to this machine
#   launch/tpu.sh delete  NAME --zone=... [--queued]       it costs money until then
#
# Each takes --project=... and --dry_run, which prints the commands and runs none. A job on several workers needs a
# MODEL_DIR that all of them see: a bucket. docs/tpu.md tells the whole way, with costs.
set -euo pipefail

die() { echo "launch/tpu.sh: $1" >&2; exit 2; }
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed '$d' >&2; exit 2; }

[[ $# -ge 2 ]] || usage
command=$1
name=$2
shift 2

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
zone='' type='' version='' worker=0 target='' spot=() project=() dry_run='' queued=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --project=*) project=("$1") ;;
    --spot) spot=(--spot) ;;
    --queued) queued=yes ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    --*) die "unknown flag '$1'" ;;
    *) [[ $command == collect && -z $target ]] || die "unexpected '$1'; what perl_jax is to do stands behind --"
       target=$1 ;;
  esac
  shift
done

# Prints a command as it could be typed; runs it unless that was all.
do_it() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

tpu_vm() { do_it gcloud compute tpus tpu-vm "$1" "$name" "${@:2}" --zone="$zone" "${project[@]}"; }
ssh_all() { tpu_vm ssh --worker=all --command="$1"; }

if [[ $command != collect ]]; then
  [[ -n $zone ]] || die '--zone=... is missing, such as --zone=us-west4-a'
fi

# The runtime of each kind of TPU (cloud.google.com/tpu/docs/runtimes).
runtime() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "--type=$1: give v4-N, v5litepod-N, v5p-N or v6e-N, or --version=..." ;;
  esac
}

case $command in
  create)
    [[ -n $type ]] || die '--type=... is missing, such as --type=v5litepod-16'
    [[ -n $version ]] || version=$(runtime "$type")
    if [[ -n $queued ]]; then # waits in line until there is room; a spot machine may be taken away again
      do_it gcloud compute tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
        --runtime-version="$version" "${spot[@]}" --zone="$zone" "${project[@]}"
    else
      tpu_vm create --accelerator-type="$type" --version="$version" "${spot[@]}"
    fi
    ;;
  status)
    if [[ -n $queued ]]; then
      do_it gcloud compute tpus queued-resources describe "$name" --zone="$zone" "${project[@]}" \
        --format='value(state.state)'
    else
      tpu_vm describe --format='value(state)'
    fi
    ;;
  install)
    archive=$(mktemp -u).tar.gz
    [[ -n $dry_run ]] && archive=perl_jax.tar.gz
    do_it git -C "$here" archive --format=tar.gz --output="$archive" HEAD
    do_it gcloud compute tpus tpu-vm scp "$archive" "$name":perl_jax.tar.gz --worker=all --zone="$zone" "${project[@]}"
    # The machines' own Python is too old; uv brings one.
    ssh_all 'rm -rf perl_jax && mkdir perl_jax && tar -xzf perl_jax.tar.gz -C perl_jax && cd perl_jax && python3 -m pip install -q --user uv && python3 -m uv venv -q --python 3.11 .venv && python3 -m uv pip install -q --python .venv/bin/python -e ".[tpu,hf,datasets]"'
    [[ -n $dry_run ]] || rm -f "$archive"
    ;;
  run)
    [[ $# -gt 0 ]] || die 'run: what perl_jax is to do stands behind --, such as -- policy --gin_file=...'
    [[ $1 == perl_jax ]] && shift
    # setsid: it goes on when this connection ends.
    ssh_all "setsid nohup perl_jax/launch/worker.sh $(printf '%q ' "$@")> perl_jax.log 2>&1 < /dev/null & sleep 1"
    ;;
  logs) tpu_vm ssh --worker="$worker" --command='tail -n 50 -F perl_jax.log' ;;
  stop) ssh_all 'touch perl_jax.stop; pkill -TERM -f "[.]venv/bin/perl_jax" || true' ;;
  collect)
    [[ $name == gs://* && -n $target ]] || die 'collect: give the run and where to: collect gs://BUCKET/run DIR'
    do_it mkdir -p "$target"
    do_it gcloud storage cp --recursive "$name" "$target"
    ;;
  delete)
    if [[ -n $queued ]]; then
      do_it gcloud compute tpus queued-resources delete "$name" --force --quiet --zone="$zone" "${project[@]}"
    else
      tpu_vm delete --quiet
    fi
    ;;
  *) die "no command is called '$command'; there are create, status, install, run, logs, stop, collect, delete" ;;
esac
