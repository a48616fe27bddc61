"""Hugging Face's config.json to a network, and back: one function a direction and family, decoders and T5.

Read: llama (2, 3.x, SmolLM2), qwen2, qwen3, gemma, gemma2, gemma3 (the text part), t5 and mt5. What a config asks for
that the networks do not compute is an error, never ignored.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from flax import linen as nn

from perl_jax.errors import UserError
from perl_jax.layers import RopeScaling
from perl_jax.networks.decoder import Decoder, DecoderConfig
from perl_jax.networks.t5 import T5, T5Config

_SILU, _GELU = 'silu', 'gelu_pytorch_tanh'
_DECODERS = {  # model_type: what its name stands for, beyond sizes
    'llama': {},
    'qwen2': {'use_qkv_bias': True},
    'qwen3': {'qk_norm': True},
    'gemma': {'activation': 'gelu', 'scale_embedding': True, 'norm_offset': 1.0},
    'gemma2': {'activation': 'gelu', 'scale_embedding': True, 'norm_offset': 1.0, 'post_norms': True},
    'gemma3_text': {
        'activation': 'gelu', 'scale_embedding': True, 'norm_offset': 1.0, 'post_norms': True, 'qk_norm': True,
    },
}  # fmt: skip
_TIED = ('gemma', 'gemma2', 'gemma3_text')  # where the file says nothing, transformers' default
_T5 = {'relu': ('relu', False), 'gated-gelu': ('gelu', True), 'gated-silu': ('silu', True)}


def read(folder: pathlib.Path) -> dict[str, Any]:
    """config.json of a checkpoint; the text part of one that has several."""
    path = folder / 'config.json'
    try:
        config = json.loads(path.read_text())
        return config.get('text_config', config)
    except OSError as error:
        raise UserError(f'{path}: cannot be read; a Hugging Face checkpoint has a config.json') from error
    except (ValueError, AttributeError) as error:
        raise UserError(f'{path}: not JSON ({error})') from error


def network(folder: pathlib.Path) -> nn.Module:
    """The network that a checkpoint is of, in float32.

    Raises:
      UserError: an architecture, or a setting of one, that the networks do not compute.
    """
    config, path = read(folder), folder / 'config.json'
    kind = config.get('model_type')
    try:
        if kind in _DECODERS:
            return Decoder(_decoder(config, kind, path))
        if kind in ('t5', 'mt5'):
            return T5(_t5(config, kind, path))
    except KeyError as error:
        raise UserError(f'{path}: {error.args[0]} is missing') from error
    raise UserError(f'{path}: model_type {kind!r} is not supported; there are {", ".join([*_DECODERS, "t5", "mt5"])}')


def _decoder(c: dict[str, Any], kind: str, path: pathlib.Path) -> DecoderConfig:
    family = _DECODERS[kind]
    act = c.get('hidden_activation') or c.get('hidden_act', _SILU)
    act = _GELU if kind == 'gemma' and act == 'gelu' else act  # what transformers makes of Gemma 1's old files
    _refuse(path, 'activation', act, act != (_GELU if family.get('activation') == 'gelu' else _SILU))
    for key in ('mlp_bias', 'attention_bias', 'use_sliding_window', 'quantization_config'):
        _refuse(path, key, c.get(key), bool(c.get(key)))
    heads = c['num_attention_heads']
    return DecoderConfig(
        vocab_size=c['vocab_size'],
        num_layers=c['num_hidden_layers'],
        emb_dim=c['hidden_size'],
        num_heads=heads,
        num_kv_heads=c.get('num_key_value_heads') or heads,
        head_dim=c.get('head_dim') or c['hidden_size'] // heads,
        mlp_dim=c['intermediate_size'],
        norm_epsilon=c.get('rms_norm_eps', 1e-6),
        logits_via_embedding=c.get('tie_word_embeddings', kind in _TIED),
        **family,
        **_rope(c, path),
        **(_windows(c, kind, path) if kind in ('gemma2', 'gemma3_text') else {}),
    )


def _rope(c: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Old files say rope_theta and rope_scaling, new ones rope_parameters, Gemma 3 one for each kind of layer."""
    given = c.get('rope_parameters') or (c.get('rope_scaling') or {}) | {'rope_theta': c.get('rope_theta', 1e4)}
    local = c.get('rope_local_base_freq')
    if 'full_attention' in given:
        local, given = given['sliding_attention']['rope_theta'], given['full_attention']
    kind, scaling = given.get('rope_type', given.get('type', 'default')), None
    if kind == 'linear':
        scaling = RopeScaling(float(given['factor']))
    elif kind == 'llama3':
        scaling = RopeScaling(
            float(given['factor']),
            float(given['low_freq_factor']),
            float(given['high_freq_factor']),
            given['original_max_position_embeddings'],
        )
    else:
        _refuse(path, 'rope_type', kind, kind != 'default')
    return {'rope_theta': float(given['rope_theta']), 'rope_scaling': scaling} | (
        {} if local is None else {'local_rope_theta': float(local)}
    )


def _windows(c: dict[str, Any], kind: str, path: pathlib.Path) -> dict[str, Any]:
    every = 2 if kind == 'gemma2' else c.get('sliding_window_pattern') or c.get('_sliding_window_pattern') or 6
    layers = c['num_hidden_layers']
    wanted = ['full_attention' if (i + 1) % every == 0 else 'sliding_attention' for i in range(layers)]
    _refuse(path, 'layer_types', c.get('layer_types'), c.get('layer_types', wanted) != wanted)
    return {
        'query_scale': float(c.get('query_pre_attn_scalar', 256)) ** -0.5,
        'attention_softcap': c.get('attn_logit_softcapping'),
        'logits_softcap': c.get('final_logit_softcapping'),
        'sliding_window': c['sliding_window'],
        'global_every': every,
    }


def _t5(c: dict[str, Any], kind: str, path: pathlib.Path) -> T5Config:
    mlp = c.get('feed_forward_proj', 'relu' if kind == 't5' else 'gated-gelu')
    _refuse(path, 'feed_forward_proj', mlp, mlp not in _T5)
    activation, gated = _T5[mlp]
    return T5Config(
        vocab_size=c['vocab_size'],
        emb_dim=c['d_model'],
        num_heads=c['num_heads'],
        head_dim=c['d_kv'],
        mlp_dim=c['d_ff'],
        num_encoder_layers=c['num_layers'],
        num_decoder_layers=c.get('num_decoder_layers') or c['num_layers'],
        activation=activation,
        gated=gated,
        # transformers 5 writes tie_word_embeddings = true for all; the difference is in a new key, for mT5 in the type.
        logits_via_embedding=kind != 'mt5' and c.get('scale_decoder_outputs', c.get('tie_word_embeddings', True)),
        relative_attention_num_buckets=c.get('relative_attention_num_buckets', 32),
        relative_attention_max_distance=c.get('relative_attention_max_distance', 128),
        norm_epsilon=c.get('layer_norm_epsilon', 1e-6),
    )


def _refuse(path: pathlib.Path, key: str, value: Any, wrong: bool) -> None:
    if wrong:
        raise UserError(f'{path}: {key} = {value!r} is not supported for this model_type')


def write(net: nn.Module) -> dict[str, Any]:
    """The config.json of a network, without dtype and special tokens."""
    c = net.config
    if isinstance(c, T5Config):
        return _from_t5(c)
    kind = model_type(c)
    out: dict[str, Any] = {
        'model_type': kind,
        'vocab_size': c.vocab_size,
        'num_hidden_layers': c.num_layers,
        'hidden_size': c.emb_dim,
        'num_attention_heads': c.num_heads,
        'num_key_value_heads': c.num_kv_heads,
        'head_dim': c.head_dim,
        'intermediate_size': c.mlp_dim,
        'rms_norm_eps': c.norm_epsilon,
        'tie_word_embeddings': c.logits_via_embedding,
        'hidden_activation' if kind.startswith('gemma') else 'hidden_act': _GELU if c.activation == 'gelu' else _SILU,
        'rope_theta': c.rope_theta,
    }
    if kind.startswith('gemma'):
        out['hidden_act'] = _GELU
    if (scaling := c.rope_scaling) is not None:
        out['rope_scaling'] = {'rope_type': 'linear', 'factor': scaling.factor}
        if scaling.original_length is not None:
            out['rope_scaling'] = {
                'rope_type': 'llama3',
                'factor': scaling.factor,
                'low_freq_factor': scaling.low_freq_factor,
                'high_freq_factor': scaling.high_freq_factor,
                'original_max_position_embeddings': scaling.original_length,
            }
    if c.sliding_window is not None:
        out |= {
            'sliding_window': c.sliding_window,
            'query_pre_attn_scalar': round((c.query_scale or c.head_dim**-0.5) ** -2),  # always whole there
            'attn_logit_softcapping': c.attention_softcap,
            'final_logit_softcapping': c.logits_softcap,
        }
        if kind == 'gemma3_text':
            out |= {
                'rope_local_base_freq': c.local_rope_theta or c.rope_theta,
                'sliding_window_pattern': c.global_every,
            }
    return out


def model_type(c: DecoderConfig) -> str:
    """Which of transformers' decoders computes what this one does.

    Raises:
      UserError: none does.
    """
    for kind, family in _DECODERS.items():
        plain = {k: getattr(DecoderConfig, k) for f in _DECODERS.values() for k in f}
        windowed = kind in ('gemma2', 'gemma3_text')
        if all(getattr(c, k) == v for k, v in (plain | family).items()) and windowed == (c.sliding_window is not None):
            return kind
    raise UserError("this model's gin file mixes what no one model of transformers does; it cannot be exported there")


def _from_t5(c: T5Config) -> dict[str, Any]:
    kind = next(name for name, value in _T5.items() if value == (c.activation, c.gated))
    return {
        'model_type': 't5',
        'vocab_size': c.vocab_size,
        'd_model': c.emb_dim,
        'num_heads': c.num_heads,
        'd_kv': c.head_dim,
        'd_ff': c.mlp_dim,
        'num_layers': c.num_encoder_layers,
        'num_decoder_layers': c.num_decoder_layers,
        'feed_forward_proj': kind,
        'tie_word_embeddings': c.logits_via_embedding,
        'relative_attention_num_buckets': c.relative_attention_num_buckets,
        'relative_attention_max_distance': c.relative_attention_max_distance,
        'layer_norm_epsilon': c.norm_epsilon,
        'is_encoder_decoder': True,
        'decoder_start_token_id': 0,
        'pad_token_id': 0,
        'eos_token_id': 1,
    }
