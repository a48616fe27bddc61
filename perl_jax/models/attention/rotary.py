"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from perl_jax import settings
from perl_jax.types import AnyArray


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Lower rotary frequencies, for contexts longer than a model was first trained on.

    Without `original_length` all frequencies are divided by `factor` (Gemma 3). With it, frequencies that make fewer
    than `low_freq_factor` rotations in that length are divided, those that make more than `high_freq_factor` are not,
    and the ones between are interpolated (Llama 3.1).

    Attributes:
      factor: divides frequencies.
      low_freq_factor: rotations in `original_length`; frequencies with fewer are divided.
      high_freq_factor: rotations in `original_length`; frequencies with more are unchanged.
      original_length: positions that the model was first trained on; None divides all frequencies.
    """

    factor: settings.Positive
    low_freq_factor: settings.Positive = 1.0
    high_freq_factor: settings.Positive = 4.0
    original_length: settings.Count | None = None

    def __post_init__(self) -> None:
        settings.check(self)

    def __call__(self, frequency: AnyArray) -> AnyArray:
        """Frequencies [E/2] in radians a position -> scaled ones."""
        unscaled = 0.0
        if self.original_length is not None:
            rotations, low = self.original_length * frequency / (2 * jnp.pi), self.low_freq_factor
            unscaled = jnp.clip((rotations - low) / (self.high_freq_factor - low), 0, 1)
        return frequency * (unscaled + (1 - unscaled) / self.factor)


def rope_table(
    positions: Int[Array, '*batch'], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, '*batch half'], Float[Array, '*batch half']]:
    """Sine and cosine of the rotary angles (Su et al. 2021).

    Args:
      positions: int [...].
      head_dim: E.
      theta: the base of the frequencies, theta^(-2i / E) radians a position.
      scaling: of the frequencies; None leaves them.

    Returns:
      Sine and cosine, float32 [..., E/2] each.
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequency = scaling(frequency)
    angles = jnp.tensordot(positions.astype(jnp.float32), frequency, axes=0)
    return jnp.sin(angles), jnp.cos(angles)


def rotate(
    x: Float[Array, '*batch H E'], table: tuple[Float[Array, '*batch E//2'], Float[Array, '*batch E//2']]
) -> Float[Array, '*batch H E']:
    """Rotate the halves of each head (Hugging Face's convention).

    Args:
      x: queries or keys, [..., T, H, E].
      table: sine and cosine of `rope_table`, [..., T, E/2] each.

    Returns:
      [..., T, H, E] in the dtype of x; computed in float32.
    """
    sin, cos = (t[..., None, :] for t in table)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)
