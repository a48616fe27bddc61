"""Hashes of parameters, independent of their sharding, and a check that their numbers are finite."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from perl_jax import trees

SLICE = 2**20  # numbers that are hashed at a time
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes


def fingerprint(params: PyTree) -> str:
    """Returns a short hash of every parameter's path, shape, dtype and bits."""
    return fingerprint_and_nonfinite(params)[0]


def fingerprint_and_nonfinite(params: PyTree) -> tuple[str, list[str]]:
    """Returns the fingerprint of parameters, and the paths of those that contain infinities or NaN.

    The bits of each number are hashed with its index and summed modulo 2^32, each device its own shards, a slice at a
    time: exact in any order and sharding, and without a second copy of a leaf.
    """
    flat = sorted(trees.flatten(params).items())
    sums = _checksums([x for _, x in flat])
    entries = [(path, list(x.shape), str(x.dtype), int(total)) for (path, x), (total, _) in zip(flat, sums)]
    nonfinite = [path for (path, _), (_, count) in zip(flat, sums) if count]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16], nonfinite


def checksums(tree: PyTree) -> dict[str, int]:
    """Returns a 32-bit checksum of every leaf, by its path 'a/b/c'; any changed bit of a leaf changes it.

    A leaf that is whole in each process, as arrays of NumPy are, counts once.
    """
    flat = [(jax.tree_util.keystr(path, simple=True, separator='/'), x) for path, x in jax.tree.leaves_with_path(tree)]
    return {path: int(total) for (path, _), (total, _) in zip(flat, _checksums([x for _, x in flat]))}


def _checksums(leaves: Sequence[jax.Array | np.ndarray]) -> np.ndarray:
    """Returns [leaves, 2]: each leaf's checksum, and whether any of its numbers is not finite."""
    local = [_checksum(jnp.asarray(x)) for x in leaves]
    is_global = [isinstance(x, jax.Array) and not x.is_fully_addressable for x in leaves]
    if not any(is_global):
        return np.array(local, np.uint32).reshape(-1, 2)
    is_first = jax.process_index() == 0
    counted = [x if split or is_first else (0, False) for x, split in zip(local, is_global)]
    gathered = multihost_utils.process_allgather(np.array(counted, np.uint32))
    return gathered.reshape(-1, len(leaves), 2).sum(axis=0, dtype=np.uint32)


def _checksum(x: jax.Array) -> tuple[int, bool]:
    """Returns the sum over one leaf's shards in this process, and whether any of their numbers is not finite.

    A number's index is its position in the whole array in row-major order.
    """
    strides = np.cumprod((1, *x.shape[:0:-1]), dtype=np.uint64)[::-1].astype(np.uint32)[: x.ndim]
    sums = []
    for shard in (shard for shard in x.addressable_shards if shard.replica_id == 0 and x.size):
        *leading, width = shard.data.shape or (1,)
        start = np.array([i.start or 0 for i in shard.index], np.uint32)
        rows = min(math.prod(leading), max(1, SLICE // width))
        first_rows = np.arange(0, math.prod(leading), rows)
        with jax.set_mesh(jax.sharding.Mesh(np.array([shard.device]), ('own',))):  # not the mesh of the whole array
            sums += [_slice_checksum(shard.data, rows, first, start, strides) for first in first_rows]
    return sum(int(total) for total, _ in sums) % 2**32, any(bool(nonfinite) for _, nonfinite in sums)


@functools.partial(jax.jit, static_argnums=1)
def _slice_checksum(
    x: jax.Array, rows: int, first: jax.Array, start: jax.Array, strides: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the checksum of `rows` rows of a shard, from row `first`; rows before `first` are not counted.

    At the end of a shard the slice starts earlier than `first`, so that all slices have one shape and compile once.
    """
    *leading, width = x.shape or (1,)
    row = jnp.minimum(first, math.prod(leading) - rows) + jnp.arange(rows)
    offset = jnp.zeros(rows, jnp.uint32)
    for axis, stride in zip(jnp.unravel_index(row, leading), strides):
        offset += axis.astype(jnp.uint32) * stride
    offset += (start * strides).sum(dtype=jnp.uint32)
    index = offset[:, None] + jnp.arange(width, dtype=jnp.uint32)[None]
    bits = jax.lax.dynamic_slice_in_dim(x.reshape(-1, width), row[0], rows)
    if x.dtype != jnp.bool_:
        bits = jax.lax.bitcast_convert_type(bits, _BITS[x.dtype.itemsize])
    hashed = bits.astype(jnp.uint32) ^ (index * np.uint32(0x9E3779B9))
    for shift, factor in (16, 0x85EBCA6B), (13, 0xC2B2AE35):  # MurmurHash3's last steps
        hashed = (hashed ^ (hashed >> shift)) * np.uint32(factor)
    hashed = jnp.where((row >= first)[:, None], hashed ^ (hashed >> 16), 0)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.sum(hashed, dtype=jnp.uint32), jnp.array(False)
    exponent = jax.lax.bitcast_convert_type(jnp.array(jnp.inf, x.dtype), bits.dtype)  # all ones; of NaN too
    return jnp.sum(hashed, dtype=jnp.uint32), ((bits & exponent) == exponent).any()
