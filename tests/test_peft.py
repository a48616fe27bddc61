"""Adapters in PEFT's form: which options and names are read, and that all others are said by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from perl_jax.errors import UserError
from perl_jax.interop import peft, peft_config
from perl_jax.models import averaging, lora
from perl_jax.models.decoder import Decoder, DecoderConfig
from perl_jax.parallel import leaves, partitioning

CONFIG = DecoderConfig(vocab_size=40, num_layers=2, emb_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)
NETWORK = Decoder(CONFIG)
QUERY = 'decoder/layers/self_attention/query'
NAME = 'base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight'


@pytest.fixture(scope='module')
def base():
    one = np.ones((1, 1), np.int32)
    return partitioning.unbox(NETWORK.init(jax.random.key(0), one, one == 0, one[:, None]))['params']


@pytest.fixture
def adapter(base):
    made = lora.LoraSpec(rank=4, alpha=6.0).init(jax.random.key(0), base)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return made.replace(lora=jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), made.lora))


@pytest.fixture
def saved(adapter, tmp_path):
    peft.save(tmp_path / 'a', NETWORK, adapter, 'base')
    return tmp_path / 'a'


def load(folder, network=NETWORK, base=None):
    return peft.load(folder, network, partitioning.abstract_params(network)[0], base)


def edit(folder, **changes):
    path = folder / 'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    path = folder / 'adapter_model.safetensors'
    save_file(change(load_file(path)), path)


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(two))


REFUSED = {
    'init_lora_weights': ['pissa', 'pissa_niter_16', 'PiSSA', 'olora', 'corda', 'loftq', 'lora_ga', 'new', 3],
    'loftq_config': [{'loftq_bits': 4}],
    'alora_invocation_tokens': [[1, 2]],
    'layer_replication': [[[0, 2], [1, 2]]],
    'lora_bias': [True],
    'trainable_token_indices': [[0, 1], {'embed_tokens': [1]}],
    'target_parameters': [['mlp.experts.gate_up_proj']],
    'megatron_config': [{'x': 1}],
    'use_qalora': [True],
    'use_dora': [True],
    'use_bdlora': [{'x': 1}],
    'monteclora_config': [{'x': 1}],
    'arrow_config': [{'x': 1}],
    'kasa_config': [{'x': 1}],
    'velora_config': [{'x': 1}],
    'fan_in_fan_out': [True],
    'bias': ['all', 'lora_only', None],
    'modules_to_save': [['lm_head'], ['score'], 'score'],
    'an_option_of_next_year': [True, 'x', 1, 0],
    'peft_type': ['LOHA', None],
    'task_type': ['TOKEN_CLS', 'FEATURE_EXTRACTION', 1],
    'r': [0, -1, '8', 8.0, True, None],
    'lora_alpha': [0, '16', float('nan'), float('inf'), None, True],
    'lora_dropout': [3, -0.1, 1, '0', None],
    'use_rslora': [1, 'yes'],
    'rank_pattern': [{'q_proj': 0}, {'q_proj': '8'}, {'(': 4}, [1]],
    'alpha_pattern': [{'q_proj': float('nan')}, {'q_proj': 0}],
    'target_modules': [1, '(', [1]],
    'layers_to_transform': ['1', [True]],
    'revision': [1],
}


@pytest.mark.parametrize(('key', 'value'), [(k, v) for k, values in REFUSED.items() for v in values])
def test_an_option_that_is_not_understood_is_named(saved, key, value):
    edit(saved, **{key: value})
    with pytest.raises(UserError, match=key):
        load(saved)


HARMLESS = {
    'init_lora_weights': [True, False, None, 'gaussian', 'orthogonal', 'eva', 'mica'],
    'inference_mode': [False],
    'revision': ['main'],
    'auto_mapping': [{'base_model_class': 'LlamaForCausalLM'}],
    'peft_version': ['0.30.0'],
    'runtime_config': [{'ephemeral_gpu_offload': False}],
    'megatron_core': ['megatron.core'],
    'qalora_group_size': [32],
    'corda_config': [None, {'x': 1}],
    'an_option_of_next_year': [None, False, {}, []],
    'layers_to_transform': [[0, 1], []],
    'exclude_modules': [['lm_head'], 'up_proj'],
    'task_type': [None],
    'target_modules': ['all-linear', r'.*\.self_attn\.[qkvo]_proj', None],
}


@pytest.mark.parametrize(('key', 'value'), [(k, v) for k, values in HARMLESS.items() for v in values])
def test_an_option_that_changes_nothing_is_read_over(saved, adapter, key, value):
    edit(saved, **{key: value})
    assert_same(load(saved), adapter)


def test_every_field_of_pefts_configuration_with_its_own_default_is_read(saved, adapter):
    config = pytest.importorskip('peft').LoraConfig(r=4, lora_alpha=6, target_modules=['q_proj', 'k_proj', 'v_proj'])
    config.target_modules.add('o_proj')
    config.task_type = 'CAUSAL_LM'
    config.save_pretrained(saved)
    assert_same(load(saved), adapter)


def test_what_peft_would_use_where_the_file_is_silent(tmp_path):
    (tmp_path / 'adapter_config.json').write_text('{"peft_type": "LORA"}')
    config = peft_config.read(tmp_path)
    assert (config.rank, config.alpha, config.dropout, config.scale_of('x')) == (8, 8.0, 0.0, 1.0)


SPELLINGS = {
    'the adapter is named': lambda n: n.replace('.weight', '.default.weight'),
    'by another name': lambda n: n.replace('.weight', '.policy.weight'),
    'inside a larger model': lambda n: n.replace('model.layers', 'model.language_model.layers'),
    'as the text part': lambda n: n.replace('base_model.model.model.', 'base_model.model.language_model.model.'),
    'compiled': lambda n: n.replace('base_model.model.', 'base_model.model._orig_mod.'),
    'compiled as a whole': lambda n: '_orig_mod.' + n,
    'of several devices': lambda n: f'module.{n}',
    'of shards': lambda n: n.replace('.self_attn', '._fsdp_wrapped_module.self_attn'),
    'with activations computed again': lambda n: n.replace('.self_attn', '._checkpoint_wrapped_module.self_attn'),
    'plain': lambda n: n.removeprefix('base_model.model.'),
    'without its head': lambda n: n.replace('base_model.model.model.', 'base_model.model.'),
}


@pytest.mark.parametrize('spelling', SPELLINGS)
def test_tensor_names_are_read_as_they_are_spelled(saved, adapter, spelling):
    rewrite(saved, lambda tensors: {SPELLINGS[spelling](name): x for name, x in tensors.items()})
    assert_same(load(saved), adapter)


def test_one_tensor_under_two_names_is_refused(saved):
    name = NAME.format(0, 'q_proj', 'A')
    rewrite(saved, lambda t: t | {name.replace('.weight', '.default.weight'): t[name]})
    with pytest.raises(UserError, match='twice'):
        load(saved)


def test_numbers_that_are_not_finite_are_named(saved):
    name = NAME.format(1, 'q_proj', 'B')
    rewrite(saved, lambda t: t | {name: np.where(t[name] > 0, np.nan, t[name])})
    with pytest.raises(UserError, match='layers.1.self_attn.q_proj.lora_B.weight has numbers that are not finite'):
        load(saved)


def test_a_rank_that_the_tensors_have_not_is_the_configurations_fault(saved):
    edit(saved, r=8)
    with pytest.raises(UserError, match=r'lora_A.weight is of rank 4, and r and rank_pattern in adapter_config.json'):
        load(saved)


FOREIGN = {
    'model.embed_tokens.lora_embedding_A': 'embed_tokens',
    'lm_head.lora_A.weight': 'output matrix is its embedding',
    'model.layers.0.self_attn.q_proj.lora_B.bias': 'lora_bias',
    'model.layers.0.self_attn.q_proj.lora_magnitude_vector': 'use_dora',
    'model.embed_tokens.token_adapter.trainable_tokens_delta': 'trainable_token_indices',
    'model.norm.modules_to_save.weight': 'modules_to_save',
    'model.layers.0.mlp.up_proj.lora_A.weight': 'does not target',
    'model.layers.2.self_attn.q_proj.lora_A.weight': 'no place',
    'lm_head.weight': 'whole',
}


@pytest.mark.parametrize('name', FOREIGN)
def test_a_tensor_that_has_no_place_names_the_option_it_is_of(saved, name):
    rewrite(saved, lambda tensors: tensors | {f'base_model.model.{name}': np.ones((4, 16), np.float32)})
    with pytest.raises(UserError, match=FOREIGN[name]):
        load(saved)


def test_a_copy_of_the_bases_embedding_is_read_over_and_another_refused(saved, adapter, base):
    name, table = 'base_model.model.model.embed_tokens.weight', np.asarray(base['token_embedder']['embedding'])
    rewrite(saved, lambda tensors: tensors | {name: table})
    assert_same(load(saved, base=base), adapter)
    rewrite(saved, lambda tensors: tensors | {name: table + 1})
    with pytest.raises(UserError, match='embed_tokens.weight'):
        load(saved, base=base)


def test_a_module_that_is_targeted_must_be_there(saved):
    rewrite(saved, lambda t: {name: x for name, x in t.items() if name != NAME.format(1, 'q_proj', 'B')})
    with pytest.raises(UserError, match='lacks tensor .*layers.1.self_attn.q_proj.lora_B'):
        load(saved)


def test_weights_of_torchs_own_format_say_how_to_convert_them(saved):
    (saved / 'adapter_model.safetensors').rename(saved / 'adapter_model.bin')
    with pytest.raises(UserError, match=f'cd {saved} && python -c .*safetensors.torch.save_file'):
        load(saved)


def test_lora_of_the_output_matrix_is_read_where_there_is_one(tmp_path):
    network = Decoder(DecoderConfig(**(vars(CONFIG) | {'logits_via_embedding': False})))
    shapes = partitioning.abstract_params(network)[0]
    values = lambda *shape: np.random.default_rng(0).normal(size=shape).astype(np.float32)  # noqa: E731
    made = lora.Adapter(lora={'decoder': {'logits_dense': {'a': values(16, 3), 'b': values(3, 40)}}}, scale=2.0)
    peft.save(tmp_path, network, made, 'base')
    assert json.loads((tmp_path / 'adapter_config.json').read_text())['target_modules'] == ['lm_head']
    assert_same(peft.load(tmp_path, network, shapes), made)


# A rank and a scale for each layer.


def uneven(saved):
    """Rank 2 and another alpha in one layer, in the way that PEFT writes it."""
    def cut(tensors):
        out = dict(tensors)
        out[NAME.format(1, 'q_proj', 'A')] = tensors[NAME.format(1, 'q_proj', 'A')][:2]
        out[NAME.format(1, 'q_proj', 'B')] = np.ascontiguousarray(tensors[NAME.format(1, 'q_proj', 'B')][:, :2])
        return out

    rewrite(saved, cut)
    edit(saved, rank_pattern={r'layers\.1\..*q_proj': 2}, alpha_pattern={r'layers\.1\.self_attn\.(q|k)_proj': 10})


@dataclasses.dataclass
class Sliced:
    """An array of the host as a leaf."""

    array: np.ndarray

    @property
    def shape(self):
        return self.array.shape

    def read_into(self, out, index):
        out[...] = self.array[index]


def deltas(adapter):
    """What an adapter does to each kernel, in NumPy."""
    flat = traverse_util.flatten_dict(jax.device_get(adapter.lora), sep='/')
    layers = [path.removesuffix('/a') for path in flat if path.endswith('/a')]
    return {x: lora.scale_of(adapter.scale, x) * (flat[f'{x}/a'] @ flat[f'{x}/b']) for x in layers}


def test_ranks_and_scales_of_layers_are_those_of_the_patterns(saved, adapter):
    before = deltas(adapter)
    uneven(saved)
    made = load(saved)
    flat = traverse_util.flatten_dict(adapter.lora, sep='/')
    got = deltas(made)
    np.testing.assert_allclose(got[QUERY][0], before[QUERY][0], rtol=1e-6)
    want = 10 / 2 * (flat[f'{QUERY}/a'][1, :, :2] @ flat[f'{QUERY}/b'][1, :2])
    np.testing.assert_allclose(got[QUERY][1], want, rtol=1e-5, atol=1e-5)
    key = QUERY.replace('query', 'key')
    np.testing.assert_allclose(got[key][1], before[key][1] * 10 / 6, rtol=1e-6)
    assert made.lora['decoder']['layers']['self_attention']['query']['a'].shape == (2, 16, 4)
    assert hash(made.scale) and lora.as_scale(json.loads(json.dumps(made.scale))) == made.scale


def test_they_go_out_again_as_patterns_and_come_back(saved, tmp_path):
    uneven(saved)
    made = load(saved)
    peft.save(tmp_path / 'b', NETWORK, made, 'base')
    config = json.loads((tmp_path / 'b/adapter_config.json').read_text())
    assert config['r'] == 4 and config['rank_pattern'] == {'model.layers.1.self_attn.q_proj': 2}
    assert config['alpha_pattern'] == dict.fromkeys([f'model.layers.1.self_attn.{x}_proj' for x in 'qk'], 10)
    assert_same(load(tmp_path / 'b'), made)


def test_layers_without_a_pair_stay_without_one(saved, tmp_path):
    rewrite(saved, lambda tensors: {name: x for name, x in tensors.items() if '.layers.1.' in name})
    edit(saved, layers_to_transform=[1], layers_pattern='layers')
    made = load(saved)
    assert not deltas(made)[QUERY][0].any() and deltas(made)[QUERY][1].any()
    peft.save(tmp_path / 'b', NETWORK, made, 'base')
    config = json.loads((tmp_path / 'b/adapter_config.json').read_text())
    assert all('.1.' in name for name in config['target_modules']) and config['r'] == 4
    assert_same(load(tmp_path / 'b'), made)


def test_rslora_divides_by_the_root_of_each_rank(saved):
    uneven(saved)
    edit(saved, use_rslora=True)
    scale = dict(load(saved).scale)[QUERY]
    np.testing.assert_allclose(scale, [6 / 2, 10 / 2**0.5])


def test_all_that_use_a_scale_use_each_layers_own(saved, base):
    uneven(saved)
    made, one = load(saved), np.array([[1, 2, 3]])
    merged = lora.merge(base, made)
    kernel = traverse_util.flatten_dict(merged, sep='/')[f'{QUERY}/kernel']
    plain = traverse_util.flatten_dict(base, sep='/')[f'{QUERY}/kernel']
    np.testing.assert_allclose(kernel - plain, deltas(made)[QUERY], atol=1e-5)

    pair = traverse_util.flatten_dict(made.lora, sep='/')
    scale = lora.scale_of(made.scale, QUERY)
    part = leaves.Merged(Sliced(np.asarray(plain)), np.dtype('float32'), pair[f'{QUERY}/a'], pair[f'{QUERY}/b'], scale)
    out = np.empty((1, *plain.shape[1:]), np.float32)
    part.read_into(out, (slice(1, 2), *leaves.full_index(plain.shape[1:])))
    np.testing.assert_allclose(out[0], kernel[1], atol=1e-5)

    run = lambda variables: NETWORK.apply(variables, one, one > 0, one[:, None])  # noqa: E731
    np.testing.assert_allclose(run(lora.bind(base, made)), run({'params': merged}), atol=2e-3)
    for other in (
        averaging.concatenate([made, made], [0.25, 0.75]), averaging.truncate(made, 4)[0], lora.rescaled(made, 2.0),
    ):  # fmt: skip
        for layer, delta in deltas(other).items():
            np.testing.assert_allclose(delta, deltas(made)[layer], atol=2e-4)
    back = lora.rescaled(lora.rescaled(made, 2.0), made.scale)
    np.testing.assert_allclose(deltas(back)[QUERY], deltas(made)[QUERY], atol=1e-4)


def test_padding_stays_zero_while_an_adapter_is_trained(saved, base):
    uneven(saved)
    made, tokens = load(saved), np.array([[1, 2, 3]])  # of one value each, attention would have no gradient
    loss = lambda a: (NETWORK.apply(lora.bind(base, a), tokens, tokens > 0, tokens[:, None] + 3) ** 2).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(made).lora['decoder']['layers']['self_attention']['query']
    assert grads['a'][1, :, :2].any() and not grads['a'][1, :, 2:].any() and not grads['b'][1, 2:].any()

