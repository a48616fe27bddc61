"""REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740): each response is compared with its K - 1 siblings.

    A = G_k - 1/(K-1) sum_{j != k} G_j,   G = (1 - beta) R - beta KL of the whole response

One advantage for all tokens of a response, and no value to learn: one step, adapter and optimizer less.

Departures from the paper:

1. The score has the weight 1 - beta, as for every algorithm here; the paper has R - beta KL.
2. The KL in G is the sum of its estimates at the tokens (kl.py). Only k1, the default, is the paper's log-ratio of the
   whole response. With the KL in the loss, G is (1 - beta) R.
3. Top-k, top-p and cut responses: as in reinforce.py.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from perl_jax import masked
from perl_jax.rl import advantages as adv
from perl_jax.rl import losses
from perl_jax.rl.algorithms import Mask, Tokens


@dataclasses.dataclass(frozen=True)
class RLOO:
    """RLOO (Ahmadian et al. 2024): one step a rollout. It has nothing to set but K, the sampler's `num_samples`."""

    has_value = False
    min_samples = 2
    clip = None
    epochs = minibatches = 1
    whole_batch = False

    def advantages(self, rewards: Tokens, values: Tokens | None, mask: Mask) -> Tokens:
        """The same at every token of a response."""
        totals = masked.total(rewards, mask)
        return jnp.broadcast_to(adv.leave_one_out(totals)[..., None], rewards.shape)

    def policy_loss(self, logprobs: Tokens, old_logprobs: Tokens, advantages: Tokens) -> Tokens:
        """The loss of REINFORCE (losses.py)."""
        return losses.reinforce(logprobs, advantages)

    def weights(self, mask: Mask) -> Tokens:
        """The sum over a response, the mean over responses."""
        B, K, _ = mask.shape
        return mask / (B * K)
