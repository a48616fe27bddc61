"""Settings of the Llama-like decoder (decoder.py)."""

from __future__ import annotations

import dataclasses

from perl_jax import settings
from perl_jax.errors import UserError
from perl_jax.models.attention.rotary import RopeScaling


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes, numerics and the differences between model families. Names are T5X's where it has one, defaults Llama's.

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
      logits_via_embedding: use the embedding as the output layer (tied).
      activation: 'silu', or 'gelu' (Gemma).
      use_qkv_bias: a bias on query, key and value (Qwen 2).
      qk_norm: RMSNorm of each head's query and key (Qwen 3, Gemma 3).
      scale_embedding: embeddings times sqrt(D) (Gemma).
      norm_offset: added to RMSNorm's scale; 1 for Gemma.
      post_norms: RMSNorm behind attention and MLP too (Gemma 2 and 3).
      query_scale: factor of attention scores; None is E^-1/2.
      attention_softcap: c; attention scores x become c tanh(x / c) (Gemma 2). None is no cap.
      logits_softcap: the same for logits.
      rope_scaling: scaling of the rotary frequencies for long contexts (Llama 3.1); None is no scaling.
      sliding_window: tokens that a local layer attends to, the query's own included; None: no layer is local.
      global_every: n; every n-th layer is global, the others are local.
      local_rope_theta: `rope_theta` of local layers, without scaling (Gemma 3); None is `rope_theta`.
      dtype: of activations; logits are float32.
      flash: use one attention kernel for prompts and responses on TPUs (kernels/flash.py).
      remat: 'none', 'full' (save nothing) or 'minimal' (save the outputs of matmuls without batch dimensions).

    Raises:
      UserError: a size that is not a positive integer, or sizes that contradict each other.
    """

    vocab_size: settings.Count
    num_layers: settings.Layers
    emb_dim: settings.Count
    num_heads: settings.Count
    num_kv_heads: settings.Count
    head_dim: settings.Count
    mlp_dim: settings.Count
    rope_theta: settings.Positive = 1e4
    norm_epsilon: settings.NonNegative = 1e-5
    logits_via_embedding: bool = True
    activation: settings.Activation = 'silu'
    use_qkv_bias: bool = False
    qk_norm: bool = False
    scale_embedding: bool = False
    norm_offset: settings.Real = 0.0
    post_norms: bool = False
    query_scale: settings.Positive | None = None
    attention_softcap: settings.Positive | None = None
    logits_softcap: settings.Positive | None = None
    rope_scaling: RopeScaling | None = None
    sliding_window: settings.Count | None = None
    global_every: settings.Count = 1
    local_rope_theta: settings.Positive | None = None
    dtype: settings.Dtype = 'float32'
    flash: bool = True
    remat: settings.Remat = 'none'

    def __post_init__(self) -> None:
        settings.check(self)
        if self.num_heads % self.num_kv_heads:
            raise UserError(f'num_kv_heads = {self.num_kv_heads}: it must divide num_heads = {self.num_heads}')
        if self.head_dim % 2:
            raise UserError(f'head_dim = {self.head_dim}: it must be even, because rotary positions rotate pairs')
