#!/usr/bin/env bash
# The whole pipeline on the offline toy task, with this checkout's perl_jax: `make demo` calls this.
#
#   launch/demo.sh            a few minutes on 2 cores
#   launch/demo.sh --short    a few steps of each phase, as a smoke test (CI)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec launch/local.sh demo "$@"
