"""REINFORCE for language models with a value baseline: the paper's algorithm (section 2.2; RLAIF, appendix F).

    Z_t = sum_{s >= t} r_s,   r_s = -beta (log pi - log pi_anchor) at every token, + (1 - beta) R at the last
    L_policy = -sum_t log pi(A_t | X_t) stop_grad(Z_t - V(X_t)),   L_value = sum_t (Z_t - V(X_t))^2

Both are means over episodes. The value is as large as the policy: an adapter of the same base and rank.

Departures from the paper, and choices where it says nothing:

1. The paper gives no estimator of the KL and no place for it. Here it is k1 at each token, in the reward, so Z_t is the
   reward to go; in RLAIF, appendix F, it is the last token's R.
2. The baseline V(X_t) is the value before its own update of the same step (steps.value_step).
3. With top-k or top-p, tokens are drawn from the truncated distribution, but log pi is that of the whole one; no
   importance weight corrects the difference.
4. A response that was cut is scored as one that ended: R at its last token.
"""

from __future__ import annotations

import dataclasses

from perl_jax.rl import advantages as adv
from perl_jax.rl import losses
from perl_jax.rl.algorithms import Mask, Tokens


@dataclasses.dataclass(frozen=True)
class Reinforce:
    """REINFORCE with a value baseline (the paper, section 2.2): one step a rollout. It has nothing to set."""

    has_value = True
    min_samples = 1
    clip = None
    epochs = minibatches = 1
    whole_batch = False

    def advantages(self, rewards: Tokens, values: Tokens | None, mask: Mask) -> Tokens:
        """Z_t - V_t."""
        assert values is not None  # has_value
        return adv.returns(rewards) - values

    def returns(self, rewards: Tokens, values: Tokens, mask: Mask) -> Tokens:
        """The return Z_t, without bootstrapping."""
        return adv.returns(rewards)

    def policy_loss(self, logprobs: Tokens, old_logprobs: Tokens, advantages: Tokens) -> Tokens:
        """-log pi(A_t | X_t) A_t."""
        return losses.reinforce(logprobs, advantages)

    def value_loss(self, values: Tokens, old_values: Tokens, returns: Tokens) -> Tokens:
        """(Z_t - V_t)^2."""
        return losses.value(values, returns)

    def weights(self, mask: Mask) -> Tokens:
        """The sum over a response, the mean over responses."""
        B, K, _ = mask.shape
        return mask / (B * K)
