"""Load a finished run onto the mesh: its base, and the adapters to bind to it."""

from __future__ import annotations

from perl_jax.models import lora
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.runs import base as bases
from perl_jax.runs import finished, rundir
from perl_jax.runs.base import BaseConfig


def load_role(
    model_dir: str, role: str, config: BaseConfig, partitioner: Partitioner
) -> tuple[bases.Base, lora.Adapter]:
    """Returns the base of a finished run, and its best adapter for a role, on the mesh.

    Args:
      model_dir: of the run.
      role: policy, reward or value.
      config: the network, and where the base is if it was moved.
      partitioner: the devices, and how arrays are split over them.
    """
    phase = rundir.require(model_dir)['phase']
    run = finished.best(model_dir, phase=phase, flag='--model_dir', role=role)
    base = bases.load_recorded(config.network, run.about['base'], partitioner, config.path)
    return base, run.placed(partitioner, base.axes, [role])[role]


def load_members(model_dir: str, config: BaseConfig, partitioner: Partitioner) -> tuple[bases.Base, list[lora.Adapter]]:
    """Returns the base of a reward run, and the adapters of all its members, on the mesh."""
    run = finished.best(model_dir, phase='reward', flag='--model_dir')
    base = bases.load_recorded(config.network, run.about['base'], partitioner, config.path)
    return base, list(run.placed(partitioner, base.axes).values())
