"""A finished run on the mesh: its base, and the adapters that are bound to it."""

from __future__ import annotations

from perl_jax.models import lora
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.runs import base as bases
from perl_jax.runs import finished, rundir
from perl_jax.runs.base import BaseConfig


def bound(model_dir: str, role: str, config: BaseConfig, partitioner: Partitioner) -> tuple[bases.Base, lora.Adapter]:
    """The base of a finished run, and its best adapter for a role, on the mesh."""
    phase = rundir.about(model_dir)['phase']
    run = finished.best(model_dir, phase=phase, flag='--model_dir', role=role)
    frozen = bases.named(config.network, run.about['base'], partitioner, config.path)
    return frozen, run.placed(partitioner, frozen.axes, [role])[role]


def members(model_dir: str, config: BaseConfig, partitioner: Partitioner) -> tuple[bases.Base, list[lora.Adapter]]:
    """`bound`, for all members of a reward run."""
    run = finished.best(model_dir, phase='reward', flag='--model_dir')
    frozen = bases.named(config.network, run.about['base'], partitioner, config.path)
    return frozen, list(run.placed(partitioner, frozen.axes).values())
