"""A decoder-only transformer of the Llama kind that reads one prompt once for all of its K responses.

Prompt and branches go through every dense layer as one packed run of P + K R tokens, or as the real tokens of several
runs at once (unpadding.py); only attention (branches.py) tells them apart.
Names, shapes and axes of the parameters are T5X's; layers are stacked on axis 0 (nn.scan).
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

from perl_jax import masked, sharded
from perl_jax.errors import UserError, check_count
from perl_jax.models import attention, branches, layers
from perl_jax.models.branches import KeyValue, Packed
from perl_jax.models.layers import Dense, Mlp, RMSNorm
from perl_jax.models.unpadding import Unpadding


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes, numerics and what families differ in; field names are T5X's where T5X has one. The defaults are Llama's.

    Attributes:
      vocab_size: V.
      num_layers: L.
      emb_dim: D.
      num_heads: H, query heads.
      num_kv_heads: N, a divisor of H; each serves H / N query heads.
      head_dim: E, even.
      mlp_dim: F.
      rope_theta: the base of the rotary frequencies.
      norm_epsilon: added to the mean square in RMSNorm.
      logits_via_embedding: the embedding is the output layer too (tied).
      activation: 'silu', or 'gelu' (Gemma).
      use_qkv_bias: a bias on query, key and value (Qwen 2).
      qk_norm: RMSNorm of each head's query and key (Qwen 3, Gemma 3).
      scale_embedding: embeddings times sqrt(D) (Gemma).
      norm_offset: added to RMSNorm's scale; 1 for Gemma.
      post_norms: RMSNorm behind attention and MLP too (Gemma 2 and 3).
      query_scale: what attention scores are multiplied by; None is E^-1/2.
      attention_softcap: c, where attention scores x become c tanh(x / c) (Gemma 2); None leaves them.
      logits_softcap: the same of logits.
      rope_scaling: how frequencies are scaled for long texts (Llama 3.1); None is not at all.
      sliding_window: so many tokens, themselves included, are seen by local layers; None is no local layer.
      global_every: every so many-th layer is not local.
      local_rope_theta: of local layers, never scaled (Gemma 3); None is `rope_theta`.
      dtype: of what is computed between the parameters; logits are float32.
      flash: attention over whole prompts and responses in one kernel on TPUs (kernels/flash.py).
      remat: 'none', 'full' (save nothing) or 'minimal' (save the outputs of matmuls without batch dimensions).

    Raises:
      UserError: sizes that are no counts, or do not go together.
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
    rope_scaling: attention.RopeScaling | None = None
    sliding_window: int | None = None
    global_every: int = 1
    local_rope_theta: float | None = None
    dtype: str = 'float32'
    flash: bool = True
    remat: str = 'none'

    def __post_init__(self) -> None:
        for name in 'vocab_size', 'num_layers', 'emb_dim', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp_dim':
            check_count(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise UserError(f'num_kv_heads = {self.num_kv_heads}: it must divide num_heads = {self.num_heads}')
        if self.head_dim % 2:
            raise UserError(f'head_dim = {self.head_dim}: it must be even, as positions turn pairs of it')


class Cache(struct.PyTreeNode):
    """Keys and values of every layer."""

    prompt: KeyValue  # [L, B, N, P, E], shared by the branches
    prompt_mask: jax.Array  # bool [B, P]
    responses: KeyValue  # [L, B, K, N, R, E]


class _Context(struct.PyTreeNode):
    """What every layer needs to know of the tokens [B, T]."""

    run: Packed
    real: Unpadding | None  # of the run [B, T]; with it x and rope are [G, N, ...]
    rope: tuple[jax.Array, jax.Array]  # [B, T or G, N, E/2] each
    local_rope: tuple[jax.Array, jax.Array] | None  # that of local layers, if there are any
    keep: bool = struct.field(pytree_node=False)  # hand back keys and values


class _Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, cache: Any, local: Any) -> tuple[jax.Array, Any]:
        c, run, real = self.config, context.run, context.real
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
        q, k = attention.rotate(q, rope), attention.rotate(k, rope)
        kept = None
        if context.keep:
            kept = jax.tree.map(_by_heads, (run.branches(k), run.branches(v)) if run.K else (k, v))
        if real is not None:
            q, k, v = real.pad(q), real.pad(k), real.pad(v)
        x = branches.attend(
            q, (k, v), run, jax.tree.map(_by_heads, cache), local=local, window=c.sliding_window, use_flash=c.flash,
            scale=c.query_scale, softcap=c.attention_softcap,
        )  # fmt: skip
        x = x if real is None else real.unpad(x)
        return Dense(c.emb_dim, ('joined_kv', 'embed'), c.dtype, name='out')(x), kept


class _Layer(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, cache: Any, local: Any) -> tuple[jax.Array, Any]:
        c = self.config
        norm = lambda name: RMSNorm(c.norm_epsilon, c.dtype, c.norm_offset, name=name)  # noqa: E731
        y, kept = _Attention(c, name='self_attention')(norm('pre_self_attention_layer_norm')(x), context, cache, local)
        x += norm('post_self_attention_layer_norm')(y) if c.post_norms else y
        y = Mlp(c.mlp_dim, c.activation, dtype=c.dtype, name='mlp')(norm('pre_mlp_layer_norm')(x))
        x += norm('post_mlp_layer_norm')(y) if c.post_norms else y
        return spmd.with_logical_constraint(x, ('batch', 'length', 'embed')), kept


Pick = Callable[[jax.Array], jax.Array]  # some of the tokens: [B, T, ...] -> [B, Q, ...], or of [G, N, ...]
_REMAT = {'full': 'nothing_saveable', 'minimal': 'dots_with_no_batch_dims_saveable'}


class _Stack(nn.Module):
    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        self.decoder_norm = RMSNorm(c.norm_epsilon, c.dtype, c.norm_offset)
        if not c.logits_via_embedding:
            self.logits_dense = Dense(c.vocab_size, ('embed', 'vocab'), c.dtype)

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, cache: Any, pick: Pick) -> tuple[jax.Array, Any]:
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
            in_axes=(nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType]  flax's annotation says int
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )
        x, kept = scanned(c, name='layers')(x, context, cache, local)
        return self.decoder_norm(pick(x)), kept


class Decoder(nn.Module):
    """A decoder-only transformer: hidden states first, logits only where somebody asks for them.

    Attributes:
      config: sizes and what families differ in.
    """

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        embed = nn.with_logical_partitioning(nn.initializers.normal(0.02), ('vocab', 'embed'))
        self.token_embedder = layers.Embed(c.vocab_size, c.emb_dim, embedding_init=embed, dtype=c.dtype)
        self.decoder = _Stack(c)

    def __call__(
        self, inputs: jax.Array, inputs_mask: jax.Array, targets: jax.Array, ends: jax.Array | None = None
    ) -> jax.Array:
        """Read prompts and all their responses at once.

        Args:
          inputs: int [B, P], the prompts, padded on the right.
          inputs_mask: bool [B, P], true at their tokens.
          targets: int [B, K, R], the responses, padded on the right.
          ends: int [B, K], where only one state of each response is wanted.

        Returns:
          hidden [B, K, R + 1, D]: `hidden[..., :-1, :]` predicts each response token, `hidden[..., 1:, :]` has read it.
          With `ends` int [B, K], of those only hidden[b, k, ends[b, k]], [B, K, D].
        """
        (B, P), (_, K, R) = inputs.shape, targets.shape
        length = masked.lengths(inputs_mask)

        def pick(y: jax.Array) -> jax.Array:
            if ends is not None:
                return attention.tokens_at(y, _has_read(ends[..., None], length, P, R))
            return jnp.concatenate([_last_token(y[:, :P], length), y[:, P:]], axis=1)

        x, _ = self._run(*_packed(inputs, inputs_mask, targets), inputs_mask, None, pick, P=P, K=K)
        if self.is_initializing():
            self.logits(x)
        if ends is not None:
            return x
        last = jnp.broadcast_to(x[:, None, :1], (B, K, 1, x.shape[-1]))
        return jnp.concatenate([last, x[:, 1:].reshape(B, K, R, -1)], axis=2)

    def unpadded(
        self, inputs: jax.Array, inputs_mask: jax.Array, targets: jax.Array, ends: jax.Array | None, run: Unpadding,
        real_targets: Unpadding,
    ) -> jax.Array:  # fmt: skip
        """As the call, but dense layers see the real tokens of the `run` alone (unpadding.apply).

        Returns:
          hidden [G, 1, N, D] that predicts each of the real targets. With `ends` as the call, [B, K, D].
        """
        (B, P), (_, K, R) = inputs.shape, targets.shape
        count = jnp.broadcast_to(jnp.arange(R), (B, K, R)) if ends is None else ends[..., None]
        at = _has_read(count, masked.lengths(inputs_mask), P, R)
        slots = attention.tokens_at(run.slot.reshape(run.shape), at)
        slots = real_targets.unpad(slots) if ends is None else slots.reshape(len(run.slot), -1)
        pick = lambda y: attention.tokens_at(y, slots)  # noqa: E731
        x, _ = self._run(*_packed(inputs, inputs_mask, targets), inputs_mask, None, pick, real=run, P=P, K=K)
        return x[:, None] if ends is None else x.reshape(B, K, -1)

    def prefill(self, inputs: jax.Array, inputs_mask: jax.Array, K: int, R: int) -> tuple[jax.Array, Cache]:
        """Read the prompts, and make room for their responses.

        Args:
          inputs: int [B, P].
          inputs_mask: bool [B, P].
          K: responses each.
          R: tokens of each at most.

        Returns:
          The last token's hidden state [B, D], and the cache.
        """
        c, (B, P) = self.config, inputs.shape
        positions = jnp.broadcast_to(jnp.arange(P), (B, P))
        pick = lambda y: _last_token(y, masked.lengths(inputs_mask))  # noqa: E731
        x, prompt = self._run(inputs, positions, inputs_mask, None, pick, P=P, K=0, keep=True)
        prompt = jax.tree.map(lambda y: sharded.split(y, 'layers', 'batch', 'kv_heads', 'length', 'kv'), prompt)
        room = jnp.zeros((c.num_layers, B, K, c.num_kv_heads, R, c.head_dim), c.dtype)
        room = sharded.split(room, 'layers', 'batch', None, 'kv_heads', 'length', 'kv')
        return x[:, 0], Cache(prompt, inputs_mask, (room, room))

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
        (B, K) = tokens.shape
        positions = jnp.broadcast_to((masked.lengths(cache.prompt_mask) + step)[:, None], (B, K))
        given = cache.prompt_mask, (cache.prompt, cache.responses)
        x, new = self._run(tokens, positions, *given, lambda y: y, P=0, K=K, keep=True, cached=step)
        return x, cache.replace(responses=_write(cache.responses, new, step))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden [..., D] -> float32 [..., V]."""
        c = self.config
        out = self.token_embedder.attend if c.logits_via_embedding else self.decoder.logits_dense
        logits = out(hidden).astype(jnp.float32)
        return logits if c.logits_softcap is None else c.logits_softcap * jnp.tanh(logits / c.logits_softcap)

    def _run(
        self, tokens, positions, prompt_mask, cache, pick, *, P, K, real=None, keep=False, cached: jax.Array | int = 0
    ):
        c, local_rope = self.config, None
        run = Packed(positions, prompt_mask, cached, P, K)
        if real is not None:
            tokens, positions = real.unpad(tokens), real.unpad(positions)
        rope = attention.rope_table(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        if c.sliding_window is not None:
            local_rope = attention.rope_table(positions, c.head_dim, c.local_rope_theta or c.rope_theta)
        x = self.token_embedder(tokens)
        if c.scale_embedding:
            x *= jnp.asarray(c.emb_dim**0.5, x.dtype)  # rounded to the model's dtype, as Gemma has it
        x = spmd.with_logical_constraint(x, ('batch', 'length', 'embed'))
        return self.decoder(x, _Context(run, real, rope, local_rope, keep), cache, pick)


def _write(room: KeyValue, new: KeyValue, step: jax.Array) -> KeyValue:
    """Put keys and values [L, B, K, N, 1, E] at token `step` of those with room [L, B, K, N, R, E]."""
    return jax.tree.map(lambda room, new: jax.lax.dynamic_update_slice_in_dim(room, new, step, axis=4), room, new)


def _packed(inputs: jax.Array, inputs_mask: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens and positions int [B, P + K R] of prompts and their responses, one behind the other."""
    (B, P), (_, K, R) = inputs.shape, targets.shape
    ahead = jnp.tile(masked.lengths(inputs_mask)[:, None] + jnp.arange(R)[None], (1, K))
    positions = jnp.concatenate([jnp.broadcast_to(jnp.arange(P), (B, P)), ahead], axis=1)
    return jnp.concatenate([inputs, targets.reshape(B, K * R)], axis=1), positions


def _has_read(count: jax.Array, length: jax.Array, P: int, R: int) -> jax.Array:
    """Which token of a packed run has read so many of a response's: int [B, K, n] -> [B, K n]; 0: the prompt's last."""
    start = P + R * jnp.arange(count.shape[1])[None, :, None]
    at = jnp.where(count > 0, start + count - 1, jnp.maximum(length - 1, 0)[:, None, None])
    return at.reshape(len(at), -1)


def _last_token(x: jax.Array, length: jax.Array) -> jax.Array:
    """x at each prompt's last real token: [B, P, ...], length [B] -> [B, 1, ...]."""
    return attention.tokens_at(x, jnp.maximum(length - 1, 0)[:, None])


def _by_heads(x: jax.Array) -> jax.Array:
    """Keys or values [..., S, N, E] -> [..., N, S, E] and back: each token reads them head by head."""
    return jnp.swapaxes(x, -3, -2)
