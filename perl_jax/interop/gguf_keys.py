"""What the metadata of a GGUF Llama asks for beyond sizes: understood, harmless, or refused by name.

Defaults and conventions are those of llama.cpp (src/llama-model.cpp, convert_hf_to_gguf.py): a linear scaling by
`factor` divides every frequency by it, also where no type is named; the tensor rope_freqs holds a divisor for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from perl_jax.errors import UserError
from perl_jax.models.attention.rotary import RopeScaling

ROPE_FREQS = 'rope_freqs.weight'
_READ = (  # gguf.config reads these
    'block_count', 'embedding_length', 'feed_forward_length', 'attention.head_count', 'attention.head_count_kv',
    'attention.key_length', 'attention.value_length', 'attention.layer_norm_rms_epsilon', 'rope.dimension_count',
    'rope.freq_base', 'rope.scaling.type', 'rope.scaling.factor', 'rope.scale_linear',
    'rope.scaling.original_context_length',
)  # fmt: skip
_HARMLESS = {
    'context_length': 'positions are relative, so no table ends',
    'rope.scaling.finetuned': 'says how the model was made',
    'vocab_size': 'token_embd has so many rows',
    'attention.key_length_swa': 'of windows, which are refused',
    'attention.value_length_swa': 'likewise',
}
_FIXED = {'attention.causal': True, 'tensor_data_layout': 'Meta AI original pth', 'rope.scaling.attn_factor': 1.0}
_OTHER_PREFIXES = ('GGUF.', 'general.', 'tokenizer.', 'quantize.', 'split.', 'mradermacher.')  # none is of the network
_TYPES = ('none', 'linear')
_ORIGINAL_LENGTH = 8192  # Llama 3.1's and 3.2's, where the file does not say


def check(path: Any, fields: Mapping[str, Any], arch: str = 'llama') -> None:
    """Go through the keys of the architecture, and refuse those that belong to nothing known.

    Raises:
      UserError: one that asks for what is not computed, naming it.
    """
    for name, value in fields.items():
        key = name.removeprefix(f'{arch}.')
        if key == name:
            if not name.startswith(_OTHER_PREFIXES) and value not in (0, False, ''):
                raise UserError(f'{path}: the key {name} = {value!r} is not understood; take a file without it')
            continue
        if key in _READ or key in _HARMLESS:
            continue
        if key in _FIXED and value == _FIXED[key]:
            continue
        if key in _FIXED or value not in (0, False, ''):
            raise UserError(f'{path}: {name} = {value!r} is not computed here; take a plain Llama')


def rope_scaling(
    path: Any, fields: Mapping[str, Any], divisors: np.ndarray | None, head_dim: int, theta: float
) -> RopeScaling | None:
    """How the file scales its rotary frequencies.

    Args:
      divisors: the tensor rope_freqs [E/2], if there is one.

    Raises:
      UserError: a type that is not read, or divisors that are not those of Llama 3.1's formula.
    """
    kind = fields.get('llama.rope.scaling.type', 'linear')
    if kind not in _TYPES:
        raise UserError(f'{path}: llama.rope.scaling.type is {kind!r}; only {" and ".join(_TYPES)} can be read')
    key, old_key = 'llama.rope.scaling.factor', 'llama.rope.scale_linear'
    if key in fields and fields.get(old_key, fields[key]) != fields[key]:
        raise UserError(
            f'{path}: {key} = {fields[key]!r} and {old_key} = {fields[old_key]!r} differ; take a file with one of them'
        )
    key = key if key in fields else old_key
    factor = fields.get(key, 0)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
        raise UserError(f'{path}: {key} = {factor!r}: it must be a number above 0')
    linear = None if kind == 'none' or factor in (0, 1) else RopeScaling(float(factor))
    if divisors is None or np.all(divisors == 1):
        return linear
    if linear is not None:
        raise UserError(f'{path}: {key} and the tensor {ROPE_FREQS} both scale positions; only one of them can be read')
    length = fields.get('llama.rope.scaling.original_context_length', _ORIGINAL_LENGTH)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        key = 'llama.rope.scaling.original_context_length'
        raise UserError(f'{path}: {key} = {length!r}: it must be a whole number of at least 1')
    scaling = RopeScaling(float(np.float32(divisors.max())), 1.0, 4.0, length)
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    expected_factors = frequencies / np.asarray(scaling(frequencies))
    if divisors.shape != expected_factors.shape or not np.allclose(divisors, expected_factors, rtol=1e-3):
        raise UserError(
            f"{path}: the tensor {ROPE_FREQS} does not scale positions as Llama 3.1 does (factor {scaling.factor:g}, "
            f'{length} tokens), and other ways cannot be read; take the safetensors of the model'
        )
    return scaling
