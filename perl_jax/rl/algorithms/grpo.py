"""Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300, section 4.1, eq. 3), outcome supervision.

    A = (G_k - mean_j G_j) / std_j G_j,   L = -1/K sum_k 1/|o_k| sum_t min(w A, clip(w, 1 - eps, 1 + eps) A)

w = pi / pi_old at each token. As in the paper, a rollout gets one update by default (section 4.2).

Departures from the paper:

1. The deviation is a sample's, over K - 1 (the paper does not say which), and 1e-4 is added to it.
2. The paper's KL, k3 in the loss, is not part of this class: algorithms/grpo.gin sets it. Without that file it is the
   default, k1 in the reward, and then G contains it.
3. The score in G has the weight 1 - beta, as for every algorithm here; the division by the deviation cancels it, but
   for the 1e-4.
4. Anchor and reward stay the same during a run: one iteration of the paper's algorithm 1. ANCHOR_EMA moves the anchor.
5. The ratio w is capped at e^20, to be finite (losses.ratio).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from perl_jax import masked, settings
from perl_jax.rl import advantages as adv
from perl_jax.rl import losses
from perl_jax.rl.algorithms import Mask, Tokens


@dataclasses.dataclass(frozen=True)
class GRPO:
    """GRPO (Shao et al. 2024, section 4.1, eq. 3).

    With one step a rollout, as here by default and in its paper, the ratio is 1 and nothing is ever clipped.

    Attributes:
      clip: eps, how far the ratio pi / pi_old may go from 1.
      epochs: passes over each rollout.
      minibatches: updates per epoch; each takes whole prompts.

    Raises:
      UserError: a setting out of range.
    """

    clip: settings.Positive = 0.2
    epochs: settings.Count = 1
    minibatches: settings.Count = 1

    has_value = False
    min_samples = 2
    whole_batch = False

    def __post_init__(self) -> None:
        settings.check(self)

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
