#!/usr/bin/env bash
# The whole pipeline on the offline toy task: SFT, a reward model, a policy, a report. `make demo` calls this.
#
#   launch/demo.sh            a few minutes on 2 cores
#   launch/demo.sh --short    a few steps of each phase, as a smoke test (CI)
#
# If it is interrupted, the same command resumes it; to start over, remove the folder that it prints at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

runs=runs/demo
short=()
case ${1:-} in
  '') ;;
  --short) runs=runs/demo_short; short=(--gin.TRAIN_STEPS=4) ;;
  *) echo "launch/demo.sh: unknown option $1; the only one is --short" >&2; exit 2 ;;
esac

phase() {
  printf '\n%s\n' "$2"
  launch/local.sh "$1" --gin_file="recipes/toy_$1.gin" --gin.MODEL_DIR="'$runs/$1'" "${short[@]}" "${@:3}"
}
sft=--gin.INITIAL_CHECKPOINT_PATH="'$runs/sft'"

phase sft '1/3  SFT: a small decoder learns to take coffee orders from demonstrations, most of them wrong.'
phase reward '2/3  Reward: a LoRA adapter and a head learn what raters preferred and liked.' "$sft"
phase policy '3/3  Policy: another adapter learns from that reward alone.' "$sft" --gin.REWARD_MODEL_DIR="'$runs/reward'"

printf '\nThe report, for a browser: '
launch/local.sh report "$runs/sft" "$runs/reward" "$runs/policy"
printf '\nNext:\n'
printf '  %-60s %s\n' \
  'source .venv/bin/activate' 'once in a shell: perl_jax is then on PATH' \
  "perl_jax sample --model_dir=$runs/policy" 'read some answers' \
  'perl_jax inspect --task=toy_pairs' 'see what the reward learned from' \
  'perl_jax --help' 'the commands that just ran, to change and run' \
  "rm -r $runs" 'to start over; otherwise make demo resumes here'
