"""Adapters that peft makes, with each option that is understood: the same logits, coming in and going out again."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='needs torch, transformers and peft, which the tests do not install')
transformers = pytest.importorskip('transformers', reason='needs transformers')
peft = pytest.importorskip('peft', reason='needs peft')

from perl_jax.errors import UserError  # noqa: E402
from perl_jax.interop import hf  # noqa: E402
from perl_jax.interop import peft as our_peft  # noqa: E402
from perl_jax.models import lora  # noqa: E402
from perl_jax.parallel import partitioning  # noqa: E402
from perl_jax.parallel.partitioning import Partitioner  # noqa: E402
from perl_jax.runs import base as bases  # noqa: E402
from perl_jax.runs.base import BaseConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')  # peft's, of what is asked of it here
TOKENS = np.random.default_rng(0).integers(1, 60, (2, 7))


@pytest.fixture(scope='module', params=['tied', 'untied'])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=request.param == 'tied', initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def base_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation='eager').eval()


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def ours(folder, adapter_folder):
    network, partitioner = hf.network(str(folder)), Partitioner()
    with partitioner.scope():
        base = bases.load(BaseConfig(network, str(folder)), partitioner, 0)
    adapter = our_peft.load(adapter_folder, network, partitioning.abstract_params(network)[0], base.params)
    tokens = TOKENS[:, None, :]
    hidden = network.apply(lora.bind(base.params, adapter), tokens[:, 0, :1], tokens[:, 0, :1] > 0, tokens[:, :, 1:])
    logits = network.apply(lora.bind(base.params, adapter), hidden, method='logits')[:, 0]
    return network, adapter, np.asarray(logits)


def trained(folder, save_to, **options):
    """An adapter with noise for weights, as peft leaves it, and its logits."""
    torch.manual_seed(1)
    options = {'r': 4, 'lora_alpha': 6, 'target_modules': ['q_proj', 'v_proj'], 'task_type': 'CAUSAL_LM'} | options
    model = peft.get_peft_model(base_model(folder), peft.LoraConfig(**options)).eval()
    before = theirs(model)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if 'lora_' in name:
                x += 0.1 * torch.randn_like(x)
    model.save_pretrained(save_to)
    want = theirs(model)
    assert np.abs(want - before).max() > 0.1
    return want


OPTIONS = {
    'plain': {},
    'rslora': {'use_rslora': True},
    'ranks': {'rank_pattern': {'q_proj': 2, r'layers\.1\.self_attn\.v_proj': 7}},
    'alphas': {'alpha_pattern': {r'layers\.[01]\..*q_proj': 3, 'v_proj': 9}},
    'both, with rslora': {'rank_pattern': {'layers.2.self_attn.q_proj': 1}, 'alpha_pattern': {'q_proj': 5},
                          'use_rslora': True},
    'first key counts': {'rank_pattern': {r'.*\.1\..*': 3, 'q_proj': 5}},
    'some layers': {'layers_to_transform': [0, 2]},
    'one layer by pattern': {'layers_to_transform': 1, 'layers_pattern': 'layers'},
    'a regex': {'target_modules': r'.*\.(0|1)\.self_attn\.(q|o)_proj|.*down_proj'},
    'all but': {'target_modules': 'all-linear', 'exclude_modules': ['o_proj', 'model.layers.0.mlp.up_proj']},
    'gaussian': {'init_lora_weights': 'gaussian'},
    'orthogonal': {'init_lora_weights': 'orthogonal'},
    'not at all': {'init_lora_weights': False},
}  # fmt: skip


@pytest.mark.parametrize('name', OPTIONS)
def test_an_adapter_of_pefts_making_comes_in_and_goes_out(folder, name, tmp_path):
    want = trained(folder, tmp_path / 'theirs', **OPTIONS[name])
    network, adapter, got = ours(folder, tmp_path / 'theirs')
    np.testing.assert_allclose(got, want[:, : got.shape[1]], atol=2e-4)
    our_peft.save(tmp_path / 'ours', network, adapter, str(folder))
    model = peft.PeftModel.from_pretrained(base_model(folder), tmp_path / 'ours').eval()
    np.testing.assert_allclose(theirs(model), want, atol=1e-5)


def test_lora_of_the_output_matrix(folder, tmp_path):
    """peft adds a copy of the matrix itself. Where it is the embedding, it is refused by name."""
    want = trained(folder, tmp_path, target_modules=['q_proj', 'lm_head'])
    if folder.name.startswith('tied'):
        with pytest.raises(UserError, match='lm_head.*output matrix is its embedding'):
            ours(folder, tmp_path)
    else:
        got = ours(folder, tmp_path)[2]
        np.testing.assert_allclose(got, want[:, : got.shape[1]], atol=2e-4)


def test_pissa_is_refused_and_read_once_it_is_converted(folder, tmp_path):
    torch.manual_seed(1)
    options = {'r': 4, 'lora_alpha': 6, 'target_modules': ['q_proj', 'v_proj'], 'task_type': 'CAUSAL_LM'}
    config = peft.LoraConfig(init_lora_weights='pissa', **options)
    model = peft.get_peft_model(base_model(folder), config).eval()
    model.peft_config['default'].init_lora_weights = True
    model.save_pretrained(tmp_path / 'first')
    model.peft_config['default'].init_lora_weights = 'pissa'
    with torch.no_grad():
        for name, x in model.named_parameters():
            if 'lora_' in name:
                x += 0.1 * torch.randn_like(x)
    want = theirs(model)
    model.save_pretrained(tmp_path / 'pissa')
    with pytest.raises(UserError, match='init_lora_weights.*path_initial_model_for_weight_conversion'):
        ours(folder, tmp_path / 'pissa')
    model.save_pretrained(tmp_path / 'plain', path_initial_model_for_weight_conversion=str(tmp_path / 'first'))
    got = ours(folder, tmp_path / 'plain')[2]
    np.testing.assert_allclose(got, want[:, : got.shape[1]], atol=1e-3)


EMBEDDINGS = {
    'trainable_token_indices': {'trainable_token_indices': {'embed_tokens': [1, 2]}},
    'embed_tokens': {'target_modules': ['q_proj', 'embed_tokens']},
    'modules_to_save': {'modules_to_save': ['embed_tokens']},
    'use_dora': {'use_dora': True},
    'lora_bias': {'lora_bias': True, 'target_modules': ['q_proj']},
    'alora_invocation_tokens': {'alora_invocation_tokens': [3]},
}


@pytest.mark.parametrize('name', EMBEDDINGS)
def test_what_peft_writes_of_other_options_is_refused_by_name(folder, name, tmp_path):
    options = {'r': 4, 'target_modules': ['q_proj'], 'task_type': 'CAUSAL_LM'} | EMBEDDINGS[name]
    if name == 'lora_bias':
        options |= {'init_lora_weights': True}
    peft.get_peft_model(base_model(folder), peft.LoraConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=name):
        ours(folder, tmp_path)


def test_an_adapter_of_weights_for_a_classifier_keeps_its_head(folder, tmp_path):
    torch.manual_seed(2)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0)
    config = peft.LoraConfig(r=2, target_modules=['q_proj'], rank_pattern={'layers.0.self_attn.q_proj': 3},
                             task_type='SEQ_CLS')  # fmt: skip
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    network = hf.network(str(folder))
    adapter = our_peft.load(tmp_path, network, partitioning.abstract_params(network)[0])
    assert adapter.head['kernel'].shape == (32,) and jax.tree.leaves(adapter.lora)[0].shape[-1] == 3
