"""Proximal policy optimization with generalised advantages (Schulman et al. 2017, arXiv 1707.06347), as for language
models since Ziegler et al. 2019: token rewards with the KL in them, a learned value, whitened advantages.

    A_t = whiten(GAE(gamma, lam)),   L_policy = -min(w A, clip(w, 1 - eps, 1 + eps) A),   w = pi / pi_old
    L_value = max((G - V)^2, (G - clip(V, V_old +- eps_v))^2),   G = GAE + V_old

Both losses are means over the tokens of a minibatch.

Departures from the papers:

1. Advantages are whitened over each minibatch.
2. The value's loss is clipped; Schulman et al. have the plain squared error.
3. Policy and value are two adapters with two optimizers, so there is no coefficient of the value's loss.
4. The value after the last token is 0 also where a response was cut; Schulman et al. bootstrap from the value there.
5. The score has the weight 1 - beta, as for every algorithm here; Ziegler et al. have R - beta KL.
6. The ratio w is capped at e^20, to be finite (losses.ratio).
"""

from __future__ import annotations

import dataclasses

from perl_jax import masked, settings
from perl_jax.rl import advantages as adv
from perl_jax.rl import losses
from perl_jax.rl.algorithms import Mask, Tokens


@dataclasses.dataclass(frozen=True)
class PPO:
    """PPO (Schulman et al. 2017, eq. 7) with GAE; advantages are whitened over a minibatch.

    Attributes:
      gamma: the discount of later rewards, from 0 to 1.
      lam: of GAE, from 0 (one step of TD) to 1 (the whole return).
      clip: eps, how far the ratio pi / pi_old may go from 1.
      value_clip: eps_v, how far a value may go from the old one.
      epochs: passes over each rollout.
      minibatches: updates per epoch; each takes whole prompts.

    Raises:
      UserError: a setting out of range.
    """

    gamma: settings.Share = 1.0
    lam: settings.Share = 0.95
    clip: settings.Positive = 0.2
    value_clip: settings.Positive = 0.2
    epochs: settings.Count = 4
    minibatches: settings.Count = 1

    has_value = True
    min_samples = 1
    whole_batch = True  # advantages are whitened over it, tokens averaged

    def __post_init__(self) -> None:
        settings.check(self)

    def advantages(self, rewards: Tokens, values: Tokens | None, mask: Mask) -> Tokens:
        """GAE, whitened."""
        assert values is not None  # has_value
        return adv.whiten(adv.gae(rewards, values, mask, self.gamma, self.lam), mask)

    def returns(self, rewards: Tokens, values: Tokens, mask: Mask) -> Tokens:
        """TD(lam): GAE plus the old value."""
        return adv.gae(rewards, values, mask, self.gamma, self.lam) + values

    def policy_loss(self, logprobs: Tokens, old_logprobs: Tokens, advantages: Tokens) -> Tokens:
        """The clipped surrogate."""
        return losses.clipped(logprobs, old_logprobs, advantages, self.clip)

    def value_loss(self, values: Tokens, old_values: Tokens, returns: Tokens) -> Tokens:
        """The clipped squared error."""
        return losses.clipped_value(values, old_values, returns, self.value_clip)

    def weights(self, mask: Mask) -> Tokens:
        """The mean over all tokens."""
        return masked.share(mask)
