"""Operations that mind the mesh they are traced for, by names of logical axes. Without a mesh they are plain ones."""

from __future__ import annotations

import math

import jax
from flax.linen import spmd
from jax.sharding import PartitionSpec


def matmul(x: jax.Array, kernel: jax.Array, axes: tuple[str | None, str | None]) -> jax.Array:
    """x [batch, ..., in] times a kernel [in, out] whose 'embed' FSDP spreads over the chips: whichever is less moves.

    Many tokens stay where they are, and the kernel is gathered at once. (Left to itself XLA multiplies a slice at a
    time and sends the slices round the ring, which takes half as long again for a few thousand tokens a chip and for
    LoRA's thin matrices.) Few tokens, as the sampler has at each turn, go to the kernel: every chip multiplies all rows
    by the part that it holds, and the products change places. Both found by the plan: docs/tpu.md.
    """
    rest, tokens = (None,) * (x.ndim - 2), x.size // x.shape[-1]
    whole = gathered(axes)
    if 'embed' not in axes or partitions('embed') == 1 or 4 * tokens > kernel.shape[axes.index('embed')]:
        return x @ spmd.with_logical_constraint(kernel, whole)
    y = spmd.with_logical_constraint(x, (None, *rest, axes[0])) @ kernel
    y = spmd.with_logical_constraint(y, (None, *rest, axes[1]))
    return spmd.with_logical_constraint(y, ('batch', *rest, whole[1]))


def gathered(axes: tuple[str | None, str | None]) -> tuple[str | None, str | None]:
    """The axes of a kernel that lies whole on each chip of FSDP."""
    first, second = (None if axis == 'embed' else axis for axis in axes)
    return first, second


def partitions(axis: str) -> int:
    """Over how many devices of the current mesh a logical axis is split."""
    over, mesh = spmd.logical_to_mesh_axes((axis,)), jax.sharding.get_abstract_mesh()
    return 1 if over is None or mesh.empty else _count(mesh, over[0])


def on_tpu() -> bool:
    """Are the devices of the current mesh TPUs? They need not be there: `plan` compiles for those of a topology."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.device_kind.startswith('TPU')


def split(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` split along its logical axes where they divide (there may be fewer key/value heads than partitions)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = spmd.logical_to_mesh_axes(axes) or PartitionSpec()
    for i, over in enumerate(spec):
        if x.shape[i] % _count(mesh, over):
            spec = PartitionSpec(*spec[:i], None, *spec[i + 1 :])
    return jax.lax.with_sharding_constraint(x, spec)


def _count(mesh: jax.sharding.AbstractMesh, over: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[axis] for axis in ((over,) if isinstance(over, str) else over or ()))
