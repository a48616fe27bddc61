"""Reward ensembles: aggregates the scores of M members for one response, and measures their disagreement.

Coste et al. 2023 (arXiv 2310.02743): the mean, the worst case, and the mean minus a multiple of the variance across
members (UWO, eq. 3); the median is an addition. A pairwise loss does not determine a member's offset. All aggregates
except the mean compare the members' absolute scores, so they are meaningful only if thumbs have fixed the offsets.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float

from perl_jax.types import Metrics

Members = Float[Array, 'M B K']
Scores = Float[Array, 'B K']


def mean(scores: Members) -> Scores:
    """The mean of all members.

    Args:
      scores: float32 [M, B, K], of the M members.

    Returns:
      float32 [B, K].
    """
    return scores.mean(0)


def minimum(scores: Members) -> Scores:
    """The worst case.

    Args:
      scores: float32 [M, B, K], of the M members.

    Returns:
      float32 [B, K].
    """
    return scores.min(0)


def median(scores: Members) -> Scores:
    """The median of the members; the mean of the two middle ones if M is even.

    Args:
      scores: float32 [M, B, K], of the M members.

    Returns:
      float32 [B, K].
    """
    return jnp.median(scores, axis=0)


def lower_bound(scores: Members, penalty: float = 1.0) -> Scores:
    """The mean minus `penalty` times the variance across members.

    Args:
      scores: float32 [M, B, K], of the M members.
      penalty: the weight of the variance, in 1 / units of the score.

    Returns:
      float32 [B, K].
    """
    return scores.mean(0) - penalty * scores.var(0)


def disagreement(scores: Members) -> Metrics:
    """Measure the disagreement of the members.

    Args:
      scores: float32 [M, B, K], of the M members.

    Returns:
      float32 [] by name, nothing for a single member. 'reward/disagreement': the standard deviation across members,
      averaged over responses. 'reward/order_disagreement', if K > 1: how often two members order two responses to one
      prompt differently.
    """
    M, _, K = scores.shape
    if M == 1:
        return {}
    metrics = {'reward/disagreement': scores.std(0).mean()}
    if K > 1:
        order_signs = jnp.sign(scores[..., :, None] - scores[..., None, :])  # [M, B, K, K]
        order_differs = jnp.stack([order_signs[i] != order_signs[j] for i, j in itertools.combinations(range(M), 2)])
        metrics['reward/order_disagreement'] = order_differs.mean() * K / (K - 1)  # off-diagonal only
    return metrics
