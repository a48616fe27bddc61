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

from perl_jax import flash, layers, masked, sharded
from perl_jax.layers import Dense, Mlp, RMSNorm, Segment


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes, numerics and what families differ in; field names are T5X's where T5X has one. The defaults are Llama's.

    logits_via_embedding: the embedding is the output layer too (tied).     activation: 'silu' or 'gelu' (Gemma).
    use_qkv_bias: on query, key and value (Qwen 2).     qk_norm: RMSNorm of each head (Qwen 3, Gemma 3).
    scale_embedding: times sqrt(D) (Gemma).     norm_offset: see RMSNorm; 1 for Gemma.
    post_norms: RMSNorm behind attention and MLP too (Gemma 2 and 3).     query_scale: of scores; None is E^-1/2.
    attention_softcap, logits_softcap: c tanh(x / c) (Gemma 2).     rope_scaling: see RopeScaling (Llama 3.1).
    sliding_window: local layers see so many tokens, themselves included; every `global_every`-th layer sees all.
    local_rope_theta: of local layers, never scaled (Gemma 3); None is rope_theta.
    flash: attention over whole prompts and responses in one kernel on TPUs (flash.py).
    unroll: layers a turn of the loop over them, where prompts are read. A small model on a CPU learns a sixth faster
      with all at once, since what the backward pass needs is not stacked; scoring and the sampler's turns gain nothing.
    remat: 'none', 'full' (save nothing) or 'minimal' (save the outputs of matmuls without batch dimensions).
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
    activation: str = 'silu'
    use_qkv_bias: bool = False
    qk_norm: bool = False
    scale_embedding: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    query_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    rope_scaling: layers.RopeScaling | None = None
    sliding_window: int | None = None
    global_every: int = 1
    local_rope_theta: float | None = None
    dtype: str = 'float32'
    flash: bool = True
    unroll: int = 1
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

    positions: jax.Array  # int [B, T]
    rope: tuple[jax.Array, jax.Array]  # [B, T, E/2] each
    local_rope: tuple[jax.Array, jax.Array] | None  # that of local layers, if there are any
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
    def __call__(self, x: jax.Array, context: _Context, cache: Any, local: Any) -> tuple[jax.Array, Any]:
        c, (B, T, _), P, K = self.config, x.shape, context.P, context.K
        R = (T - P) // max(K, 1)
        project = lambda name, heads: Dense(  # noqa: E731
            heads * c.head_dim, ('embed', 'joined_kv'), c.dtype, c.use_qkv_bias, name=name
        )(x).reshape(B, T, heads, c.head_dim)
        q, k, v = project('query', c.num_heads), project('key', c.num_kv_heads), project('value', c.num_kv_heads)
        if c.qk_norm:
            q = RMSNorm(c.norm_epsilon, c.dtype, c.norm_offset, axis='kv', name='query_norm')(q)
            k = RMSNorm(c.norm_epsilon, c.dtype, c.norm_offset, axis='kv', name='key_norm')(k)
        rope = context.rope
        if local is not None:
            rope = jax.tree.map(lambda near, far: jnp.where(local, near, far), context.local_rope, rope)
        q, k = layers.rotate(q, rope), layers.rotate(k, rope)

        def branches(y: jax.Array) -> jax.Array:  # [B, K R, ...] of the packed run -> [B, K, R, ...]
            return y[:, P:].reshape(B, K, R, *y.shape[2:])

        def near(query: jax.Array, key: jax.Array) -> jax.Array | bool:  # positions [B, K, R], [B, 1 or K, S]
            if local is None:
                return True
            return ~local | (query[..., None] - key[..., None, :] < c.sliding_window)

        def attend(query: jax.Array, segments: list[Segment]) -> jax.Array:
            return layers.attend(query, segments, scale=c.query_scale, softcap=c.attention_softcap)

        outs, kept, positions = [], None, context.positions
        own = (branches(k), branches(v)) if K else None
        far = local is None or c.sliding_window >= P + R  # no window hides anything
        fused = P > 0 and far and c.flash and flash.usable(q, k)
        if fused:
            mask = context.prompt_mask
            outs.append(flash.attend(q, k, v, mask, K, scale=c.query_scale, softcap=c.attention_softcap))
        if P and not fused:
            mine = positions[:, None, :P]
            outs.append(attend(q[:, None, :P], [Segment(k[:, :P], v[:, :P], _causal(P) & near(mine, mine))])[:, 0])
        if K and not fused:
            mine = branches(positions)
            prompt = (k[:, :P], v[:, :P]) if P else cache[0]
            before = jnp.arange(prompt[0].shape[1])[None, None]
            segments = [
                Segment(*prompt, context.prompt_mask[:, None, None] & near(mine, before)),
                Segment(*own, _causal(mine.shape[2]) & near(mine, mine)),
            ]
            if not P:
                ahead = jnp.arange(cache[1][0].shape[2])
                there = masked.lengths(context.prompt_mask)[:, None, None] + ahead[None, None]
                filled = (ahead < context.cached)[None, None, None]
                segments.append(Segment(*cache[1], filled & near(mine, there)))
            outs.append(attend(branches(q), segments).reshape(B, T - P, -1))
        if context.keep:
            kept = own if K else (k, v)
        x = Dense(c.emb_dim, ('joined_kv', 'embed'), c.dtype, name='out')(jnp.concatenate(outs, axis=1))
        return x, kept


class _Layer(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, cache: Any, local: Any) -> tuple[jax.Array, Any]:
        c = self.config
        norm = lambda name: RMSNorm(c.norm_epsilon, c.dtype, c.norm_offset, name=name)  # noqa: E731
        y, kept = _Attention(c, name='self_attention')(
            norm('pre_self_attention_layer_norm')(x), context, cache, local
        )
        x += norm('post_self_attention_layer_norm')(y) if c.post_norms else y
        y = Mlp(c.mlp_dim, c.activation, dtype=c.dtype, name='mlp')(norm('pre_mlp_layer_norm')(x))
        x += norm('post_mlp_layer_norm')(y) if c.post_norms else y
        return nn.with_logical_constraint(x, ('batch', 'length', 'embed')), kept


_REMAT = {'full': 'nothing_saveable', 'minimal': 'dots_with_no_batch_dims_saveable'}


class _Stack(nn.Module):
    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        self.decoder_norm = RMSNorm(c.norm_epsilon, c.dtype, c.norm_offset)
        if not c.logits_via_embedding:
            self.logits_dense = Dense(c.vocab_size, ('embed', 'vocab'), c.dtype)

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, cache: Any) -> tuple[jax.Array, Any]:
        c, local, layer = self.config, None, _Layer
        if c.sliding_window is not None:
            local = (jnp.arange(c.num_layers) + 1) % c.global_every != 0
        if c.remat != 'none':
            layer = nn.remat(layer, prevent_cse=False, policy=getattr(jax.checkpoint_policies, _REMAT[c.remat]))
        scanned = nn.scan(
            layer,
            length=c.num_layers,
            variable_axes={'params': 0, 'lora': 0},
            split_rngs={'params': True, 'dropout': True},
            in_axes=(nn.broadcast, 0, 0),
            metadata_params={nn.PARTITION_NAME: 'layers'},
            unroll=c.unroll if context.P else 1,
        )
        x, kept = scanned(c, name='layers')(x, context, cache, local)
        return self.decoder_norm(x), kept


class Decoder(nn.Module):
    """Hidden states first; logits only where somebody asks for them."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        embed = nn.with_logical_partitioning(nn.initializers.normal(0.02), ('vocab', 'embed'))
        self.token_embedder = layers.Embed(c.vocab_size, c.emb_dim, embedding_init=embed, dtype=c.dtype)
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
        kept = jax.tree.map(lambda y: sharded.split(y, 'layers', 'batch', 'length', 'kv_heads', 'kv'), kept)
        room = jnp.zeros((c.num_layers, B, K, R, c.num_kv_heads, c.head_dim), c.dtype)
        room = sharded.split(room, 'layers', 'batch', None, 'length', 'kv_heads', 'kv')
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
        c = self.config
        out = self.token_embedder.attend if c.logits_via_embedding else self.decoder.logits_dense
        logits = out(hidden).astype(jnp.float32)
        return logits if c.logits_softcap is None else c.logits_softcap * jnp.tanh(logits / c.logits_softcap)

    def _run(self, tokens, positions, prompt_mask, cache, *, P, K, keep=False, cached=0):
        c, local_rope = self.config, None
        rope = layers.rope_table(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        if c.sliding_window is not None:
            local_rope = layers.rope_table(positions, c.head_dim, c.local_rope_theta or c.rope_theta)
        x = self.token_embedder(tokens)
        if c.scale_embedding:
            x *= jnp.asarray(c.emb_dim**0.5, x.dtype)  # rounded to the model's dtype, as Gemma has it
        x = nn.with_logical_constraint(x, ('batch', 'length', 'embed'))
        return self.decoder(x, _Context(positions, rope, local_rope, prompt_mask, cached, P, K, keep), cache)


def _last(x: jax.Array, length: jax.Array) -> jax.Array:
    """The hidden state at each prompt's last real token: x [B, P, D], length [B] -> [B, D]."""
    return jnp.take_along_axis(x, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
