"""The mesh ('replica', 'data', 'model'), and the shardings that follow from it and the rules (rules.py).

Base parameters have logical axis names (layers.py); a LoRA pair has its kernel's names with 'lora_rank' between them;
optimizer state is sharded as its parameters. This module computes with shapes only, and allocates nothing but in
`place`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.linen import spmd
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from perl_jax import settings, trees
from perl_jax.errors import UserError
from perl_jax.models.lora import Adapter
from perl_jax.parallel import leaves, topology
from perl_jax.parallel.leaves import Leaf
from perl_jax.parallel.rules import Rules, standard_logical_axis_rules
from perl_jax.types import TrainState

AXES = ('replica', 'data', 'model')


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """The layout of a run on its devices: replica x data x model = all devices.

    Attributes:
      num_partitions: devices that share each matrix multiplication ('model'; keep it within a host's fast links).
      num_replicas: groups of devices that only exchange gradients ('replica'); None is one per slice, so that only
        gradients cross the slow network between slices.
      logical_axis_rules: the mesh axis of each logical axis, as in T5X.
      topology: the devices that this layout is for, as 'v5e:4x4' or, for two slices, '2xv5e:4x4': `plan` compiles for
        them, and a run on other devices stops. None accepts any devices.
      devices: None uses all of this job; `plan` passes those of a topology.
    """

    num_partitions: settings.Count = 1
    num_replicas: settings.Count | None = None
    logical_axis_rules: Rules = standard_logical_axis_rules()
    topology: str | None = None
    devices: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        settings.check(self)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices as [replica, data, model]; neighbours along 'model' and 'data' are physically close."""
        devices = tuple(jax.devices()) if self.devices is None else self.devices
        if self.topology is not None and self.devices is None:
            topology.check(self.topology, devices)
        slices = len({getattr(device, 'slice_index', None) for device in devices})
        replicas = slices if self.num_replicas is None else self.num_replicas
        for name, size in ('num_partitions', self.num_partitions), ('num_replicas', replicas):
            if size < 1 or len(devices) % size:
                raise UserError(f'Partitioner.{name} = {size} does not divide the {len(devices)} devices')
        if len(devices) % (self.num_partitions * replicas) or replicas % slices:
            raise UserError(
                f'Partitioner: num_replicas = {replicas} times num_partitions = {self.num_partitions} does not divide '
                f'the {len(devices)} devices of {slices} slices'
            )
        shape = replicas, len(devices) // (replicas * self.num_partitions), self.num_partitions
        if slices == 1:
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        else:
            shape = (replicas // slices, *shape[1:])
            grid = mesh_utils.create_hybrid_device_mesh(
                shape, (slices, 1, 1), devices, allow_split_physical_axes=True
            )
        return Mesh(grid, AXES)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """A context in which the mesh is set and the networks' logical sharding constraints apply."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.logical_axis_rules):
            yield

    @property
    def data_parallel_size(self) -> int:
        """The number of parts that a batch is split into: the size of the mesh axes replica and data."""
        return self.mesh.shape['replica'] * self.mesh.shape['data']

    def check_batch(self, name: str, size: int, num_microbatches: int = 1) -> None:
        """Check that a batch, and each of its microbatches, divides by the data-parallel size.

        Args:
          name: of the setting, for the message.
          size: of the batch.
          num_microbatches: per batch.

        Raises:
          UserError: it does not divide.
        """
        divisor = self.data_parallel_size * num_microbatches
        if size % divisor:
            factors = f'the data-parallel size {self.data_parallel_size}'
            if num_microbatches > 1:
                factors += f' times {num_microbatches} microbatches'
            raise UserError(f'{name} = {size} is not divisible by {factors}; use a multiple of {divisor}')

    def check_params(self, shapes: PyTree, axes: PyTree) -> None:
        """Check that every parameter divides over the mesh axes that the rules give it.

        Args:
          shapes: of the parameters.
          axes: their logical axes.

        Raises:
          UserError: naming the parameter and its axis.
        """
        for path, param in trees.flatten(shapes).items():
            names = trees.flatten(axes)[path]
            for name, size, mesh_axes in zip(names, param.shape, self.sharding(*names).spec):
                device_count = int(np.prod([self.mesh.shape[axis] for axis in _mesh_axes(mesh_axes)]))
                if size % device_count:
                    raise UserError(
                        f"{path}: its axis '{name}' of {size} does not divide over the {device_count} devices along "
                        f'{mesh_axes!r}; choose another Partitioner.num_partitions or rule'
                    )

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Returns the sharding of an array with these logical axes; no axes means a copy on every device."""
        spec = spmd.logical_to_mesh_axes(axes, self.logical_axis_rules)
        return NamedSharding(self.mesh, spec or PartitionSpec())

    def rows(self, size: int) -> np.ndarray:
        """Returns the rows of a batch that this process reads, those on its devices: int [n], ascending."""
        slices = self.sharding('batch').addressable_devices_indices_map((size,))
        return np.unique(np.concatenate([np.arange(size)[index] for index in slices.values()]))

    def batch(self, batch: PyTree) -> PyTree:
        """Returns a batch on the devices, split over the data axes, from this process's `rows` [B, ...] on the host."""
        sharding = self.sharding('batch')
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)

    def place(self, tree: PyTree, shardings: PyTree, dtype: Any = None) -> PyTree:
        """Put host arrays, or leaves that are not read yet, on the devices, the largest first.

        Args:
          tree: arrays that every process has whole, or leaves.Leaf.
          shardings: of the same structure (`self.tree`).
          dtype: of the arrays on the devices; None keeps a host array's.
        """
        paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        names = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in paths_and_leaves]
        flat = [x for _, x in paths_and_leaves]
        flat_shardings = structure.flatten_up_to(shardings)
        for index in sorted(range(len(flat)), key=lambda index: -int(np.prod(flat[index].shape))):
            leaf_dtype = flat[index].dtype if dtype is None else dtype
            flat[index] = place(flat[index], flat_shardings[index], leaf_dtype, names[index])
        return structure.unflatten(flat)

    def local(self, batch: PyTree) -> PyTree:
        """Returns this process's rows of a batch on the devices as host arrays: the inverse of `batch`."""

        def local_rows(x: jax.Array) -> np.ndarray:
            if x.is_fully_addressable:
                return np.asarray(x)
            shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
            return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

        return jax.tree.map(local_rows, batch)

    def tree(self, axes: PyTree) -> PyTree:
        """Returns shardings for a tree of logical axis names (tuples)."""
        return jax.tree.map(lambda names: self.sharding(*names), axes, is_leaf=lambda x: isinstance(x, tuple))

    def adapter(self, shapes: Adapter, axes: PyTree, dtype: Any = None) -> Adapter:
        """Give the shapes of an adapter their shardings.

        Args:
          shapes: of the adapter.
          axes: the logical axes of each parameter of its base.
          dtype: of the parameters of full tuning; None leaves theirs.

        Returns:
          The shapes with shardings.
        """
        laid = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            self.tree(adapter_axes(shapes, axes)),
        )
        if dtype is None:
            return laid
        return laid.replace(params=jax.tree.map(lambda x: x.update(dtype=jnp.dtype(dtype)), laid.params))

    def state(self, state: TrainState, axes: PyTree, tx: optax.GradientTransformation) -> TrainState:
        """Find the shardings of a train state. The optimizer's moments lie where their parameters do.

        Args:
          state: arrays or shapes.
          axes: the logical axes of each parameter of its base.
          tx: the optimizer.

        Returns:
          A TrainState of shardings.
        """
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
        return state.replace(step=copy, adapter=adapter, opt_state=opt)


def place(
    leaf: Leaf | np.ndarray | jax.Array, sharding: NamedSharding, dtype: Any, name: str = 'an array'
) -> jax.Array:
    """Put one array on the devices: each process reads the slices of its own devices, one at a time.

    Devices with the same slice share one reading of it. (`jax.device_put` of a host array instead makes every process
    send the whole array to all others.)

    Args:
      leaf: an array that every process has whole, or a leaf that is not read yet.
      sharding: on the devices.
      dtype: on the devices.
      name: what the message calls the array.

    Raises:
      UserError: it has numbers that float16 cannot hold.
    """
    leaf = leaf if isinstance(leaf, Leaf) else leaves.InMemory(leaf)
    slices = sharding.addressable_devices_indices_map(leaf.shape)
    devices_by_slice: dict[str, list[Any]] = {}
    for device, index in slices.items():
        devices_by_slice.setdefault(str(index), []).append(device)
    shards = []
    for devices in devices_by_slice.values():
        index = leaves.explicit_index(slices[devices[0]] or (), leaf.shape)
        array = leaves.read(leaf, index, jnp.dtype(dtype))
        # Infinities that are in the file itself (as in masks) are not caused by float16.
        if array.dtype == np.float16 and np.isinf(array).any() and not np.array_equal(
            np.isinf(leaves.read(leaf, index, np.dtype(np.float32))), np.isinf(array)
        ):
            raise UserError(f"BASE_DTYPE = 'float16': {name} has numbers beyond 65504; take 'bfloat16'")
        shards += jax.block_until_ready([jax.device_put(array, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def abstract_params(network: nn.Module) -> tuple[PyTree, PyTree]:
    """Returns shapes and logical axis names (tuples) of a network's parameters; nothing is computed."""
    boxed = jax.eval_shape(network.init, jax.random.key(0), *_one_token())['params']
    axes = jax.tree.map(tuple, nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec))
    return unbox(boxed), axes


def init_params(network: nn.Module, key: jax.Array, dtype: str = 'float32') -> PyTree:
    """Draw random parameters for a network. Pure.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      key: a key of jax.random; the same key draws the same parameters.
      dtype: of every parameter.

    Returns:
      A tree of arrays, as `network.init` has it below 'params', without the boxes of axis names.
    """
    params = unbox(network.init(key, *_one_token()))['params']
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _one_token() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns prompts, their mask and targets of one token, to trace a network with."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return tokens, tokens == 0, tokens[:, None]


def unbox(tree: PyTree) -> PyTree:
    """Returns parameters without their boxes of axis names. (nn.unbox would also apply sharding constraints.)"""
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def adapter_axes(adapter: Adapter, base_axes: PyTree) -> Adapter:
    """Returns the logical axes of an adapter: those of a pair are its kernel's, with 'lora_rank' between them.

    Args:
      adapter: arrays or shapes.
      base_axes: the logical axes of each parameter of its base.

    Returns:
      A tuple of axes for each leaf.
    """
    lora = params = head = None
    if adapter.lora is not None:
        kernels = trees.flatten(base_axes)
        lora = {}
        for path in trees.flatten(adapter.lora):
            layer, _, side = path.rpartition('/')
            *stack, fan_in, fan_out = kernels[f'{layer}/kernel']
            lora[path] = (*stack, fan_in, 'lora_rank') if side == 'a' else (*stack, 'lora_rank', fan_out)
        lora = trees.unflatten(lora)
    if adapter.params is not None:
        params = base_axes
    if adapter.head is not None:
        head = {'kernel': ('embed',)}
    return adapter.replace(lora=lora, params=params, head=head)


def gather(tree: PyTree) -> PyTree:
    """Returns whole arrays on the host, in every process."""

    def fetch(x: jax.Array | np.ndarray) -> np.ndarray:
        elsewhere = isinstance(x, jax.Array) and not x.is_fully_addressable
        return multihost_utils.process_allgather(x, tiled=True) if elsewhere else np.asarray(x)

    return jax.tree.map(fetch, tree)


def _mesh_axes(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes
