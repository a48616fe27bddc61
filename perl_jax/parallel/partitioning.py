"""A ('replica', 'data', 'model') mesh, T5X's logical axis rules, and the shardings that follow from both.

Base parameters carry logical axis names (layers.py); a LoRA pair takes its kernel's names with 'lora_rank' between;
optimizer state lies as its parameter does. Everything here is shapes: nothing is allocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
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

from perl_jax import trees
from perl_jax.errors import UserError, check_count
from perl_jax.models.lora import Adapter
from perl_jax.parallel import leaves, topology
from perl_jax.parallel.leaves import Leaf
from perl_jax.types import TrainState

AXES = ('replica', 'data', 'model')
Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]


def standard_logical_axis_rules(
    activation_partitioning_dims: int = 1, parameter_partitioning_dims: int = 1, additional_rules: Rules = ()
) -> Rules:
    """T5X's function of this name, with LoRA's own axis: which logical axis lies on which axis of the mesh.

    An array takes a mesh axis once, by the first rule that asks for it. So 'embed' on 'data' splits parameters alone
    (FSDP, `parameter_partitioning_dims` = 2), since an activation's batch is there already; 'embed' on 'model' splits
    the activations between the layers (`activation_partitioning_dims` = 2).
    """
    embed = [('embed', 'model')] * (activation_partitioning_dims == 2)
    embed += [('embed', 'data')] * (parameter_partitioning_dims == 2)
    return (
        ('batch', ('replica', 'data')),
        ('vocab', 'model'),
        ('mlp', 'model'),
        ('heads', 'model'),
        ('kv_heads', 'model'),
        ('joined_kv', 'model'),
        *embed,
        *additional_rules,
        ('embed', None),
        ('kv', None),
        ('relpos_buckets', None),
        ('length', None),
        ('layers', None),
        ('lora_rank', None),
    )


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """How a run is laid out: replica x data x model = all devices.

    Attributes:
      num_partitions: devices that share each matrix multiplication ('model'; keep it within a host's fast links).
      num_replicas: groups of devices that only exchange gradients ('replica'); None is one for each slice, so that
        only those cross the slow network between slices.
      logical_axis_rules: which logical axis lies on which axis of the mesh, as T5X has them.
      topology: the devices that this layout is for, as 'v5e:4x4' or, of two slices, '2xv5e:4x4': `plan` compiles for
        them, and a run on other devices stops. None takes what is there.
      devices: None are all of this job; `plan` gives those of a topology.
    """

    num_partitions: int = 1
    num_replicas: int | None = None
    logical_axis_rules: Rules = standard_logical_axis_rules()
    topology: str | None = None
    devices: tuple[Any, ...] | None = None

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices as [replica, data, model], neighbours along 'model' and 'data' near each other."""
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
        """Where the networks' logical constraints hold."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.logical_axis_rules):
            yield

    @property
    def data_parallelism(self) -> int:
        """How many parts a batch is split into."""
        return self.mesh.shape['replica'] * self.mesh.shape['data']

    def check_batch(self, name: str, size: int, num_microbatches: int = 1) -> None:
        """A batch, and each of its microbatches, must divide over the data axes."""
        check_count('NUM_MICROBATCHES', num_microbatches)
        parts, over = self.data_parallelism * num_microbatches, f'the {self.data_parallelism} rows of the mesh'
        if size % parts:
            if num_microbatches > 1:
                over += f' in {num_microbatches} microbatches'
            raise UserError(f'{name} = {size} does not divide over {over}; make it a multiple of {parts}')

    def check_params(self, shapes: PyTree, axes: PyTree) -> None:
        """Every parameter must divide over the mesh axes that the rules give it."""
        for path, shape in trees.flatten(shapes).items():
            names = trees.flatten(axes)[path]
            for name, size, over in zip(names, shape.shape, self.sharding(*names).spec):
                parts = int(np.prod([self.mesh.shape[axis] for axis in _mesh_axes(over)]))
                if size % parts:
                    raise UserError(
                        f"{path}: its axis '{name}' of {size} does not divide over the {parts} devices along {over!r}; "
                        'choose another Partitioner.num_partitions or rule'
                    )

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Where an array with these logical axes lies; no axes means a copy on every device."""
        spec = spmd.logical_to_mesh_axes(axes, self.logical_axis_rules)
        return NamedSharding(self.mesh, spec or PartitionSpec())

    def rows(self, size: int) -> np.ndarray:
        """Which rows of a batch of `size` lie on the devices of this process, int [n], ascending: what it reads."""
        where = self.sharding('batch').addressable_devices_indices_map((size,))
        return np.unique(np.concatenate([np.arange(size)[index] for index in where.values()]))

    def batch(self, batch: PyTree) -> PyTree:
        """Put this process's rows (`rows`) of a batch of host arrays [B, ...] on the devices, split over the data."""
        sharding = self.sharding('batch')
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)

    def place(self, tree: PyTree, shardings: PyTree, dtype: Any = None) -> PyTree:
        """Put host arrays, or leaves that are not read yet, on the devices, the largest first; `place` does each.

        Args:
          tree: arrays that every process has whole, or leaves.Leaf.
          shardings: where they go (`self.tree`), of the same structure.
          dtype: of the arrays on the devices; None keeps that of a host array.
        """
        named, structure = jax.tree_util.tree_flatten_with_path(tree)
        names = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in named]
        flat = [x for _, x in named]
        where = structure.flatten_up_to(shardings)
        for i in sorted(range(len(flat)), key=lambda i: -int(np.prod(flat[i].shape))):
            flat[i] = place(flat[i], where[i], flat[i].dtype if dtype is None else dtype, names[i])
        return structure.unflatten(flat)

    def local(self, batch: PyTree) -> PyTree:
        """This process's rows of a batch on the devices, as host arrays: `batch` undone."""

        def rows(x: jax.Array) -> np.ndarray:
            if x.is_fully_addressable:
                return np.asarray(x)
            shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
            return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

        return jax.tree.map(rows, batch)

    def tree(self, axes: PyTree) -> PyTree:
        """Shardings of a tree of logical axis names (tuples)."""
        return jax.tree.map(lambda names: self.sharding(*names), axes, is_leaf=lambda x: isinstance(x, tuple))

    def adapter(self, shapes: Adapter, axes: PyTree, dtype: Any = None) -> Adapter:
        """Shapes of an adapter with shardings, given the logical axes of its base; `dtype` is for full tuning's."""
        laid = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            self.tree(adapter_axes(shapes, axes)),
        )
        if dtype is None:
            return laid
        return laid.replace(params=jax.tree.map(lambda x: x.update(dtype=jnp.dtype(dtype)), laid.params))

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
        return state.replace(step=copy, adapter=adapter, opt_state=opt)


def place(
    leaf: Leaf | np.ndarray | jax.Array, sharding: NamedSharding, dtype: Any, name: str = 'an array'
) -> jax.Array:
    """Put one array on the devices: each process reads the slices that its own devices hold, one at a time.

    Devices that hold the same slice share one reading of it. (`jax.device_put` of a host array instead has every
    process send all of it to all others.)

    Raises:
      UserError: calling the array `name`, if it has numbers that float16 cannot hold.
    """
    leaf = leaf if isinstance(leaf, Leaf) else leaves.InMemory(leaf)
    where = sharding.addressable_devices_indices_map(leaf.shape)
    same: dict[str, list[Any]] = {}
    for device, index in where.items():
        same.setdefault(str(index), []).append(device)
    shards = []
    for devices in same.values():
        index = leaves.bounds(where[devices[0]] or (), leaf.shape)
        piece = leaves.read(leaf, index, jnp.dtype(dtype))
        # Infinities that stand in the file itself (as masks do) are none of float16's making.
        if piece.dtype == np.float16 and np.isinf(piece).any() and not np.array_equal(
            np.isinf(leaves.read(leaf, index, np.dtype(np.float32))), np.isinf(piece)
        ):
            raise UserError(f"BASE_DTYPE = 'float16': {name} has numbers beyond 65504; take 'bfloat16'")
        shards += jax.block_until_ready([jax.device_put(piece, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def abstract(network: nn.Module) -> tuple[PyTree, PyTree]:
    """Shapes and logical axis names (tuples) of the base parameters; nothing is computed."""
    boxed = jax.eval_shape(network.init, jax.random.key(0), *_one_token())['params']
    axes = jax.tree.map(tuple, nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec))
    return unbox(boxed), axes


def init_params(network: nn.Module, key: jax.Array, dtype: str = 'float32') -> PyTree:
    """Draw random parameters for a network. Pure.

    Args:
      network: a Decoder, a T5, or a module with their methods.
      key: a key of jax.random; the same key draws the same parameters.
      dtype: of every parameter.

    Returns:
      A tree of arrays, as `network.init` has it below 'params', without the boxes of axis names.
    """
    params = unbox(network.init(key, *_one_token()))['params']
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _one_token() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prompts, their mask and targets, to trace a network with."""
    one = jnp.zeros((1, 1), jnp.int32)
    return one, one == 0, one[:, None]


def unbox(tree: PyTree) -> PyTree:
    """Parameters without their boxes of axis names, as they are (nn.unbox would also lay them out)."""
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def adapter_axes(adapter: Adapter, base_axes: PyTree) -> Adapter:
    """Logical axes of an adapter: a pair's are its kernel's, joined by 'lora_rank'."""
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
    """Whole arrays on the host, in every process."""

    def fetch(x: jax.Array | np.ndarray) -> np.ndarray:
        elsewhere = isinstance(x, jax.Array) and not x.is_fully_addressable
        return multihost_utils.process_allgather(x, tiled=True) if elsewhere else np.asarray(x)

    return jax.tree.map(fetch, tree)


def _mesh_axes(over: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if over is None else (over,) if isinstance(over, str) else over
