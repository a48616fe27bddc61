"""config.json against transformers: what counts where a file leaves a key out."""

import json

import pytest

pytest.importorskip('torch', reason='needs torch and transformers, which the tests do not install')
transformers = pytest.importorskip('transformers', reason='needs transformers')

from perl_jax.errors import UserError  # noqa: E402
from perl_jax.interop import hf_config, hf_families  # noqa: E402

KINDS = {
    'llama': 'LlamaConfig', 'mistral': 'MistralConfig', 'qwen2': 'Qwen2Config', 'qwen3': 'Qwen3Config',
    'gemma': 'GemmaConfig', 'gemma2': 'Gemma2Config', 'gemma3_text': 'Gemma3TextConfig', 't5': 'T5Config',
    'mt5': 'MT5Config',
}  # fmt: skip
kinds = pytest.mark.parametrize('kind', KINDS)


def config_of(tmp_path, config):
    (tmp_path / 'config.json').write_text(json.dumps(config))
    return hf_config.network(tmp_path).config


def theirs(kind, **settings):
    """All that transformers writes. A T5 config that it fills in from nothing keeps what scales the output apart."""
    return getattr(transformers, KINDS[kind])(**settings).to_dict()


@kinds
def test_a_file_that_says_nothing_is_what_transformers_takes_it_for(tmp_path, kind):
    assert config_of(tmp_path, {'model_type': kind}) == config_of(tmp_path, theirs(kind))


@kinds
def test_each_key_that_is_left_out_counts_as_transformers_counts_it(tmp_path, kind):
    sizes = {'hidden_size': 128, 'num_attention_heads': 32, 'num_hidden_layers': 7, 'intermediate_size': 112}
    if kind in ('t5', 'mt5'):
        sizes = {'d_model': 96, 'num_heads': 4, 'num_layers': 3, 'd_ff': 112}
    whole = theirs(kind, **sizes)
    for key in hf_families.FAMILIES[kind].defaults:
        gone = (key, 'layer_types') if key == 'num_hidden_layers' else (key,)  # a list for each layer
        some = {k: v for k, v in whole.items() if k not in gone}
        counted = theirs(kind, **{k: v for k, v in some.items() if k != 'model_type'})
        if kind == 't5' and key == 'tie_word_embeddings':  # transformers 5 reads the new key, which stays
            counted = whole
        assert config_of(tmp_path, some) == config_of(tmp_path, counted), key


def test_gemma_3_as_published_says_a_handful_of_keys_in_its_text_config(tmp_path):
    text = {
        'hidden_size': 2560, 'intermediate_size': 10240, 'model_type': 'gemma3_text', 'num_hidden_layers': 34,
        'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}, 'sliding_window': 1024,
    }  # fmt: skip
    published = {
        'architectures': ['Gemma3ForConditionalGeneration'], 'boi_token_index': 255999, 'eoi_token_index': 256000,
        'eos_token_id': [1, 106], 'image_token_index': 262144, 'initializer_range': 0.02, 'mm_tokens_per_image': 256,
        'model_type': 'gemma3', 'text_config': text, 'torch_dtype': 'bfloat16', 'transformers_version': '4.50.0.dev0',
        'vision_config': {'hidden_size': 1152, 'model_type': 'siglip_vision_model', 'vision_use_head': False},
    }  # fmt: skip
    theirs = transformers.Gemma3TextConfig(**{k: v for k, v in text.items() if k != 'model_type'})
    found = config_of(tmp_path, published)
    assert found == config_of(tmp_path, theirs.to_dict())
    assert (found.num_layers, found.num_heads, found.num_kv_heads, found.head_dim) == (34, 8, 4, 256)
    assert (found.rope_theta, found.local_rope_theta, found.rope_scaling.factor) == (1e6, 1e4, 8.0)
    assert (found.activation, found.sliding_window, found.logits_via_embedding) == ('gelu', 1024, True)


def test_gemma_3_27b_scales_queries_by_its_own_number(tmp_path):
    text = {
        'head_dim': 128, 'hidden_size': 5376, 'intermediate_size': 21504, 'model_type': 'gemma3_text',
        'num_attention_heads': 32, 'num_hidden_layers': 62, 'num_key_value_heads': 16, 'query_pre_attn_scalar': 168,
        'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}, 'sliding_window': 1024,
    }  # fmt: skip
    found = config_of(tmp_path, {'model_type': 'gemma3', 'text_config': text})
    assert (found.head_dim, found.num_kv_heads, found.query_scale) == (128, 16, pytest.approx(168**-0.5))


def test_a_quantized_model_of_several_parts_is_refused_by_its_outer_key(tmp_path):
    with pytest.raises(UserError, match='quantization_config'):
        config_of(tmp_path, {'model_type': 'gemma3', 'text_config': {}, 'quantization_config': {'bits': 4}})
