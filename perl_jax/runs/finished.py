"""A finished run: its best checkpoint, what that says of itself, and its adapters once they are asked for."""

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
class Finished:
    """The best (or latest) checkpoint of a run: what it says of itself, and its adapters once they are asked for.

    shapes: of each role's adapter.
    """

    model_dir: str
    step: int
    about: dict[str, Any]
    shapes: dict[str, lora.Adapter]

    def on_host(self, roles: Iterable[str] | None = None) -> dict[str, lora.Adapter]:
        """The adapters of these roles, or of all, as whole host arrays."""
        return self._read({role: self.shapes[role] for role in roles or self.shapes})

    def placed(
        self, partitioner: Partitioner, axes: PyTree, roles: Iterable[str] | None = None, dtype: Any = None
    ) -> dict[str, lora.Adapter]:
        """The same on the mesh, each process reading its own part.

        Args:
          axes: logical axes of the run's base.
          dtype: of a fully tuned adapter's parameters; None is float32, as they were trained.
        """
        roles = roles or self.shapes
        return self._read({role: partitioner.adapter(self.shapes[role], axes, dtype) for role in roles})

    def _read(self, like: dict[str, lora.Adapter]) -> dict[str, lora.Adapter]:
        with contextlib.closing(Checkpoints(self.model_dir, read_only=True)) as checkpoints:
            return checkpoints.restore_adapters(self.step, like)


def best(model_dir: str, *, phase: str | tuple[str, ...], flag: str, role: str | None = None) -> Finished:
    """Open the best (or latest) checkpoint of a run.

    Raises:
      UserError: naming `flag`, if `model_dir` holds no checkpoint of a run of `phase`, or several adapters in the
        place of `role` (an ensemble).
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
    return Finished(model_dir, step, about, shapes)


def read_adapter(model_dir: str, role: str, *, phase: str, flag: str) -> tuple[lora.Adapter, dict[str, Any]]:
    """The adapter of one role as host arrays, and what the checkpoint says of itself; raises as `best`."""
    run = best(model_dir, phase=phase, flag=flag, role=role)
    return run.on_host([role])[role], run.about


def read_adapters(model_dir: str, *, phase: str, flag: str) -> tuple[dict[str, lora.Adapter], dict[str, Any]]:
    """As `read_adapter`, for all roles."""
    run = best(model_dir, phase=phase, flag=flag)
    return run.on_host(), run.about
