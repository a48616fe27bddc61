"""What Hugging Face's config.json may say: for each family the keys that are understood, and those that do no harm.

A key that stands in neither table and asks for something (it is not null, false, 0 or empty) ends the command: what a
config asks for is computed or refused, never ignored. Where a file leaves a key out, the family's own default counts,
which is that of transformers' config class (tests/parity/test_hf_defaults.py compares them).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from perl_jax import json_files, settings
from perl_jax.errors import UserError

SILU, GELU = 'silu', 'gelu_pytorch_tanh'
ABSENT = object()  # where a key that is null says something else than one that is not there


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type.

    Attributes:
      defaults: every key that is read, with what counts where the file has none.
      fixed: keys that must hold this value, which is also their default.
      settings: the fields of our config that the name stands for, beyond sizes.
    """

    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_ROPE = {'rope_theta': None, 'rope_scaling': None, 'rope_parameters': None, 'max_position_embeddings': 2048}
_LLAMA = _ROPE | {
    'vocab_size': 32000, 'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32,
    'num_attention_heads': 32, 'num_key_value_heads': None, 'head_dim': None, 'rms_norm_eps': 1e-6,
    'tie_word_embeddings': False, 'layer_types': None,
}  # fmt: skip
_QWEN = _LLAMA | {
    'vocab_size': 151936, 'intermediate_size': 22016, 'num_key_value_heads': 32, 'max_position_embeddings': 32768,
    'use_sliding_window': False, 'sliding_window': 4096, 'max_window_layers': 28,
}  # fmt: skip
_GEMMA = _LLAMA | {
    'vocab_size': 256000, 'hidden_size': 3072, 'intermediate_size': 24576, 'num_hidden_layers': 28,
    'num_attention_heads': 16, 'num_key_value_heads': 16, 'head_dim': 256, 'tie_word_embeddings': True,
    'max_position_embeddings': 8192,
}  # fmt: skip
_GEMMA2 = _GEMMA | {
    'hidden_size': 2304, 'intermediate_size': 9216, 'num_hidden_layers': 26, 'num_attention_heads': 8,
    'num_key_value_heads': 4, 'query_pre_attn_scalar': 256, 'sliding_window': 4096,
    'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0,
}  # fmt: skip
_GEMMA3 = _GEMMA2 | {
    'vocab_size': 262208, 'attn_logit_softcapping': None, 'final_logit_softcapping': None,
    'max_position_embeddings': 131072, 'rope_local_base_freq': None, 'sliding_window_pattern': None,
    '_sliding_window_pattern': None,
}  # fmt: skip
_T5 = {
    'vocab_size': 32128, 'd_model': 512, 'd_kv': 64, 'd_ff': 2048, 'num_layers': 6, 'num_decoder_layers': None,
    'num_heads': 8, 'relative_attention_num_buckets': 32, 'relative_attention_max_distance': 128,
    'layer_norm_epsilon': 1e-6, 'feed_forward_proj': 'relu', 'tie_word_embeddings': True,
    'scale_decoder_outputs': ABSENT, 'dense_act_fn': None, 'is_gated_act': None,
}  # fmt: skip
_AS_GEMMA = {'activation': 'gelu', 'scale_embedding': True, 'norm_offset': 1.0}
_CAUSAL = {'is_causal': True, 'is_encoder_decoder': False}  # the first is read, though no config class names it
_NO_BIAS = _CAUSAL | {'attention_bias': False}
_GEMMA_FIXED = _NO_BIAS | {'use_bidirectional_attention': None}
_T5_FIXED = {
    'is_causal': True, 'is_encoder_decoder': True, 'is_decoder': False,
    'decoder_start_token_id': 0,  # what our decoder starts from
}  # fmt: skip

FAMILIES = {
    'llama': Family(_LLAMA, _NO_BIAS | {'mlp_bias': False, 'hidden_act': SILU}),
    'mistral': Family(
        _LLAMA | {
            'intermediate_size': 14336, 'num_key_value_heads': 8, 'sliding_window': 4096,
            'max_position_embeddings': 131072,
        },
        _CAUSAL | {'hidden_act': SILU},
    ),
    'qwen2': Family(_QWEN, _CAUSAL | {'hidden_act': SILU}, {'use_qkv_bias': True}),
    'qwen3': Family(_QWEN | {'head_dim': 128}, _NO_BIAS | {'hidden_act': SILU}, {'qk_norm': True}),
    'gemma': Family(_GEMMA, _GEMMA_FIXED | {'hidden_act': GELU}, _AS_GEMMA),
    'gemma2': Family(_GEMMA2, _GEMMA_FIXED | {'hidden_activation': GELU}, _AS_GEMMA | {'post_norms': True}),
    'gemma3_text': Family(
        _GEMMA3,
        # transformers stores the cap of attention logits here, and computes without it
        _GEMMA_FIXED | {'hidden_activation': GELU, 'attn_logit_softcapping': None},
        _AS_GEMMA | {'post_norms': True, 'qk_norm': True},
    ),
    't5': Family(_T5, _T5_FIXED),
    'mt5': Family(
        _T5 | {
            'vocab_size': 250112, 'd_ff': 1024, 'num_layers': 8, 'num_heads': 6, 'feed_forward_proj': 'gated-gelu'
        },
        _T5_FIXED,
    ),
}  # fmt: skip
TEXT_OF = {'gemma3': 'gemma3_text'}  # models of several parts whose text part is read: its model_type

_HARMLESS = {
    'bookkeeping': (
        'model_type', 'architectures', 'transformers_version', '_name_or_path', 'transformers.js_config',
        'unsloth_fixed', 'unsloth_version', 'is_llama_config', 'tokenizer_class', 'task_specific_params',
        'finetuning_task', 'processor_class', 'license',
    ),
    'how it was stored; tensors say their own dtype': ('dtype', 'torch_dtype'),
    'which kernel computes the same': (
        'attn_implementation', '_attn_implementation', '_attn_implementation_autoset', 'use_cache', 'output_past',
        'cache_implementation', 'chunk_size_feed_forward', 'pretraining_tp', 'torchscript', 'return_dict',
        'output_attentions', 'output_hidden_states', 'use_bfloat16',
    ),
    'training from scratch, or dropout, which is our own setting': (
        'initializer_range', 'initializer_factor', 'attention_dropout', 'dropout_rate', 'classifier_dropout',
        'hidden_dropout', 'resid_pdrop', 'embd_pdrop', 'attn_pdrop', 'layerdrop', 'gradient_checkpointing',
    ),
    'ids: the tokenizer and generation are read elsewhere': (
        'bos_token_id', 'eos_token_id', 'pad_token_id', 'sep_token_id', 'forced_bos_token_id', 'forced_eos_token_id',
    ),
    'lengths: positions are relative, so no table ends': (
        'max_position_embeddings', 'n_positions', 'model_max_length', 'max_sequence_length', 'seq_length',
    ),
    'how transformers generates, which is our sampler\'s': (
        'max_length', 'min_length', 'do_sample', 'early_stopping', 'num_beams', 'num_beam_groups',
        'diversity_penalty', 'temperature', 'top_k', 'top_p', 'typical_p', 'repetition_penalty', 'length_penalty',
        'no_repeat_ngram_size', 'encoder_no_repeat_ngram_size', 'num_return_sequences', 'output_scores',
        'return_dict_in_generate', 'remove_invalid_values', 'suppress_tokens', 'begin_suppress_tokens',
    ),
    'a classifier\'s labels, which its reader checks': ('id2label', 'label2id', 'num_labels', 'problem_type'),
    'of a decoder by itself: whether an encoder might stand beside it': ('is_decoder',),
}  # fmt: skip
HARMLESS = {key: why for why, keys in _HARMLESS.items() for key in keys}
_ONLY_HERE = {  # harmless in one family alone: (family, key): why
    ('gemma2', 'hidden_act'): 'transformers reads hidden_activation',
    ('gemma3_text', 'hidden_act'): 'transformers reads hidden_activation',
    ('gemma', 'hidden_activation'): 'transformers reads hidden_act',
}
OUTER = {  # beside text_config
    'vision_config': 'the images\' part, which is not read', 'mm_tokens_per_image': 'likewise',
    'image_token_index': 'likewise', 'boi_token_index': 'likewise', 'eoi_token_index': 'likewise',
    'image_token_id': 'likewise', 'boi_token_id': 'likewise', 'eoi_token_id': 'likewise',
    'vision_soft_tokens_per_image': 'likewise', 'text_config': 'what is read',
}  # fmt: skip


def complete(path: pathlib.Path, config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Every key that the family reads, with the file's value or the family's default.

    Raises:
      UserError: a key that asks for what is not computed, naming it.
    """
    family = FAMILIES[kind]
    for key, value in config.items():
        if key in family.fixed:
            fixed = family.fixed[key]
            same = value == fixed if fixed else _asks_nothing(value)
            legacy = kind == 'gemma' and key == 'hidden_act' and value == 'gelu'  # transformers takes the tanh form too
            no_activation = key.startswith('hidden_act') and value is None  # transformers fails there
            if no_activation or value is not None and not same and not legacy:
                refuse(path, key, value)
            continue
        known = key in family.defaults or key in HARMLESS or (kind, key) in _ONLY_HERE
        if not known and not _asks_nothing(value):
            refuse(path, key, value)
    return {key: config.get(key, default) for key, default in family.defaults.items()}


def check_outer(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuse what a model of several parts says beside its text part and the text part would have to obey."""
    for key, value in config.items():
        tied = key == 'tie_word_embeddings' and value is True
        if key not in OUTER and key not in HARMLESS and not tied and not _asks_nothing(value):
            refuse(path, key, value)


def _asks_nothing(value: Any) -> bool:
    return value is None or value in (0, False, '', [], {})


def refuse(path: pathlib.Path, key: str, value: Any) -> None:
    """End the command, naming a key that asks for what is not computed."""
    raise UserError(f'{path}: {key} = {value!r} is not supported for this model_type; take a model without it')


def size(path: pathlib.Path, config: Mapping[str, Any], key: str) -> int:
    """A count of a config: a whole number of at least 1, and not so large that the rest would take for ever."""
    json_files.check(config, path, {key: settings.Layers if 'layers' in key else settings.Count})
    return config[key]


def number(path: pathlib.Path, config: Mapping[str, Any], key: str) -> float:
    """A number of a config that must be finite and above 0."""
    json_files.check(config, path, {key: settings.Positive})
    return float(config[key])


def flag(path: pathlib.Path, config: Mapping[str, Any], key: str) -> bool:
    """A yes or no of a config."""
    json_files.check(config, path, {key: bool})
    return config[key]
