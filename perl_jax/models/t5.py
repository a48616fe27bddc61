"""T5's encoder-decoder: 1.0, 1.1, Flan, LM-adapted, mT5 and ByT5 are fields of one config.

    encoder   p0 p1 p2 .          the prompt, which sees itself whole; read once
    decoder   s a0 a1 a2          branch 0 sees the prompt and, from the start token s on, itself (causal)
              s b0 b1 .           branch 1 likewise: the keys and values of the prompt are theirs together

Names, shapes and axes of the parameters are those of T5X's `t5` example, its `layers_0`, `layers_1`, ... stacked on
axis 0 as `layers` (nn.scan): the compiler sees one layer. interop/t5x.py stacks them at reading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.linen import spmd

from perl_jax import sharded
from perl_jax.errors import check_count
from perl_jax.models import attention, layers
from perl_jax.models.attention import RelativeBias, Segment
from perl_jax.models.branches import KeyValue
from perl_jax.models.layers import Dense, Mlp, RMSNorm


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and numerics; the names are T5X's. The defaults are those of T5 1.1 and of all that came after it.

    T5 1.0 is activation 'relu', gated False, logits_via_embedding True.

    Attributes:
      vocab_size: V.
      emb_dim: D.
      num_heads: H.
      head_dim: E.
      mlp_dim: F.
      num_encoder_layers: of the encoder.
      num_decoder_layers: L, of the decoder.
      activation: 'gelu', 'relu' or 'silu'.
      gated: the MLP has a gate.
      logits_via_embedding: the embedding is the output layer too, whose logits are then divided by sqrt(D).
      relative_attention_num_buckets: of relative positions, at least 4.
      relative_attention_max_distance: from which distance on all share a bucket.
      norm_epsilon: added to the mean square in RMSNorm.
      dtype: of what is computed between the parameters; logits are float32.
      remat: 'none', 'full' (save nothing) or 'minimal' (save the outputs of matmuls without batch dimensions).

    Raises:
      UserError: sizes that are no counts, or do not go together.
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

    def __post_init__(self) -> None:
        for name in 'vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim', 'num_encoder_layers':
            check_count(name, getattr(self, name))
        check_count('num_decoder_layers', self.num_decoder_layers)
        check_count('relative_attention_num_buckets', self.relative_attention_num_buckets, 4)
        # Half of the decoder's buckets are a position each; the others, up to the distance, are logarithmic.
        least = self.relative_attention_num_buckets // 2 + 1
        check_count('relative_attention_max_distance', self.relative_attention_max_distance, least)


class Cache(struct.PyTreeNode):
    """Keys and values of every decoder layer; E, which is 64, is not the last axis, that a TPU pads to 128."""

    prompt: KeyValue  # [L, B, H, E, P], shared by the branches
    prompt_mask: jax.Array  # bool [B, P]
    responses: KeyValue  # [L, B, K, 1 + R, H * E], the start token first


class _Context(struct.PyTreeNode):
    """What every decoder layer needs to know of the tokens [B, K, T] that it reads."""

    encoded: jax.Array | None  # [B, P, D]; None where the cache has what the layers make of it
    prompt_mask: jax.Array  # bool [B, 1, 1, P]
    bias: jax.Array  # [H, T, T], among the tokens
    cached_bias: jax.Array | None  # [H, T, 1 + R], between them and those of the cache
    cached: jax.Array | None  # bool [1 + R], those of the cache that are there
    keep: bool = struct.field(pytree_node=False)  # hand back keys and values


class _Attention(nn.Module):
    """Scores are not scaled: T5 has E^-1/2 in the query's initial kernel instead."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        inner, axes = c.num_heads * c.head_dim, ('embed', 'joined_kv')
        self.query = Dense(inner, axes, c.dtype, init_scale=1 / c.head_dim)
        self.key, self.value = Dense(inner, axes, c.dtype), Dense(inner, axes, c.dtype)
        self.out = Dense(c.emb_dim, ('joined_kv', 'embed'), c.dtype)

    def remember(self, x: jax.Array) -> KeyValue:
        """What others may attend to: [..., D] -> [..., H, E] twice."""
        return self._heads(self.key(x)), self._heads(self.value(x))

    def __call__(self, x: jax.Array, segments: list[Segment]) -> jax.Array:
        return self.out(attention.attend(self._heads(self.query(x)), segments, scale=1.0))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)


def _norm(c: T5Config, name: str | None = None) -> RMSNorm:
    return RMSNorm(c.norm_epsilon, c.dtype, name=name)


def _mlp(c: T5Config, x: jax.Array) -> jax.Array:
    y = _norm(c, 'pre_mlp_layer_norm')(x)
    x += Mlp(c.mlp_dim, c.activation, c.gated, c.dtype, name='mlp')(y)
    return spmd.with_logical_constraint(x, ('batch', None, 'length', 'embed'))


class _EncoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
        c, attention = self.config, _Attention(self.config, name='attention')
        y = _norm(c, 'pre_attention_layer_norm')(x)
        return _mlp(c, x + attention(y, [Segment(*attention.remember(y), mask, bias)])), None


class _DecoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, cache: Any) -> tuple[jax.Array, Any]:
        c, attention = self.config, _Attention(self.config, name='self_attention')
        across = _Attention(c, name='encoder_decoder_attention')
        y = _norm(c, 'pre_self_attention_layer_norm')(x)
        own = attention.remember(y)
        segments = [Segment(*own, jnp.tri(x.shape[2], dtype=bool)[None, None], context.bias)]
        prompt: KeyValue
        if cache is None:
            assert context.encoded is not None
            prompt = across.remember(context.encoded)
        else:
            assert context.cached is not None
            prompt = jax.tree.map(lambda y: jnp.moveaxis(y, -1, 1), cache[0])
            before: KeyValue = jax.tree.map(lambda y: y.reshape(*y.shape[:-1], c.num_heads, c.head_dim), cache[1])
            segments.append(Segment(*before, context.cached[None, None, None], context.cached_bias))
        x += attention(y, segments)
        x += across(_norm(c, 'pre_cross_attention_layer_norm')(x), [Segment(*prompt, context.prompt_mask)])
        kept = None
        if context.keep:
            kept = jax.tree.map(lambda y: y.reshape(*y.shape[:-2], -1), own)
            if cache is None:
                kept = jax.tree.map(lambda y: jnp.moveaxis(y, 1, -1), prompt), kept
        return _mlp(c, x), kept


_REMAT = {'full': 'nothing_saveable', 'minimal': 'dots_with_no_batch_dims_saveable'}


def _layers(c: T5Config, layer: type[nn.Module], length: int, in_axes: Any) -> Callable[..., Any]:
    """All of one side's layers, called as one is; what each takes and gives of its own has an axis L in front."""
    if c.remat != 'none':
        layer = nn.remat(layer, prevent_cse=False, policy=getattr(jax.checkpoint_policies, _REMAT[c.remat]))
    scanned = nn.scan(
        layer,
        length=length,
        variable_axes={'params': 0, 'lora': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=in_axes,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    return scanned(c, name='layers')


def _positions(c: T5Config, bidirectional: bool, name: str | None = None) -> RelativeBias:
    sizes = c.relative_attention_num_buckets, c.relative_attention_max_distance
    return RelativeBias(c.num_heads, *sizes, bidirectional, c.dtype, name=name)


class _Encoder(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, P, D] -> [B, P, D]: one branch of attention that is not causal."""
        c, here = self.config, jnp.arange(x.shape[1])
        bias = _positions(c, bidirectional=True, name='relpos_bias')(here, here)
        run = _layers(c, _EncoderLayer, c.num_encoder_layers, (nn.broadcast, nn.broadcast))
        x, _ = run(x[:, None], mask[:, None, None], bias)
        return _norm(c, 'encoder_norm')(x)[:, 0]


class _Decoder(nn.Module):
    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = _positions(c, bidirectional=False)
        self.decoder_norm = _norm(c)
        if not c.logits_via_embedding:
            self.logits_dense = Dense(c.vocab_size, ('embed', 'vocab'), jnp.float32)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        prompt_mask: jax.Array,
        *,
        encoded: jax.Array | None = None,
        cache: Cache | None = None,
        at: jax.Array | int = 0,
        keep: bool = False,
    ) -> tuple[jax.Array, Any]:
        """[B, K, T, D], the tokens from position `at` on -> [B, K, T, D], and what each layer keeps of them.

        That is keys and values [L, B, K, T, H * E], behind those of the prompt where `encoded` is given.
        """
        c, here = self.config, at + jnp.arange(x.shape[2])
        cached = cached_bias = before = None
        if cache is not None:
            before = cache.prompt, cache.responses
            there = jnp.arange(cache.responses[0].shape[3])
            cached, cached_bias = there < at, self.relpos_bias(here, there)
        bias = self.relpos_bias(here, here)
        context = _Context(encoded, prompt_mask[:, None, None], bias, cached_bias, cached, keep)
        x, kept = _layers(c, _DecoderLayer, c.num_decoder_layers, (nn.broadcast, 0))(x, context, before)
        return self.decoder_norm(x), kept


class T5(nn.Module):
    """T5's encoder-decoder (Raffel et al. 2020, arXiv 1910.10683); its methods are those of Decoder.

    Attributes:
      config: sizes and numerics.
    """

    config: T5Config

    def setup(self) -> None:
        c = self.config
        embed = nn.with_logical_partitioning(nn.initializers.normal(1.0), ('vocab', 'embed'))
        self.token_embedder = layers.Embed(c.vocab_size, c.emb_dim, embedding_init=embed, dtype=c.dtype)
        self.encoder = _Encoder(c)
        self.decoder = _Decoder(c)

    def __call__(
        self, inputs: jax.Array, inputs_mask: jax.Array, targets: jax.Array, ends: jax.Array | None = None
    ) -> jax.Array:
        """Read prompts with the encoder, and all their responses with the decoder.

        Args:
          inputs: int [B, P], the prompts, padded on the right.
          inputs_mask: bool [B, P], true at their tokens.
          targets: int [B, K, R], the responses, padded on the right.
          ends: int [B, K], where only one state of each response is wanted.

        Returns:
          hidden [B, K, R + 1, D]: `hidden[..., :-1, :]` predicts each response token, `hidden[..., 1:, :]` has read it.
          The first has read the start token, which is 0.
          With `ends` int [B, K], of those only hidden[b, k, ends[b, k]], [B, K, D].
        """
        tokens = jnp.pad(targets, ((0, 0), (0, 0), (1, 0)))
        encoded = self.encoder(self.token_embedder(inputs), inputs_mask)
        hidden, _ = self.decoder(self.token_embedder(tokens), inputs_mask, encoded=encoded)
        if self.is_initializing():
            self.logits(hidden)
        if ends is not None:
            return jnp.take_along_axis(hidden, ends[..., None, None], axis=2)[:, :, 0]
        return hidden

    def prefill(self, inputs: jax.Array, inputs_mask: jax.Array, K: int, R: int) -> tuple[jax.Array, Cache]:
        """Read the prompts and the start token, and make room for the responses.

        Args:
          inputs: int [B, P].
          inputs_mask: bool [B, P].
          K: responses each.
          R: tokens of each at most.

        Returns:
          The start token's hidden state [B, D], and the cache.
        """
        c, B = self.config, inputs.shape[0]
        encoded = self.encoder(self.token_embedder(inputs), inputs_mask)
        start = self.token_embedder(jnp.zeros((B, K, 1), jnp.int32))
        hidden, (prompt, own) = self.decoder(start, inputs_mask, encoded=encoded, keep=True)
        prompt = jax.tree.map(lambda y: sharded.split(y, 'layers', 'batch', 'heads', 'kv', 'length'), prompt)
        room = jnp.zeros((c.num_decoder_layers, B, K, 1 + R, c.num_heads * c.head_dim), c.dtype)
        room = sharded.split(room, 'layers', 'batch', None, 'length', 'joined_kv')
        return hidden[:, 0, 0], Cache(prompt, inputs_mask, _write((room, room), own, 0))

    def decode(self, tokens: jax.Array, step: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read one more token of every response.

        Args:
          tokens: int [B, K].
          step: int [], which token of the response they are, the same for all.
          cache: of the prompts and the tokens before.

        Returns:
          hidden [B, K, D], and the cache with these tokens in it.
        """
        # The layers only read the cache; all of them are written together at the end, so that XLA updates it in place.
        x, at = self.token_embedder(tokens[..., None]), step + 1
        hidden, own = self.decoder(x, cache.prompt_mask, cache=cache, at=at, keep=True)
        return hidden[:, :, 0], cache.replace(responses=_write(cache.responses, own, at))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden [..., D] -> float32 [..., V], computed in float32 as T5X does."""
        if not self.config.logits_via_embedding:
            return self.decoder.logits_dense(hidden)
        embedding = self.token_embedder.embedding.astype(jnp.float32)
        return hidden.astype(jnp.float32) @ embedding.T * hidden.shape[-1] ** -0.5


def _write(room: KeyValue, now: KeyValue, at: jax.Array | int) -> KeyValue:
    """Put keys and values [L, B, K, 1, H * E] at position `at` of those with room [L, B, K, 1 + R, H * E]."""
    return jax.tree.map(lambda room, now: jax.lax.dynamic_update_slice_in_dim(room, now, at, axis=3), room, now)
