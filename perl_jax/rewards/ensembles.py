"""Several rewards as one: what becomes of M members' scores of one response, and how far the members disagree.

Coste et al. 2023 (arXiv 2310.02743): the mean, the worst case, and the mean less a multiple of the variance across
members (UWO, eq. 3); here also the median. A pairwise loss leaves each member's offset free: all but the mean compare
members with each other, and make sense where thumbs have pinned the offsets.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float

from perl_jax.types import Metrics

Members = Float[Array, 'M B K']
Scores = Float[Array, 'B K']


def mean(scores: Members) -> Scores:
    """Of all members."""
    return scores.mean(0)


def minimum(scores: Members) -> Scores:
    """The worst case."""
    return scores.min(0)


def median(scores: Members) -> Scores:
    """The middle member; the mean of the two in the middle where M is even."""
    return jnp.median(scores, axis=0)


def lower_bound(scores: Members, penalty: float = 1.0) -> Scores:
    """The mean less `penalty` times the variance across members."""
    return scores.mean(0) - penalty * scores.var(0)


def disagreement(scores: Members) -> Metrics:
    """How far members are apart; nothing for one member.

    'reward/disagreement': the standard deviation across members, mean over responses. 'reward/order_disagreement': of
    two members and two responses to one prompt, how often they are put in a different order; only where K > 1.
    """
    M, _, K = scores.shape
    if M == 1:
        return {}
    metrics = {'reward/disagreement': scores.std(0).mean()}
    if K > 1:
        order = jnp.sign(scores[..., :, None] - scores[..., None, :])  # [M, B, K, K]
        differ = jnp.stack([order[i] != order[j] for i, j in itertools.combinations(range(M), 2)])
        metrics['reward/order_disagreement'] = differ.mean() * K / (K - 1)  # a response is never against itself
    return metrics
