"""A hash of parameters, wherever they lie, and whether their numbers are finite."""

from __future__ import annotations

import functools
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from perl_jax import trees

SLICE = 2**20  # numbers that are looked at together


def fingerprint(params: PyTree) -> str:
    """A short hash of every parameter's path, shape, dtype and bits."""
    return read_through(params)[0]


def read_through(params: PyTree) -> tuple[str, list[str]]:
    """The fingerprint of parameters, and the paths of those that hold infinities or NaN.

    Each number's bits are mixed with its place and summed modulo 2^32, each device its own shards, a slice at a time:
    exact in any order or sharding, and without a second copy of a leaf.
    """
    flat = sorted(trees.flatten(params).items())
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
