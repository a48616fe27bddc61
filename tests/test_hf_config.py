"""What a config.json asks for is computed, or the command ends with one line that names the key."""

import dataclasses
import json

import pytest

from perl_jax.errors import UserError
from perl_jax.interop import hf_config
from perl_jax.models.attention.rotary import RopeScaling

LLAMA3 = {
    'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
}  # fmt: skip


def network(tmp_path, **config):
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'llama'} | config))
    return hf_config.network(tmp_path).config


REFUSED = {
    'an option nobody knows': ({'attention_sinks': 4}, 'attention_sinks = 4'),
    'a string for a switch': ({'parallel_residual': 'yes'}, "parallel_residual = 'yes'"),
    'biases': ({'attention_bias': True}, 'attention_bias = True'),
    'other biases': ({'mlp_bias': True}, 'mlp_bias = True'),
    'experts': ({'num_local_experts': 8}, 'num_local_experts = 8'),
    'granite': ({'embedding_multiplier': 12.0}, 'embedding_multiplier = 12.0'),
    'interleaved': ({'rope_interleaved': True}, 'rope_interleaved = True'),
    'heads that do not share': ({'num_attention_heads': 4, 'num_key_value_heads': 3}, 'json: num_kv_heads = 3'),
    'an odd head': ({'head_dim': 7}, 'head_dim = 7'),
    'a list for a family': ({'model_type': ['llama']}, 'model_type = '),
    'an object for a family': ({'model_type': {}}, 'model_type = '),
    'a list for a rope': ({'rope_scaling': {'rope_type': ['linear'], 'factor': 2.0}}, 'rope_type = '),
    'an object for a rope': ({'rope_scaling': {'rope_type': {}, 'factor': 2.0}}, 'rope_type = '),
    'frequencies the wrong way round': (
        {'rope_scaling': LLAMA3 | {'low_freq_factor': 4.0, 'high_freq_factor': 1.0}}, 'low_freq_factor = 4'
    ),
    'a list for an activation': ({'model_type': 't5', 'feed_forward_proj': []}, 'feed_forward_proj = '),
    'another activation beside it': (
        {'model_type': 't5', 'feed_forward_proj': 'relu', 'dense_act_fn': 'relu2'}, "dense_act_fn = 'relu2'"
    ),
    'a gate beside none': ({'model_type': 't5', 'feed_forward_proj': 'relu', 'is_gated_act': True}, 'is_gated_act'),
    'no encoder': ({'model_type': 't5', 'is_encoder_decoder': False}, 'is_encoder_decoder = False'),
    'an encoder': ({'is_encoder_decoder': True}, 'is_encoder_decoder = True'),
    'null for a scale': ({'model_type': 't5', 'scale_decoder_outputs': None}, 'scale_decoder_outputs = None'),
    'one bucket': ({'model_type': 't5', 'relative_attention_num_buckets': 1}, 'relative_attention_num_buckets = 1'),
    'a distance within the buckets': (
        {'model_type': 't5', 'relative_attention_max_distance': 16}, 'relative_attention_max_distance = 16'
    ),
    'a number for layers': ({'model_type': 'gemma3_text', 'layer_types': 5}, 'layer_types = 5'),
    'a text for windows': (
        {'model_type': 'qwen2', 'use_sliding_window': True, 'max_window_layers': 'x'}, "max_window_layers = 'x'"
    ),
    'more than there can be': ({'vocab_size': 10**30}, 'vocab_size = '),
    'layers without end': ({'num_hidden_layers': 10**9}, 'num_hidden_layers = 1000000000'),
    'no mask': ({'is_causal': False}, 'is_causal = False'),
    'no mask in another family': ({'model_type': 'gemma3_text', 'is_causal': False}, 'is_causal = False'),
    'no activation': ({'hidden_act': ''}, "hidden_act = ''"),
    'null for an activation': ({'hidden_act': None}, 'hidden_act = None'),
    'null for an activation of Gemma': ({'model_type': 'gemma3_text', 'hidden_activation': None}, 'activation = None'),
    'a cap that transformers ignores': (
        {'model_type': 'gemma3_text', 'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping = 50.0'
    ),
    'a window of nothing': ({'model_type': 'mistral', 'sliding_window': 0}, 'sliding_window = 0'),
    'own code': ({'auto_map': {'AutoModelForCausalLM': 'modeling.Mine'}}, 'auto_map'),
    'quantized': ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    'yarn': ({'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}}, "rope_type = 'yarn'"),
    'a part of each head': ({'rope_parameters': {'rope_theta': 1e4, 'partial_rotary_factor': 0.5}}, 'partial_rotary'),
    'a list for scaling': ({'rope_scaling': [8]}, r'rope_scaling = \[8\]'),
    'no factor': ({'rope_scaling': {'type': 'linear'}}, 'factor = None'),
    'scaling by zero': ({'rope_scaling': {'type': 'linear', 'factor': 0}}, 'factor = 0'),
    'no heads': ({'num_attention_heads': 0}, 'num_attention_heads = 0'),
    'a string for a number': ({'hidden_size': '4096'}, "hidden_size = '4096'"),
    'a fraction': ({'num_hidden_layers': 2.5}, 'num_hidden_layers = 2.5'),
    'true for a number': ({'num_hidden_layers': True}, 'num_hidden_layers = True'),
    'null for a size': ({'vocab_size': None}, 'vocab_size = None'),
    'heads that do not divide': ({'hidden_size': 100, 'num_attention_heads': 7}, 'hidden_size = 100'),
    'epsilon below zero': ({'rms_norm_eps': -1e-6}, 'rms_norm_eps = -1e-06'),
    'theta of zero': ({'rope_theta': 0}, 'rope_theta = 0'),
    'a string for a flag': ({'tie_word_embeddings': 'no'}, "tie_word_embeddings = 'no'"),
    'layers of another kind': ({'layer_types': ['linear_attention'] * 32}, 'layer_types'),
    'windows on some layers': (
        {'model_type': 'qwen2', 'use_sliding_window': True, 'max_window_layers': 3}, 'use_sliding_window = True'
    ),
    'both ways': ({'model_type': 'gemma3_text', 'use_bidirectional_attention': True}, 'use_bidirectional_attention'),
    'one rope for two kinds of layers': (
        {'model_type': 'gemma3_text', 'rope_parameters': {'rope_theta': 1e6}}, 'rope_parameters'
    ),
    'a start that is not ours': ({'model_type': 't5', 'decoder_start_token_id': 2}, 'decoder_start_token_id = 2'),
    'an activation': ({'model_type': 't5', 'feed_forward_proj': 'gelu'}, "feed_forward_proj = 'gelu'"),
    'no text': ({'model_type': 'gemma3', 'text_config': None}, 'text_config = None'),
    'another family': ({'model_type': 'phi3'}, "model_type 'phi3' is not supported"),
    'another wrapper': ({'model_type': 'llava', 'text_config': {'model_type': 'llama'}}, "model_type 'llava'"),
    'no family': ({'model_type': None}, 'model_type None'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_not_computed_is_refused_by_name(tmp_path, case):
    config, said = REFUSED[case]
    with pytest.raises(UserError, match=said):
        network(tmp_path, **config)


def test_a_list_is_no_config(tmp_path):
    (tmp_path / 'config.json').write_text('[1]')
    with pytest.raises(UserError, match='not an object'):
        hf_config.network(tmp_path)


HARMLESS = {
    'nothing asked': {'attention_sinks': None, 'parallel_residual': False, 'pruned_heads': {}, 'extra': []},
    'smollm2': {'is_llama_config': True, 'rope_interleaved': False, 'transformers.js_config': {'dtype': 'fp16'}},
    'llama 2': {'pretraining_tp': 2, '_name_or_path': 'x', 'torch_dtype': 'float16', 'use_cache': True},
    'generation': {'temperature': 0.6, 'top_p': 0.9, 'eos_token_id': [1, 2], 'max_length': 4096},
    'a default that is said': {'rope_scaling': None, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4}},
}


@pytest.mark.parametrize('case', HARMLESS)
def test_what_changes_nothing_is_read_over(tmp_path, case):
    assert network(tmp_path, **HARMLESS[case]) == network(tmp_path)


def test_a_theta_beside_rope_parameters_counts_where_those_have_none(tmp_path):
    found = network(tmp_path, rope_theta=5e5, rope_parameters=LLAMA3)
    assert found.rope_theta == 5e5
    assert found.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert network(tmp_path, rope_theta=5e5, rope_parameters=LLAMA3 | {'rope_theta': 1e6}).rope_theta == 1e6


def test_scaling_without_a_length_takes_the_models(tmp_path):
    scaling = {k: v for k, v in LLAMA3.items() if not k.startswith('original')}
    assert network(tmp_path, rope_scaling=scaling, max_position_embeddings=4096).rope_scaling.original_length == 4096


def test_a_pattern_that_transformers_does_not_read_is_not_read(tmp_path):
    """It saves `_sliding_window_pattern` beside layer_types, and reads those alone."""
    assert network(tmp_path, model_type='gemma3_text', _sliding_window_pattern=3).global_every == 6
    assert network(tmp_path, model_type='gemma3_text', sliding_window_pattern=3).global_every == 3


def test_layer_types_say_which_layers_are_local(tmp_path):
    kinds = ['sliding_attention', 'sliding_attention', 'full_attention'] * 2
    found = network(tmp_path, model_type='gemma3_text', num_hidden_layers=6, layer_types=kinds)
    assert found.global_every == 3
    with pytest.raises(UserError, match='layer_types'):
        network(tmp_path, model_type='gemma3_text', num_hidden_layers=6, layer_types=kinds[::-1])


def test_mistral_slides_everywhere_or_nowhere(tmp_path):
    assert network(tmp_path, model_type='mistral', sliding_window=None).sliding_window is None
    found = network(tmp_path, model_type='mistral')  # 4096, Mistral 7B 0.1's
    assert found.sliding_window == 4096 and found.global_every > found.num_layers


@pytest.mark.parametrize('config', [
    {'model_type': 'mistral'}, {'model_type': 'gemma2'}, {'model_type': 'gemma3_text'}, {'model_type': 'qwen3'},
    {'model_type': 'llama', 'rope_scaling': LLAMA3}, {'model_type': 'gemma'}, {'model_type': 't5'},
    {'model_type': 'gemma2', 'attn_logit_softcapping': None},
], ids=str)  # fmt: skip
def test_what_is_written_is_read_as_the_same_network(tmp_path, config):
    first = network(tmp_path, **config)
    written = hf_config.write(hf_config.network(tmp_path))
    assert written['model_type'] == config['model_type']
    assert network(tmp_path, **written) == first


def test_a_gemma_3_with_capped_attention_is_no_model_of_transformers(tmp_path):
    config = network(tmp_path, model_type='gemma3_text', final_logit_softcapping=30.0)
    assert config.logits_softcap == 30 and hf_config.model_type(config) == 'gemma3_text'
    with pytest.raises(UserError, match='cannot be exported'):
        hf_config.model_type(dataclasses.replace(config, attention_softcap=50.0))
