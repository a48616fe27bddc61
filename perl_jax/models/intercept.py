"""LoRA for other people's linen modules, without changes to them.

    net = intercept(module, LoraSpec(targets=r'.*/(query|value)'))
    adapter = net.init(rng, *inputs)                            # lora.Adapter, its tree named as the module's own is
    y = net.apply(lora.bind(base, adapter), *inputs)            # instead of module.apply({'params': base}, *inputs)
    params = net.merge(base, adapter, *inputs)                  # plain parameters, for the plain module

A layer is any module with a `kernel` that multiplies the trailing axes of its input by it: nn.Dense, nn.DenseGeneral
with kernels of any rank, T5X's DenseGeneral. While the module runs, the pair is stored in the layer's own `params`,
because nn.scan passes on only the collections that its author listed; there it also gets the layer axis of its author.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jaxtyping import PyTree

from perl_jax import trees
from perl_jax.errors import UserError
from perl_jax.models.lora import Adapter, LoraSpec, rescaled
from perl_jax.types import Variables

HIDDEN = 'lora_'  # prefix of the names a and b: no layer has such a parameter of its own


@dataclasses.dataclass(frozen=True)
class Intercepted:
    """Any linen module with a hook for LoRA. Its base parameters are the module's own.

    Attributes:
      module: a linen module.
      spec: rank, alpha, dropout and the layers to adapt.
    """

    module: nn.Module
    spec: LoraSpec

    def init(self, rng: jax.Array, *args: Any, **kwargs: Any) -> Adapter:
        """Initialize an adapter in float32. B is zero, so the module computes exactly what it does without.

        Args:
          rng: for the A of each pair; every B is zero.
          *args: of the module's own `init`, which is traced without computing its parameters.
          **kwargs: likewise.

        Raises:
          UserError: the targets match no layer, or one that is not a product over its input's trailing axes.
        """
        pattern, layers = re.compile(self.spec.targets), []

        def create(layer: _Layer) -> jax.Array:
            layers.append(layer.path)
            if pattern.fullmatch(layer.path):
                layer.pair(self.spec.rank)
            return layer.y

        def draw(rng: jax.Array) -> PyTree:
            with _each_layer(create):
                return _pairs_of(self.module.init(rng, *args, **kwargs)['params'])

        lora = jax.jit(draw)(rng)
        if not lora:
            layer_names = ', '.join(dict.fromkeys(layers))
            raise UserError(f"LoraSpec.targets = '{self.spec.targets}' matches no layer; there are: {layer_names}")
        return Adapter(lora=lora, scale=self.spec.alpha / self.spec.rank, dropout=self.spec.dropout)

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        """`module.apply` with an adapter.

        LoRA's dropout needs `bind(..., train=True)` and a `dropout` rng in the layer; nn.scan passes on only the rngs
        that its author listed.

        Args:
          variables: `lora.bind(base, adapter)`, to which other collections may be added.
          *args: of the module's own `apply`.
          **kwargs: likewise.

        Returns:
          The output of `module.apply`.
        """
        pairs = trees.flatten(variables.get('lora', {}))
        dropout = self.spec.dropout if any(name.endswith('/dropout') for name in pairs) else 0.0

        return _applied(self.module.apply, dropout, variables, *args, **kwargs)

    def merge(self, base: PyTree, adapter: Adapter, *args: Any, **kwargs: Any) -> PyTree:
        """Merge an adapter into plain parameters, W + alpha/r A B in each layer's own shape.

        Args:
          base: the module's parameters.
          adapter: of `init`.
          *args: as for `init`.
          **kwargs: likewise.

        Returns:
          A tree like `base`, for the plain module.
        """

        scale = adapter.scale
        if isinstance(scale, tuple):  # inside a scan all layers have the same number
            scale = 1.0
            adapter = rescaled(adapter, scale)

        def write(layer: _Layer) -> jax.Array:
            if layer.has_pair:
                layer.fold(scale)
            return layer.y

        def run(base: PyTree, lora: PyTree) -> PyTree:
            with _each_layer(write):
                variables = _merge_pairs({'params': base, 'lora': lora})
                _, changed = self.module.apply(variables, *args, mutable=['params'], **kwargs)
            flat = traverse_util.flatten_dict(changed['params'])
            return traverse_util.unflatten_dict({k: v for k, v in flat.items() if not k[-1].startswith(HIDDEN)})

        return jax.jit(run)(base, adapter.lora)


def intercept(module: nn.Module, spec: LoraSpec) -> Intercepted:
    """Add the LoRA hook to a module.

    Args:
      module: a linen module.
      spec: its `targets` matches the whole path of a layer, as in LoraSpec.

    Returns:
      An Intercepted, with `init`, `apply` and `merge`.
    """
    return Intercepted(module, spec)


def apply(plain: Callable[..., Any], variables: Variables, *args: Any, **kwargs: Any) -> Any:
    """A module's `apply` with `lora.bind(base, adapter)`, for a wrapper that hides the interception.

    Raises:
      UserError: LoRA's dropout is enabled; its rate is known to an `Intercepted` alone.
    """
    if any(name.endswith('/dropout') for name in trees.flatten(variables.get('lora', {}))):
        raise UserError('LoraSpec.dropout: not with a network that is not ours; set it to 0.0')
    return _applied(plain, 0.0, variables, *args, **kwargs)


def _applied(plain: Callable[..., Any], dropout: float, variables: Variables, *args: Any, **kwargs: Any) -> Any:
    def add(layer: _Layer) -> jax.Array:
        return layer.y + layer.delta(dropout) if layer.has_pair else layer.y

    with _each_layer(add):
        return plain(_merge_pairs(variables), *args, **kwargs)


class _Layer:
    """One call of a layer with a kernel: its input, its output and its scope of parameters."""

    def __init__(self, module: nn.Module, x: jax.Array, y: jax.Array) -> None:
        assert module.scope is not None  # it is being called
        self.module, self.scope, self.x, self.y = module, module.scope, x, y
        self.path = '/'.join(module.path)
        self.kernel = self.scope.get_variable('params', 'kernel')
        self.has_pair = self.scope.has_variable('params', f'{HIDDEN}a')

    def fans(self) -> tuple[int, int]:
        """Input and output features for each batch element, with their axes flattened."""
        axis, counts = getattr(self.module, 'axis', None), range(1, self.x.ndim + 1)
        if axis is not None:  # DenseGeneral has the contracted axes; for other modules the shapes tell
            axes = sorted(i % self.x.ndim for i in (axis if isinstance(axis, Sequence) else [axis]))
            counts = [n for n in counts if axes == list(range(self.x.ndim - n, self.x.ndim))]
        for n in counts:
            batch = self.x.shape[: self.x.ndim - n]
            fans = math.prod(self.x.shape[len(batch) :]), math.prod(self.y.shape[len(batch) :])
            if self.y.shape[: len(batch)] == batch and math.prod(fans) == jnp.size(self.kernel):
                return fans
        raise UserError(
            f'LoraSpec.targets matches {self.path}, which is no matrix product over the trailing axes: '
            f'{list(self.x.shape)} by {list(jnp.shape(self.kernel))} gives {list(self.y.shape)}; name other layers'
        )

    def pair(self, rank: int) -> tuple[jax.Array, jax.Array]:
        """A [in, r] and B [r, out], created if missing."""
        fan_in, fan_out = self.fans()
        gaussian = lambda key: jax.random.normal(key, (fan_in, rank)) * fan_in**-0.5  # noqa: E731
        a = self.scope.param(f'{HIDDEN}a', gaussian)
        return a, self.scope.param(f'{HIDDEN}b', lambda key: jnp.zeros((rank, fan_out)))

    def delta(self, dropout: float) -> jax.Array:
        """(x A) B in the shape and dtype of y."""
        a, b = (self.scope.get_variable('params', HIDDEN + side).astype(self.y.dtype) for side in 'ab')
        x = self.x.astype(self.y.dtype).reshape(-1, a.shape[0])
        if dropout and self.module.has_rng('dropout'):
            keep = jax.random.bernoulli(self.module.make_rng('dropout'), 1 - dropout, x.shape)
            x = jnp.where(keep, x / (1 - dropout), 0)
        return (x @ a @ b).reshape(self.y.shape)

    def fold(self, scale: float) -> None:
        """Merge the pair into the kernel and set B to zero, so that a second call of the layer adds nothing."""
        a, b = (self.scope.get_variable('params', HIDDEN + side) for side in 'ab')
        delta = (scale * (a @ b)).reshape(self.kernel.shape)
        self.scope.put_variable('params', 'kernel', (self.kernel.astype(jnp.float32) + delta).astype(self.kernel.dtype))
        self.scope.put_variable('params', f'{HIDDEN}b', jnp.zeros_like(b))


@contextlib.contextmanager
def _each_layer(fn: Callable[[_Layer], jax.Array]) -> Iterator[None]:
    """Within this context, replace the output of every layer with a kernel by `fn` of its call."""

    def interceptor(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        y, module = call(*args, **kwargs), context.module
        if context.method_name != '__call__' or not module.has_variable('params', 'kernel'):
            return y
        return fn(_Layer(module, [*args, *kwargs.values()][0], y))

    with nn.intercept_methods(interceptor):
        yield


def _merge_pairs(variables: Variables) -> Variables:
    """Move the pairs of the `lora` collection into the layers' `params`."""
    params = traverse_util.flatten_dict(variables['params'])
    pairs = traverse_util.flatten_dict(variables.get('lora', {}))
    hidden = {(*path[:-1], HIDDEN + path[-1]): x for path, x in pairs.items() if path[-1] in ('a', 'b')}
    rest = {name: tree for name, tree in variables.items() if name != 'lora'}
    return rest | {'params': traverse_util.unflatten_dict(params | hidden)}


def _pairs_of(params: PyTree) -> PyTree:
    """The pairs stored in `params`, under their own names."""
    flat = traverse_util.flatten_dict(params)
    pairs = {(*path[:-1], path[-1].removeprefix(HIDDEN)): x for path, x in flat.items() if path[-1].startswith(HIDDEN)}
    return traverse_util.unflatten_dict(pairs)
