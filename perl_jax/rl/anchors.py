"""An anchor that follows the policy: the exponential moving average of WARP (Rame et al. 2024, section 3.1).

The average is of the adapters' products A B, not of A and B: it has the sum of their ranks, and is truncated to the
anchor's rank by a singular value decomposition of the thin factors (models/averaging.py).
"""

from __future__ import annotations

import jax
import optax

from perl_jax.models import averaging
from perl_jax.models.lora import Adapter, rescaled


def follow(anchor: Adapter, policy: Adapter, rate: float) -> Adapter:
    """(1 - rate) anchor + rate policy, for two adapters of one base. Pure.

    Args:
      anchor: the anchor's adapter.
      policy: the policy's adapter, of the same kind of tuning.
      rate: WARP's mu, 0 to 1.

    Returns:
      The next anchor adapter, shaped like `anchor`.
    """
    if anchor.params is not None:
        return anchor.replace(params=optax.incremental_update(policy.params, anchor.params, rate))
    rank = jax.tree.leaves(anchor.lora)[0].shape[-1]
    average, _ = averaging.truncate(averaging.concatenate((anchor, policy), (1 - rate, rate)), rank)
    average = rescaled(average, anchor.scale)
    return anchor.replace(lora=average.lora)
