"""Scores of responses: a scalar head on the last token's hidden state, of one reward or of several on one base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from perl_jax import masked
from perl_jax.models import lora, unpadding
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import ensembles
from perl_jax.types import Metrics, Responses, Variables


def score(network: nn.Module, variables: Variables, batch: Responses, **apply: Any) -> Float[Array, 'B K']:
    """Score responses by a learned reward: the scalar head on the hidden state of the last token.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      variables: the reward's variables, `bind(base, adapter)` with an adapter that has a head.
      batch: prompts and responses.
      **apply: keyword arguments of `network.apply` (`rngs` for dropout).

    Returns:
      float32 [B, K]: logits, not probabilities; the difference of two is the log-odds that the first is preferred (the
      paper, A.1.2).
    """
    ends = masked.lengths(batch.targets_mask)
    return lora.readout(variables, unpadding.apply(network, variables, batch, ends, **apply))


def member_scores(
    network: nn.Module, base: PyTree, adapters: Sequence[lora.Adapter], batch: Responses
) -> Float[Array, 'M B K']:
    """Score responses by several rewards on one base, which may differ in rank, targets or tuning.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      base: the frozen parameters.
      adapters: of the M members, each with a head.
      batch: prompts and responses.

    Returns:
      float32 [M, B, K], logits; see `score`.
    """
    return jnp.stack([score(network, lora.bind(base, adapter), batch) for adapter in adapters])


def cast_to_base_dtype(adapter: lora.Adapter, base: PyTree) -> lora.Adapter:
    """Cast the weights of a fully tuned reward to the base's dtype.

    Args:
      adapter: of LoRA or of full tuning.
      base: the frozen parameters.

    Returns:
      The adapter with `params` in that dtype; a LoRA adapter unchanged.
    """
    if adapter.params is None:
        return adapter
    dtype = jax.tree.leaves(base)[0].dtype
    return adapter.replace(params=jax.tree.map(lambda x: x.astype(dtype), adapter.params))


def make_score_fn(
    network: nn.Module, aggregate: Callable[[Float[Array, 'M B K']], Float[Array, 'B K']], partitioner: Partitioner
) -> Callable[[PyTree, Sequence[lora.Adapter], Responses], tuple[jax.Array, Metrics]]:
    """Return the jitted scoring function of a learned reward: (base, adapters, batch) -> scores [B, K], metrics.

    Args:
      network: the network of the rewards.
      aggregate: combines the members' scores [M, B, K] into [B, K]; see rewards/ensembles.py.
      partitioner: the devices.
    """

    def score_fn(base: PyTree, adapters: Sequence[lora.Adapter], batch: Responses) -> tuple[jax.Array, Metrics]:
        scores = member_scores(network, base, adapters, batch)
        return aggregate(scores), ensembles.disagreement(scores)

    return jax.jit(score_fn, out_shardings=(partitioner.sharding('batch'), None))
