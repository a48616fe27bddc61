"""T5 by way of Hugging Face's checkpoints and PEFT's adapters; test_t5.py holds the network itself to transformers."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='needs torch, transformers and peft, which the tests do not install')
transformers = pytest.importorskip('transformers', reason='needs transformers')
peft = pytest.importorskip('peft', reason='needs peft')

from perl_jax.errors import UserError  # noqa: E402
from perl_jax.interop import hf  # noqa: E402
from perl_jax.interop import peft as our_peft  # noqa: E402
from perl_jax.models import lora  # noqa: E402
from perl_jax.parallel import leaves, partitioning  # noqa: E402

V = 61
SIZES = {
    'vocab_size': V, 'd_model': 32, 'd_kv': 6, 'd_ff': 48, 'num_layers': 2, 'num_decoder_layers': 3, 'num_heads': 4,
    'decoder_start_token_id': 0, 'pad_token_id': 0, 'relative_attention_num_buckets': 8,
    'relative_attention_max_distance': 10,
}  # fmt: skip
FAMILIES = {
    't5': ('T5', {'feed_forward_proj': 'relu', 'tie_word_embeddings': True}),
    't5_1_1': ('T5', {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}),
    'mt5': ('MT5', {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}),
}
families = pytest.mark.parametrize('family', FAMILIES)
rng = np.random.default_rng(0)
INPUTS, TARGETS = rng.integers(2, V, (3, 9)), rng.integers(2, V, (3, 7))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            name, settings = FAMILIES[family]
            torch.manual_seed(0)
            config = getattr(transformers, f'{name}Config')(**SIZES | settings)
            model = getattr(transformers, f'{name}ForConditionalGeneration')(config).eval()
            with torch.no_grad():
                for x in model.parameters():
                    x.add_(0.1 * torch.randn_like(x))
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = folder, model
        return made[family]

    return get


@pytest.mark.parametrize('start', [0, None, 5])
def test_another_start_of_generation_is_refused(saved, tmp_path, start):
    """transformers generates from generation_config.json's token, whatever config.json says."""
    shutil.copytree(saved('t5')[0], tmp_path / 'model')
    (tmp_path / 'model' / 'generation_config.json').write_text(json.dumps({'decoder_start_token_id': start}))
    if start is not None and start:
        with pytest.raises(UserError, match='generation_config.json: decoder_start_token_id = 5'):
            loaded(tmp_path / 'model')
    else:
        loaded(tmp_path / 'model')


def loaded(folder):
    network = hf.network(str(folder))
    shapes, _ = partitioning.abstract_params(network)
    return network, jax.tree.map(jnp.asarray, leaves.to_host(hf.leaves(str(folder), network, shapes), 'float32'))


def ours(network, variables):
    hidden = network.apply(variables, INPUTS, np.ones_like(INPUTS, bool), TARGETS[:, None])
    return np.asarray(network.apply(variables, hidden, method='logits')[:, 0, :-1])


def theirs(model):
    start = np.concatenate([np.zeros((3, 1), int), TARGETS[:, :-1]], axis=1)
    with torch.no_grad():
        return model(input_ids=torch.tensor(INPUTS), decoder_input_ids=torch.tensor(start)).logits.numpy()


@families
def test_logits_and_the_way_back(saved, family, tmp_path):
    folder, model = saved(family)
    network, base = loaded(folder)
    want = theirs(model)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(ours(network, {'params': base}), want, atol=1e-4)
    hf.save(tmp_path, network, base, 'float32')
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    np.testing.assert_array_equal(theirs(again), want)
    assert hf.network(str(tmp_path)) == network


def test_an_output_matrix_of_its_own_is_kept(saved, tmp_path):
    network, base = loaded(saved('t5_1_1')[0])
    base['decoder']['logits_dense']['kernel'] = base['decoder']['logits_dense']['kernel'][:, ::-1]
    hf.save(tmp_path, network, base, 'float32')
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(theirs(again), ours(network, {'params': base}), atol=1e-4)
    again.save_pretrained(tmp_path / 'theirs')
    network, back = loaded(tmp_path / 'theirs')
    jax.tree.map(np.testing.assert_array_equal, back, base)


@families
def test_adapters_go_to_peft_and_back(saved, family, tmp_path):
    folder, _ = saved(family)
    network, base = loaded(folder)
    adapter = lora.LoraSpec(rank=3, alpha=6.0, targets=lora.ALL_LINEAR).init(jax.random.key(0), base)
    adapter = adapter.replace(lora=jax.tree.map(lambda x: x + 0.05, adapter.lora))
    our_peft.save(tmp_path, network, adapter, str(folder))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    before = theirs(model)
    model = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    want = theirs(model)
    assert np.abs(want - before).max() > 0.1
    np.testing.assert_allclose(ours(network, lora.bind(base, adapter)), want, atol=1e-4)
    model.save_pretrained(tmp_path / 'theirs')
    back = our_peft.load(tmp_path / 'theirs', network, partitioning.abstract_params(network)[0])
    jax.tree.map(np.testing.assert_array_equal, back.lora, adapter.lora)


def test_a_reward_has_no_form_there(saved, tmp_path):
    network, base = loaded(saved('t5')[0])
    adapter = lora.with_head(lora.LoraSpec().init(jax.random.key(0), base), jax.random.key(0), 32, 1.0)
    with pytest.raises(UserError, match='T5 classifier'):
        our_peft.save(tmp_path, network, adapter, None)
    with pytest.raises(UserError, match='T5 classifier'):
        hf.save(tmp_path, network, base, 'float32', head=adapter.head['kernel'])
