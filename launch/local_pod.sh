#!/usr/bin/env bash
# Runs a perl_jax command as N processes on this machine's CPU, as the N hosts of a TPU slice would run it:
#
#   launch/local_pod.sh 4 -- perl_jax policy --gin_file=recipes/toy_policy.gin --gin.MODEL_DIR="'runs/pod'" ...
#   DEVICES=2 launch/local_pod.sh 4 -- ...      2 (virtual) devices per process
#   LOGS=logs launch/local_pod.sh 4 -- ...      keeps the output of process I in logs/I.log; process 0's is also shown
#
# If one process fails, the others are stopped and its exit code is returned. SIGTERM is forwarded to all.
set -euo pipefail

usage() { echo "usage: launch/local_pod.sh N -- perl_jax COMMAND ..." >&2; exit 2; }
[[ $# -ge 4 && $1 =~ ^[1-9][0-9]*$ && $2 == -- && $3 == perl_jax ]] || usage
count=$1
shift 3

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
# Picks a free port.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')

pids=()
for ((i = 0; i < count; i++)); do
  DEVICES=${DEVICES:-1} "$here/launch/local.sh" "$@" --coordinator_address="localhost:$port" \
    --process_count="$count" --process_index="$i" > "$logs/$i.log" 2>&1 &
  pids+=($!)
done
stop() { kill -"$1" "${pids[@]}" 2>/dev/null || true; }
trap 'stop TERM' TERM INT
tail -n +1 -f -s 0.2 --pid="${pids[0]}" "$logs/0.log" >&2 & # ends when it has shown all of process 0
tail=$!

# A process may end while others are waited for or killed: those that are gone are looked up, and `wait PID` knows their
# exit codes. (`wait -n` alone returns at once, again and again, where all that it is asked for are gone.)
code=0
while [[ ${#pids[@]} -gt 0 ]]; do
  wait -n "${pids[@]}" 2>/dev/null || true # returns early at a signal
  failed=''
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    status=0
    wait "${pids[i]}" 2>/dev/null || status=$?
    unset "pids[$i]"
    [[ $status -ne 0 ]] || continue
    if [[ $code -eq 0 && $status -ne 75 ]]; then # 75: preempted, and the others are too
      echo "launch/local_pod.sh: process $i of $count ended with exit code $status; its log: $logs/$i.log" >&2
      tail -n 3 "$logs/$i.log" >&2
      failed=yes
    fi
    [[ $code -ne 0 ]] || code=$status
  done
  if [[ -n $failed && ${#pids[@]} -gt 0 ]]; then
    sleep "${GRACE:-5}"
    stop KILL
  fi
  sleep 0.05
done
wait "$tail" || true
exit "$code"
