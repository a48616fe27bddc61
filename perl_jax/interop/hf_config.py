"""Hugging Face's config.json to a network, and back: one function a direction and family, decoders and T5.

Read: llama (2, 3.x, SmolLM2), mistral, qwen2, qwen3, gemma, gemma2, gemma3 (the text part), t5 and mt5. Which keys are
understood, and which do no harm, stands in hf_families.py; any other that asks for something is an error.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn

from perl_jax import json_files, settings
from perl_jax.errors import UserError
from perl_jax.interop.hf_families import (
    ABSENT,
    FAMILIES,
    GELU,
    SILU,
    TEXT_OF,
    check_outer,
    complete,
    flag,
    number,
    refuse,
    size,
)
from perl_jax.models.attention.rotary import RopeScaling
from perl_jax.models.decoder import Decoder, DecoderConfig
from perl_jax.models.t5 import T5, T5Config

_DECODERS = {kind: family.settings for kind, family in FAMILIES.items() if kind not in ('t5', 'mt5')}
_WINDOWED = ('gemma2', 'gemma3_text')
_T5_ACTIVATIONS = {'relu': 'relu', 'gelu': 'gelu_new', 'silu': 'silu'}  # in transformers' words
_T5: dict[str, tuple[settings.Activation, bool]] = {
    'relu': ('relu', False), 'gated-gelu': ('gelu', True), 'gated-silu': ('silu', True)
}  # fmt: skip
FIELDS: dict[str, Any] = {
    'model_type': str | None, 'architectures': Sequence[str] | None, 'id2label': Mapping[str, Any] | None
}  # fmt: skip
_NETWORK_FIELDS: dict[str, Any] = {
    'rope_scaling': Mapping[str, Any] | None, 'rope_parameters': Mapping[str, Any] | None,
    'layer_types': Sequence[str] | None, 'use_sliding_window': bool | None,
}  # fmt: skip
_FULL, _SLIDING = 'full_attention', 'sliding_attention'
_ROPE_KEYS = {  # what each rope_type reads
    'default': (),
    'linear': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
}


def read(folder: pathlib.Path) -> dict[str, Any]:
    """config.json of a checkpoint; the text part of one that has several, whose model_type it then says."""
    path = folder / 'config.json'
    config = json_files.read(path, FIELDS, 'a Hugging Face checkpoint has a config.json; download it again')
    kind = config.get('model_type')
    if kind not in TEXT_OF:
        return config
    text = config.get('text_config')
    if not isinstance(text, dict):
        raise UserError(f'{path}: text_config = {text!r}: a model of type {kind} says its sizes there')
    check_outer(path, config)
    json_files.check(text, path, FIELDS)
    return {'model_type': TEXT_OF[kind], 'tie_word_embeddings': config.get('tie_word_embeddings', True)} | text


def network(folder: pathlib.Path) -> nn.Module:
    """The network that a checkpoint is of, in float32.

    Raises:
      UserError: an architecture, or a key of config.json, that the networks do not compute.
    """
    config, path = read(folder), folder / 'config.json'
    kind = config.get('model_type')
    if kind not in FAMILIES:
        raise UserError(f'{path}: model_type {kind!r} is not supported; there are {", ".join([*FAMILIES, *TEXT_OF])}')
    json_files.check(config, path, _NETWORK_FIELDS)
    known = complete(path, config, kind)
    try:
        return Decoder(_decoder(known, kind, path)) if kind in _DECODERS else T5(_t5(known, kind, path))
    except UserError as error:  # of sizes that do not go together
        raise error if str(path) in str(error) else UserError(f'{path}: {error}') from None


def _decoder(c: dict[str, Any], kind: str, path: pathlib.Path) -> DecoderConfig:
    heads, width = size(path, c, 'num_attention_heads'), size(path, c, 'hidden_size')
    if c['head_dim'] is None and width % heads:
        raise UserError(f'{path}: hidden_size = {width} does not divide into num_attention_heads = {heads}')
    c |= {'num_key_value_heads': heads} if c['num_key_value_heads'] is None else {}
    c |= {'head_dim': width // heads} if c['head_dim'] is None else {}
    return DecoderConfig(
        vocab_size=size(path, c, 'vocab_size'),
        num_layers=size(path, c, 'num_hidden_layers'),
        emb_dim=width,
        num_heads=heads,
        num_kv_heads=size(path, c, 'num_key_value_heads'),
        head_dim=size(path, c, 'head_dim'),
        mlp_dim=size(path, c, 'intermediate_size'),
        norm_epsilon=number(path, c, 'rms_norm_eps'),
        logits_via_embedding=flag(path, c, 'tie_word_embeddings'),
        **_DECODERS[kind],
        **_rope(c, kind, path),
        **_windows(c, kind, path),
    )


def _rope(c: dict[str, Any], kind: str, path: pathlib.Path) -> dict[str, Any]:
    """Old files say rope_theta and rope_scaling, new ones rope_parameters, Gemma 3 one for each kind of layer."""
    rope_fields, theta = c['rope_scaling'] or c['rope_parameters'] or {}, c['rope_theta']
    if kind != 'gemma3_text':
        theta = 1e4 if theta is None else theta
        return dict(zip(('rope_theta', 'rope_scaling'), _frequencies({'rope_theta': theta} | rope_fields, c, path)))
    layers = c['rope_parameters'] or {}
    if not all(key in (_FULL, _SLIDING) and isinstance(value, dict | None) for key, value in layers.items()):
        raise UserError(f'{path}: rope_parameters = {layers!r}: it must have {_FULL} and {_SLIDING}')
    far = {'rope_theta': 1e6 if theta is None else theta} | (layers.get(_FULL) or {}) | (c['rope_scaling'] or {})
    local = c['rope_local_base_freq']
    near = {'rope_theta': 1e4 if local is None else local} | (layers.get(_SLIDING) or {})
    rope_theta, scaling = _frequencies(far, c, path)
    local_theta, local_scaling = _frequencies(near, c, path)
    if local_scaling is not None:
        refuse(path, f'rope_parameters.{_SLIDING}', near)
    return {'rope_theta': rope_theta, 'rope_scaling': scaling, 'local_rope_theta': local_theta}


def _frequencies(
    rope_fields: dict[str, Any], c: dict[str, Any], path: pathlib.Path
) -> tuple[float, RopeScaling | None]:
    """What one rope_parameters says: theta, and how frequencies are scaled."""
    kinds = [x for x in (rope_fields.get('rope_type'), rope_fields.get('type')) if x is not None]
    kind = kinds[0] if kinds else 'default'
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        refuse(path, 'rope_type', kind)
    for key, value in rope_fields.items():
        # Keys of other types are not read by this one (transformers warns); 1 turns the whole head, as here.
        known = ('rope_theta', 'rope_type', 'type', *_ROPE_KEYS['llama3'])
        if key not in known and not (key == 'partial_rotary_factor' and value == 1) and value is not None:
            refuse(path, key, value)
    theta = number(path, rope_fields, 'rope_theta')
    if kind == 'default':
        return theta, None
    if kind == 'linear':
        return theta, RopeScaling(number(path, rope_fields, 'factor'))
    rope_fields = {'original_max_position_embeddings': c['max_position_embeddings']} | rope_fields
    factor, low, high = (number(path, rope_fields, key) for key in ('factor', 'low_freq_factor', 'high_freq_factor'))
    if low >= high:
        raise UserError(f'{path}: low_freq_factor = {low:g}: it must be below high_freq_factor = {high:g}')
    return theta, RopeScaling(factor, low, high, size(path, rope_fields, 'original_max_position_embeddings'))


def _windows(c: dict[str, Any], kind: str, path: pathlib.Path) -> dict[str, Any]:
    """Which layers are local: by layer_types where the file has them, else by the family's pattern."""
    layers, types = c['num_hidden_layers'], c['layer_types']
    never = layers + 1  # no layer is the so manieth
    if kind in _WINDOWED:
        pattern = c.get('sliding_window_pattern') or 6  # transformers ignores `_sliding_window_pattern` here
        fields = {'sliding_window_pattern': pattern}
        global_every = 2 if kind == 'gemma2' else size(path, fields, 'sliding_window_pattern')
    elif kind == 'mistral':
        global_every = 1 if c['sliding_window'] is None else never
    else:
        slides = c.get('use_sliding_window') and c['sliding_window'] is not None
        if slides and size(path, c | {'max_window_layers': c['max_window_layers'] or 1}, 'max_window_layers') < layers:
            # The first layers alone are global there.
            refuse(path, 'use_sliding_window', c['use_sliding_window'])
        global_every = 1
    if types is not None and kind in _WINDOWED:
        global_every = types.index(_FULL) + 1 if _FULL in types else never
    expected_types = [_FULL if (i + 1) % global_every == 0 else _SLIDING for i in range(layers)]
    if types is not None and types != expected_types:
        refuse(path, 'layer_types', types)
    windows: dict[str, Any] = {}
    if global_every > 1:
        windows = {'sliding_window': size(path, c, 'sliding_window'), 'global_every': global_every}
    if kind in _WINDOWED:
        windows |= {
            'query_scale': number(path, c, 'query_pre_attn_scalar') ** -0.5,
            'attention_softcap': _cap(path, c, 'attn_logit_softcapping'),
            'logits_softcap': _cap(path, c, 'final_logit_softcapping'),
        }
    return windows


def _cap(path: pathlib.Path, c: dict[str, Any], key: str) -> float | None:
    return None if c[key] is None else number(path, c, key)


def _t5(c: dict[str, Any], kind: str, path: pathlib.Path) -> T5Config:
    mlp = c['feed_forward_proj']
    if not isinstance(mlp, str) or mlp not in _T5:
        refuse(path, 'feed_forward_proj', mlp)
    activation, gated = _T5[mlp]
    for key, follows in ('dense_act_fn', _T5_ACTIVATIONS[activation]), ('is_gated_act', gated):
        if c[key] not in (None, follows):
            raise UserError(f'{path}: {key} = {c[key]!r}: with feed_forward_proj = {mlp!r} it is {follows!r}')
    c |= {'num_decoder_layers': c['num_layers']} if c['num_decoder_layers'] is None else {}
    # transformers 5 writes tie_word_embeddings = true for all; the difference is in a new key, for mT5 in the type.
    tied = 'tie_word_embeddings' if c['scale_decoder_outputs'] is ABSENT else 'scale_decoder_outputs'
    return T5Config(
        vocab_size=size(path, c, 'vocab_size'),
        emb_dim=size(path, c, 'd_model'),
        num_heads=size(path, c, 'num_heads'),
        head_dim=size(path, c, 'd_kv'),
        mlp_dim=size(path, c, 'd_ff'),
        num_encoder_layers=size(path, c, 'num_layers'),
        num_decoder_layers=size(path, c, 'num_decoder_layers'),
        activation=activation,
        gated=gated,
        logits_via_embedding=flag(path, c, tied) and kind != 'mt5',
        relative_attention_num_buckets=size(path, c, 'relative_attention_num_buckets'),
        relative_attention_max_distance=size(path, c, 'relative_attention_max_distance'),
        norm_epsilon=number(path, c, 'layer_norm_epsilon'),
    )


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
        'hidden_activation' if kind.startswith('gemma') else 'hidden_act': GELU if c.activation == 'gelu' else SILU,
        'rope_theta': c.rope_theta,
    }
    if kind.startswith('gemma'):
        out['hidden_act'] = GELU
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
        out['sliding_window'] = c.sliding_window
    if kind in _WINDOWED:
        out |= {
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
    plain = {field: getattr(DecoderConfig, field) for fields in _DECODERS.values() for field in fields}
    capped = any(x is not None for x in (c.query_scale, c.attention_softcap, c.logits_softcap))
    for kind, fields in _DECODERS.items():
        if any(getattr(c, field) != value for field, value in {**plain, **fields}.items()):
            continue
        if kind == 'gemma3_text' and c.attention_softcap is not None:  # transformers would not compute it
            continue
        if kind in _WINDOWED and c.sliding_window is not None and (kind != 'gemma2' or c.global_every == 2):
            return kind
        everywhere = c.sliding_window is not None and c.global_every > c.num_layers
        if kind not in _WINDOWED and not capped and everywhere == (kind == 'mistral') and (
            everywhere or c.sliding_window is None
        ):
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
