#!/usr/bin/env bash
# Runs a perl_jax command on this machine's CPU, from any folder:
#
#   launch/local.sh sft --gin_file=recipes/toy_sft.gin --gin.MODEL_DIR="'runs/toy/sft'"
#   DEVICES=8 launch/local.sh reward ...    8 virtual devices, to test a mesh without a TPU
#
# It uses perl_jax of this checkout's .venv if there is one, else of PATH.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
perl_jax=$here/.venv/bin/perl_jax
if [[ ! -x $perl_jax ]]; then
  perl_jax=$(command -v perl_jax) || { echo 'launch/local.sh: perl_jax is not installed; run make install' >&2; exit 2; }
fi

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export TPU_SKIP_MDS_QUERY=1 # on a TPU machine too, this runs on the CPU
if [[ -n ${DEVICES:-} ]]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi

# Huge pages (2 MiB) for malloc, which glibc reads at process start: a step on a CPU takes about a tenth less time.
# GLIBC_TUNABLES= turns them off.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
# LLVM's level 2 instead of 3: steps are as fast, and compiling takes about a tenth less time.
level=--xla_backend_optimization_level
[[ ${XLA_FLAGS:-} == *"$level"* ]] || export XLA_FLAGS="${XLA_FLAGS:-} $level=2"

exec "$perl_jax" "$@"
