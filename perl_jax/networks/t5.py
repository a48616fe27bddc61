"""T5's encoder-decoder: 1.0, 1.1, Flan, LM-adapted, mT5 and ByT5 are fields of one config.

    encoder   p0 p1 p2 .          the prompt, which sees itself whole; read once
    decoder   s a0 a1 a2          branch 0 sees the prompt and, from the start token s on, itself (causal)
              s b0 b1 .           branch 1 likewise: the keys and values of the prompt are theirs together

The tree is that of T5X's `t5` example, layers apart (`layers_0`, ...) and kernels 2-D, so that the `target` of a
T5X checkpoint is a base as it stands (interop/t5x.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from perl_jax import layers, sharded
from perl_jax.layers import Dense, Mlp, RelativeBias, RMSNorm, Segment


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and numerics; the names are T5X's. The defaults are those of T5 1.1 and of all that came after it.

    T5 1.0 is activation 'relu', gated False, logits_via_embedding True.
    logits_via_embedding: the embedding is the output layer too, whose logits are then divided by sqrt(D).
    remat: 'none', 'full' (save nothing) or 'minimal' (save the outputs of matmuls without batch dimensions).
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    activation: str = 'gelu'
    gated: bool = True
    logits_via_embedding: bool = False
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    norm_epsilon: float = 1e-6
    dtype: str = 'float32'
    remat: str = 'none'


KeyValue = tuple[jax.Array, jax.Array]


@struct.dataclass
class Cache:
    """What each decoder layer remembers; a part that is None is not there yet (prompt) or not wanted (responses)."""

    prompt: tuple[KeyValue, ...] | None  # [B, P, H, E], shared by the branches
    prompt_mask: jax.Array  # bool [B, P]
    responses: tuple[KeyValue, ...] | None  # [B, K, 1 + R, H, E], the start token first


class _Attention(nn.Module):
    """Scores are not scaled: T5 has E^-1/2 in the query's initial kernel instead."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        inner, axes = c.num_heads * c.head_dim, ('embed', 'joined_kv')
        self.query = Dense(inner, axes, c.dtype, init_scale=1 / c.head_dim)
        self.key, self.value = Dense(inner, axes, c.dtype), Dense(inner, axes, c.dtype)
        self.out = Dense(c.emb_dim, axes[::-1], c.dtype)

    def remember(self, x: jax.Array) -> KeyValue:
        """What others may attend to: [..., D] -> [..., H, E] twice."""
        return self._heads(self.key(x)), self._heads(self.value(x))

    def __call__(self, x: jax.Array, segment: Segment) -> jax.Array:
        return self.out(layers.attend(self._heads(self.query(x)), [segment], scale=1.0))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)


def _norm(c: T5Config, name: str | None = None) -> RMSNorm:
    return RMSNorm(c.norm_epsilon, c.dtype, name=name)


def _mlp(c: T5Config, x: jax.Array) -> jax.Array:
    y = _norm(c, 'pre_mlp_layer_norm')(x)
    x += Mlp(c.mlp_dim, c.activation, c.gated, c.dtype, name='mlp')(y)
    return nn.with_logical_constraint(x, ('batch', None, 'length', 'embed'))


class _EncoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array) -> jax.Array:
        c, attention = self.config, _Attention(self.config, name='attention')
        y = _norm(c, 'pre_attention_layer_norm')(x)
        return _mlp(c, x + attention(y, Segment(*attention.remember(y), mask, bias)))


class _DecoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(
        self, x: jax.Array, encoded: jax.Array | None, at: Any, masks: Any, bias: jax.Array, prompt: Any, room: Any
    ) -> tuple[jax.Array, Any]:
        c, attention = self.config, _Attention(self.config, name='self_attention')
        across = _Attention(c, name='encoder_decoder_attention')
        y = _norm(c, 'pre_self_attention_layer_norm')(x)
        own = attention.remember(y)
        if room is not None:  # written before it is read, so that XLA may do it in place
            write = lambda room, now: jax.lax.dynamic_update_slice_in_dim(room, now, at, axis=2)  # noqa: E731
            own = jax.tree.map(write, room, own)
        x += attention(y, Segment(*own, masks[0], bias))
        if prompt is None:
            prompt = across.remember(encoded)
        x += across(_norm(c, 'pre_cross_attention_layer_norm')(x), Segment(*prompt, masks[1]))
        return _mlp(c, x), None if room is None else (prompt, own)


_REMAT = {'full': 'nothing_saveable', 'minimal': 'dots_with_no_batch_dims_saveable'}


def _layers(c: T5Config, layer: type[nn.Module], count: int) -> list[nn.Module]:
    if c.remat != 'none':
        layer = nn.remat(layer, policy=getattr(jax.checkpoint_policies, _REMAT[c.remat]))
    return [layer(c) for _ in range(count)]


def _positions(c: T5Config, bidirectional: bool) -> RelativeBias:
    sizes = c.relative_attention_num_buckets, c.relative_attention_max_distance
    return RelativeBias(c.num_heads, *sizes, bidirectional=bidirectional)


class _Encoder(nn.Module):
    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = _positions(c, bidirectional=True)
        self.layers = _layers(c, _EncoderLayer, c.num_encoder_layers)
        self.encoder_norm = _norm(c)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, P, D] -> [B, P, D]: one branch of attention that is not causal."""
        x, here = x[:, None], jnp.arange(x.shape[1])
        bias = self.relpos_bias(here, here)
        for layer in self.layers:
            x = layer(x, mask[:, None, None], bias)
        return self.encoder_norm(x)[:, 0]


class _Decoder(nn.Module):
    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = _positions(c, bidirectional=False)
        self.layers = _layers(c, _DecoderLayer, c.num_decoder_layers)
        self.decoder_norm = _norm(c)
        if not c.logits_via_embedding:
            self.logits_dense = Dense(c.vocab_size, ('embed', 'vocab'), jnp.float32)

    def __call__(
        self, x: jax.Array, cache: Cache, *, encoded: jax.Array | None = None, at: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache]:
        """[B, K, R, D], the tokens from position `at` on -> [B, K, R, D] and the cache that has read them too."""
        nothing = (None,) * len(self.layers)
        room = cache.responses or nothing
        here = at + jnp.arange(x.shape[2])
        keys = here if cache.responses is None else jnp.arange(room[0][0].shape[2])
        masks = (keys[None] <= here[:, None])[None, None], cache.prompt_mask[:, None, None]
        bias, kept = self.relpos_bias(here, keys), []
        for layer, prompt, responses in zip(self.layers, cache.prompt or nothing, room):
            x, now = layer(x, encoded, at, masks, bias, prompt, responses)
            kept.append(now)
        if cache.responses is not None:
            prompt, responses = zip(*kept)
            cache = cache.replace(prompt=prompt, responses=responses)
        return self.decoder_norm(x), cache


class T5(nn.Module):
    """Hidden states first; logits only where somebody asks for them. The calls are networks.decoder.Decoder's."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        embed = nn.with_logical_partitioning(nn.initializers.normal(1.0), ('vocab', 'embed'))
        self.token_embedder = layers.Embed(c.vocab_size, c.emb_dim, embedding_init=embed, dtype=c.dtype)
        self.encoder = _Encoder(c)
        self.decoder = _Decoder(c)

    def __call__(self, inputs: jax.Array, inputs_mask: jax.Array, targets: jax.Array) -> jax.Array:
        """Read prompts [B, P] (padded right) with the encoder, and all their responses [B, K, R] with the decoder.

        Returns:
          hidden [B, K, R + 1, D]: `hidden[..., :-1, :]` predicts each response token, `hidden[..., 1:, :]` has read it.
          The first has read the start token, which is 0.
        """
        tokens = jnp.pad(targets, ((0, 0), (0, 0), (1, 0)))
        encoded = self.encoder(self.token_embedder(inputs), inputs_mask)
        hidden, _ = self.decoder(self.token_embedder(tokens), Cache(None, inputs_mask, None), encoded=encoded)
        if self.is_initializing():
            self.logits(hidden)
        return hidden

    def prefill(self, inputs: jax.Array, inputs_mask: jax.Array, K: int, R: int) -> tuple[jax.Array, Cache]:
        """Read the prompts and the start token; make room for K responses of R tokens.

        Returns the last hidden [B, D] and the cache.
        """
        c, B = self.config, inputs.shape[0]
        encoded = self.encoder(self.token_embedder(inputs), inputs_mask)
        room = jnp.zeros((B, K, 1 + R, c.num_heads, c.head_dim), c.dtype)
        rooms = [sharded.split(room, 'batch', None, 'length', 'heads', 'kv')] * 2
        cache = Cache(None, inputs_mask, (tuple(rooms),) * c.num_decoder_layers)
        start = self.token_embedder(jnp.zeros((B, K, 1), jnp.int32))
        hidden, cache = self.decoder(start, cache, encoded=encoded)
        return hidden[:, 0, 0], cache

    def decode(self, tokens: jax.Array, step: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read response token `step` (int, the same for all) of every branch: tokens [B, K] -> hidden [B, K, D]."""
        hidden, cache = self.decoder(self.token_embedder(tokens[..., None]), cache, at=step + 1)
        return hidden[:, :, 0], cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden [..., D] -> float32 [..., V], computed in float32 as T5X does."""
        if not self.config.logits_via_embedding:
            return self.decoder.logits_dense(hidden)
        embedding = self.token_embedder.embedding.astype(jnp.float32)
        return hidden.astype(jnp.float32) @ embedding.T * hidden.shape[-1] ** -0.5
