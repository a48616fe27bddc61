#!/usr/bin/env bash
# Creates a TPU VM or pod slice with gcloud and runs jobs on it. In order:
#
#   launch/tpu.sh create  NAME --type=v5litepod-16 --zone=us-west4-a [--spot] [--queued [--slices=2]] [--version=...]
#   launch/tpu.sh status  NAME --zone=...          wait until it is READY (ACTIVE, where it was queued)
#   launch/tpu.sh install NAME --zone=...          this checkout's last commit, on every worker
#   launch/tpu.sh run     NAME --zone=... [--env HF_TOKEN] -- policy --gin_file=... --gin.MODEL_DIR="'gs://BUCKET/run'"
#   launch/tpu.sh logs    NAME --zone=... [--worker=0] [--slice=0]     follow it
#   launch/tpu.sh stop    NAME --zone=...          SIGTERM: the run saves; the same run command resumes it
#   launch/tpu.sh renew   NAME --type=... --zone=... [as for create]   replaces a spot machine that was preempted
#   launch/tpu.sh collect gs://BUCKET/run DIR      copies the run to this machine
#   launch/tpu.sh delete  NAME --zone=... [--queued]       the machine costs money until then
#
# Each takes --project=... and --dry_run, which only prints the commands. Further flags for gcloud come after --, such as
# -- --network=mine --tags=a; for run they come before a second one: -- --internal-ip -- policy ...
#
# --env sets a variable of the job, by default to its value in this shell, and --env_file=FILE those of a file
# (NAME[=VALUE] on each line): HF_TOKEN, TASKMASTER_DIR, TLDR_SOURCE. They are copied in a file that only you can read.
#
# With --slices=2 the machine is two slices of that type; give it to every command except collect. A job on several
# workers needs a MODEL_DIR that all of them can access, such as a bucket. docs/howto/tpu.md has all steps, with costs.
set -euo pipefail

die() { printf 'launch/tpu.sh: %s\n' "${1//[[:cntrl:]]/?}" >&2; exit 2; } # one line, whatever it quotes
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

[[ $# -ge 2 ]] || usage
command=$1
name=$2
shift 2

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/env.sh
source "$here/launch/env.sh"
zone='' type='' version='' worker=0 slice=0 slices=1 target='' spot=() project=() dry_run='' queued='' tool_flags=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --slice=*) slice=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --project=*) project=("$1") ;;
    --env=*) add_env "${1#*=}" ;;
    --env) [[ $# -ge 2 ]] || die '--env: give NAME or NAME=VALUE'; shift; add_env "$1" ;;
    --env_file=*) add_env_file "${1#*=}" ;;
    --spot) spot=(--spot) ;;
    --queued) queued=yes ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    --*) die "unknown flag '${1%%=*}' (write --FLAG=VALUE); flags for gcloud come after --" ;;
    *) [[ $command == collect && -z $target ]] || die 'an argument that is not a flag; the perl_jax command comes after --'
       target=$1 ;;
  esac
  shift
done

split_words gcloud "$@"
[[ $command == collect || $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "'$name': a name has only a-z, 0-9 and -"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices: give a number"
[[ ${#env_names[@]} -eq 0 || $command == run ]] || die "$command: --env and --env_file are for run"

# Runs a command; in a dry run only prints it, quoted for a shell.
run_command() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    type -P "$1" > /dev/null || die "there is no $1 on PATH; install it"
    "$@"
  fi
}

tpu_vm() { run_command gcloud compute tpus tpu-vm "$1" "$name" "${@:2}" --zone="$zone" "${project[@]}" "${tool_flags[@]}"; }
resource() {
  run_command gcloud compute tpus queued-resources "$1" "$name" "${@:2}" --zone="$zone" "${project[@]}" "${tool_flags[@]}"
}

# Several slices are accessed through their queued resource.
ssh_to() {
  if [[ $slices -gt 1 ]]; then
    resource ssh --node="$1" --worker="$2" --command="$3"
  else
    tpu_vm ssh --worker="$2" --command="$3"
  fi
}
ssh_all() { ssh_to all all "$1"; }
scp_all() {
  local kind=tpu-vm node=()
  if [[ $slices -gt 1 ]]; then
    kind=queued-resources node=(--node=all)
  fi
  run_command gcloud compute tpus "$kind" scp "$1" "$name:$2" "${node[@]}" --worker=all --zone="$zone" "${project[@]}" \
    "${tool_flags[@]}"
}

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
    tpu7x-*) die "--type=$1: Ironwood is available on GKE only: launch/gke.sh run ... --type=$1" ;;
    *) die "--type=$1: give v4-N, v5litepod-N, v5p-N or v6e-N, or --version=..." ;;
  esac
}

check_create() {
  [[ -n $type ]] || die '--type=... is missing, such as --type=v5litepod-16'
  [[ -n $version ]] || version=$(runtime "$type")
  [[ $slices -eq 1 || -n $queued ]] || die "--slices=$slices: several slices require --queued"
}
create() {
  if [[ -n $queued ]]; then # waits in the queue for capacity; a spot machine may be preempted
    local node=(--node-id="$name")
    [[ $slices -eq 1 ]] || node=(--node-count="$slices" --node-prefix="$name")
    resource create "${node[@]}" --accelerator-type="$type" --runtime-version="$version" "${spot[@]}"
  else
    tpu_vm create --accelerator-type="$type" --version="$version" "${spot[@]}"
  fi
}
state() {
  if [[ -n $queued || $slices -gt 1 ]]; then
    resource describe --format='value(state.state)'
  else
    tpu_vm describe --format='value(state)'
  fi
}
delete() {
  if [[ -n $queued || $slices -gt 1 ]]; then
    resource delete --force --quiet
  else
    tpu_vm delete --quiet
  fi
}

case $command in
  create)
    check_create
    create
    ;;
  status)
    tpu_state=$(state) # a separate statement, so that its failure ends the script
    echo "$tpu_state"
    case $tpu_state in
      # Final states of preempted machines, queued or not: they never become ACTIVE again.
      SUSPENDED | FAILED | PREEMPTED | TERMINATED)
        echo "launch/tpu.sh: $name is $tpu_state and will not recover: renew it with the flags of create, then install" \
          'and run; the same run command resumes from the last checkpoint' >&2
        exit 75
        ;;
    esac
    ;;
  renew)
    check_create # before anything is deleted
    tpu_state=$(tool_flags=() && state)
    case $tpu_state in
      SUSPENDED | FAILED | PREEMPTED | TERMINATED) ;;
      *) [[ -n $dry_run ]] || die "renew: $name is $tpu_state, and not SUSPENDED, FAILED, PREEMPTED or TERMINATED" ;;
    esac
    [[ -z $dry_run ]] || echo "$tpu_state"
    flags=("${tool_flags[@]}") # they apply to create, not to delete
    tool_flags=()
    delete
    tool_flags=("${flags[@]}")
    create
    ;;
  install)
    archive=$(mktemp -u).tar.gz
    [[ -n $dry_run ]] && archive=perl_jax.tar.gz
    run_command git -C "$here" archive --format=tar.gz --output="$archive" HEAD
    scp_all "$archive" perl_jax.tar.gz
    # The system's Python is too old; uv installs one.
    ssh_all 'rm -rf perl_jax && mkdir perl_jax && tar -xzf perl_jax.tar.gz -C perl_jax && cd perl_jax && python3 -m pip install -q --user uv && python3 -m uv venv -q --python 3.11 .venv && python3 -m uv pip install -q --python .venv/bin/python -e ".[tpu,hf,datasets]"'
    [[ -n $dry_run ]] || rm -f "$archive"
    ;;
  run)
    [[ ${job_command[0]:-} != perl_jax ]] || job_command=("${job_command[@]:1}")
    [[ ${#job_command[@]} -gt 0 ]] || die 'run: the perl_jax command comes after --, such as -- policy --gin_file=...'
    variables=''
    if [[ ${#env_names[@]} -gt 0 ]]; then
      variables='--env_file=perl_jax.env '
      if [[ -n $dry_run ]]; then
        echo "# perl_jax.env: ${env_names[*]}"
        scp_all perl_jax.env perl_jax.env
      else
        file=$(mktemp) # readable by its owner only, and so is the copy
        trap 'rm -f "$file"' EXIT
        env_lines > "$file"
        scp_all "$file" perl_jax.env
      fi
    fi
    line="perl_jax/launch/worker.sh $variables$(printf '%q ' "${job_command[@]}")"
    ssh_all "setsid nohup $line> perl_jax.log 2>&1 < /dev/null & sleep 1" # setsid: the job survives the end of this connection
    ;;
  logs) ssh_to "$slice" "$worker" 'tail -n 50 -F perl_jax.log' ;;
  stop) ssh_all 'touch perl_jax.stop; [ ! -s perl_jax.pid ] || kill -TERM "$(cat perl_jax.pid)" || true' ;;
  collect)
    [[ $name == gs://* && -n $target && $target != -* ]] ||
      die 'collect: give the run and the target: collect gs://BUCKET/run DIR'
    run_command mkdir -p "$target"
    run_command gcloud storage cp --recursive "$name" "$target" "${tool_flags[@]}"
    ;;
  delete) delete ;;
  *) die "no command is called '$command'; create, status, install, run, logs, stop, renew, collect, delete are" ;;
esac
