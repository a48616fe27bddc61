"""What may be done to scores before they become rewards: functions of (scores, responses, eos_ids), applied in turn.

    SHAPING = [@shaping.whiten, @shaping.clip, @shaping.missing_eos]

A score is [B, K] float32. Any of `eos_ids` ends a response. Evaluation never sees shaped
scores, and training logs both.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from perl_jax import masked
from perl_jax.types import Responses

Ends = int | Sequence[int]


def whiten(
    scores: Float[Array, 'B K'], responses: Responses, eos_ids: Ends, eps: float = 1e-8
) -> Float[Array, 'B K']:
    """Mean 0 and standard deviation 1 over the batch."""
    del responses, eos_ids
    away = scores - scores.min()  # so that equal scores are exactly 0: their mean may be off by a rounding
    return (away - away.mean()) / jnp.sqrt(away.var() + eps)


def clip(
    scores: Float[Array, 'B K'], responses: Responses, eos_ids: Ends, limit: float = 5.0
) -> Float[Array, 'B K']:
    """No score beyond +-`limit`."""
    del responses, eos_ids
    return jnp.clip(scores, -limit, limit)


def length(
    scores: Float[Array, 'B K'], responses: Responses, eos_ids: Ends, per_token: float = 0.01
) -> Float[Array, 'B K']:
    """`per_token` less for each token of the response, its EOS included."""
    del eos_ids
    return scores - per_token * masked.lengths(responses.targets_mask)


def missing_eos(
    scores: Float[Array, 'B K'], responses: Responses, eos_ids: Ends, penalty: float = 1.0
) -> Float[Array, 'B K']:
    """`penalty` less for a response that ran out of room."""
    ended = (responses.targets_mask & masked.is_any(responses.targets, eos_ids)).any(-1)
    return jnp.where(ended, scores, scores - penalty)
