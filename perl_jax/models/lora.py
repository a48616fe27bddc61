"""Adapters: the trainable parameters of one role, and `bind`, which joins them to the frozen base.

    base                                       adapter.lora
    decoder/layers/self_attention/             decoder/layers/self_attention/
      query/kernel [L, D, H E]          <->      query/a [L, D, r]   query/b [L, r, H E]
      out/kernel   [L, H E, D]          <->      out/a   [L, H E, r] out/b   [L, r, D]

    bind(base, policy)   bind(base, reward)   bind(base, value)   bind(base, None) = the anchor

LoRA: W + alpha/r A B, initially with A Gaussian and B zero (Hu et al. 2021; the paper, section 2, adapts every
attention projection). Full tuning is another kind of adapter: a `params` tree that replaces the base.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, PyTree

from perl_jax import settings, trees
from perl_jax.errors import UserError
from perl_jax.types import Variables

# alpha / r: one number for all layers, or (path, number) pairs, with a tuple of numbers for stacked layers. Hashable.
Scale = float | tuple[tuple[str, float | tuple[float, ...]], ...]

ATTENTION = r'.*attention/(query|key|value|out)'
ALL_LINEAR = r'.*(attention/(query|key|value|out)|mlp/(wi|wi_0|wi_1|wo))'


class Adapter(struct.PyTreeNode):
    """The trainable parameters of one role: `lora` or `params`, and for a reward or a value also `head`.

    Attributes:
      lora: mirrors the base, {.., 'query': {'a': [.., in, r], 'b': [.., r, out]}} in float32; None for full tuning.
      params: the float32 parameters of full tuning, a tree like the base; None for LoRA.
      head: {'kernel': [D]} in float32; None for a policy.
      scale: alpha / r, the factor of A B: a number, or (path, number) pairs where layers differ.
      dropout: the dropout rate of the inputs of A in training.
    """

    lora: PyTree = None
    params: PyTree = None
    head: PyTree = None
    scale: Scale = struct.field(pytree_node=False, default=1.0)
    dropout: float = struct.field(pytree_node=False, default=0.0)


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """LoRA (Hu et al. 2021, section 4.1): the targeted layers compute x W + alpha/r x A B, with A and B trained.

    Attributes:
      rank: r.
      alpha: A B is multiplied by alpha / r.
      dropout: the dropout rate of the inputs of A in training, from 0 to below 1.
      targets: a regex that matches the whole path of the layers to adapt. `lora.ATTENTION` is the paper's choice
        (section 2); `lora.ALL_LINEAR` adds the MLPs.

    Raises:
      UserError: a rank or dropout out of range.
    """

    rank: settings.Count = 8
    alpha: settings.Positive = 16.0
    dropout: settings.Decay = 0.0
    targets: str = ATTENTION

    tuning = 'lora'

    def __post_init__(self) -> None:
        settings.check(self)

    def init(self, rng: jax.Array, base: PyTree) -> Adapter:
        """Initialize an adapter. B is zero, so the bound network computes exactly what the base does.

        Args:
          rng: a key of jax.random.
          base: the frozen parameters, or their shapes.

        Returns:
          An Adapter with `lora` in float32.

        Raises:
          UserError: `targets` is no regular expression, or matches no layer.
        """
        flat, lora = trees.flatten(base), {}
        layers = [path.removesuffix('/kernel') for path in flat if path.endswith('/kernel')]
        try:
            pattern = re.compile(self.targets)
        except re.error as error:
            raise UserError(f"LoraSpec.targets = '{self.targets}' is no regular expression: {error}") from error
        for layer in filter(pattern.fullmatch, layers):
            *stack, fan_in, fan_out = flat[f'{layer}/kernel'].shape
            # The key depends on the layer's path alone, so that adding a target does not change the other layers.
            key = jax.random.fold_in(rng, zlib.crc32(layer.encode()))
            lora[f'{layer}/a'] = jax.random.normal(key, (*stack, fan_in, self.rank)) * fan_in**-0.5
            lora[f'{layer}/b'] = jnp.zeros((*stack, self.rank, fan_out))
        if not lora:
            raise UserError(f"LoraSpec.targets = '{self.targets}' matches no layer; there are: {', '.join(layers)}")
        return Adapter(
            lora=trees.unflatten(lora), scale=self.alpha / self.rank, dropout=self.dropout
        )


@dataclasses.dataclass(frozen=True)
class FullSpec:
    """Full tuning, the paper's comparator: the adapter is a float32 copy of the whole base."""

    tuning = 'full'

    def init(self, rng: jax.Array, base: PyTree) -> Adapter:
        """Copy the base.

        Args:
          rng: unused; a copy has nothing random.
          base: the parameters to start from.

        Returns:
          An Adapter with `params` in float32.
        """
        del rng
        return Adapter(params=jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), base))


def with_head(adapter: Adapter, rng: jax.Array, width: int, std: float) -> Adapter:
    """Add a scalar head with normal weights.

    Args:
      adapter: of a reward or a value.
      rng: a key of jax.random.
      width: D.
      std: standard deviation of the weights; with 0 the head's outputs are 0.

    Returns:
      The adapter with `head`, {'kernel': float32 [D]}.
    """
    return adapter.replace(head={'kernel': std * jax.random.normal(rng, (width,))})


def bind(base: PyTree, adapter: Adapter | None, *, train: bool = False) -> Variables:
    """Join the frozen base and an adapter into the variables of one role, without a copy.

    Args:
      base: the frozen parameters.
      adapter: the role's trainable parameters; None is the anchor, the base itself.
      train: enable LoRA's dropout, in an `apply` that also gets `rngs={'dropout': key}`.

    Returns:
      Linen's collections for `network.apply`: 'params', and the adapter's 'lora' (B times alpha / r) and 'head'.
    """
    if adapter is None:
        return {'params': base}
    variables: dict[str, Any] = {'params': base if adapter.params is None else adapter.params}
    if adapter.head is not None:
        variables['head'] = adapter.head
    if adapter.lora is not None:
        flat = trees.flatten(adapter.lora)
        for path in [p for p in flat if p.endswith('/b')]:
            flat[path] = flat[path] * scale_of(adapter.scale, path.removesuffix('/b'))
            if train and adapter.dropout:
                flat[path.removesuffix('b') + 'dropout'] = jnp.full(flat[path].shape[:-2], adapter.dropout)
        variables['lora'] = trees.unflatten(flat)
    return variables


def merge(base: PyTree, adapter: Adapter) -> PyTree:
    """Merge an adapter into plain parameters that compute the same as `bind(base, adapter)`: W + alpha/r A B.

    Args:
      base: the frozen parameters.
      adapter: of LoRA or of full tuning. Its head is not merged.

    Returns:
      A tree like the base, in its dtypes; for full tuning the adapter's parameters.
    """
    if adapter.params is not None:
        return adapter.params
    flat = trees.flatten(base)
    lora = trees.flatten(adapter.lora)
    for path in [p.removesuffix('/a') for p in lora if p.endswith('/a')]:
        kernel = flat[f'{path}/kernel']
        delta = scale_of(adapter.scale, path) * (lora[f'{path}/a'] @ lora[f'{path}/b'])
        flat[f'{path}/kernel'] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return trees.unflatten(flat)


def scale_of(scale: Scale, layer: str) -> float | np.ndarray:
    """The factor of A B of one layer.

    Args:
      scale: `Adapter.scale`.
      layer: the layer's path, such as 'decoder/layers/mlp/wo'.

    Returns:
      A number, or float32 [L, 1, 1] where stacked layers differ.
    """
    value = dict(scale)[layer] if isinstance(scale, tuple) else scale
    return np.array(value, np.float32)[:, None, None] if isinstance(value, tuple) else value


def as_scale(value: Any) -> Scale:
    """Convert a scale from JSON, where lists stand for tuples."""
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, list | tuple) else value


def rescaled(adapter: Adapter, scale: Scale) -> Adapter:
    """The same LoRA with another `scale`, compensated in B.

    Args:
      adapter: of LoRA.
      scale: the new factor of A B.

    Returns:
      An adapter that computes the same as `adapter`: B times the old scale / the new one.
    """
    flat = trees.flatten(adapter.lora)
    for layer in [path.removesuffix('/b') for path in flat if path.endswith('/b')]:
        flat[f'{layer}/b'] = flat[f'{layer}/b'] * (scale_of(adapter.scale, layer) / scale_of(scale, layer))
    return adapter.replace(lora=trees.unflatten(flat), scale=scale)


def count(tree: PyTree) -> int:
    """Count the parameters.

    Args:
      tree: arrays, or shapes.

    Returns:
      The number of elements of all its leaves.
    """
    return sum(int(x.size) for x in jax.tree.leaves(tree))


def readout(variables: Variables, hidden: Float[Array, '*batch D']) -> Float[Array, '*batch']:
    """Apply the scalar head to hidden states: rewards or values.

    Args:
      variables: `bind(base, adapter)` of an adapter with a head.
      hidden: [..., D], in any float dtype.

    Returns:
      float32 [...].
    """
    return hidden.astype(jnp.float32) @ variables['head']['kernel']
