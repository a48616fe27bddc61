"""Adapters: all that is trained for one role, and the one function that joins them to the frozen base.

    base                                       adapter.lora
    decoder/layers/self_attention/             decoder/layers/self_attention/
      query/kernel [L, D, H E]          <->      query/a [L, D, r]   query/b [L, r, H E]
      out/kernel   [L, H E, D]          <->      out/a   [L, H E, r] out/b   [L, r, D]

    bind(base, policy)   bind(base, reward)   bind(base, value)   bind(base, None) = the anchor

LoRA: W + alpha/r A B with A Gaussian and B zero (Hu et al. 2021; the paper, section 2, adapts every attention
projection). Full tuning is another adapter: a whole `params` tree that takes the base's place.
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

from perl_jax import trees
from perl_jax.errors import UserError, check_count
from perl_jax.types import Variables

# alpha / r: of all layers, or of each by its path; of stacked layers one each. Hashable, and JSON but for its lists.
Scale = float | tuple[tuple[str, float | tuple[float, ...]], ...]

ATTENTION = r'.*attention/(query|key|value|out)'
ALL_LINEAR = r'.*(attention/(query|key|value|out)|mlp/(wi|wi_0|wi_1|wo))'


class Adapter(struct.PyTreeNode):
    """All that is trained for one role: `lora` or `params`, and for a reward or a value also `head`.

    Attributes:
      lora: mirrors the base, {.., 'query': {'a': [.., in, r], 'b': [.., r, out]}} in float32; None for full tuning.
      params: of full tuning, a float32 tree like the base that takes its place; None for LoRA.
      head: {'kernel': [D]} in float32; None for a policy.
      scale: alpha / r, what A B is multiplied by: a number, or (path of a layer, its numbers) where layers differ.
      dropout: the share of a layer's inputs that its pair does not see while it is trained.
    """

    lora: PyTree = None
    params: PyTree = None
    head: PyTree = None
    scale: Scale = struct.field(pytree_node=False, default=1.0)
    dropout: float = struct.field(pytree_node=False, default=0.0)


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """LoRA (Hu et al. 2021, section 4.1): chosen layers compute x W + alpha/r x A B, of which A and B are trained.

    Attributes:
      rank: r.
      alpha: a constant; what A B is multiplied by is alpha / r.
      dropout: the share of a layer's inputs that its pair does not see while it is trained, from 0 to below 1.
      targets: which layers, a regex over a layer's whole path. `lora.ATTENTION` is the paper's choice (section 2);
        `lora.ALL_LINEAR` adds the MLPs.

    Raises:
      UserError: a rank or dropout out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = ATTENTION

    tuning = 'lora'

    def __post_init__(self) -> None:
        check_count('LoraSpec.rank', self.rank)
        if not 0 <= self.dropout < 1:
            raise UserError(f'LoraSpec.dropout = {self.dropout}: give a number from 0 to below 1')

    def init(self, rng: jax.Array, base: PyTree) -> Adapter:
        """Draw a fresh adapter; the bound network still computes exactly what the base does, as B is zero.

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
            # Each layer's randomness depends on its own path alone, so that adding a target does not change the others.
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
          rng: unused, as there is nothing random in a copy.
          base: the parameters to start from.

        Returns:
          An Adapter with `params` in float32.
        """
        del rng
        return Adapter(params=jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), base))


def with_head(adapter: Adapter, rng: jax.Array, width: int, std: float) -> Adapter:
    """Add a scalar head, normal with `std`; 0 makes a value that starts at 0. `width` is D."""
    return adapter.replace(head={'kernel': std * jax.random.normal(rng, (width,))})


def bind(base: PyTree, adapter: Adapter | None, *, train: bool = False) -> Variables:
    """Join the frozen base and an adapter to the variables of one role. Nothing is copied.

    Args:
      base: the frozen parameters.
      adapter: what the role trains; None is the anchor policy, the base itself.
      train: let LoRA's dropout happen, in an `apply` that also gets `rngs={'dropout': key}`.

    Returns:
      Linen's collections for `network.apply`: 'params', and of the adapter 'lora' (its B times alpha / r) and 'head'.
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
    """Make plain parameters that compute what `bind(base, adapter)` does: W + alpha/r A B.

    Args:
      base: the frozen parameters.
      adapter: of LoRA or of full tuning. Its head stays outside.

    Returns:
      A tree like the base, in its dtypes; of full tuning the adapter's own parameters.
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
    """What A B of one layer is multiplied by: a number, or float32 [L, 1, 1] where stacked layers differ."""
    value = dict(scale)[layer] if isinstance(scale, tuple) else scale
    return np.array(value, np.float32)[:, None, None] if isinstance(value, tuple) else value


def as_scale(value: Any) -> Scale:
    """A scale as JSON gives it back, with lists for tuples."""
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, list | tuple) else value


def rescaled(adapter: Adapter, scale: Scale) -> Adapter:
    """The same LoRA with another `scale`: its B takes up the difference."""
    flat = trees.flatten(adapter.lora)
    for layer in [path.removesuffix('/b') for path in flat if path.endswith('/b')]:
        flat[f'{layer}/b'] = flat[f'{layer}/b'] * (scale_of(adapter.scale, layer) / scale_of(scale, layer))
    return adapter.replace(lora=trees.unflatten(flat), scale=scale)


def count(tree: PyTree) -> int:
    """How many numbers a tree holds; shapes are enough."""
    return sum(int(x.size) for x in jax.tree.leaves(tree))


def readout(variables: Variables, hidden: Float[Array, '*batch D']) -> Float[Array, '*batch']:
    """The scalar head on hidden states: a reward or a value, in float32."""
    return hidden.astype(jnp.float32) @ variables['head']['kernel']
