"""Arrays that still lie where they come from: each device reads its own slice of them, turned, stacked and cast.

    q_proj.weight [out, in] of each layer in a file -> Stacked([Transposed(tensor), ...])    [L, in, out]

Every reader of weights (interop/) gives such leaves, and partitioning.place is where they are read. A slice goes
straight to its destination through bounded buffers: to read it takes its own memory and little more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import PyTree

Index = tuple[slice, ...]  # for each axis a slice with start and stop
TILE = 256, 1024  # rows and columns of A B that are made together


@runtime_checkable
class Leaf(Protocol):
    """What can be read by slices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        ...

    def read_into(self, out: np.ndarray, index: Index) -> None:
        """Fill `out`, which has the shape of the slice `index`, cast to its dtype."""


@dataclasses.dataclass(frozen=True)
class InMemory:
    """An array that the host holds whole."""

    array: np.ndarray | jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def read_into(self, out: np.ndarray, index: Index) -> None:
        out[...] = self.array[index]


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A leaf with its last two axes the other way round."""

    leaf: Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, columns = self.leaf.shape
        return (*stack, columns, rows)

    def read_into(self, out: np.ndarray, index: Index) -> None:
        *stack, rows, columns = index
        self.leaf.read_into(out.swapaxes(-1, -2), (*stack, columns, rows))


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Leaves of one shape along a new first axis, the layers. Each may have a dtype of its own."""

    leaves: Sequence[Leaf]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.leaves), *self.leaves[0].shape)

    def read_into(self, out: np.ndarray, index: Index) -> None:
        layers, *rest = index
        for row, leaf in zip(out, self.leaves[layers], strict=True):
            leaf.read_into(row, tuple(rest))


@dataclasses.dataclass(frozen=True)
class Placed:
    """An array on the devices, of which this process can read what lies on its own."""

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def read_into(self, out: np.ndarray, index: Index) -> None:
        for shard in self.array.addressable_shards:
            if bounds(shard.index, self.shape) == index:
                out[...] = np.asarray(shard.data)
                return
        raise ValueError(f'no device of this process holds {index}')


@dataclasses.dataclass(frozen=True)
class Merged:
    """A kernel [..., in, out] with LoRA's factors added, W + scale A B: A [..., in, r] and B [..., r, out] on the host.

    A B is made in tiles that lie the same whatever the slice, so that every mesh gets the same bits.
    """

    kernel: Leaf
    dtype: np.dtype  # the kernel's, to which the sum is rounded
    a: np.ndarray
    b: np.ndarray
    scale: float | np.ndarray  # or [..., 1, 1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def read_into(self, out: np.ndarray, index: Index) -> None:
        *stack, rows, columns = index
        sum_ = out if out.dtype == self.dtype else np.empty(out.shape, self.dtype)
        self.kernel.read_into(sum_, index)
        a, b = self.a[tuple(stack)], self.b[tuple(stack)]
        scale = np.broadcast_to(np.float32(self.scale), (*self.a.shape[:-2], 1, 1))[(*stack, 0, 0)]
        for layer in np.ndindex(*a.shape[:-2]):
            for i, row in _tiles(rows, TILE[0]):
                for j, column in _tiles(columns, TILE[1]):
                    delta = scale[layer] * (a[layer][i : i + TILE[0]] @ b[layer][:, j : j + TILE[1]])
                    inside = delta[row.start - i : row.stop - i, column.start - j : column.stop - j]
                    place = sum_[layer][_shifted(row, -rows.start), _shifted(column, -columns.start)]
                    place[...] = place.astype(np.float32) + inside
        if sum_ is not out:
            out[...] = sum_


def whole(shape: Sequence[int]) -> Index:
    """The index of all of an array."""
    return tuple(slice(0, size) for size in shape)


def bounds(index: Sequence[slice], shape: Sequence[int]) -> Index:
    """An index with start and stop for each axis."""
    return tuple(slice(*axis.indices(size)[:2]) for axis, size in zip(index, shape, strict=True))


def size(index: Index) -> tuple[int, ...]:
    """The shape of the slice at `index`."""
    return tuple(axis.stop - axis.start for axis in index)


def read(leaf: Leaf, index: Index, dtype: Any) -> np.ndarray:
    """The slice at `index` as a host array of `dtype`."""
    out = np.empty(size(index), dtype)
    leaf.read_into(out, index)
    return out


def to_host(tree: PyTree, dtype: Any) -> PyTree:
    """All of a tree of leaves, as host arrays of `dtype`."""
    return jax.tree.map(lambda leaf: read(leaf, whole(leaf.shape), np.dtype(dtype)), tree)


def rows_at_once(width: int, itemsize: int, limit: int = 2**19) -> int:
    """How many rows of so many numbers a buffer that stays in a core's cache holds; at least one."""
    return max(1, limit // max(1, width * itemsize))


def _tiles(span: slice, width: int) -> Iterator[tuple[int, slice]]:
    """Where each tile that `span` touches begins, and what of it lies in `span`."""
    for first in range(span.start // width * width, span.stop, width):
        yield first, slice(max(span.start, first), min(span.stop, first + width))


def _shifted(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)
