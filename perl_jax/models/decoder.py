"""A Llama-like decoder that computes each prompt once for all of its K responses.

Prompt and branches pass through every dense layer as one packed sequence of P + K R tokens, or as the real tokens of
several sequences (unpadding.py); only attention (branches.py) distinguishes them.
Names, shapes and axes of the parameters are T5X's; layers are stacked on axis 0 (nn.scan).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.linen import spmd
from jaxtyping import Array, Bool, Float, Int, Shaped

from perl_jax import masked, sharded
from perl_jax.models import layers
from perl_jax.models.attention import branches, rotary
from perl_jax.models.attention.branches import KeyValue, Packed
from perl_jax.models.decoder_config import DecoderConfig
from perl_jax.models.layers import Dense, Mlp, RMSNorm
from perl_jax.models.unpadding import Unpadding
from perl_jax.types import AnyArray


class Cache(struct.PyTreeNode):
    """Keys and values of every layer, in the network's dtype.

    Attributes:
      prompt: two arrays [L, B, N, P, E], shared by the branches.
      prompt_mask: bool [B, P].
      responses: two arrays [L, B, K, N, R, E].
    """

    prompt: KeyValue
    prompt_mask: AnyArray
    responses: KeyValue


class _Context(struct.PyTreeNode):
    """The inputs that all layers share.

    Attributes:
      packed: the layout of the tokens [B, T].
      unpadding: of [B, T]; x and rope are then [G, C, ...]. None: they are [B, T, ...].
      rope: sine and cosine, [B, T, E/2] or [G, C, E/2] each.
      local_rope: those of local layers; None if no layer is local.
      return_kv: whether layers return their keys and values.
    """

    packed: Packed
    unpadding: Unpadding | None
    rope: tuple[jax.Array, jax.Array]
    local_rope: tuple[jax.Array, jax.Array] | None
    return_kv: bool = struct.field(pytree_node=False)


class _Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, cache: Any, local: Any) -> tuple[jax.Array, Any]:
        c, packed, unpadding = self.config, context.packed, context.unpadding
        project = lambda name, heads: Dense(  # noqa: E731
            heads * c.head_dim, ('embed', 'joined_kv'), c.dtype, c.use_qkv_bias, name=name
        )(x).reshape(*x.shape[:2], heads, c.head_dim)
        q, k, v = project('query', c.num_heads), project('key', c.num_kv_heads), project('value', c.num_kv_heads)
        if c.qk_norm:
            q = RMSNorm(c.norm_epsilon, c.dtype, c.norm_offset, axis='kv', name='query_norm')(q)
            k = RMSNorm(c.norm_epsilon, c.dtype, c.norm_offset, axis='kv', name='key_norm')(k)
        rope = context.rope
        if local is not None:
            rope = jax.tree.map(lambda near, far: jnp.where(local, near, far), context.local_rope, rope)
        q, k = rotary.rotate(q, rope), rotary.rotate(k, rope)
        new_kv = None
        if context.return_kv:
            new_kv = jax.tree.map(_by_heads, (packed.branches(k), packed.branches(v)) if packed.K else (k, v))
        if unpadding is not None:
            q, k, v = unpadding.pad(q), unpadding.pad(k), unpadding.pad(v)
        x = branches.attend(
            q, (k, v), packed, jax.tree.map(_by_heads, cache), local=local, window=c.sliding_window, use_flash=c.flash,
            scale=c.query_scale, softcap=c.attention_softcap,
        )  # fmt: skip
        x = x if unpadding is None else unpadding.unpad(x)
        return Dense(c.emb_dim, ('joined_kv', 'embed'), c.dtype, name='out')(x), new_kv


class _Layer(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, cache: Any, local: Any) -> tuple[jax.Array, Any]:
        c = self.config
        norm = lambda name: RMSNorm(c.norm_epsilon, c.dtype, c.norm_offset, name=name)  # noqa: E731
        y = norm('pre_self_attention_layer_norm')(x)
        y, new_kv = _Attention(c, name='self_attention')(y, context, cache, local)
        x += norm('post_self_attention_layer_norm')(y) if c.post_norms else y
        y = Mlp(c.mlp_dim, c.activation, dtype=c.dtype, name='mlp')(norm('pre_mlp_layer_norm')(x))
        x += norm('post_mlp_layer_norm')(y) if c.post_norms else y
        # Between layers, activations are split as the rules say ('embed' on 'model' for T5X's second dimension).
        return spmd.with_logical_constraint(x, ('batch', 'length', 'embed')), new_kv


Select = Callable[[jax.Array], jax.Array]  # tokens whose final states are returned: [B, T, ...] -> [B, Q, ...]
_REMAT = {'full': 'nothing_saveable', 'minimal': 'dots_with_no_batch_dims_saveable'}


class _Stack(nn.Module):
    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        self.decoder_norm = RMSNorm(c.norm_epsilon, c.dtype, c.norm_offset)
        if not c.logits_via_embedding:
            self.logits_dense = Dense(c.vocab_size, ('embed', 'vocab'), c.dtype)

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, cache: Any, select: Select) -> tuple[jax.Array, Any]:
        c, local, layer = self.config, None, _Layer
        if c.sliding_window is not None:
            local = (jnp.arange(c.num_layers) + 1) % c.global_every != 0
        if c.remat != 'none':
            # In a loop XLA cannot merge what is recomputed with what was computed, so no barrier against it is needed.
            layer = nn.remat(layer, prevent_cse=False, policy=getattr(jax.checkpoint_policies, _REMAT[c.remat]))
        scanned = nn.scan(
            layer,
            length=c.num_layers,
            variable_axes={'params': 0, 'lora': 0},
            split_rngs={'params': True, 'dropout': True},
            in_axes=(nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType]  flax's annotation says int
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )
        x, new_kv = scanned(c, name='layers')(x, context, cache, local)
        return self.decoder_norm(select(x)), new_kv


class Decoder(nn.Module):
    """A decoder-only transformer, a Network (models/network.py).

    Attributes:
      config: sizes, numerics and family.
    """

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        embed = nn.with_logical_partitioning(nn.initializers.normal(0.02), ('vocab', 'embed'))
        self.token_embedder = layers.Embed(c.vocab_size, c.emb_dim, embedding_init=embed, dtype=c.dtype)
        self.decoder = _Stack(c)

    def __call__(
        self,
        inputs: Int[AnyArray, 'B P'],
        inputs_mask: Bool[AnyArray, 'B P'],
        targets: Int[AnyArray, 'B K R'],
        ends: Int[AnyArray, 'B K'] | None = None,
    ) -> Float[Array, 'B K R+1 D'] | Float[Array, 'B K D']:
        """Read prompts and all their responses at once: `Network.__call__`."""
        (B, P), (_, K, R) = inputs.shape, targets.shape
        length = masked.lengths(inputs_mask)

        def select(y: jax.Array) -> jax.Array:
            if ends is not None:
                return _tokens_at(y, _state_index(ends[..., None], length, P, R))
            return jnp.concatenate([_last_token(y[:, :P], length), y[:, P:]], axis=1)

        x, _ = self._apply_layers(*_packed(inputs, inputs_mask, targets), inputs_mask, None, select, P=P, K=K)
        if self.is_initializing():
            self.logits(x)
        if ends is not None:
            return x
        last = jnp.broadcast_to(x[:, None, :1], (B, K, 1, x.shape[-1]))
        return jnp.concatenate([last, x[:, 1:].reshape(B, K, R, -1)], axis=2)

    def unpadded(
        self,
        inputs: Int[AnyArray, 'B P'],
        inputs_mask: Bool[AnyArray, 'B P'],
        targets: Int[AnyArray, 'B K R'],
        ends: Int[AnyArray, 'B K'] | None,
        real_tokens: Unpadding,
        real_targets: Unpadding,
    ) -> Float[Array, 'G 1 C D'] | Float[Array, 'B K D']:
        """Like `__call__`, but dense layers compute the real tokens alone (called by unpadding.apply).

        Args:
          inputs: as `__call__`, and so are `inputs_mask`, `targets` and `ends`.
          inputs_mask: bool [B, P].
          targets: int [B, K, R].
          ends: int [B, K] or None.
          real_tokens: of prompts followed by their responses, [B, P + K R].
          real_targets: of the responses, [B, K, R].

        Returns:
          hidden [G, 1, C, D], which predicts the `real_targets`. With `ends` as `__call__`, [B, K, D].
        """
        (B, P), (_, K, R) = inputs.shape, targets.shape
        tokens_read = jnp.broadcast_to(jnp.arange(R), (B, K, R)) if ends is None else ends[..., None]
        state_index = _state_index(tokens_read, masked.lengths(inputs_mask), P, R)
        slots = _tokens_at(real_tokens.slot.reshape(real_tokens.shape), state_index)
        slots = real_targets.unpad(slots) if ends is None else slots.reshape(len(real_tokens.slot), -1)
        select = lambda y: _tokens_at(y, slots)  # noqa: E731
        packed = _packed(inputs, inputs_mask, targets)
        x, _ = self._apply_layers(*packed, inputs_mask, None, select, unpadding=real_tokens, P=P, K=K)
        return x[:, None] if ends is None else x.reshape(B, K, -1)

    def prefill(
        self, inputs: Int[AnyArray, 'B P'], inputs_mask: Bool[AnyArray, 'B P'], K: int, R: int
    ) -> tuple[Float[Array, 'B D'], Cache]:
        """Read the prompts, and allocate the cache of their responses: `Network.prefill`."""
        c, (B, P) = self.config, inputs.shape
        positions = jnp.broadcast_to(jnp.arange(P), (B, P))
        select = lambda y: _last_token(y, masked.lengths(inputs_mask))  # noqa: E731
        x, prompt = self._apply_layers(inputs, positions, inputs_mask, None, select, P=P, K=0, return_kv=True)
        # Split by rows and heads, so that no device stores the whole cache; zeros have no sharding of their own.
        prompt = jax.tree.map(lambda y: sharded.split(y, 'layers', 'batch', 'kv_heads', 'length', 'kv'), prompt)
        buffer = jnp.zeros((c.num_layers, B, K, c.num_kv_heads, R, c.head_dim), c.dtype)
        buffer = sharded.split(buffer, 'layers', 'batch', None, 'kv_heads', 'length', 'kv')
        return x[:, 0], Cache(prompt, inputs_mask, (buffer, buffer))

    def decode(
        self, tokens: Int[Array, 'B K'], step: Int[Array, ''], cache: Cache
    ) -> tuple[Float[Array, 'B K D'], Cache]:
        """Read one more token of every response: `Network.decode`."""
        # Layers only read the cache, which is written once for all layers at the end: XLA then updates it in place.
        (B, K) = tokens.shape
        positions = jnp.broadcast_to((masked.lengths(cache.prompt_mask) + step)[:, None], (B, K))
        key_values = cache.prompt, cache.responses
        x, new_kv = self._apply_layers(
            tokens, positions, cache.prompt_mask, key_values, lambda y: y, P=0, K=K, return_kv=True, cached=step
        )
        return x, cache.replace(responses=_write(cache.responses, new_kv, step))

    def logits(self, hidden: Float[Array, '*batch D']) -> Float[Array, '*batch V']:
        """Compute the logits of hidden states, softcapped if the config has a softcap: `Network.logits`."""
        c = self.config
        out = self.token_embedder.attend if c.logits_via_embedding else self.decoder.logits_dense
        logits = out(hidden).astype(jnp.float32)
        return logits if c.logits_softcap is None else c.logits_softcap * jnp.tanh(logits / c.logits_softcap)

    def _apply_layers(
        self, tokens, positions, prompt_mask, cache, select, *, P, K, unpadding=None, return_kv=False,
        cached: jax.Array | int = 0,
    ):  # fmt: skip
        c, local_rope = self.config, None
        packed = Packed(positions, prompt_mask, cached, P, K)
        if unpadding is not None:
            tokens, positions = unpadding.unpad(tokens), unpadding.unpad(positions)
        rope = rotary.rope_table(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        if c.sliding_window is not None:
            local_rope = rotary.rope_table(positions, c.head_dim, c.local_rope_theta or c.rope_theta)
        x = self.token_embedder(tokens)
        if c.scale_embedding:
            x *= jnp.asarray(c.emb_dim**0.5, x.dtype)  # rounded to the model's dtype, as Gemma has it
        # Embed returns whole embeddings; the first layer reads them split as every layer returns its own.
        x = spmd.with_logical_constraint(x, ('batch', 'length', 'embed'))
        return self.decoder(x, _Context(packed, unpadding, rope, local_rope, return_kv), cache, select)


def _write(buffer: KeyValue, new: KeyValue, step: Int[Array, '']) -> KeyValue:
    """Write keys and values [L, B, K, N, 1, E] at token `step` of the buffers [L, B, K, N, R, E]."""
    return jax.tree.map(lambda buffer, new: jax.lax.dynamic_update_slice_in_dim(buffer, new, step, axis=4), buffer, new)


def _packed(
    inputs: Int[AnyArray, 'B P'], inputs_mask: Bool[AnyArray, 'B P'], targets: Int[AnyArray, 'B K R']
) -> tuple[Int[Array, 'B P+K*R'], Int[Array, 'B P+K*R']]:
    """Pack prompts and their responses: tokens and positions, int [B, P + K R]."""
    (B, P), (_, K, R) = inputs.shape, targets.shape
    response_positions = jnp.tile(masked.lengths(inputs_mask)[:, None] + jnp.arange(R)[None], (1, K))
    positions = jnp.concatenate([jnp.broadcast_to(jnp.arange(P), (B, P)), response_positions], axis=1)
    return jnp.concatenate([inputs, targets.reshape(B, K * R)], axis=1), positions


def _state_index(
    tokens_read: Int[AnyArray, 'B K n'], length: Int[AnyArray, ' B'], P: int, R: int
) -> Int[Array, 'B K*n']:
    """The packed index of the state that has read that many tokens of its response: int [B, K, n] -> [B, K n].

    With 0 tokens read it is the prompt's last token; `length` [B] is the prompt's.
    """
    start = P + R * jnp.arange(tokens_read.shape[1])[None, :, None]
    state_index = jnp.where(tokens_read > 0, start + tokens_read - 1, jnp.maximum(length - 1, 0)[:, None, None])
    return state_index.reshape(len(state_index), -1)


def _tokens_at(x: Shaped[Array, 'B T *rest'], index: Int[Array, 'B Q']) -> Shaped[Array, 'B Q *rest']:
    """Select tokens by their index in the row: [B, T, ...], int [B, Q] -> [B, Q, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _last_token(x: Shaped[Array, 'B P *rest'], length: Int[AnyArray, ' B']) -> Shaped[Array, 'B 1 *rest']:
    """x at each prompt's last real token: [B, P, ...], length [B] -> [B, 1, ...]."""
    return _tokens_at(x, jnp.maximum(length - 1, 0)[:, None])


def _by_heads(x: Float[Array, '*batch m n E']) -> Float[Array, '*batch n m E']:
    """Keys or values [..., S, N, E] -> [..., N, S, E] and back: the cache's layout, read head by head in decoding."""
    return jnp.swapaxes(x, -3, -2)
