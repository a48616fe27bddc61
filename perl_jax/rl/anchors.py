"""An anchor that follows the policy: the exponential moving average of WARP (Rame et al. 2024, section 3.1).

What is averaged is what the adapters do to the weights, A B, and not A and B: the average has twice the rank, and is
cut back to the anchor's by a singular value decomposition of the thin factors (averaging.py).
"""

from __future__ import annotations

import jax
import optax

from perl_jax.models import averaging
from perl_jax.models.lora import Adapter, rescaled


def follow(anchor: Adapter, policy: Adapter, rate: float) -> Adapter:
    """(1 - rate) anchor + rate policy, both adapters of one base; shaped like the anchor. Pure."""
    if anchor.params is not None:
        return anchor.replace(params=optax.incremental_update(policy.params, anchor.params, rate))
    rank = jax.tree.leaves(anchor.lora)[0].shape[-1]
    average, _ = averaging.truncate(averaging.concatenate((anchor, policy), (1 - rate, rate)), rank)
    average = rescaled(average, anchor.scale)
    return anchor.replace(lora=average.lora)
