"""The KL to the anchor: its estimators, where it goes, and its coefficient.

With d = log pi(A_t | X_t) - log pi_anchor(A_t | X_t) of the sampled token:

    k1    d                           unbiased                      k3    exp(-d) - 1 + d   unbiased, never negative
    k2    d^2 / 2                     biased, never negative        full  sum over V        the KL itself, at each state

(Schulman, "Approximating KL divergence", 2020.) A good estimate of the KL need not have a good gradient. Only k1 in the
reward (the paper's choice) has the exact gradient of E[R] - beta KL(pi || pi_anchor) over whole responses. In the loss:

    k1          zero in expectation; KLConfig refuses it
    k2, full    the gradient of KL(pi || pi_anchor) at each state, with the states held fixed
    k3          the gradient of KL(pi_anchor || pi) at each state

tests/test_kl.py shows each by enumeration.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Float

from perl_jax import settings
from perl_jax.errors import UserError
from perl_jax.rl import losses
from perl_jax.types import AnyArray

Tokens = Float[AnyArray, 'B K R']


def k1(logprobs: Tokens, anchor_logprobs: Tokens) -> Tokens:
    """The log-ratio itself.

    Args:
      logprobs: float32 [B, K, R], nats: log pi(A_t | X_t).
      anchor_logprobs: float32 [B, K, R], nats: log pi_anchor(A_t | X_t).

    Returns:
      float32 [B, K, R], nats: d.
    """
    return logprobs - anchor_logprobs


def k2(logprobs: Tokens, anchor_logprobs: Tokens) -> Tokens:
    """Half its square.

    Args:
      logprobs: float32 [B, K, R], nats: log pi(A_t | X_t).
      anchor_logprobs: float32 [B, K, R], nats: log pi_anchor(A_t | X_t).

    Returns:
      float32 [B, K, R], nats: d^2 / 2.
    """
    return 0.5 * (logprobs - anchor_logprobs) ** 2


def k3(logprobs: Tokens, anchor_logprobs: Tokens) -> Tokens:
    """The ratio anchor / policy, less 1, less its log.

    Args:
      logprobs: float32 [B, K, R], nats: log pi(A_t | X_t).
      anchor_logprobs: float32 [B, K, R], nats: log pi_anchor(A_t | X_t).

    Returns:
      float32 [B, K, R], nats: exp(-d) - 1 + d, never negative.
    """
    log_ratio = anchor_logprobs - logprobs
    # expm1 keeps the digits of a small ratio; a large one is capped.
    return jnp.where(log_ratio < 1, jnp.expm1(jnp.minimum(log_ratio, 1)), losses.ratio(log_ratio) - 1) - log_ratio


ESTIMATORS = {'k1': k1, 'k2': k2, 'k3': k3, 'full': None}  # 'full' needs logits: logprobs.token_kl


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """The KL penalty to the anchor.

    Attributes:
      beta: the weight of the KL, beside 1 - beta for the score (the paper, eq. 1); the initial one with a `target`.
      estimator: 'k1', 'k2', 'k3' or 'full', as the formulas in rl/kl.py.
      place: 'reward' or 'loss'.
      target: KL in nats per response that beta is adapted to reach (Ziegler et al. 2019, section 2.2); None keeps beta.
      horizon: of that adaptation, in responses.

    Raises:
      UserError: a setting out of range, or an estimator that has no gradient in its place.
    """

    beta: settings.Share = 0.05
    estimator: Literal['k1', 'k2', 'k3', 'full'] = 'k1'
    place: Literal['reward', 'loss'] = 'reward'
    target: settings.Positive | None = None
    horizon: settings.Count = 10000

    def __post_init__(self) -> None:
        settings.check(self)
        if (self.place, self.estimator) == ('loss', 'k1'):
            raise UserError("KL_ESTIMATOR = 'k1' has no gradient in the loss; take 'k2', or KL_PLACE = 'reward'")
        if self.target is not None and self.beta == 0:
            raise UserError(f'KL_TARGET = {self.target} with BETA = {self.beta}: a product stays 0; raise it')

    @property
    def in_loss(self) -> bool:
        """Whether the KL is part of the loss, rather than of the reward."""
        return self.place == 'loss'

    def adapt(self, beta: Float[AnyArray, ''], kl: Float[AnyArray, ''], responses: int) -> Float[AnyArray, '']:
        """Adapt beta after a batch (Ziegler et al. 2019, section 2.2).

        Args:
          beta: float32 [], before.
          kl: float32 [], nats per response, the mean of the batch.
          responses: their number in the batch.

        Returns:
          float32 [], at most 1, so that rewards keep their sign.
        """
        if self.target is None:
            return beta
        error = jnp.clip(kl / self.target - 1, -0.2, 0.2)
        return jnp.minimum(beta * (1 + error * responses / self.horizon), 1.0)
