"""What is trained of the base for one role, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import optax

from perl_jax.errors import UserError
from perl_jax.models.lora import FullSpec, LoraSpec
from perl_jax.optim import schedules

Spec = LoraSpec | FullSpec


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The parameters that a role trains, and what trains them.

    Attributes:
      spec: LoRA or full tuning; of a reward also a list of them, an ensemble.
      optimizer: any of optax. It only ever sees what is trained.
      schedule: the share of the optimizer's learning rate at each step of the loop.
      num_microbatches: a batch is learned from in so many parts, one after the other.
    """

    spec: Spec | Sequence[Spec]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule = schedules.constant
    num_microbatches: int = 1

    @property
    def specs(self) -> list[Spec]:
        """All of them: one, but for an ensemble."""
        return list(self.spec) if isinstance(self.spec, Sequence) else [self.spec]

    @property
    def only_spec(self) -> Spec:
        """That of a role which is no ensemble; raises UserError for a list."""
        if isinstance(self.spec, Sequence):
            raise UserError('Tuning.spec is a list, an ensemble, which only a reward may be: give one LoraSpec')
        return self.spec

    def tx(self, name: str, updates: int = 1) -> optax.GradientTransformationExtraArgs:
        """The scheduled optimizer; raises as `schedules.scheduled`, by the `name` of its macro."""
        return schedules.scheduled(name, self.optimizer, self.schedule, updates)
