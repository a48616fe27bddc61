"""Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300, section 4.1, eq. 3), outcome supervision.

    A = (G_k - mean_j G_j) / std_j G_j,   L = -1/K sum_k 1/|o_k| sum_t min(w A, clip(w, 1 - eps, 1 + eps) A)

w = pi / pi_old at each token; the deviation is a sample's (over K - 1). In its paper the KL is k3 in the loss, as
algorithms/grpo.gin sets it.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from perl_jax import masked
from perl_jax.errors import check_count, check_number
from perl_jax.rl import advantages as adv
from perl_jax.rl import losses
from perl_jax.rl.algorithms import Mask, Tokens


@dataclasses.dataclass(frozen=True)
class GRPO:
    """GRPO (Shao et al. 2024, section 4.1, eq. 3).

    With one step a rollout, as here by default and in its paper, the ratio is 1 and nothing is ever clipped.

    Attributes:
      clip: eps, how far the ratio pi / pi_old may go from 1.
      epochs: how often a rollout is learned from.
      minibatches: in how many parts each time.

    Raises:
      UserError: a setting out of range.
    """

    clip: float = 0.2
    epochs: int = 1
    minibatches: int = 1

    has_value = False
    min_samples = 2
    whole_batch = False

    def __post_init__(self) -> None:
        check_number('GRPO.clip', self.clip, above=0)
        check_count('GRPO.epochs', self.epochs)
        check_count('GRPO.minibatches', self.minibatches)

    def advantages(self, rewards: Tokens, values: Tokens | None, mask: Mask) -> Tokens:
        """The same at every token of a response."""
        totals = masked.total(rewards, mask)
        return jnp.broadcast_to(adv.standardize(totals)[..., None], rewards.shape)

    def policy_loss(self, logprobs: Tokens, old_logprobs: Tokens, advantages: Tokens) -> Tokens:
        """PPO's surrogate."""
        return losses.clipped(logprobs, old_logprobs, advantages, self.clip)

    def weights(self, mask: Mask) -> Tokens:
        """The mean over a response, then over responses: long ones count no more than short ones."""
        B, K, _ = mask.shape
        return mask / (B * K * jnp.maximum(masked.lengths(mask), 1)[..., None])
