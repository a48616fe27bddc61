"""Read stories260K, a trained Llama of 260,032 parameters (https://huggingface.co/karpathy/tinyllamas, MIT)."""

import os
import pathlib
import struct

import numpy as np
import pytest

from perl_jax.interop.gguf import split_halves
from perl_jax.models.decoder import DecoderConfig

DATA = pathlib.Path(os.environ.get('PERL_JAX_DATA', pathlib.Path(__file__).parents[2] / 'shared/data')) / 'stories260k'
needs_stories = pytest.mark.skipif(
    not DATA.is_dir(), reason='needs stories260k/ (stories260K.bin, tok512.bin) in ../shared/data or PERL_JAX_DATA'
)
BOS = 1


def load():
    """The configuration and the parameters, float32."""
    raw = (DATA / 'stories260K.bin').read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack('7i', raw[:28])
    numbers = np.frombuffer(raw, np.float32, offset=28)
    E = dim // heads

    def take(*shape):
        nonlocal numbers
        taken, numbers = np.split(numbers, [int(np.prod(shape))])
        return taken.reshape(shape)

    def kernels(out, width, rope_heads=None):
        stack = take(layers, out, width)
        if rope_heads:
            stack = np.stack([split_halves(k, rope_heads) for k in stack])
        return {'kernel': stack.swapaxes(1, 2)}

    embedding = {'embedding': take(vocab, dim)}
    attention_norm = {'scale': take(layers, dim)}
    attention = {
        'query': kernels(dim, dim, heads),
        'key': kernels(kv_heads * E, dim, kv_heads),
        'value': kernels(kv_heads * E, dim),
        'out': kernels(dim, dim),
    }
    mlp_norm = {'scale': take(layers, dim)}
    mlp = {'wi_0': kernels(hidden, dim), 'wo': kernels(dim, hidden), 'wi_1': kernels(hidden, dim)}
    decoder_norm = {'scale': take(dim)}
    assert len(numbers) == length * E  # tables of cosines and sines, which nobody needs
    params = {
        'token_embedder': embedding,
        'decoder': {
            'layers': {
                'pre_self_attention_layer_norm': attention_norm,
                'self_attention': attention,
                'pre_mlp_layer_norm': mlp_norm,
                'mlp': mlp,
            },
            'decoder_norm': decoder_norm,
        },
    }
    return DecoderConfig(vocab, layers, dim, heads, kv_heads, E, hidden), params


def pieces():
    """The bytes of each of the 512 tokens."""
    raw, found, at = (DATA / 'tok512.bin').read_bytes(), [], 4
    while at < len(raw):
        _, size = struct.unpack_from('fi', raw, at)
        found.append(raw[at + 8 : at + 8 + size])
        at += 8 + size
    return found
