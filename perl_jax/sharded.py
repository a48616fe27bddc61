"""Operations with sharding constraints for the current mesh, by logical axes. Without a mesh they add none."""

from __future__ import annotations

import math

import jax
from flax.linen import spmd
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from perl_jax.types import AnyArray


def matmul(
    x: Float[Array, '*batch in'], kernel: Float[AnyArray, 'in out'], axes: tuple[str | None, str | None]
) -> Float[Array, '*batch out']:
    """Multiply by a kernel whose 'embed' axis FSDP shards: the smaller of the two is moved.

    With many tokens the kernel is gathered before the product. (By default XLA multiplies shard by shard and passes the
    shards around a ring, which takes half as long again for a few thousand tokens a chip and for LoRA's thin matrices.)
    With few tokens, as in decoding, the tokens are gathered: every chip multiplies all rows by its shard of the kernel,
    and the products are exchanged. Both choices come from the plan: docs/explanation/memory.md.

    Args:
      x: [batch, ..., in].
      kernel: [in, out].
      axes: the logical axes of the kernel.

    Returns:
      [batch, ..., out].
    """
    inner_axes, num_tokens = (None,) * (x.ndim - 2), x.size // x.shape[-1]
    gathered_axes = gathered(axes)
    if 'embed' not in axes or partitions('embed') == 1 or 4 * num_tokens > kernel.shape[axes.index('embed')]:
        return x @ spmd.with_logical_constraint(kernel, gathered_axes)
    y = spmd.with_logical_constraint(x, (None, *inner_axes, axes[0])) @ kernel
    y = spmd.with_logical_constraint(y, (None, *inner_axes, axes[1]))
    return spmd.with_logical_constraint(y, ('batch', *inner_axes, gathered_axes[1]))


def gathered(axes: tuple[str | None, str | None]) -> tuple[str | None, str | None]:
    """The axes of a kernel after FSDP's gather."""
    first, second = (None if axis == 'embed' else axis for axis in axes)
    return first, second


def partitions(axis: str) -> int:
    """The number of partitions of a logical axis on the current mesh."""
    mesh_axes, mesh = spmd.logical_to_mesh_axes((axis,)), jax.sharding.get_abstract_mesh()
    return 1 if mesh_axes is None or mesh.empty else _num_devices(mesh, mesh_axes[0])


def on_tpu() -> bool:
    """Whether the current mesh is of TPUs, which may be abstract: `plan` compiles for a topology without devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.device_kind.startswith('TPU')


def split(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shard `x` along its logical axes, where they divide (there may be fewer key/value heads than partitions)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = spmd.logical_to_mesh_axes(axes) or PartitionSpec()
    for dim, mesh_axes in enumerate(spec):
        if x.shape[dim] % _num_devices(mesh, mesh_axes):
            spec = PartitionSpec(*spec[:dim], None, *spec[dim + 1 :])
    return jax.lax.with_sharding_constraint(x, spec)


def _num_devices(mesh: jax.sharding.AbstractMesh, mesh_axes: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[axis] for axis in ((mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()))
