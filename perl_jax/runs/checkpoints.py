"""Checkpoints: what one run learned and nothing else. The base is named in them by path and fingerprint, never copied.

MODEL_DIR/checkpoints/STEP/state    adapter, optimizer, step (Orbax; written in the background, renamed when whole)
MODEL_DIR/checkpoints/STEP/about    {'phase', 'base': {'path', 'fingerprint', 'dtype'}, 'adapters': {...},
                                     'window', 'best_metric'}
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from perl_jax.errors import UserError
from perl_jax.models.lora import Adapter, as_scale

RESTORED_AT_ONCE_GB = 1  # of an adapter; else Orbax holds all of it on its way to the devices
_OPTIONS = {'anchor': 'ANCHOR_EMA', 'value': 'ALGORITHM'}  # what decides whether a role is learned at all
SLICE = 2**20  # numbers that a fingerprint looks at together


class Checkpoints:
    """The checkpoints of one run: the latest, and the best by one evaluation metric."""

    def __init__(self, model_dir: str, best_metric: str | None = None, *, read_only: bool = False) -> None:
        """`best_metric` is a name of the metrics handed to `save`, larger is better; None keeps only the latest."""
        model_dir = os.fspath(model_dir)
        self.folder = os.path.join(model_dir if '://' in model_dir else os.path.abspath(model_dir), 'checkpoints')
        self.noted = {} if best_metric is None else {'best_metric': best_metric}  # in `about`, for those who only read
        keep: list[Any] = [checkpoint_managers.LatestN(1)]
        if best_metric is not None:
            keep.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            best_fn=None if best_metric is None else lambda metrics: metrics[best_metric],
            cleanup_tmp_directories=not read_only,  # what a killed process left half-written
            read_only=read_only,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The last whole step; None if there is none."""
        return self.manager.latest_step()

    def best(self) -> int | None:
        """The best step by the metric that the run was told, the latest if it was told none or none is measured yet."""
        latest = self.latest()
        metric = None if latest is None else self.about(latest).get('best_metric')
        if metric is None:
            return latest
        found = {step: self.manager.metrics(step) for step in self.manager.all_steps()}
        measured = [(metrics[metric], step) for step, metrics in found.items() if metrics]
        return max(measured)[1] if measured else latest

    def about(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return self._read(step, about=ocp.args.JsonRestore())['about']

    def save(self, step: int, state: PyTree, about: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Write in the background; returns as soon as the arrays are copied off."""
        state = ocp.args.StandardSave(serialization.to_state_dict(state))
        args = ocp.args.Composite(state=state, about=ocp.args.JsonSave(about | self.noted))
        self.manager.save(step, args=args, metrics=metrics)

    def restore(self, step: int, like: PyTree) -> PyTree:
        """A state shaped and placed like `like` (arrays with shardings).

        Raises:
          UserError: the checkpoint cannot be read, or holds other things: another optimizer's, of another adapter.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, serialization.to_state_dict(like))
        there, wanted = self._names(step), _names(template)
        if there != wanted:
            odd = {name.partition('/')[0] for name in there} ^ {name.partition('/')[0] for name in wanted}
            option = next((_OPTIONS[role] for role in sorted(odd) if role in _OPTIONS), 'OPTIMIZER or TUNING')
            raise UserError(
                f'checkpoint {os.path.join(self.folder, str(step))} is of another {option}: '
                f'{min(there ^ wanted)} is {"there" if there - wanted else "not there"}; give that which it was made '
                'with, or name another MODEL_DIR'
            )
        tree = self._read(step, state=ocp.args.StandardRestore(template))['state']
        return serialization.from_state_dict(like, tree)

    def adapters(self, step: int) -> dict[str, Adapter]:
        """Every role's adapter as shapes, without knowing how it was made."""
        named = sorted(self.about(step)['adapters'].items())
        try:
            there = _metadata(self._item(step))
            adapters = {
                role: Adapter(**there[role]['adapter'], **settings | {'scale': as_scale(settings['scale'])})
                for role, settings in named
            }
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), adapters)
        except Exception as error:
            raise _broken(self.folder, step) from error

    def restore_adapters(self, step: int, like: Mapping[str, Adapter] | None = None) -> dict[str, Adapter]:
        """Read adapters, and nothing else of the checkpoint.

        Args:
          like: shapes with shardings (Partitioner.adapter) of the roles to read, of which each process then reads its
            own part; None is every role as whole host arrays.
        """
        like = self.adapters(step) if like is None else like
        item = {role: {'adapter': serialization.to_state_dict(adapter)} for role, adapter in like.items()}
        args = ocp.args.PyTreeRestore(item, jax.tree.map(_restored_as, item), partial_restore=True)
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=RESTORED_AT_ONCE_GB)
        try:
            with ocp.Checkpointer(handler) as checkpointer:
                tree = checkpointer.restore(self._item(step), args=args)
        except Exception as error:
            raise _broken(self.folder, step) from error
        return {role: adapter.replace(**tree[role]['adapter']) for role, adapter in like.items()}

    def close(self) -> None:
        """Wait for what is still being written."""
        self.manager.close()

    def _item(self, step: int) -> str:
        return os.path.join(self.folder, str(step), 'state')

    def _names(self, step: int) -> set[str]:
        try:
            return _names(_metadata(self._item(step)))
        except Exception as error:
            raise _broken(self.folder, step) from error

    def _read(self, step: int, **args: Any) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:
            raise _broken(self.folder, step) from error


def _metadata(item: str) -> PyTree:
    return ocp.PyTreeCheckpointer().metadata(item).item_metadata.tree


def _restored_as(x: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if x.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)


def _names(tree: PyTree) -> set[str]:
    return {jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in jax.tree.leaves_with_path(tree)}


def _broken(folder: str, step: int) -> UserError:
    return UserError(
        f'checkpoint {os.path.join(folder, str(step))} cannot be read: it is truncated or of another run; '
        'delete that folder to go on from the checkpoint before it, or else from the start'
    )


def fingerprint(params: PyTree) -> str:
    """A short hash of every parameter's path, shape, dtype and bits."""
    return read_through(params)[0]


def read_through(params: PyTree) -> tuple[str, list[str]]:
    """The fingerprint of parameters, and the paths of those that hold infinities or NaN.

    Each number's bits are mixed with its place and summed modulo 2^32, each device its own shards, a slice at a time:
    exact in any order or sharding, and without a second copy of a leaf.
    """
    flat = sorted(traverse_util.flatten_dict(params, sep='/').items())
    found = np.array([_checksum(jnp.asarray(x)) for _, x in flat], np.uint32)
    found = multihost_utils.process_allgather(found).reshape(-1, len(flat), 2).sum(axis=0, dtype=np.uint32)
    listed = [(path, list(x.shape), str(x.dtype), int(total)) for (path, x), (total, _) in zip(flat, found)]
    odd = [path for (path, _), (_, count) in zip(flat, found) if count]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16], odd


def _checksum(x: jax.Array) -> tuple[int, bool]:
    """The sum of one leaf's shards in this process, and whether one of its numbers is not finite.

    A number's place is its index in the whole array, row by row.
    """
    strides = np.cumprod((1, *x.shape[:0:-1]), dtype=np.uint64)[::-1].astype(np.uint32)[: x.ndim]
    sums = []
    for shard in (shard for shard in x.addressable_shards if shard.replica_id == 0):
        *lead, width = shard.data.shape
        start = np.array([i.start or 0 for i in shard.index], np.uint32)
        rows = min(math.prod(lead), max(1, SLICE // width))
        firsts = np.arange(0, math.prod(lead), rows)
        with jax.set_mesh(jax.sharding.Mesh(np.array([shard.device]), ('own',))):  # not that of the whole array
            sums += [_of_rows(shard.data, rows, first, start, strides) for first in firsts]
    return sum(int(total) for total, _ in sums) % 2**32, any(bool(odd) for _, odd in sums)


@functools.partial(jax.jit, static_argnums=1)
def _of_rows(
    x: jax.Array, rows: int, first: jax.Array, start: jax.Array, strides: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of `rows` rows of a shard; past its end those before them are read again, and not counted."""
    *lead, width = x.shape
    row = jnp.minimum(first, math.prod(lead) - rows) + jnp.arange(rows)
    place = jnp.zeros(rows, jnp.uint32)
    for axis, stride in zip(jnp.unravel_index(row, lead), strides):
        place += axis.astype(jnp.uint32) * stride
    place += (start * strides).sum(dtype=jnp.uint32)
    index = place[:, None] + jnp.arange(width, dtype=jnp.uint32)[None]
    bits = jax.lax.dynamic_slice_in_dim(x.reshape(-1, width), row[0], rows)
    bits = jax.lax.bitcast_convert_type(bits, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)
    mixed = bits.astype(jnp.uint32) ^ (index * np.uint32(0x9E3779B9))
    for shift, factor in (16, 0x85EBCA6B), (13, 0xC2B2AE35):  # MurmurHash3's last steps
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    mixed = jnp.where((row >= first)[:, None], mixed ^ (mixed >> 16), 0)
    exponent = jax.lax.bitcast_convert_type(jnp.array(jnp.inf, x.dtype), bits.dtype)  # all ones; of NaN too
    return jnp.sum(mixed, dtype=jnp.uint32), ((bits & exponent) == exponent).any()
