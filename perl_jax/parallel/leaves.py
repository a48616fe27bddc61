"""Arrays that are still in their files: each device reads its own slice, transposed, stacked and cast.

    q_proj.weight [out, in] of each layer in a file -> Stacked([Transposed(tensor), ...])    [L, in, out]

All readers of weights (interop/) return such leaves; partitioning.place reads them. A slice is read directly into its
destination through bounded buffers, so reading takes little more memory than the slice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import PyTree

Index = tuple[slice, ...]  # for each axis a slice with start and stop
TILE = 256, 1024  # rows and columns of a tile of A B


@runtime_checkable
class Leaf(Protocol):
    """An array that can be read by slices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        ...

    def read_into(self, out: np.ndarray, index: Index) -> None:
        """Fill `out` with the slice at `index`, cast to the dtype of `out`."""


@dataclasses.dataclass(frozen=True)
class InMemory:
    """An array in host memory."""

    array: np.ndarray | jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def read_into(self, out: np.ndarray, index: Index) -> None:
        out[...] = self.array[index]


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A leaf with its last two axes swapped."""

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
    """Leaves of one shape along a new first axis, the layers. Their dtypes may differ."""

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
    """An array on the devices, of which this process can read the shards on its own."""

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def read_into(self, out: np.ndarray, index: Index) -> None:
        for shard in self.array.addressable_shards:
            if explicit_index(shard.index, self.shape) == index:
                out[...] = np.asarray(shard.data)
                return
        raise ValueError(f'no device of this process holds {index}')


@dataclasses.dataclass(frozen=True)
class Merged:
    """A kernel with LoRA's factors added, W + scale A B.

    A B is computed in tiles at fixed positions, whatever the slice, so that every mesh gets the same bits.

    Attributes:
      kernel: W, [..., in, out].
      dtype: the kernel's, to which the sum is rounded.
      a: [..., in, r], on the host.
      b: [..., r, out], on the host.
      scale: alpha / r, a number or [..., 1, 1].
    """

    kernel: Leaf
    dtype: np.dtype
    a: np.ndarray
    b: np.ndarray
    scale: float | np.ndarray

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
            for i, row_span in _tiles(rows, TILE[0]):
                for j, column_span in _tiles(columns, TILE[1]):
                    delta = scale[layer] * (a[layer][i : i + TILE[0]] @ b[layer][:, j : j + TILE[1]])
                    delta_slice = delta[
                        row_span.start - i : row_span.stop - i, column_span.start - j : column_span.stop - j
                    ]
                    target = sum_[layer][_shift(row_span, -rows.start), _shift(column_span, -columns.start)]
                    target[...] = target.astype(np.float32) + delta_slice
        if sum_ is not out:
            out[...] = sum_


def full_index(shape: Sequence[int]) -> Index:
    """Returns the index of a whole array."""
    return tuple(slice(0, size) for size in shape)


def explicit_index(index: Sequence[slice], shape: Sequence[int]) -> Index:
    """Returns an index with start and stop for each axis."""
    return tuple(slice(*axis.indices(size)[:2]) for axis, size in zip(index, shape, strict=True))


def slice_shape(index: Index) -> tuple[int, ...]:
    """Returns the shape of the slice at `index`."""
    return tuple(axis.stop - axis.start for axis in index)


def read(leaf: Leaf, index: Index, dtype: Any) -> np.ndarray:
    """Returns the slice at `index` as a host array of `dtype`."""
    out = np.empty(slice_shape(index), dtype)
    leaf.read_into(out, index)
    return out


def to_host(tree: PyTree, dtype: Any) -> PyTree:
    """Returns a whole tree of leaves as host arrays of `dtype`."""
    return jax.tree.map(lambda leaf: read(leaf, full_index(leaf.shape), np.dtype(dtype)), tree)


def rows_at_once(width: int, itemsize: int, limit: int = 2**19) -> int:
    """Returns how many rows of this width fit a buffer that stays in a core's cache; at least one."""
    return max(1, limit // max(1, width * itemsize))


def _tiles(span: slice, width: int) -> Iterator[tuple[int, slice]]:
    """Yields the start of each tile that `span` touches, and the part of the tile within `span`."""
    for start in range(span.start // width * width, span.stop, width):
        yield start, slice(max(span.start, start), min(span.stop, start + width))


def _shift(span: slice, offset: int) -> slice:
    return slice(span.start + offset, span.stop + offset)
