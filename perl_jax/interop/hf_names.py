"""What a tensor is called here and in Hugging Face's checkpoints: one table a network, used in both directions.

    decoder/layers/self_attention/query/kernel [L, D, H E]  <->  model.layers.{0..L-1}.self_attn.q_proj.weight [H E, D]
    encoder/layers/mlp/wi_0/kernel [L, D, F]  <->  encoder.block.{0..L-1}.layer.1.DenseReluDense.wi_0.weight [F, D]
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from flax import linen as nn

from perl_jax.models.t5 import T5

_TOP = {
    'token_embedder/embedding': 'model.embed_tokens.weight',
    'decoder/decoder_norm/scale': 'model.norm.weight',
    'decoder/logits_dense/kernel': 'lm_head.weight',
}
_LAYER = {
    'pre_self_attention_layer_norm/scale': 'input_layernorm.weight',
    'self_attention/query/kernel': 'self_attn.q_proj.weight',
    'self_attention/key/kernel': 'self_attn.k_proj.weight',
    'self_attention/value/kernel': 'self_attn.v_proj.weight',
    'self_attention/query/bias': 'self_attn.q_proj.bias',
    'self_attention/key/bias': 'self_attn.k_proj.bias',
    'self_attention/value/bias': 'self_attn.v_proj.bias',
    'self_attention/query_norm/scale': 'self_attn.q_norm.weight',
    'self_attention/key_norm/scale': 'self_attn.k_norm.weight',
    'self_attention/out/kernel': 'self_attn.o_proj.weight',
    'pre_mlp_layer_norm/scale': 'post_attention_layernorm.weight',
    'mlp/wi_0/kernel': 'mlp.gate_proj.weight',
    'mlp/wi_1/kernel': 'mlp.up_proj.weight',
    'mlp/wo/kernel': 'mlp.down_proj.weight',
}
_POST_NORMS = {  # where there are norms behind the blocks too, the same name means another one
    'post_self_attention_layer_norm/scale': 'post_attention_layernorm.weight',
    'pre_mlp_layer_norm/scale': 'pre_feedforward_layernorm.weight',
    'post_mlp_layer_norm/scale': 'post_feedforward_layernorm.weight',
}
_T5_TOP = {
    'token_embedder/embedding': 'shared.weight',
    'encoder/relpos_bias/rel_embedding': 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
    'decoder/relpos_bias/rel_embedding': 'decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
    'encoder/encoder_norm/scale': 'encoder.final_layer_norm.weight',
    'decoder/decoder_norm/scale': 'decoder.final_layer_norm.weight',
    'decoder/logits_dense/kernel': 'lm_head.weight',
}
_T5_BLOCKS = {  # our block: (its number and name there, that of the norm before it)
    'encoder': {'attention': (0, 'SelfAttention', 'pre_attention'), 'mlp': (1, 'DenseReluDense', 'pre_mlp')},
    'decoder': {
        'self_attention': (0, 'SelfAttention', 'pre_self_attention'),
        'encoder_decoder_attention': (1, 'EncDecAttention', 'pre_cross_attention'),
        'mlp': (2, 'DenseReluDense', 'pre_mlp'),
    },
}
_T5_LEAVES = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}  # the others are called as they are here

# Tensors that may be left unread. Copies of the embedding are not among them: hf.py compares those first.
IGNORED = re.compile(
    r'.*rotary_emb\.inv_freq'  # a buffer that config.json determines; transformers does not read it either
    r'|.*EncDecAttention\.relative_attention_bias\.weight'  # of the first T5s, never used; transformers skips it
    r'|.*(vision_tower|multi_modal_projector)\..*'  # the images' part of a model of several
)


def tensor_names(network: nn.Module, path: str) -> list[str]:
    """The Hugging Face names of one of our leaves: one, or one for each of the stacked layers."""
    if path in (top := _T5_TOP if isinstance(network, T5) else _TOP):
        return [top[path]]
    if isinstance(network, T5):
        side, c = path.split('/', maxsplit=1)[0], network.config
        count = c.num_encoder_layers if side == 'encoder' else c.num_decoder_layers
        return [f'{side}.block.{i}.layer.{_t5(path)}' for i in range(count)]
    leaf = path.removeprefix('decoder/layers/')
    name = (_LAYER | _POST_NORMS if network.config.post_norms else _LAYER)[leaf]
    return [f'model.layers.{i}.{name}' for i in range(network.config.num_layers)]


def is_transposed(path: str) -> bool:
    """Whether Hugging Face stores the last two axes in reverse order."""
    return path.endswith(('/kernel', '/rel_embedding'))


def layers(network: nn.Module, paths: Mapping[str, object]) -> dict[str, list[str]]:
    """The Hugging Face modules of each dense layer: {'decoder/layers/mlp/wo': ['model.layers.0.mlp.down_proj', ..]}."""
    kernels = [path for path in paths if path.endswith('/kernel')]
    return {
        path.removesuffix('/kernel'): [name.removesuffix('.weight') for name in tensor_names(network, path)]
        for path in kernels
    }


def _t5(path: str) -> str:
    side, _, block, leaf, *_ = path.split('/')
    for name, (number, submodule, norm) in _T5_BLOCKS[side].items():
        if block == f'{norm}_layer_norm':
            return f'{number}.layer_norm.weight'
        if block == name:
            return f'{number}.{submodule}.{_T5_LEAVES.get(leaf, leaf)}.weight'
    raise KeyError(path)
