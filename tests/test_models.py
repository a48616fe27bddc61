"""Every file of gin/models by how many parameters it makes: shapes alone, nothing is allocated.

The counts are what Hugging Face's model pages show of the safetensors files. Where a page shows another number or none
(ByT5 from base on, and Gemma 3 from 4B on, which comes with a vision tower) they are transformers' own of the same
sizes; tests/parity/test_model_sizes.py counts all of them again in that way.
"""

import math
import pathlib
import re

import gin
import jax
import pytest

from perl_jax.cli import configure
from perl_jax.models.attention import rotary
from perl_jax.parallel import partitioning

MODELS = pathlib.Path(__file__).parents[1] / 'gin/models'
FILES = {path.stem: path.read_text() for path in sorted(MODELS.glob('*.gin'))}
FLAN = {f'flan_t5_{size}': f't5_1_1_{size}' for size in ('small', 'base', 'large', 'xl', 'xxl')}
COUNTS = {
    'llama3_8b': 8_030_261_248,
    'llama3_1_8b': 8_030_261_248,
    'llama3_1_70b': 70_553_706_496,
    'llama3_2_1b': 1_235_814_400,
    'llama3_2_3b': 3_212_749_824,
    'smollm2_135m': 134_515_008,
    'smollm2_360m': 361_821_120,
    'smollm2_1_7b': 1_711_376_384,
    'qwen2_5_0_5b': 494_032_768,
    'qwen2_5_1_5b': 1_543_714_304,
    'qwen2_5_3b': 3_085_938_688,
    'qwen2_5_7b': 7_615_616_512,
    'qwen2_5_14b': 14_770_033_664,
    'qwen2_5_32b': 32_763_876_352,
    'qwen3_0_6b': 596_049_920,
    'qwen3_1_7b': 1_720_574_976,
    'qwen3_4b': 4_022_468_096,
    'qwen3_8b': 8_190_735_360,
    'qwen3_14b': 14_768_307_200,
    'qwen3_32b': 32_762_123_264,
    'gemma2_2b': 2_614_341_888,
    'gemma2_9b': 9_241_705_984,
    'gemma2_27b': 27_227_128_320,
    'gemma3_1b': 999_885_952,
    'gemma3_4b': 3_880_263_168,
    'gemma3_12b': 11_766_034_176,
    'gemma3_27b': 27_009_346_304,
    't5_small': 60_506_624,
    't5_base': 222_903_552,
    't5_large': 737_668_096,
    't5_3b': 2_851_598_336,
    't5_11b': 11_307_321_344,
    't5_1_1_small': 76_961_152,
    't5_1_1_base': 247_577_856,
    't5_1_1_large': 783_150_080,
    't5_1_1_xl': 2_849_757_184,
    't5_1_1_xxl': 11_135_332_352,
    'mt5_small': 300_176_768,
    'mt5_base': 582_401_280,
    'mt5_large': 1_229_581_312,
    'mt5_xl': 3_742_619_648,
    'mt5_xxl': 12_921_057_280,
    'byt5_small': 299_637_760,
    'byt5_base': 581_653_248,
    'byt5_large': 1_228_183_552,
    'byt5_xl': 3_737_801_728,
    'byt5_xxl': 12_906_899_328,
}


def network(name, *bindings):
    """The NETWORK of gin/models/NAME.gin."""
    configure.configured('train_sft.train', [f'models/{name}.gin'], list(bindings), [])
    return gin.get_configurable('NETWORK/macro')()


@pytest.mark.parametrize('name', COUNTS)
def test_a_size_has_as_many_parameters_as_published(name):
    shapes, axes = partitioning.abstract_params(network(name))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == COUNTS[name]
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    assert [len(x) for x in jax.tree.leaves(axes, is_leaf=is_axes)] == [x.ndim for x in jax.tree.leaves(shapes)]


def test_every_file_is_a_size_or_what_sizes_share():
    shared = {name for text in FILES.values() for name in re.findall(r"^include 'models/(\w+)\.gin'$", text, re.M)}
    assert COUNTS.keys() <= FILES.keys()
    others = {'toy', 'bench_s', 'bench_m', 'from_hf', 'from_t5x', 't5x_network', *FLAN}
    assert FILES.keys() - COUNTS.keys() - shared == others


@pytest.mark.parametrize('name', FILES)
def test_a_file_is_short(name):
    comment, *rest = FILES[name].splitlines()
    assert comment.startswith('# ') and not any('#' in line for line in rest)
    assert 1 <= len(rest) <= 11


# What a count does not see, as the models' config.json has it.


def test_llama():
    c = network('llama3_8b').config
    assert (c.rope_theta, c.norm_epsilon, c.rope_scaling) == (5e5, 1e-5, None)
    assert network('llama3_1_8b').config.rope_scaling == rotary.RopeScaling(8.0, 1.0, 4.0, 8192)
    assert network('llama3_2_1b').config.rope_scaling == rotary.RopeScaling(32.0, 1.0, 4.0, 8192)
    assert network('llama3_1_70b', 'layers.RopeScaling.factor = 2.0').config.rope_scaling.factor == 2.0
    assert [network(f'smollm2_{size}').config.rope_theta for size in ('135m', '360m', '1_7b')] == [1e5, 1e5, 1.3e5]


def test_qwen():
    two = {size: network(f'qwen2_5_{size}').config for size in ('0_5b', '1_5b', '3b', '7b', '14b', '32b')}
    assert [c.norm_epsilon for c in two.values()] == [1e-6, 1e-6, 1e-6, 1e-6, 1e-5, 1e-5]
    assert {(c.rope_theta, c.use_qkv_bias, c.qk_norm) for c in two.values()} == {(1e6, True, False)}
    three = network('qwen3_4b').config
    assert (three.rope_theta, three.norm_epsilon, three.use_qkv_bias, three.qk_norm) == (1e6, 1e-6, False, True)


def test_gemma():
    two = {size: network(f'gemma2_{size}').config for size in ('2b', '9b', '27b')}
    three = {size: network(f'gemma3_{size}').config for size in ('1b', '4b', '12b', '27b')}
    for c in (*two.values(), *three.values()):
        assert (c.norm_epsilon, c.norm_offset, c.activation) == (1e-6, 1.0, 'gelu')
        assert c.post_norms and c.scale_embedding and c.logits_via_embedding
    for c in two.values():
        assert (c.attention_softcap, c.logits_softcap, c.sliding_window, c.global_every) == (50.0, 30.0, 4096, 2)
        assert (c.rope_theta, c.local_rope_theta, c.rope_scaling, c.qk_norm) == (1e4, None, None, False)
    for c in three.values():
        assert (c.attention_softcap, c.logits_softcap, c.global_every) == (None, None, 6)
        assert (c.rope_theta, c.local_rope_theta, c.qk_norm) == (1e6, 1e4, True)
    assert [c.sliding_window for c in three.values()] == [512, 1024, 1024, 1024]
    assert [c.rope_scaling for c in three.values()] == [None, *[rotary.RopeScaling(8.0)] * 3]
    scales = [(c.query_scale or c.head_dim**-0.5) ** -2 for c in (*two.values(), *three.values())]
    assert scales == pytest.approx([256, 256, 144, 256, 256, 256, 168])  # query_pre_attn_scalar


def test_t5():
    first, second = network('t5_small').config, network('t5_1_1_small').config
    assert (first.activation, first.gated, first.logits_via_embedding) == ('relu', False, True)
    assert (second.activation, second.gated, second.logits_via_embedding) == ('gelu', True, False)
    assert all(network(flan).config == network(name).config for flan, name in FLAN.items())
