"""What a policy learns by: one value, which the loop, the plan, the benchmarks and the tests hand on as a whole.

    J = E[(1 - beta) shaped score - beta KL(policy || anchor)] + entropy_bonus H        (the paper, section 3.2)

`algorithm` says how its gradient is estimated, `sampling` what the expectation is taken over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from perl_jax.errors import UserError, check_number
from perl_jax.optim.tuning import Tuning
from perl_jax.rl.algorithms import Algorithm
from perl_jax.rl.algorithms.reinforce import Reinforce
from perl_jax.rl.kl import KLConfig
from perl_jax.rl.sampling import SamplingConfig
from perl_jax.types import Responses

Shaping = Callable[[jax.Array, Responses, int | Sequence[int]], jax.Array]  # shaping.py


@dataclasses.dataclass(frozen=True)
class Objective:
    """An algorithm with all that goes into its loss.

    Attributes:
      algorithm: see algorithms/.
      kl: how the policy is held to its anchor; its `beta` is where `PolicyState.beta` starts.
      sampling: how the policy answers, K times each prompt. Its temperature is the policy's in every log-prob.
      shaping: what is done to scores before they become rewards, in turn; evaluation never does it.
      entropy_bonus: weight of the policy's entropy (nats a token) in its loss.
      anchor_ema: how far the anchor follows the policy each step (WARP's mu); 0 leaves it at the base.
      value: how the value baseline is trained, where the algorithm learns one; None is as the policy. The paper gives
        it the policy's rank.

    Raises:
      UserError: settings that do not go together.
    """

    algorithm: Algorithm = Reinforce()
    kl: KLConfig = KLConfig()
    sampling: SamplingConfig = SamplingConfig()
    shaping: Sequence[Shaping] = ()
    entropy_bonus: float = 0.0
    anchor_ema: float = 0.0
    value: Tuning | None = None

    def __post_init__(self) -> None:
        check_number('ANCHOR_EMA', self.anchor_ema, 0, 1)
        check_number('ENTROPY_BONUS', self.entropy_bonus)
        if self.sampling.temperature == 0:
            raise UserError('TEMPERATURE = 0: a policy learns from answers that are drawn; give a number above 0')
        if self.sampling.num_samples < self.algorithm.min_samples:
            raise UserError(
                f'NUM_SAMPLES = {self.sampling.num_samples}: {type(self.algorithm).__name__} compares the answers to '
                f'one prompt; give at least {self.algorithm.min_samples}'
            )

    @property
    def updates(self) -> int:
        """How many updates a rollout is learned from in."""
        return self.algorithm.epochs * self.algorithm.minibatches

    @property
    def takes_prompts_apart(self) -> bool:
        """Whether no prompt's gradient hangs on the others of its batch; a shaping may look over all of them."""
        return not (self.algorithm.whole_batch or self.shaping)
