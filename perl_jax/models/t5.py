"""T5's encoder-decoder: 1.0, 1.1, Flan, LM-adapted, mT5 and ByT5 are fields of one config.

    encoder   p0 p1 p2 .          the prompt, computed once with bidirectional attention
    decoder   s a0 a1 a2          branch 0 attends to the prompt and, from the start token s on, to itself (causal)
              s b0 b1 .           branch 1 likewise; both share the prompt's keys and values

Names, shapes and axes of the parameters are those of T5X's `t5` example, its `layers_0`, `layers_1`, ... stacked on
axis 0 as `layers` (nn.scan): the compiler sees one layer. interop/t5x.py stacks them at reading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from annotated_types import Interval
from flax import linen as nn
from flax import struct
from flax.linen import spmd
from jaxtyping import Array, Bool, Float, Int

from perl_jax import settings, sharded
from perl_jax.errors import UserError
from perl_jax.models import layers
from perl_jax.models.attention import segmented
from perl_jax.models.attention.branches import KeyValue
from perl_jax.models.attention.relative_bias import RelativeBias
from perl_jax.models.attention.segmented import Segment
from perl_jax.models.layers import Dense, Mlp, RMSNorm
from perl_jax.types import AnyArray


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and numerics; the names are T5X's. The defaults are those of T5 1.1 and its successors.

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
      logits_via_embedding: use the embedding as the output layer, with logits divided by sqrt(D).
      relative_attention_num_buckets: of relative positions, at least 4.
      relative_attention_max_distance: all larger distances share a bucket.
      norm_epsilon: added to the mean square in RMSNorm.
      dtype: of activations; logits are float32.
      remat: 'none', 'full' (save nothing) or 'minimal' (save the outputs of matmuls without batch dimensions).

    Raises:
      UserError: a size that is not a positive integer, or too small a distance for the buckets.
    """

    vocab_size: settings.Count
    emb_dim: settings.Count
    num_heads: settings.Count
    head_dim: settings.Count
    mlp_dim: settings.Count
    num_encoder_layers: settings.Layers
    num_decoder_layers: settings.Layers
    activation: settings.Activation = 'gelu'
    gated: bool = True
    logits_via_embedding: bool = False
    relative_attention_num_buckets: Annotated[int, Interval(ge=4, le=settings.INT_MAX)] = 32
    relative_attention_max_distance: settings.Count = 128
    norm_epsilon: settings.NonNegative = 1e-6
    dtype: settings.Dtype = 'float32'
    remat: settings.Remat = 'none'

    def __post_init__(self) -> None:
        settings.check(self)
        # Half of the decoder's buckets hold one distance each; the others grow logarithmically up to the maximum.
        least = self.relative_attention_num_buckets // 2 + 1
        if self.relative_attention_max_distance < least:
            raise UserError(
                f'relative_attention_max_distance = {self.relative_attention_max_distance}: give at least {least}'
            )


class Cache(struct.PyTreeNode):
    """Keys and values of every decoder layer. E = 64 is not the last axis, which a TPU would pad to 128."""

    prompt: KeyValue  # [L, B, H, E, P], shared by the branches
    prompt_mask: AnyArray  # bool [B, P]
    responses: KeyValue  # [L, B, K, 1 + R, H * E], the start token first


class _Context(struct.PyTreeNode):
    """The inputs that all decoder layers share, for tokens [B, K, T].

    Attributes:
      encoded: [B, P, D], the encoder's output; None where the cache has its keys and values.
      prompt_mask: bool [B, 1, 1, P].
      bias: [H, T, T], among the tokens.
      cached_bias: [H, T, 1 + R], between the tokens and the cache.
      cached: bool [1 + R], the positions of the cache that are filled.
      return_kv: whether layers return their keys and values.
    """

    encoded: jax.Array | None
    prompt_mask: AnyArray
    bias: jax.Array
    cached_bias: jax.Array | None
    cached: jax.Array | None
    return_kv: bool = struct.field(pytree_node=False)


class _Attention(nn.Module):
    """Multi-head attention with unscaled scores: T5 has the factor E^-1/2 in the query's initializer instead."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        inner, axes = c.num_heads * c.head_dim, ('embed', 'joined_kv')
        self.query = Dense(inner, axes, c.dtype, init_scale=1 / c.head_dim)
        self.key, self.value = Dense(inner, axes, c.dtype), Dense(inner, axes, c.dtype)
        self.out = Dense(c.emb_dim, ('joined_kv', 'embed'), c.dtype)

    def keys_values(self, x: jax.Array) -> KeyValue:
        """Keys and values: [..., D] -> [..., H, E] each."""
        return self._heads(self.key(x)), self._heads(self.value(x))

    def __call__(self, x: Float[Array, 'B K T D'], segments: list[Segment]) -> Float[Array, 'B K T D']:
        return self.out(segmented.attend(self._heads(self.query(x)), segments, scale=1.0))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)


def _norm(c: T5Config, name: str | None = None) -> RMSNorm:
    return RMSNorm(c.norm_epsilon, c.dtype, name=name)


def _mlp(c: T5Config, x: jax.Array) -> jax.Array:
    y = _norm(c, 'pre_mlp_layer_norm')(x)
    x += Mlp(c.mlp_dim, c.activation, c.gated, c.dtype, name='mlp')(y)
    return spmd.with_logical_constraint(x, ('batch', None, 'length', 'embed'))  # between layers, as the rules say


class _EncoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: AnyArray, bias: jax.Array) -> tuple[jax.Array, None]:
        c, attention = self.config, _Attention(self.config, name='attention')
        y = _norm(c, 'pre_attention_layer_norm')(x)
        return _mlp(c, x + attention(y, [Segment(*attention.keys_values(y), mask, bias)])), None


class _DecoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, cache: Any) -> tuple[jax.Array, Any]:
        c, attention = self.config, _Attention(self.config, name='self_attention')
        cross_attention = _Attention(c, name='encoder_decoder_attention')
        y = _norm(c, 'pre_self_attention_layer_norm')(x)
        new_kv = attention.keys_values(y)
        segments = [Segment(*new_kv, jnp.tri(x.shape[2], dtype=bool)[None, None], context.bias)]
        prompt: KeyValue
        if cache is None:
            assert context.encoded is not None
            prompt = cross_attention.keys_values(context.encoded)
        else:
            assert context.cached is not None
            prompt = jax.tree.map(lambda y: jnp.moveaxis(y, -1, 1), cache[0])
            before: KeyValue = jax.tree.map(lambda y: y.reshape(*y.shape[:-1], c.num_heads, c.head_dim), cache[1])
            segments.append(Segment(*before, context.cached[None, None, None], context.cached_bias))
        x += attention(y, segments)
        x += cross_attention(_norm(c, 'pre_cross_attention_layer_norm')(x), [Segment(*prompt, context.prompt_mask)])
        returned_kv = None
        if context.return_kv:
            returned_kv = jax.tree.map(lambda y: y.reshape(*y.shape[:-2], -1), new_kv)
            if cache is None:
                returned_kv = jax.tree.map(lambda y: jnp.moveaxis(y, 1, -1), prompt), returned_kv
        return _mlp(c, x), returned_kv


_REMAT = {'full': 'nothing_saveable', 'minimal': 'dots_with_no_batch_dims_saveable'}


def _layers(c: T5Config, layer: type[nn.Module], length: int, in_axes: Any) -> Callable[..., Any]:
    """All layers of the encoder or decoder as one scanned module; inputs and outputs per layer have an axis L first."""
    if c.remat != 'none':
        # In a loop XLA cannot merge what is recomputed with what was computed, so no barrier against it is needed.
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
    def __call__(self, x: Float[Array, 'B P D'], mask: Bool[AnyArray, 'B P']) -> Float[Array, 'B P D']:
        """[B, P, D] -> [B, P, D], with bidirectional attention; a batch of one branch each."""
        c, positions = self.config, jnp.arange(x.shape[1])
        bias = _positions(c, bidirectional=True, name='relpos_bias')(positions, positions)
        apply_layers = _layers(c, _EncoderLayer, c.num_encoder_layers, (nn.broadcast, nn.broadcast))
        x, _ = apply_layers(x[:, None], mask[:, None, None], bias)
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
        self, x: Float[Array, 'B K T D'], prompt_mask: Bool[AnyArray, 'B P'], *,
        encoded: Float[Array, 'B P D'] | None = None, cache: Cache | None = None,
        at: jax.Array | int = 0, return_kv: bool = False,
    ) -> tuple[Float[Array, 'B K T D'], Any]:  # fmt: skip
        """Run the layers on tokens [B, K, T, D] that start at position `at`.

        Returns:
          hidden [B, K, T, D]; with `return_kv` also keys and values [L, B, K, T, H * E], and before them those of the
          prompt where `encoded` is given.
        """
        c, positions = self.config, at + jnp.arange(x.shape[2])
        cached = cached_bias = before = None
        if cache is not None:
            before = cache.prompt, cache.responses
            cached_positions = jnp.arange(cache.responses[0].shape[3])
            cached, cached_bias = cached_positions < at, self.relpos_bias(positions, cached_positions)
        bias = self.relpos_bias(positions, positions)
        context = _Context(encoded, prompt_mask[:, None, None], bias, cached_bias, cached, return_kv)
        x, returned_kv = _layers(c, _DecoderLayer, c.num_decoder_layers, (nn.broadcast, 0))(x, context, before)
        return self.decoder_norm(x), returned_kv


class T5(nn.Module):
    """T5's encoder-decoder (Raffel et al. 2020, arXiv 1910.10683); a Network (models/network.py).

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
        self, inputs: Int[AnyArray, 'B P'], inputs_mask: Bool[AnyArray, 'B P'], targets: Int[AnyArray, 'B K R'],
        ends: Int[AnyArray, 'B K'] | None = None,
    ) -> Float[Array, 'B K R+1 D'] | Float[Array, 'B K D']:  # fmt: skip
        """Read prompts with the encoder, and all their responses with the decoder: `Network.__call__`.

        The first state of a response has read the start token, which is 0.
        """
        tokens = jnp.pad(targets, ((0, 0), (0, 0), (1, 0)))
        encoded = self.encoder(self.token_embedder(inputs), inputs_mask)
        hidden, _ = self.decoder(self.token_embedder(tokens), inputs_mask, encoded=encoded)
        if self.is_initializing():
            self.logits(hidden)
        if ends is not None:
            return jnp.take_along_axis(hidden, ends[..., None, None], axis=2)[:, :, 0]
        return hidden

    def prefill(
        self, inputs: Int[AnyArray, 'B P'], inputs_mask: Bool[AnyArray, 'B P'], K: int, R: int
    ) -> tuple[Float[Array, 'B D'], Cache]:
        """Read the prompts and the start token, and allocate the cache of the responses: `Network.prefill`."""
        c, B = self.config, inputs.shape[0]
        encoded = self.encoder(self.token_embedder(inputs), inputs_mask)
        start = self.token_embedder(jnp.zeros((B, K, 1), jnp.int32))
        hidden, (prompt, new_kv) = self.decoder(start, inputs_mask, encoded=encoded, return_kv=True)
        prompt = jax.tree.map(lambda y: sharded.split(y, 'layers', 'batch', 'heads', 'kv', 'length'), prompt)
        buffer = jnp.zeros((c.num_decoder_layers, B, K, 1 + R, c.num_heads * c.head_dim), c.dtype)
        buffer = sharded.split(buffer, 'layers', 'batch', None, 'length', 'joined_kv')  # no device has a whole cache
        return hidden[:, 0, 0], Cache(prompt, inputs_mask, _write((buffer, buffer), new_kv, 0))

    def decode(
        self, tokens: Int[Array, 'B K'], step: Int[Array, ''], cache: Cache
    ) -> tuple[Float[Array, 'B K D'], Cache]:
        """Read one more token of every response: `Network.decode`."""
        # Layers only read the cache, which is written once for all layers at the end: XLA then updates it in place.
        x, at = self.token_embedder(tokens[..., None]), step + 1
        hidden, new_kv = self.decoder(x, cache.prompt_mask, cache=cache, at=at, return_kv=True)
        return hidden[:, :, 0], cache.replace(responses=_write(cache.responses, new_kv, at))

    def logits(self, hidden: Float[Array, '*batch D']) -> Float[Array, '*batch V']:
        """Compute the logits of hidden states, in float32 as T5X does: `Network.logits`."""
        if not self.config.logits_via_embedding:
            return self.decoder.logits_dense(hidden)
        embedding = self.token_embedder.embedding.astype(jnp.float32)
        return hidden.astype(jnp.float32) @ embedding.T * hidden.shape[-1] ** -0.5


def _write(buffer: KeyValue, new: KeyValue, at: jax.Array | int) -> KeyValue:
    """Write keys and values [L, B, K, 1, H * E] at position `at` of the buffers [L, B, K, 1 + R, H * E]."""
    return jax.tree.map(lambda buffer, new: jax.lax.dynamic_update_slice_in_dim(buffer, new, at, axis=3), buffer, new)
