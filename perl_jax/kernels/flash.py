"""Attention in one kernel on TPUs: the scores of prompts and branches stay in the chip's fast memory.

The kernel is JAX's splash attention (jax.experimental.pallas.ops.tpu), FlashAttention's blocked softmax (Dao 2023,
arXiv 2307.08691), which skips blocks that are masked entirely. This module adds the mask of a prompt with its branches,
and the sharding. docs/explanation/memory.md has the gain by the plan.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import spmd

from perl_jax import sharded

LANES = 128  # a block of the kernel is a multiple of it
MAX_BLOCK = 640  # larger blocks take fewer bundles a score, but must fit the chip's memory (docs/explanation/memory.md)


def usable(query: jax.Array, key: jax.Array) -> bool:
    """Is this a TPU, and do batch and heads divide over its mesh? query [B, T, H, E], key [B, T, N, E]."""
    batch, heads = sharded.partitions('batch'), sharded.partitions('kv_heads')
    return sharded.on_tpu() and query.shape[0] % batch == 0 and key.shape[2] % heads == 0


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    prompt_mask: jax.Array,
    K: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of P + K R packed tokens: a prompt attends to itself, a branch to the prompt and itself.

    Equal to `branches.attend` without the kernel at every real token; outputs at the padding differ and are not used.

    Args:
      query: [B, T = P + K R, H, E]. H is a multiple of N (grouped queries).
      key, value: [B, T, N, E].
      prompt_mask: bool [B, P], padded on the right.
      K: branches, of equal length; 0 for prompts alone.
      scale, softcap: as in `segmented.attend`.
      interpret: run the kernel's operations one by one on any machine, for tests.

    Returns:
      [B, T, H * E] in the query's dtype; the softmax is float32.
    """
    B, T, H, E = query.shape
    P, padding = prompt_mask.shape[1], -T % LANES
    is_real = jnp.pad(prompt_mask, ((0, 0), (0, T - P)), constant_values=True)
    query = query * (E**-0.5 if scale is None else scale)
    args = [jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2) for x in (query, key, value)]
    args.append(jnp.pad(is_real, ((0, 0), (0, padding))).astype(jnp.int32))
    axes = ('batch', 'kv_heads', None, None), ('batch', None)
    heads, rows = map(spmd.logical_to_mesh_axes, axes)
    kernel_fn = functools.partial(_kernel, visible=_visible(P, K, T, padding), softcap=softcap, interpret=interpret)
    if not jax.sharding.get_abstract_mesh().empty:
        kernel_fn = jax.shard_map(kernel_fn, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return kernel_fn(*args).swapaxes(1, 2)[:, :T].reshape(B, T, H * E)


def _kernel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    is_real: jax.Array,
    *,
    visible: np.ndarray,
    softcap: float | None,
    interpret: bool,
) -> jax.Array:
    """The kernel on one chip: [B, H, T, E], [B, N, T, E] twice, int [B, T] -> [B, H, T, E].

    Padding attends to padding alone.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    T = len(visible)
    block = max(n for n in range(LANES, MAX_BLOCK + 1, LANES) if T % n == 0)
    names = 'q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq'
    sizes: dict[str, Any] = {f'block_{name}': block for name in names}
    kernel = splash.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.NumpyMask(visible)] * query.shape[1]),
        block_sizes=splash.BlockSizes(**sizes),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    kernel_fn = jax.vmap(lambda q, k, v, r: kernel(q, k, v, splash.SegmentIds(r, r)))
    return cast(jax.Array, kernel_fn(query, key, value, is_real))  # a pair only with save_residuals


def _visible(P: int, K: int, T: int, padding: int) -> np.ndarray:
    """The attention mask, bool [T + padding, T + padding]; tokens of the padding attend to the padding."""
    ids = np.arange(T + padding)
    branch = np.where(ids < P, 0, 1 + (ids - P) // max((T - P) // max(K, 1), 1))
    branch = np.where(ids < T, branch, K + 1)
    causal = ids[:, None] >= ids[None]
    prompt = (branch[:, None] <= K) & (branch[None] == 0)
    return causal & (prompt | (branch[:, None] == branch[None]))
