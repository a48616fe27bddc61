"""From scores and a KL to token rewards, and from these to returns and advantages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from perl_jax import masked


def token_rewards(
    scores: Float[Array, 'B K'],
    kl: Float[Array, 'B K R'],
    mask: Bool[Array, 'B K R'],
    beta: float | Float[Array, ''],
) -> Float[Array, 'B K R']:
    """-beta KL at each token and (1 - beta) R at the last.

    Summed over a response this is the paper's objective (eq. 1) with its KL estimated (kl.py); 0 at the padding.
    """
    return (1 - beta) * masked.at_last(scores, mask) - beta * jnp.where(mask, kl, 0)


def returns(rewards: Float[Array, 'B K R'], gamma: float = 1.0) -> Float[Array, 'B K R']:
    """The reward to go, Z_t = sum_{s >= t} gamma^(s - t) r_s, by a scan from the right."""

    def step(ahead: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = now + gamma * ahead
        return z, z

    time_first = jnp.moveaxis(rewards, -1, 0)
    _, z = jax.lax.scan(step, jnp.zeros_like(time_first[0]), time_first, reverse=True)
    return jnp.moveaxis(z, 0, -1)


def gae(
    rewards: Float[Array, 'B K R'],
    values: Float[Array, 'B K R'],
    mask: Bool[Array, 'B K R'],
    gamma: float,
    lam: float,
) -> Float[Array, 'B K R']:
    """Generalised advantages (Schulman et al. 2015, eq. 16), A_t = sum_{s >= t} (gamma lam)^(s - t) delta_s.

    delta_t = r_t + gamma V_{t+1} - V_t, and the value after a response's last token is 0, whether it ended or was cut.
    With gamma = lam = 1 this is the return less the value, REINFORCE's advantage.
    """
    values = jnp.where(mask, values, 0)
    ahead = jnp.pad(values[..., 1:], ((0, 0), (0, 0), (0, 1)))
    return returns(rewards + gamma * ahead - values, gamma * lam)


def leave_one_out(totals: Float[Array, 'B K']) -> Float[Array, 'B K']:
    """Each response's total less the mean of the K - 1 others' (RLOO: Ahmadian et al. 2024, eq. 8). K >= 2."""
    K = totals.shape[1]
    return _centred(totals) * K / (K - 1)


def standardize(totals: Float[Array, 'B K'], eps: float = 1e-4) -> Float[Array, 'B K']:
    """Each response's total in standard deviations of its prompt's K (GRPO: Shao et al. 2024, section 4.1.2). K >= 2.

    The deviation is a sample's, over K - 1, as in TRL, verl and Tunix; the paper does not say which.
    """
    centred = _centred(totals)
    deviation = jnp.sqrt((centred**2).sum(1, keepdims=True) / (totals.shape[1] - 1))
    return centred / (deviation + eps)


def whiten(x: Float[Array, 'B K R'], mask: Bool[Array, 'B K R'], eps: float = 1e-8) -> Float[Array, 'B K R']:
    """Mean 0 and variance 1 over all real tokens of the batch."""
    away = x - jnp.min(x, initial=jnp.inf, where=mask)  # so that equal ones are 0, as in _centred
    centred = away - masked.mean(away, mask)
    return centred * jax.lax.rsqrt(masked.mean(centred**2, mask) + eps)


def equal(totals: Float[Array, 'B K']) -> Bool[Array, ' B']:
    """Which groups teach nothing where a response is only compared with its siblings: all K totals are the same."""
    return totals.max(1) == totals.min(1)


def _centred(totals: Float[Array, 'B K']) -> Float[Array, 'B K']:
    """Less their mean, and exactly 0 where a group's are all equal.

    A mean of equal numbers is off by a rounding unless K is a power of two; counted from the group's least they are 0.
    """
    away = totals - totals.min(1, keepdims=True)
    return away - away.mean(1, keepdims=True)
