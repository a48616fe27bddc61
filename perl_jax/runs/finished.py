"""A finished run: the metadata of its best checkpoint, and its adapters, which are read on demand."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

from etils import epath
from jaxtyping import PyTree

from perl_jax.errors import UserError
from perl_jax.interop import hf
from perl_jax.models import lora
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.runs.checkpoints import Checkpoints


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """The best (or latest) checkpoint of a run.

    Attributes:
      model_dir: of the run.
      step: of the checkpoint.
      about: its metadata.
      shapes: the shapes of each role's adapter.
    """

    model_dir: str
    step: int
    about: dict[str, Any]
    shapes: dict[str, lora.Adapter]

    def on_host(self, roles: Iterable[str] | None = None) -> dict[str, lora.Adapter]:
        """Returns the adapters of these roles, or of all, as whole host arrays."""
        return self._read({role: self.shapes[role] for role in roles or self.shapes})

    def placed(
        self, partitioner: Partitioner, axes: PyTree, roles: Iterable[str] | None = None, dtype: Any = None
    ) -> dict[str, lora.Adapter]:
        """Returns the adapters on the mesh; each process reads its own shards.

        Args:
          partitioner: the devices, and how arrays are split over them.
          axes: logical axes of the run's base.
          roles: None means all.
          dtype: of a fully tuned adapter's parameters; None is float32, as they were trained.
        """
        roles = roles or self.shapes
        return self._read({role: partitioner.adapter(self.shapes[role], axes, dtype) for role in roles})

    def _read(self, targets: dict[str, lora.Adapter]) -> dict[str, lora.Adapter]:
        with contextlib.closing(Checkpoints(self.model_dir, read_only=True)) as checkpoints:
            return checkpoints.restore_adapters(self.step, targets)


def best(model_dir: str, *, phase: str | tuple[str, ...], flag: str, role: str | None = None) -> FinishedRun:
    """Open the best (or latest) checkpoint of a run.

    Args:
      model_dir: of the run.
      phase: the kind of run, or the kinds that are accepted.
      flag: the flag or setting that names the run, for messages.
      role: a role that must have exactly one adapter; None accepts any.

    Raises:
      UserError: `model_dir` has no checkpoint of a run of `phase`, or several adapters for `role` (an ensemble).
    """
    if hf.is_checkpoint(model_dir):
        raise UserError(
            f"{flag}: '{model_dir}' is a Hugging Face checkpoint and not the MODEL_DIR of a run; make one of it with "
            '`perl_jax import --format=hf`'
        )
    if not epath.Path(model_dir, 'checkpoints').is_dir():
        raise UserError(f"{flag}: '{model_dir}' is not the MODEL_DIR of a run: it has no checkpoints/")
    with contextlib.closing(Checkpoints(model_dir, read_only=True)) as checkpoints:
        if (step := checkpoints.best()) is None:
            raise UserError(f"{flag}: '{model_dir}' has no checkpoint yet; let that run finish first")
        about = checkpoints.about(step)
        phases = (phase,) if isinstance(phase, str) else phase
        if about['phase'] not in phases:
            raise UserError(f"{flag}: '{model_dir}' is a run of {about['phase']}; name one of {' or '.join(phases)}")
        shapes = checkpoints.adapters(step)
    if role is not None and role not in shapes:
        raise UserError(
            f"{flag}: '{model_dir}' holds {', '.join(shapes)}, where one '{role}' is needed; "
            'make one of an ensemble with perl_jax average'
        )
    return FinishedRun(model_dir, step, about, shapes)


def read_adapter(model_dir: str, role: str, *, phase: str, flag: str) -> tuple[lora.Adapter, dict[str, Any]]:
    """Returns the adapter of one role as host arrays, and the checkpoint's metadata; raises as `best`."""
    run = best(model_dir, phase=phase, flag=flag, role=role)
    return run.on_host([role])[role], run.about


def read_adapters(model_dir: str, *, phase: str, flag: str) -> tuple[dict[str, lora.Adapter], dict[str, Any]]:
    """Returns the adapters of all roles as host arrays, and the checkpoint's metadata; raises as `best`."""
    run = best(model_dir, phase=phase, flag=flag)
    return run.on_host(), run.about
