"""Averages of adapters: of their products A B, not of A and B, without ever forming a matrix of the kernel's size.

    w1 A1 B1 + w2 A2 B2 = [A1, A2] [w1 B1; w2 B2]       `concatenate`: exact, the ranks add up
    Qa Ra = A,  Qb Rb = B^T,  U S V = svd(Ra Rb^T)      `truncate`: the nearest of a lower rank

The mean of A times the mean of B is another matrix, because A B does not determine A and B: (A Q)(Q^-1 B) = A B. Both
functions work under jit, and on stacked layers [L, in, r].
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from perl_jax import trees
from perl_jax.models.lora import Adapter, scale_of


def concatenate(adapters: Sequence[Adapter], weights: Sequence[float | jax.Array]) -> Adapter:
    """The exact weighted sum of adapters of one base; its rank is the sum of their ranks, and its scale is 1.

    A layer that only some adapters have is the sum of those. Heads, and the parameters of full tuning, are summed too.

    Args:
      adapters: all of LoRA, or all of full tuning.
      weights: one of each adapter.

    Returns:
      The Adapter of the sum.
    """
    pairs = list(zip(adapters, weights, strict=True))
    mix = lambda *xs: sum(w * x for (_, w), x in zip(pairs, xs, strict=True))  # noqa: E731
    head = params = lora = None
    if adapters[0].head is not None:
        head = jax.tree.map(mix, *(adapter.head for adapter in adapters))
    if adapters[0].params is not None:
        params = jax.tree.map(mix, *(adapter.params for adapter in adapters))
    else:
        sides: dict[str, list[jax.Array]] = {}
        for adapter, weight in pairs:
            for path, x in trees.flatten(adapter.lora).items():
                layer, _, side = path.rpartition('/')
                sides.setdefault(path, []).append(x * (weight * scale_of(adapter.scale, layer)) if side == 'b' else x)
        joined = {path: jnp.concatenate(xs, -1 if path.endswith('/a') else -2) for path, xs in sides.items()}
        lora = trees.unflatten(joined)
    return Adapter(lora=lora, params=params, head=head)


def truncate(adapter: Adapter, rank: int) -> tuple[Adapter, Float[Array, '']]:
    """The nearest LoRA of at most `rank` (Frobenius norm), at scale 1.

    Args:
      adapter: of LoRA.
      rank: the most that the result has.

    Returns:
      The Adapter; and its relative error, float32 []: the Frobenius norm of what was dropped / that of scale A B, over
      all layers.
    """
    flat, dropped, total = trees.flatten(adapter.lora), 0.0, 0.0
    for layer in [path.removesuffix('/a') for path in flat if path.endswith('/a')]:
        qa, ra = jnp.linalg.qr(flat[f'{layer}/a'])
        qb, rb = jnp.linalg.qr(jnp.swapaxes(scale_of(adapter.scale, layer) * flat[f'{layer}/b'], -1, -2))
        u, s, v = jnp.linalg.svd(ra @ jnp.swapaxes(rb, -1, -2), full_matrices=False)
        root = jnp.sqrt(s[..., :rank])
        flat[f'{layer}/a'] = qa @ (u[..., :rank] * root[..., None, :])
        flat[f'{layer}/b'] = (root[..., None] * v[..., :rank, :]) @ jnp.swapaxes(qb, -1, -2)
        dropped, total = dropped + (s[..., rank:] ** 2).sum(), total + (s**2).sum()
    lora = trees.unflatten(flat)
    return adapter.replace(lora=lora, scale=1.0), jnp.sqrt(dropped / jnp.maximum(total, 1e-30))
