"""An anchor that follows the policy: the exponential moving average of WARP (Rame et al. 2024, section 3.1).

What is averaged is what the adapters do to the weights, B A, and not A and B: the average has twice the rank, and is
cut back to the anchor's by a singular value decomposition of the thin factors (averaging.py).
"""

from __future__ import annotations

import jax

from perl_jax import averaging
from perl_jax.lora import Adapter


def follow(anchor: Adapter, policy: Adapter, rate: float) -> Adapter:
    """(1 - rate) anchor + rate policy, both adapters of one base; shaped like the anchor. Pure."""
    weights = (1 - rate, rate)
    if anchor.params is not None:
        average = jax.tree.map(lambda a, p: weights[0] * a + weights[1] * p, anchor.params, policy.params)
        return anchor.replace(params=average)
    rank = jax.tree.leaves(anchor.lora)[0].shape[-1]
    average, _ = averaging.truncate(averaging.concatenate((anchor, policy), weights), rank)
    average = averaging.rescaled(average, anchor.scale)
    return anchor.replace(lora=average.lora)
