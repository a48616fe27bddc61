"""A ('data', 'model') mesh, T5X's logical axis rules, and the shardings that follow from both.

Base parameters carry logical axis names (layers.py); a LoRA pair takes its kernel's names with 'lora_rank' between;
optimizer state lies as its parameter does. Everything here is shapes: nothing is allocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from perl_jax.errors import UserError
from perl_jax.lora import Adapter
from perl_jax.types import TrainState

# T5X's standard_logical_axis_rules() with one parameter and activation dimension, and LoRA's own axis.
STANDARD_RULES = (
    ('batch', 'data'),
    ('vocab', 'model'),
    ('mlp', 'model'),
    ('heads', 'model'),
    ('joined_kv', 'model'),
    ('embed', None),
    ('kv', None),
    ('relpos_buckets', None),
    ('length', None),
    ('layers', None),
    ('lora_rank', None),
)


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """How a run is laid out. `num_partitions` devices share each copy of the model, the rest are data parallel."""

    num_partitions: int = 1
    logical_axis_rules: tuple[tuple[str, str | None], ...] = STANDARD_RULES

    @property
    def mesh(self) -> Mesh:
        """All devices as [data, model]."""
        devices = np.array(jax.devices())
        if devices.size % self.num_partitions:
            raise UserError(
                f'Partitioner.num_partitions = {self.num_partitions} does not divide the {devices.size} devices'
            )
        return Mesh(devices.reshape(-1, self.num_partitions), ('data', 'model'))

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Where the networks' logical constraints hold."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.logical_axis_rules):
            yield

    def check_batch(self, name: str, size: int) -> None:
        """A batch must divide over the data axis."""
        data = self.mesh.shape['data']
        if size % data:
            raise UserError(
                f'{name} = {size} does not divide over the {data} rows of the mesh; make it a multiple of {data}'
            )

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Where an array with these logical axes lies; no axes means a copy on every device."""
        return NamedSharding(self.mesh, nn.logical_to_mesh_axes(axes, self.logical_axis_rules))

    def batch(self, batch: PyTree) -> PyTree:
        """Put a batch of host arrays [B, ...] on the devices, split over 'data'."""
        return jax.device_put(batch, self.sharding('batch'))

    def tree(self, axes: PyTree) -> PyTree:
        """Shardings of a tree of logical axis names (tuples)."""
        return jax.tree.map(lambda names: self.sharding(*names), axes, is_leaf=lambda x: isinstance(x, tuple))

    def state(self, state: TrainState, axes: PyTree, tx: optax.GradientTransformation) -> TrainState:
        """Shardings of a train state (arrays or shapes), given the logical axes of its base."""
        adapter = self.tree(adapter_axes(state.adapter, axes))
        copy = self.sharding()
        opt = optax.tree_utils.tree_map_params(
            tx.init,
            lambda leaf, param, where: where if leaf.shape == param.shape else copy,
            state.opt_state,
            state.adapter,
            adapter,
            transform_non_params=lambda _: copy,
        )
        return TrainState(step=copy, adapter=adapter, opt_state=opt)


def abstract(network: nn.Module) -> tuple[PyTree, PyTree]:
    """Shapes and logical axis names (tuples) of the base parameters; nothing is computed."""
    one = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(network.init, jax.random.key(0), one, one == 0, one[:, None])['params']
    axes = jax.tree.map(tuple, nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec))
    return unbox(boxed), axes


def unbox(tree: PyTree) -> PyTree:
    """Parameters without their boxes of axis names, as they are (nn.unbox would also lay them out)."""
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def adapter_axes(adapter: Adapter, base_axes: PyTree) -> Adapter:
    """Logical axes of an adapter: a pair's are its kernel's, joined by 'lora_rank'."""
    lora = params = head = None
    if adapter.lora is not None:
        kernels = traverse_util.flatten_dict(base_axes, sep='/')
        lora = {}
        for path in traverse_util.flatten_dict(adapter.lora, sep='/'):
            layer, _, side = path.rpartition('/')
            *stack, fan_in, fan_out = kernels[f'{layer}/kernel']
            lora[path] = (*stack, fan_in, 'lora_rank') if side == 'a' else (*stack, 'lora_rank', fan_out)
        lora = traverse_util.unflatten_dict(lora, sep='/')
    if adapter.params is not None:
        params = base_axes
    if adapter.head is not None:
        head = {'kernel': ('embed',)}
    return adapter.replace(lora=lora, params=params, head=head)


def place(tree: PyTree, shardings: PyTree) -> Any:
    """Put host arrays where they belong."""
    return jax.tree.map(jax.device_put, tree, shardings)
