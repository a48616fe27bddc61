"""Shaping of scores before they become rewards: functions of (scores, responses, eos_ids), applied in turn.

    SHAPING = [@shaping.whiten, @shaping.clip, @shaping.missing_eos]

Scores are float32 [B, K]. Any of `eos_ids` ends a response. Evaluation uses unshaped scores; training logs both.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Float

from perl_jax import masked
from perl_jax.types import AnyArray, Responses

Ends = int | Sequence[int]


def whiten(
    scores: Float[AnyArray, 'B K'], responses: Responses, eos_ids: Ends, eps: float = 1e-8
) -> Float[AnyArray, 'B K']:
    """Standardize to mean 0 and standard deviation 1 over the batch.

    Args:
      scores: float32 [B, K].
      responses: unused.
      eos_ids: unused.
      eps: is added to the variance.

    Returns:
      float32 [B, K].
    """
    del responses, eos_ids
    shifted = scores - scores.min()  # equal scores become exactly 0: their mean could be off by a rounding
    return (shifted - shifted.mean()) / jnp.sqrt(shifted.var() + eps)


def clip(
    scores: Float[AnyArray, 'B K'], responses: Responses, eos_ids: Ends, limit: float = 5.0
) -> Float[AnyArray, 'B K']:
    """Clip to +-`limit`.

    Args:
      scores: float32 [B, K].
      responses: unused.
      eos_ids: unused.
      limit: in units of the score.

    Returns:
      float32 [B, K].
    """
    del responses, eos_ids
    return jnp.clip(scores, -limit, limit)


def length(
    scores: Float[AnyArray, 'B K'], responses: Responses, eos_ids: Ends, per_token: float = 0.01
) -> Float[AnyArray, 'B K']:
    """Subtract `per_token` for each token of the response, its EOS included.

    Args:
      scores: float32 [B, K].
      responses: the mask of their tokens.
      eos_ids: unused.
      per_token: in units of the score.

    Returns:
      float32 [B, K].
    """
    del eos_ids
    return scores - per_token * masked.lengths(responses.targets_mask)


def missing_eos(
    scores: Float[AnyArray, 'B K'], responses: Responses, eos_ids: Ends, penalty: float = 1.0
) -> Float[AnyArray, 'B K']:
    """Subtract `penalty` from responses without an EOS.

    Args:
      scores: float32 [B, K].
      responses: their tokens, with the mask.
      eos_ids: any of these tokens ends a response.
      penalty: in units of the score.

    Returns:
      float32 [B, K].
    """
    ended = (responses.targets_mask & masked.is_any(responses.targets, eos_ids)).any(-1)
    return jnp.where(ended, scores, scores - penalty)
