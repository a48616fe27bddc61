"""Which tokens of a run are computed in the last layer, and handed back: those that somebody reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from perl_jax.models.unpadding import Unpadding

Pick = Callable[[jax.Array], jax.Array]  # some of the tokens: [B, T, ...] -> [B, Q, ...]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The tokens of a run that go on, by default all: Q of each row's T. Where x is without padding, M of a group's N.

    Where it has its padding, rows are groups, `tokens` is `rows`, and nothing is to be padded or taken out.
    """

    rows: Pick | None = None  # [B, T, ...] -> [B, Q, ...]
    tokens: Pick = lambda x: x  # [G, N, ...] -> [G, M, ...]
    pad: Pick = lambda x: x  # [G, M, ...] -> [B, Q, ...]
    unpad: Pick = lambda x: x  # [B, Q, ...] -> [G, M, ...]


def choose(at: jax.Array, run: Unpadding | None, targets: Unpadding | None) -> Chosen:
    """The tokens `at` [B, Q] of a run: those that predict `targets`, padding too; or others, none of them padding."""
    rows = lambda y: _at(y, at)  # noqa: E731
    if run is None:
        return Chosen(rows, rows)

    def pad(y: jax.Array) -> jax.Array:
        return (y if targets is None else targets.pad(y)).reshape(*at.shape, *y.shape[2:])

    def unpad(y: jax.Array) -> jax.Array:
        if targets is None:
            return y.reshape(len(run.slot), -1, *y.shape[2:])
        return targets.unpad(y.reshape(*targets.shape, *y.shape[2:]))

    slots = unpad(_at(run.slot.reshape(run.shape), at))
    return Chosen(rows, lambda y: _at(y, slots), pad, unpad)


def last_token(x: jax.Array, length: jax.Array) -> jax.Array:
    """x at each prompt's last real token: [B, P, ...], length [B] -> [B, 1, ...]."""
    return _at(x, jnp.maximum(length - 1, 0)[:, None])


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, T, ...] at index [B, Q] -> [B, Q, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
