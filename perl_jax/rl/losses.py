"""The losses, each a formula of arrays, without networks, adapters or settings.

Each returns the loss of every token, pair or response; a step computes the weighted sum, with the algorithm's weights
(rl/algorithms/) for policy, value, KL and entropy. Values at the padding are arbitrary and get weight 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from perl_jax.types import AnyArray


def pairwise(rewards: Float[AnyArray, 'B 2']) -> Float[AnyArray, ' B']:
    """Bradley-Terry, of each pair: -log sigmoid(r_chosen - r_rejected) (the paper, A.1.2).

    Args:
      rewards: float32 [B, 2], logits; the chosen response comes first.

    Returns:
      float32 [B], the loss of each pair in nats.
    """
    return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1])


def pointwise(rewards: Float[AnyArray, 'B K'], labels: Float[AnyArray, 'B K']) -> Float[AnyArray, 'B K']:
    """Binary cross-entropy on the logit r, of each response: -p log sigmoid(r) - (1 - p) log(1 - sigmoid(r)).

    The paper prints log sigmoid(1 - r) for the negative term; this is the standard form.

    Args:
      rewards: float32 [B, K], the logits r.
      labels: float32 [B, K], p: 1 is a thumb up, 0 a thumb down.

    Returns:
      float32 [B, K], the loss of each response in nats.
    """
    return optax.sigmoid_binary_cross_entropy(rewards, labels)


LOG_RATIO_CAP = 20.0  # e^20 is 5e8: far beyond any clip, and its square still finite in float32


def ratio(log_ratio: Float[AnyArray, '*shape']) -> Float[AnyArray, '*shape']:
    """exp(log_ratio), capped so that it is always finite.

    exp(100) overflows float32, and infinity times an advantage of 0 is NaN. Beyond the cap value and gradient stay at
    e^20, so the gradient keeps its direction.

    Args:
      log_ratio: float32 of any shape, nats: log pi - log pi_old.

    Returns:
      float32 of the same shape: pi / pi_old, at most e^`LOG_RATIO_CAP`.
    """
    return jnp.exp(log_ratio - jax.lax.stop_gradient(jnp.maximum(log_ratio - LOG_RATIO_CAP, 0)))


def reinforce(logprobs: Float[AnyArray, 'B K R'], advantages: Float[AnyArray, 'B K R']) -> Float[AnyArray, 'B K R']:
    """REINFORCE for language models, of each token: -log pi(A_t | X_t) stop_grad(Z_t - V_t) (RLAIF, app. F).

    Args:
      logprobs: float32 [B, K, R], nats: log pi(A_t | X_t), which the gradient flows through.
      advantages: float32 [B, K, R], Z_t - V_t.

    Returns:
      float32 [B, K, R], the loss of each token.
    """
    return -logprobs * jax.lax.stop_gradient(advantages)


def clipped(
    logprobs: Float[AnyArray, 'B K R'],
    old_logprobs: Float[AnyArray, 'B K R'],
    advantages: Float[AnyArray, 'B K R'],
    clip: float,
) -> Float[AnyArray, 'B K R']:
    """PPO's surrogate (Schulman 2017, eq. 7), of each token: -min(w A, clip(w, 1 -+ clip) A) with w = pi / pi_old.

    Args:
      logprobs: float32 [B, K, R], nats: log pi, which the gradient flows through.
      old_logprobs: float32 [B, K, R], nats: log pi_old, those that the rollout was drawn with.
      advantages: float32 [B, K, R], A.
      clip: the most that w may differ from 1.

    Returns:
      float32 [B, K, R], the loss of each token.
    """
    w, advantages = ratio(logprobs - old_logprobs), jax.lax.stop_gradient(advantages)
    return -jnp.minimum(w * advantages, jnp.clip(w, 1 - clip, 1 + clip) * advantages)


def value(values: Float[AnyArray, 'B K R'], returns: Float[AnyArray, 'B K R']) -> Float[AnyArray, 'B K R']:
    """Squared error of the baseline, of each token: (Z_t - V_t)^2 (RLAIF, app. F).

    Args:
      values: float32 [B, K, R], V_t, which the gradient flows through.
      returns: float32 [B, K, R], Z_t.

    Returns:
      float32 [B, K, R], the loss of each token.
    """
    return (jax.lax.stop_gradient(returns) - values) ** 2


def clipped_value(
    values: Float[AnyArray, 'B K R'],
    old_values: Float[AnyArray, 'B K R'],
    returns: Float[AnyArray, 'B K R'],
    clip: float,
) -> Float[AnyArray, 'B K R']:
    """The larger of the squared errors of a value and of that value held within `clip` of the old one.

    Args:
      values: float32 [B, K, R], V_t, which the gradient flows through.
      old_values: float32 [B, K, R], V_t before the first update of this rollout.
      returns: float32 [B, K, R], Z_t.
      clip: the most that a value may differ from the old one, in units of the reward.

    Returns:
      float32 [B, K, R], the loss of each token.
    """
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    return jnp.maximum(value(values, returns), value(near, returns))
