"""The KL to the anchor: its estimators, where it goes, and its coefficient.

With d = log pi(A_t | X_t) - log pi_anchor(A_t | X_t) of the sampled token:

    k1    d                           unbiased                      k3    exp(-d) - 1 + d   unbiased, never negative
    k2    d^2 / 2                     biased, never negative        full  sum over V        the KL itself, at each state

(Schulman, "Approximating KL divergence", 2020.) What is good to look at is not what is good to differentiate. Of
E[R] - beta KL(pi || pi_anchor) over whole responses the gradient is exact with k1 in the reward (the paper's choice)
and with nothing else here; in the loss, k2 and full give that of the KL at each state with the states held fixed, k3
gives that of KL(pi_anchor || pi) at each state, and k1 gives none at all. tests/test_kl.py shows each by enumeration.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from perl_jax.errors import UserError, check_count, check_number
from perl_jax.rl import losses

Tokens = Float[Array, 'B K R']


def k1(logprobs: Tokens, anchor_logprobs: Tokens) -> Tokens:
    """The log-ratio itself."""
    return logprobs - anchor_logprobs


def k2(logprobs: Tokens, anchor_logprobs: Tokens) -> Tokens:
    """Half its square."""
    return 0.5 * (logprobs - anchor_logprobs) ** 2


def k3(logprobs: Tokens, anchor_logprobs: Tokens) -> Tokens:
    """The ratio anchor / policy, less 1, less its log."""
    log_ratio = anchor_logprobs - logprobs
    # expm1 keeps the digits of a small ratio; a large one is capped.
    return jnp.where(log_ratio < 1, jnp.expm1(jnp.minimum(log_ratio, 1)), losses.ratio(log_ratio) - 1) - log_ratio


ESTIMATORS = {'k1': k1, 'k2': k2, 'k3': k3, 'full': None}  # the full one needs logits: logprobs.token_kl


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """How a policy is held to its anchor.

    Attributes:
      beta: the weight of the KL, against 1 - beta for the score (the paper, eq. 1); where it starts if it adapts.
      estimator: 'k1', 'k2', 'k3' or 'full', as the formulas in rl/kl.py.
      place: 'reward' or 'loss'.
      target: nats a response that beta is steered to (Ziegler et al. 2019, section 2.2); None leaves beta where it is.
      horizon: of that steering, in responses.

    Raises:
      UserError: a setting out of range, or an estimator that has no gradient in its place.
    """

    beta: float = 0.05
    estimator: str = 'k1'
    place: str = 'reward'
    target: float | None = None
    horizon: int = 10000

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise UserError(f"KL_ESTIMATOR = '{self.estimator}': give one of {', '.join(ESTIMATORS)}")
        if self.place not in ('reward', 'loss'):
            raise UserError(f"KL_PLACE = '{self.place}': give 'reward' or 'loss'")
        if (self.place, self.estimator) == ('loss', 'k1'):
            raise UserError("KL_ESTIMATOR = 'k1' has no gradient in the loss; take 'k2', or KL_PLACE = 'reward'")
        check_number('BETA', self.beta, 0, 1)
        check_count('KLConfig.horizon', self.horizon)
        if self.target is None:
            return
        check_number('KL_TARGET', self.target, above=0)
        if self.beta == 0:
            raise UserError(f'KL_TARGET = {self.target} with BETA = {self.beta}: a product stays 0; raise it')

    @property
    def in_loss(self) -> bool:
        """Whether the loss holds it, rather than the reward."""
        return self.place == 'loss'

    def adapt(self, beta: Float[Array, ''], kl: Float[Array, ''], responses: int) -> Float[Array, '']:
        """Steer beta after a batch (Ziegler et al. 2019, section 2.2).

        Args:
          beta: float32 [], as it was.
          kl: float32 [], nats a response, the mean of the batch.
          responses: how many the batch had.

        Returns:
          float32 []; at most 1, so that rewards keep their sign.
        """
        if self.target is None:
            return beta
        error = jnp.clip(kl / self.target - 1, -0.2, 0.2)
        return jnp.minimum(beta * (1 + error * responses / self.horizon), 1.0)
