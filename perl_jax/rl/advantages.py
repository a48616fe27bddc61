"""From scores and a KL to token rewards, and from these to returns and advantages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from perl_jax import masked
from perl_jax.types import AnyArray


def token_rewards(
    scores: Float[AnyArray, 'B K'],
    kl: Float[AnyArray, 'B K R'],
    mask: Bool[AnyArray, 'B K R'],
    beta: float | Float[Array, ''],
) -> Float[Array, 'B K R']:
    """-beta KL at each token and (1 - beta) R at the last.

    Summed over a response this is the paper's objective (eq. 1) with its KL estimated (kl.py).

    Args:
      scores: float32 [B, K], R.
      kl: float32 [B, K, R], nats: an estimate of the KL at each token; any value at the padding.
      mask: bool [B, K, R], true at the tokens.
      beta: the weight of the KL, 0 to 1.

    Returns:
      float32 [B, K, R], 0 at the padding.
    """
    return (1 - beta) * masked.at_last(scores, mask) - beta * jnp.where(mask, kl, 0)


def returns(rewards: Float[AnyArray, 'B K R'], gamma: float = 1.0) -> Float[AnyArray, 'B K R']:
    """The reward to go, Z_t = sum_{s >= t} gamma^(s - t) r_s, by a reverse scan.

    Args:
      rewards: float32 [B, K, R], r_t; 0 at the padding.
      gamma: the discount for each token.

    Returns:
      Z_t, float32 [B, K, R]; 0 at the padding.
    """

    def step(later: jax.Array, reward: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = reward + gamma * later
        return z, z

    time_first = jnp.moveaxis(rewards, -1, 0)
    _, z = jax.lax.scan(step, jnp.zeros_like(time_first[0]), time_first, reverse=True)
    return jnp.moveaxis(z, 0, -1)


def gae(
    rewards: Float[AnyArray, 'B K R'],
    values: Float[AnyArray, 'B K R'],
    mask: Bool[AnyArray, 'B K R'],
    gamma: float,
    lam: float,
) -> Float[AnyArray, 'B K R']:
    """Generalised advantages (Schulman et al. 2015, eq. 16), A_t = sum_{s >= t} (gamma lam)^(s - t) delta_s.

    delta_t = r_t + gamma V_{t+1} - V_t, and the value after a response's last token is 0, whether it ended or was cut.
    With gamma = lam = 1 this is the return minus the value, REINFORCE's advantage.

    Args:
      rewards: float32 [B, K, R], r_t; 0 at the padding.
      values: float32 [B, K, R], V_t before each token; any value at the padding.
      mask: bool [B, K, R], true at the tokens.
      gamma: the discount for each token.
      lam: lambda, 0 (one-step advantages) to 1 (returns).

    Returns:
      A_t, float32 [B, K, R]; 0 at the padding.
    """
    values = jnp.where(mask, values, 0)
    next_values = jnp.pad(values[..., 1:], ((0, 0), (0, 0), (0, 1)))
    return returns(rewards + gamma * next_values - values, gamma * lam)


def leave_one_out(totals: Float[AnyArray, 'B K']) -> Float[AnyArray, 'B K']:
    """Each response's total minus the mean of the K - 1 others (RLOO: Ahmadian et al. 2024, eq. 8).

    Args:
      totals: float32 [B, K], the sum of each response's token rewards; K >= 2.

    Returns:
      float32 [B, K]; each prompt's K numbers have mean 0.
    """
    K = totals.shape[1]
    return _centred(totals) * K / (K - 1)


def standardize(totals: Float[AnyArray, 'B K'], eps: float = 1e-4) -> Float[AnyArray, 'B K']:
    """Standardize the totals of each prompt's K responses (GRPO: Shao et al. 2024, section 4.1.2).

    The standard deviation is a sample's, with K - 1, as in TRL, verl and Tunix; the paper does not specify it.

    Args:
      totals: float32 [B, K], the sum of each response's token rewards; K >= 2.
      eps: is added to the standard deviation.

    Returns:
      float32 [B, K]; each prompt's K numbers have mean 0, and are 0 where the totals are equal.
    """
    centred = _centred(totals)
    deviation = jnp.sqrt((centred**2).sum(1, keepdims=True) / (totals.shape[1] - 1))
    return centred / (deviation + eps)


def whiten(x: Float[AnyArray, 'B K R'], mask: Bool[AnyArray, 'B K R'], eps: float = 1e-8) -> Float[AnyArray, 'B K R']:
    """Standardize to mean 0 and variance 1 over all real tokens of the batch.

    Args:
      x: float32 [B, K, R]; any value at the padding.
      mask: bool [B, K, R], true at the tokens.
      eps: is added to the variance.

    Returns:
      float32 [B, K, R]; any value at the padding.
    """
    shifted = x - jnp.min(x, initial=jnp.inf, where=mask)  # equal numbers become exactly 0, as in _centred
    centred = shifted - masked.mean(shifted, mask)
    return centred * jax.lax.rsqrt(masked.mean(centred**2, mask) + eps)


def equal(totals: Float[AnyArray, 'B K']) -> Bool[AnyArray, ' B']:
    """Groups whose K totals are all equal: they give no gradient to an algorithm that compares a prompt's responses.

    Args:
      totals: float32 [B, K], of the responses to each prompt.

    Returns:
      bool [B].
    """
    return totals.max(1) == totals.min(1)


def _centred(totals: Float[AnyArray, 'B K']) -> Float[AnyArray, 'B K']:
    """Subtract each group's mean; exactly 0 where a group's totals are all equal.

    The mean of K equal numbers is off by a rounding unless K is a power of two, so the minimum is subtracted first.
    """
    shifted = totals - totals.min(1, keepdims=True)
    return shifted - shifted.mean(1, keepdims=True)
