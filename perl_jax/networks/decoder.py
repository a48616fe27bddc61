"""A decoder-only transformer of the Llama kind that reads one prompt once for all of its K responses.

    prompt    p0 p1 p2 p3 .          the prompt sees itself (causal)
    response        \\- a0 a1 a2      branch 0 sees the prompt and itself; its positions go on where the prompt ends
                    \\- b0 b1 .       branch 1 likewise; branches never see each other

Prompt and branches go through every dense layer as one packed run of P + K R tokens; only attention tells them apart.
Names, shapes and axes of the parameters are T5X's; layers are stacked on axis 0 (nn.scan).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from perl_jax import layers, masked
from perl_jax.layers import Dense, GatedMlp, RMSNorm


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and numerics; field names are T5X's where T5X has one.

    `remat` is 'none', 'full' (save nothing) or 'minimal' (save the outputs of matmuls without batch dimensions).
    """

    vocab_size: int
    num_layers: int
    emb_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 1e4
    norm_epsilon: float = 1e-5
    logits_via_embedding: bool = True
    dtype: str = 'float32'
    remat: str = 'none'


@struct.dataclass
class Cache:
    """Keys and values [L, B, P, N, E] of the prompt, shared by its branches, and [L, B, K, R, N, E] of responses."""

    prompt: tuple[jax.Array, jax.Array]
    prompt_mask: jax.Array  # bool [B, P]
    responses: tuple[jax.Array, jax.Array]


@struct.dataclass
class _Context:
    """What every layer needs to know of the packed tokens [B, T = P + K R]; P or K is 0 where there are none."""

    rope: tuple[jax.Array, jax.Array]  # [B, T, E/2] each
    prompt_mask: jax.Array  # bool [B, P of the prompt, cached or not]
    cached: jax.Array | int  # how many response tokens the cache holds
    P: int = struct.field(pytree_node=False)
    K: int = struct.field(pytree_node=False)
    keep: bool = struct.field(pytree_node=False)  # hand back keys and values


def _causal(n: int) -> jax.Array:
    return jnp.tri(n, dtype=bool)[None, None]


class _Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, cache: Any) -> tuple[jax.Array, Any]:
        c, (B, T, _), P, K = self.config, x.shape, context.P, context.K
        q = Dense(c.num_heads * c.head_dim, ('embed', 'joined_kv'), c.dtype, name='query')(x)
        k = Dense(c.num_kv_heads * c.head_dim, ('embed', 'joined_kv'), c.dtype, name='key')(x)
        v = Dense(c.num_kv_heads * c.head_dim, ('embed', 'joined_kv'), c.dtype, name='value')(x)
        q = layers.rotate(q.reshape(B, T, -1, c.head_dim), context.rope)
        k = layers.rotate(k.reshape(B, T, -1, c.head_dim), context.rope)
        v = v.reshape(B, T, -1, c.head_dim)

        def branches(y: jax.Array) -> jax.Array:  # [B, K R, ...] of the packed run -> [B, K, R, ...]
            return y[:, P:].reshape(B, K, (T - P) // max(K, 1), *y.shape[2:])

        outs, kept = [], None
        if P:
            outs.append(layers.attend(q[:, None, :P], [(k[:, :P], v[:, :P], _causal(P))])[:, 0])
        if K:
            R = (T - P) // K
            own = (branches(k), branches(v))
            prompt = (k[:, :P], v[:, :P]) if P else cache[0]
            segments = [(*prompt, context.prompt_mask[:, None, None]), (*own, _causal(R))]
            if not P:
                filled = jnp.arange(cache[1][0].shape[2]) < context.cached
                segments.append((*cache[1], filled[None, None, None]))
            outs.append(layers.attend(branches(q), segments).reshape(B, K * R, -1))
        if context.keep:
            kept = own if K else (k, v)
        x = Dense(c.emb_dim, ('joined_kv', 'embed'), c.dtype, name='out')(jnp.concatenate(outs, axis=1))
        return x, kept


class _Layer(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, cache: Any) -> tuple[jax.Array, Any]:
        c = self.config
        y = RMSNorm(c.norm_epsilon, c.dtype, name='pre_self_attention_layer_norm')(x)
        y, kept = _Attention(c, name='self_attention')(y, context, cache)
        x = x + y
        y = RMSNorm(c.norm_epsilon, c.dtype, name='pre_mlp_layer_norm')(x)
        x = x + GatedMlp(c.mlp_dim, c.dtype, name='mlp')(y)
        return nn.with_logical_constraint(x, ('batch', 'length', 'embed')), kept


_REMAT = {'full': 'nothing_saveable', 'minimal': 'dots_with_no_batch_dims_saveable'}


class _Stack(nn.Module):
    config: DecoderConfig

    def setup(self) -> None:
        c, layer = self.config, _Layer
        if c.remat != 'none':
            layer = nn.remat(layer, prevent_cse=False, policy=getattr(jax.checkpoint_policies, _REMAT[c.remat]))
        scanned = nn.scan(
            layer,
            length=c.num_layers,
            variable_axes={'params': 0, 'lora': 0},
            split_rngs={'params': True, 'dropout': True},
            in_axes=(nn.broadcast, 0),
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )
        self.layers = scanned(c)
        self.decoder_norm = RMSNorm(c.norm_epsilon, c.dtype)
        if not c.logits_via_embedding:
            self.logits_dense = Dense(c.vocab_size, ('embed', 'vocab'), c.dtype)

    def __call__(self, x: jax.Array, context: _Context, cache: Any) -> tuple[jax.Array, Any]:
        x, kept = self.layers(x, context, cache)
        return self.decoder_norm(x), kept


class Decoder(nn.Module):
    """Hidden states first; logits only where somebody asks for them."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        embed = nn.with_logical_partitioning(nn.initializers.normal(0.02), ('vocab', 'embed'))
        self.token_embedder = nn.Embed(c.vocab_size, c.emb_dim, embedding_init=embed, dtype=c.dtype)
        self.decoder = _Stack(c)

    def __call__(self, inputs: jax.Array, inputs_mask: jax.Array, targets: jax.Array) -> jax.Array:
        """Read prompts [B, P] (padded right) and all their responses [B, K, R] at once.

        Returns:
          hidden [B, K, R + 1, D]: `hidden[..., :-1, :]` predicts each response token, `hidden[..., 1:, :]` has read it.
        """
        (B, P), (_, K, R) = inputs.shape, targets.shape
        length = masked.lengths(inputs_mask)
        ahead = jnp.tile(length[:, None] + jnp.arange(R)[None], (1, K))
        positions = jnp.concatenate([jnp.broadcast_to(jnp.arange(P), (B, P)), ahead], axis=1)
        tokens = jnp.concatenate([inputs, targets.reshape(B, K * R)], axis=1)
        x, _ = self._run(tokens, positions, inputs_mask, None, P=P, K=K)
        last = _last(x[:, :P], length)
        last = jnp.broadcast_to(last[:, None, None], (B, K, 1, x.shape[-1]))
        if self.is_initializing():
            self.logits(last)
        return jnp.concatenate([last, x[:, P:].reshape(B, K, R, -1)], axis=2)

    def prefill(self, inputs: jax.Array, inputs_mask: jax.Array, K: int, R: int) -> tuple[jax.Array, Cache]:
        """Read the prompts; make room for K responses of R tokens. Returns the last hidden [B, D] and the cache."""
        c, (B, P) = self.config, inputs.shape
        positions = jnp.broadcast_to(jnp.arange(P), (B, P))
        x, kept = self._run(inputs, positions, inputs_mask, None, P=P, K=0, keep=True)
        room = jnp.zeros((c.num_layers, B, K, R, c.num_kv_heads, c.head_dim), c.dtype)
        return _last(x, masked.lengths(inputs_mask)), Cache(kept, inputs_mask, (room, room))

    def decode(self, tokens: jax.Array, step: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read response token `step` (int, the same for all) of every branch: tokens [B, K] -> hidden [B, K, D].

        The layers only read the cache; all of them are written together at the end, so that XLA updates it in place.
        """
        (B, K) = tokens.shape
        positions = jnp.broadcast_to((masked.lengths(cache.prompt_mask) + step)[:, None], (B, K))
        x, new = self._run(
            tokens, positions, cache.prompt_mask, (cache.prompt, cache.responses), P=0, K=K, keep=True, cached=step
        )
        write = lambda room, now: jax.lax.dynamic_update_slice_in_dim(room, now, step, axis=3)  # noqa: E731
        return x, cache.replace(responses=jax.tree.map(write, cache.responses, new))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden [..., D] -> float32 [..., V]."""
        if self.config.logits_via_embedding:
            return self.token_embedder.attend(hidden).astype(jnp.float32)
        return self.decoder.logits_dense(hidden).astype(jnp.float32)

    def _run(self, tokens, positions, prompt_mask, cache, *, P, K, keep=False, cached=0):
        rope = layers.rope_table(positions, self.config.head_dim, self.config.rope_theta)
        x = nn.with_logical_constraint(self.token_embedder(tokens), ('batch', 'length', 'embed'))
        return self.decoder(x, _Context(rope, prompt_mask, cached, P, K, keep), cache)


def _last(x: jax.Array, length: jax.Array) -> jax.Array:
    """The hidden state at each prompt's last real token: x [B, P, D], length [B] -> [B, D]."""
    return jnp.take_along_axis(x, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
