"""Tensors of other people's checkpoints: what repeats another is compared, what overflows is named, heads come in."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from perl_jax.errors import UserError
from perl_jax.interop import hf, safetensors
from perl_jax.models.decoder import Decoder, DecoderConfig
from perl_jax.models.t5 import T5, T5Config
from perl_jax.parallel import leaves, partitioning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.runs import base

DECODER = DecoderConfig(
    vocab_size=40, num_layers=3, emb_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=12, norm_epsilon=1e-6
)
T5_SIZES = {'vocab_size': 40, 'emb_dim': 8, 'num_heads': 2, 'head_dim': 4, 'mlp_dim': 12, 'num_encoder_layers': 2}
T5_CONFIG = T5Config(**T5_SIZES, num_decoder_layers=2)


def saved(folder, network, **changed):
    """A checkpoint of random weights, some of which are changed: None leaves a tensor out."""
    shapes, _ = partitioning.abstract_params(network)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    hf.save(folder, network, params, 'float32')
    tensors = load_file(folder / 'model.safetensors')
    tensors = {name: x for name, x in (tensors | changed).items() if x is not None}
    save_file(tensors, folder / 'model.safetensors')
    return tensors


def read(folder, network):
    shapes, _ = partitioning.abstract_params(network)
    return leaves.to_host(hf.leaves(str(folder), network, shapes), np.float32)


def edited(folder, **settings):
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_an_output_matrix_beside_a_tied_embedding_has_to_be_its_copy(tmp_path):
    network = Decoder(DECODER)
    embedding = saved(tmp_path, network)['model.embed_tokens.weight']
    saved(tmp_path, network, **{'lm_head.weight': embedding})
    np.testing.assert_array_equal(read(tmp_path, network)['token_embedder']['embedding'], embedding)
    other = embedding.copy()
    other[-1, -1] += 1
    saved(tmp_path, network, **{'lm_head.weight': other})
    with pytest.raises(UserError, match='lm_head.weight differs from model.embed_tokens.weight'):
        read(tmp_path, network)


@pytest.mark.parametrize('name', ['encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'])
def test_embeddings_of_t5s_two_sides_have_to_be_one(tmp_path, name):
    network = T5(T5_CONFIG)
    shared = saved(tmp_path, network)['shared.weight']
    saved(tmp_path, network, **{name: shared})
    np.testing.assert_array_equal(read(tmp_path, network)['token_embedder']['embedding'], shared)
    saved(tmp_path, network, **{name: shared[::-1].copy()})
    with pytest.raises(UserError, match=f'{name} differs from shared.weight'):
        read(tmp_path, network)


def test_a_tied_t5s_output_matrix_has_to_be_its_embedding(tmp_path):
    network = T5(dataclasses.replace(T5_CONFIG, logits_via_embedding=True))
    shared = saved(tmp_path, network)['shared.weight']
    saved(tmp_path, network, **{'lm_head.weight': shared})
    read(tmp_path, network)
    saved(tmp_path, network, **{'lm_head.weight': shared * 2})
    with pytest.raises(UserError, match='lm_head.weight differs'):
        read(tmp_path, network)


def test_a_t5_whose_two_sides_have_the_embedding_and_no_third_loads(tmp_path):
    """As madlad400 is saved."""
    network = T5(T5_CONFIG)
    shared = saved(tmp_path, network)['shared.weight']
    both = {'encoder.embed_tokens.weight': shared, 'decoder.embed_tokens.weight': shared}
    saved(tmp_path, network, **both, **{'shared.weight': None})
    np.testing.assert_array_equal(read(tmp_path, network)['token_embedder']['embedding'], shared)
    saved(tmp_path, network, **both | {'decoder.embed_tokens.weight': shared + 1}, **{'shared.weight': None})
    with pytest.raises(UserError, match='decoder.embed_tokens.weight differs'):
        read(tmp_path, network)


def test_a_layer_in_float16_does_not_make_the_others_float16(tmp_path):
    network, name = Decoder(DECODER), 'model.layers.{}.mlp.down_proj.weight'.format
    large = saved(tmp_path, network)[name(2)] * 1e6
    small = np.full_like(large, 0.5, np.float16)
    saved(tmp_path, network, **{name(0): small, name(2): large.astype(jnp.bfloat16)})
    kernel = read(tmp_path, network)['decoder']['layers']['mlp']['wo']['kernel']
    np.testing.assert_array_equal(kernel[0], 0.5)
    np.testing.assert_array_equal(kernel[2], large.astype(jnp.bfloat16).astype(np.float32).T)


@pytest.mark.filterwarnings('ignore:overflow')
def test_numbers_beyond_float16_are_named_and_not_written_as_infinity(tmp_path):
    network = Decoder(DECODER)
    saved(tmp_path, network, **{'model.norm.weight': np.full(8, 1e5, np.float32)})
    params = read(tmp_path, network)
    with pytest.raises(UserError, match='--dtype=float16: model.norm.weight has numbers beyond 65504'):
        hf.save(tmp_path / 'out', network, params, 'float16')
    hf.save(tmp_path / 'other', network, params, 'bfloat16')
    partitioner = Partitioner()
    with partitioner.scope(), pytest.raises(UserError, match="BASE_DTYPE = 'float16': .*norm/scale has"):
        base.load(base.BaseConfig(network, str(tmp_path), 'float16'), partitioner, 0)
    for number in np.inf, np.nan:  # which float16 has not made
        saved(tmp_path, network, **{'model.norm.weight': np.full(8, number, np.float32)})
        for dtype in 'float16', 'float32':
            with partitioner.scope(), pytest.raises(UserError, match='norm/scale .* has numbers that are not finite'):
                base.load(base.BaseConfig(network, str(tmp_path), dtype), partitioner, 0)


def test_a_whole_file_counts_more_than_a_stale_index(tmp_path):
    """As transformers has it."""
    tensors = saved(tmp_path, Decoder(DECODER))
    (tmp_path / safetensors.INDEX).write_text(json.dumps({'weight_map': {'x': 'model-00001-of-00002.safetensors'}}))
    assert safetensors.entries(tmp_path).keys() == tensors.keys()


@pytest.mark.parametrize(('where', 'said'), [
    (None, 'weight_map = None: give a dictionary'), ([], 'weight_map = .*: give a dictionary'),
    ({'a': 5}, r"weight_map\['a'\] = 5: give a string"), ({'a': '../model.safetensors'}, 'not beside it'),
    ({'a': '/etc/passwd'}, 'not beside it'),
])  # fmt: skip
def test_an_index_names_files_beside_it(tmp_path, where, said):
    (tmp_path / safetensors.INDEX).write_text(json.dumps({'weight_map': where}))
    with pytest.raises(UserError, match=f'index.json: .*{said}'):
        safetensors.entries(tmp_path)


@pytest.mark.parametrize('dtype', [np.int8, np.int32, np.bool_])
def test_tensors_that_are_no_floats_are_named(tmp_path, dtype):
    saved(tmp_path, Decoder(DECODER), **{'model.norm.weight': np.ones(8, dtype)})
    with pytest.raises(UserError, match='dtype .* cannot be read'):
        read(tmp_path, Decoder(DECODER))


@pytest.mark.parametrize('architectures', [None, ['LlamaForTokenClassification']])
@pytest.mark.parametrize('tied', [True, False])
def test_a_classifier_that_is_not_called_one(tmp_path, architectures, tied):
    network = Decoder(dataclasses.replace(DECODER, logits_via_embedding=tied))
    classifier(tmp_path, network, architectures=architectures)
    shapes, _ = partitioning.abstract_params(network)
    with pytest.raises(UserError, match="score.weight is a classifier's head, and architectures = "):
        hf.leaves(str(tmp_path), network, shapes)


@pytest.mark.parametrize(('file', 'said'), [
    ('pytorch_model.bin', 'pytorch_model.bin is a pickle'),
    ('model.fp16.safetensors', r'model.fp16.safetensors is a variant; rename it'),
    ('consolidated.safetensors', "consolidated.safetensors is in Meta's"),
    ('adapter_model.safetensors', 'adapter_model.safetensors is an adapter of PEFT'),
    ('model-q4.gguf', 'model-q4.gguf is a GGUF file'),
])  # fmt: skip
def test_what_there_is_in_place_of_the_weights_is_named(tmp_path, file, said):
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=f'neither model.safetensors nor .*; {said}'):
        safetensors.entries(tmp_path)


def test_an_adapter_beside_the_weights_is_named(tmp_path):
    """transformers would load it over them."""
    network = Decoder(DECODER)
    saved(tmp_path, network)
    (tmp_path / 'adapter_config.json').write_text('{}')
    for call in read, lambda folder, network: base.check(base.BaseConfig(network, str(folder))):
        with pytest.raises(UserError, match='adapter_config.json beside the weights.*--format=peft, or remove'):
            call(tmp_path, network)


def test_two_tensors_of_one_name_are_named(tmp_path):
    network = Decoder(DECODER)
    norm = saved(tmp_path, network)['model.norm.weight']
    saved(tmp_path, network, **{'model.norm.weight': None, 'model.language_model.norm.weight': norm})
    np.testing.assert_array_equal(read(tmp_path, network)['decoder']['decoder_norm']['scale'], norm)
    saved(tmp_path, network, **{'model.language_model.norm.weight': norm})
    with pytest.raises(UserError, match='model.language_model.norm.weight .*model.norm.weight are the same one'):
        read(tmp_path, network)


def test_an_epsilon_that_went_through_float32_is_the_same(tmp_path):
    network = Decoder(DECODER)
    saved(tmp_path, network)
    edited(tmp_path, rms_norm_eps=float(np.float32(1e-6)), rope_theta=float(np.float32(1e4)))
    hf.agree(str(tmp_path), network)
    edited(tmp_path, rms_norm_eps=1.001e-6)
    with pytest.raises(UserError, match='norm_epsilon'):
        base.check(base.BaseConfig(network, str(tmp_path)))


def classifier(folder, network, **settings):
    shapes, _ = partitioning.abstract_params(network)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    hf.save(folder, network, params, 'float32', jnp.arange(8.0))
    edited(folder, **settings)
    return params


@pytest.mark.parametrize('tied', [True, False])
def test_a_classifier_with_one_label_is_weights_and_a_head(tmp_path, tied):
    network = Decoder(dataclasses.replace(DECODER, logits_via_embedding=tied))
    params = classifier(tmp_path, network)
    np.testing.assert_array_equal(hf.score(str(tmp_path), 8), np.arange(8))
    shapes, _ = partitioning.abstract_params(network)
    found = leaves.to_host(hf.leaves(str(tmp_path), network, shapes, classifier=True), np.float32)
    if not tied:  # it has no output matrix, and a reward needs none
        assert not found['decoder'].pop('logits_dense')['kernel'].any() and params['decoder'].pop('logits_dense')
    jax.tree.map(np.testing.assert_array_equal, found, params)
    with pytest.raises(UserError, match='is a classifier'):
        hf.leaves(str(tmp_path), network, shapes)


@pytest.mark.parametrize(('settings', 'said'), [
    ({'id2label': {'0': 'a', '1': 'b'}}, 'num_labels 1.* has 2 entries'),
    ({'id2label': 2}, 'id2label = 2: give a dictionary'),
    ({'num_labels': 3}, 'num_labels = 3: a reward has 1'),
    ({'problem_type': 'multi_label_classification'}, 'problem_type'),
])  # fmt: skip
def test_a_classifier_that_is_no_reward_is_refused(tmp_path, settings, said):
    classifier(tmp_path, Decoder(DECODER), **settings)
    with pytest.raises(UserError, match=said):
        hf.score(str(tmp_path), 8)


@pytest.mark.parametrize(('head', 'said'), [
    (np.float32(1), r'shape \[\]'),
    (np.ones(8, np.float32), r'shape \[8\]'),
    (np.ones((1, 9), np.float32), r'\[1, 9\]'),
    (np.ones((2, 8), np.float32), 'score.weight has 2 rows, .* needs 1; '),
    (np.full((1, 8), np.nan, np.float32), 'score.weight has numbers that are not finite'),
])  # fmt: skip
def test_a_head_that_is_no_row_of_numbers_is_refused(tmp_path, head, said):
    classifier(tmp_path, Decoder(DECODER))
    tensors = load_file(tmp_path / 'model.safetensors')
    save_file(tensors | {'score.weight': np.asarray(head)}, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match=said):
        hf.score(str(tmp_path), 8)


@pytest.mark.parametrize('value', ['LlamaForCausalLM', [1], {'a': 1}])
def test_architectures_are_a_list_of_names(tmp_path, value):
    classifier(tmp_path, Decoder(DECODER), architectures=value)
    with pytest.raises(UserError, match='architectures'):
        hf.is_classifier(str(tmp_path))
