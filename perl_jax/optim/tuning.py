"""The trainable parameters of one role, and their optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import optax
from pydantic import SkipValidation

from perl_jax import settings
from perl_jax.errors import UserError
from perl_jax.models.lora import FullSpec, LoraSpec
from perl_jax.optim import schedules

Spec = LoraSpec | FullSpec


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The trainable parameters of a role, and their optimizer.

    Attributes:
      spec: LoRA or full tuning; for a reward also a list of them, an ensemble.
      optimizer: any optax optimizer. Its state covers the trainable parameters alone.
      schedule: factor of the optimizer's learning rate at each step of the loop.
      num_microbatches: microbatches whose gradients are accumulated for each batch.
    """

    spec: Spec | Sequence[Spec]
    optimizer: SkipValidation[optax.GradientTransformation]  # `check` says what is wrong with another's
    schedule: optax.Schedule = schedules.constant
    num_microbatches: settings.Count = 1

    def __post_init__(self) -> None:
        settings.check(self)

    @property
    def specs(self) -> list[Spec]:
        """The specs as a list, with one entry unless this is an ensemble."""
        return list(self.spec) if isinstance(self.spec, Sequence) else [self.spec]

    @property
    def only_spec(self) -> Spec:
        """The spec of a role that is not an ensemble; raises UserError for a list."""
        if isinstance(self.spec, Sequence):
            raise UserError('Tuning.spec is a list, an ensemble, which only a reward may be: give one LoraSpec')
        return self.spec

    def check(self, name: str, updates: int = 1) -> None:
        """Raise what `tx` would, before data and weights are read.

        Args:
          name: the optimizer's macro, for messages.
          updates: optimizer updates per step of the loop.

        Raises:
          UserError: as `schedules.check`.
        """
        schedules.check(name, self.optimizer, self.schedule, updates)

    def tx(self, name: str, updates: int = 1) -> optax.GradientTransformationExtraArgs:
        """Make the scheduled optimizer.

        Args:
          name: the optimizer's macro, for messages.
          updates: optimizer updates per step of the loop.

        Returns:
          An optimizer whose `update` also takes `step`.

        Raises:
          UserError: as `schedules.check`.
        """
        return schedules.scheduled(name, self.optimizer, self.schedule, updates)
