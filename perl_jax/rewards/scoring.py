"""The score of a response: a scalar head on the state that has read it, of one reward or of several on one base."""

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
    """Score responses by a learned reward: the scalar head on the state that has read the last token.

    Args:
      network: a Decoder, a T5, or a module with their methods.
      variables: of the reward, `bind(base, adapter)` with an adapter that has a head.
      batch: prompts and responses.
      **apply: goes to `network.apply` (`rngs` for dropout).

    Returns:
      float32 [B, K]: a logit, no probability; a difference of two is the log-odds that the first is preferred (the
      paper, A.1.2).
    """
    ends = masked.lengths(batch.targets_mask)
    return lora.readout(variables, unpadding.apply(network, variables, batch, ends, **apply))


def member_scores(
    network: nn.Module, base: PyTree, adapters: Sequence[lora.Adapter], batch: Responses
) -> Float[Array, 'M B K']:
    """The scores of several rewards on one base: one program, whatever the members' ranks, targets or tuning."""
    return jnp.stack([score(network, lora.bind(base, adapter), batch) for adapter in adapters])


def frozen(adapter: lora.Adapter, base: PyTree) -> lora.Adapter:
    """A reward that is not trained any more: of full tuning, its weights in the base's dtype."""
    if adapter.params is None:
        return adapter
    dtype = jax.tree.leaves(base)[0].dtype
    return adapter.replace(params=jax.tree.map(lambda x: x.astype(dtype), adapter.params))


def compiled(
    network: nn.Module, aggregate: Callable[[Float[Array, 'M B K']], Float[Array, 'B K']], partitioner: Partitioner
) -> Callable[[PyTree, Sequence[lora.Adapter], Responses], tuple[jax.Array, Metrics]]:
    """The learned reward as the loop compiles it: (base, members, rollout) -> scores [B, K], disagreement."""

    def judge(base: PyTree, members: Sequence[lora.Adapter], batch: Responses) -> tuple[jax.Array, Metrics]:
        scores = member_scores(network, base, members, batch)
        return aggregate(scores), ensembles.disagreement(scores)

    return jax.jit(judge, out_shardings=(partitioner.sharding('batch'), None))
