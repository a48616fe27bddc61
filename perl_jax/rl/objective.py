"""The objective of a policy: one value that the loop, the plan, the benchmarks and the tests share.

    J = E[(1 - beta) shaped score - beta KL(policy || anchor)] + entropy_bonus H        (the paper, section 3.2)

`algorithm` estimates its gradient; the expectation is over responses drawn by `sampling`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from perl_jax import settings
from perl_jax.errors import UserError
from perl_jax.optim.tuning import Tuning
from perl_jax.rl.algorithms import Algorithm
from perl_jax.rl.algorithms.reinforce import Reinforce
from perl_jax.rl.kl import KLConfig
from perl_jax.rl.sampling import SamplingConfig
from perl_jax.types import Responses

Shaping = Callable[[jax.Array, Responses, int | Sequence[int]], jax.Array]  # shaping.py


@dataclasses.dataclass(frozen=True)
class Objective:
    """An algorithm and everything else that its loss depends on.

    Attributes:
      algorithm: one of rl/algorithms/.
      kl: the KL penalty to the anchor; its `beta` is the initial `PolicyState.beta`.
      sampling: how K responses to each prompt are drawn. Its temperature is the policy's in every log-prob.
      shaping: functions applied in turn to scores before they become rewards, in training only.
      entropy_bonus: weight of the policy's entropy (nats a token) in its loss.
      anchor_ema: the rate at which the anchor follows the policy (WARP's mu); 0 keeps it at the base.
      value: trainable parameters and optimizer of the value baseline, if the algorithm has one; None takes the
        policy's. The paper gives it the policy's rank.

    Raises:
      UserError: a setting out of range, or settings that contradict each other.
    """

    algorithm: Algorithm = Reinforce()
    kl: KLConfig = KLConfig()
    sampling: SamplingConfig = SamplingConfig()
    shaping: Sequence[Shaping] = ()
    entropy_bonus: settings.Real = 0.0
    anchor_ema: settings.Share = 0.0
    value: Tuning | None = None

    def __post_init__(self) -> None:
        settings.check(self)
        if self.sampling.temperature == 0:
            raise UserError('TEMPERATURE = 0: a policy learns from answers that are drawn; give a number above 0')
        if self.sampling.num_samples < self.algorithm.min_samples:
            raise UserError(
                f'NUM_SAMPLES = {self.sampling.num_samples}: {type(self.algorithm).__name__} compares the answers to '
                f'one prompt; give at least {self.algorithm.min_samples}'
            )

    @property
    def updates(self) -> int:
        """Optimizer updates for each rollout: epochs times minibatches."""
        return self.algorithm.epochs * self.algorithm.minibatches

    @property
    def prompts_are_independent(self) -> bool:
        """Whether each prompt's gradient is independent of the others in its batch.

        Shaping may depend on all of them, and the entropy bonus is a mean over the batch's tokens.
        """
        return not (self.algorithm.whole_batch or self.shaping or self.entropy_bonus)
