#!/usr/bin/env bash
# Runs a perl_jax command on this machine's CPU, from any folder:
#
#   launch/local.sh sft --gin_file=recipes/toy_sft.gin --gin.MODEL_DIR="'runs/toy/sft'"
#   DEVICES=8 launch/local.sh reward ...    8 fake devices, to try a mesh before renting one
#
# It takes perl_jax from this checkout's .venv where there is one, else from PATH.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
perl_jax=$here/.venv/bin/perl_jax
if [[ ! -x $perl_jax ]]; then
  perl_jax=$(command -v perl_jax) || { echo 'launch/local.sh: perl_jax is not installed; run make install' >&2; exit 2; }
fi

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export TPU_SKIP_MDS_QUERY=1 # on a TPU machine too, this is a run of its CPU
if [[ -n ${DEVICES:-} ]]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi

exec "$perl_jax" "$@"
