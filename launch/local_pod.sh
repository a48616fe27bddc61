#!/usr/bin/env bash
# Runs a perl_jax command as N processes on this machine's CPU, as the N hosts of a TPU slice would run it:
#
#   launch/local_pod.sh 4 -- perl_jax policy --gin_file=recipes/toy_policy.gin --gin.MODEL_DIR="'runs/pod'" ...
#   DEVICES=2 launch/local_pod.sh 4 -- ...      2 (fake) devices a process
#   LOGS=logs launch/local_pod.sh 4 -- ...      the output of process I in logs/I.log, not only that of the first here
#
# If one process fails, the others are stopped, and its exit code is that of the whole. SIGTERM is passed on to all.
set -euo pipefail

usage() { echo "usage: launch/local_pod.sh N -- perl_jax COMMAND ..." >&2; exit 2; }
[[ $# -ge 4 && $1 =~ ^[1-9][0-9]*$ && $2 == -- && $3 == perl_jax ]] || usage
count=$1
shift 3

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
# A port that is free now.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')

pids=()
for ((i = 0; i < count; i++)); do
  DEVICES=${DEVICES:-1} "$here/launch/local.sh" "$@" --coordinator_address="localhost:$port" \
    --process_count="$count" --process_index="$i" > "$logs/$i.log" 2>&1 &
  pids+=($!)
done
stop() { kill -"$1" "${pids[@]}" 2>/dev/null || true; }
trap 'stop TERM' TERM INT
tail -n +1 -f --pid=$$ "$logs/0.log" >&2 &
tail=$!

code=0
left=$count
while [[ $left -gt 0 ]]; do
  status=0
  wait -n -p ended "${pids[@]}" || status=$?
  [[ -n ${ended:-} ]] || continue # a signal came in between
  ((left -= 1)) || true
  for i in "${!pids[@]}"; do
    if [[ ${pids[i]} == "$ended" ]]; then
      unset "pids[$i]"
      if [[ $status -ne 0 && $code -eq 0 ]]; then
        code=$status
        if [[ $status -ne 75 ]]; then # 75: preempted, and the others are too
          echo "launch/local_pod.sh: process $i of $count ended with exit code $status; its log: $logs/$i.log" >&2
          tail -n 3 "$logs/$i.log" >&2
          sleep "${GRACE:-5}"
          stop KILL
        fi
      fi
    fi
  done
done
sleep 0.2
kill "$tail" 2>/dev/null || true
exit "$code"
