"""The losses, each a formula. Nothing here knows of networks, adapters or settings.

They are losses of each token, pair or response; a step weighs and sums them up (for a policy and its value as the
algorithm says, algorithms/), and so a KL or an entropy beside them alike. What stands at the padding is not looked at.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def pairwise(rewards: Float[Array, 'B 2']) -> Float[Array, ' B']:
    """Bradley-Terry, of each pair: -log sigmoid(r_chosen - r_rejected); the chosen comes first (paper A.1.2)."""
    return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1])


def pointwise(rewards: Float[Array, 'B K'], labels: Float[Array, 'B K']) -> Float[Array, 'B K']:
    """Binary cross-entropy on the logit r, of each response: -p log sigmoid(r) - (1 - p) log(1 - sigmoid(r)).

    The paper prints log sigmoid(1 - r) for the negative term; this is the standard form.
    """
    return optax.sigmoid_binary_cross_entropy(rewards, labels)


LOG_RATIO_CAP = 20.0  # e^20 is 5e8: far beyond any clip, and its square still finite in float32


def ratio(log_ratio: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """exp(log_ratio), finite whatever the log-ratio is.

    At 100 float32 is infinite, and infinity times an advantage of 0 is no number. Beyond the cap the value stays at
    e^20, and so does the gradient, which goes on pulling the same way.
    """
    return jnp.exp(log_ratio - jax.lax.stop_gradient(jnp.maximum(log_ratio - LOG_RATIO_CAP, 0)))


def reinforce(logprobs: Float[Array, 'B K R'], advantages: Float[Array, 'B K R']) -> Float[Array, 'B K R']:
    """REINFORCE for language models, of each token: -log pi(A_t | X_t) stop_grad(Z_t - V_t) (RLAIF, app. F)."""
    return -logprobs * jax.lax.stop_gradient(advantages)


def clipped(
    logprobs: Float[Array, 'B K R'],
    old_logprobs: Float[Array, 'B K R'],
    advantages: Float[Array, 'B K R'],
    clip: float,
) -> Float[Array, 'B K R']:
    """PPO's surrogate (Schulman 2017, eq. 7), of each token: -min(w A, clip(w, 1 -+ clip) A) with w = pi / pi_old."""
    w, advantages = ratio(logprobs - old_logprobs), jax.lax.stop_gradient(advantages)
    return -jnp.minimum(w * advantages, jnp.clip(w, 1 - clip, 1 + clip) * advantages)


def value(values: Float[Array, 'B K R'], returns: Float[Array, 'B K R']) -> Float[Array, 'B K R']:
    """Squared error of the baseline, of each token: (Z_t - V_t)^2 (RLAIF, app. F)."""
    return (jax.lax.stop_gradient(returns) - values) ** 2


def clipped_value(
    values: Float[Array, 'B K R'],
    old_values: Float[Array, 'B K R'],
    returns: Float[Array, 'B K R'],
    clip: float,
) -> Float[Array, 'B K R']:
    """The larger of the squared errors of a value and of that value held within `clip` of the old one."""
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    return jnp.maximum(value(values, returns), value(near, returns))
