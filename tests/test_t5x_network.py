"""T5X's own network as reward and policy, with LoRA by interception; skipped where T5X is not installed."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from toy_runs import perl, quoted, ran, toy
from toy_runs import rows as logged

from perl_jax import types
from perl_jax.interop import t5x, t5x_network
from perl_jax.models import lora
from perl_jax.models.logprobs import response_logprobs
from perl_jax.parallel import partitioning
from perl_jax.rl import sampling

theirs = pytest.importorskip('t5x.examples.t5.network')
B, K, P, R, V = 2, 3, 5, 4, 60
MODEL, NETWORK = '--gin_file=t5x/examples/t5/t5_1_1/tiny.gin', '--gin_file=models/t5x_network.gin'


@pytest.fixture(scope='module', autouse=True)
def promoted():
    """T5X broadcasts [B, 1] with [V]."""
    with jax.numpy_rank_promotion('allow'):
        yield


@pytest.fixture(scope='module')
def case():
    """T5X's module, ours around it, its parameters, and a batch."""
    config = theirs.T5Config(
        vocab_size=V, emb_dim=8, num_heads=2, head_dim=3, mlp_dim=16, num_encoder_layers=2, num_decoder_layers=2,
        mlp_activations=('gelu', 'linear'), dropout_rate=0.0,
    )  # fmt: skip
    module, rng = theirs.Transformer(config), np.random.default_rng(0)
    network, one = t5x_network.network(module), jnp.zeros((1, 1), jnp.int32)
    params = partitioning.unbox(network.init(jax.random.key(0), one, one == 0, one[:, None]))['params']
    inputs, targets = (jnp.array(rng.integers(3, V, shape), jnp.int32) for shape in ((B, P), (B, K, R)))
    return module, network, params, (inputs, jnp.arange(P) < jnp.array([[5], [3]]), targets)


def test_it_computes_what_t5x_does_and_what_ours_does(case):
    module, network, params, (inputs, mask, targets) = case
    hidden = network.apply({'params': params}, inputs, mask, targets)
    logits = network.apply({'params': params}, hidden, method='logits')
    flat = targets.reshape(-1, R)
    prompts, before = jnp.repeat(jnp.where(mask, inputs, 0), K, 0), jnp.pad(flat, ((0, 0), (1, 0)))[:, :-1]
    own = module.apply({'params': params}, prompts, before, flat, enable_dropout=False)
    np.testing.assert_allclose(logits[:, :, :-1], own.reshape(B, K, R, V), atol=1e-5)
    stacks = {}
    for path, x in traverse_util.flatten_dict(params, sep='/').items():
        stacks.setdefault(re.sub(r'layers_\d+', 'layers', path), []).append(x)
    stacked = {path: jnp.stack(xs) if '/layers/' in path else xs[0] for path, xs in stacks.items()}
    ours = {'params': traverse_util.unflatten_dict(stacked, sep='/')}
    np.testing.assert_allclose(hidden, t5x.network(module).apply(ours, inputs, mask, targets), atol=1e-5)


def test_lora_is_the_merged_weights_and_the_sampler_says_what_it_drew(case):
    _, network, params, (inputs, mask, targets) = case
    adapter = jax.tree.map(lambda x: x + 0.1, lora.LoraSpec(rank=2).init(jax.random.key(1), params))
    bound = lora.bind(params, adapter)
    hidden = network.apply(bound, inputs, mask, targets)
    merged = network.apply({'params': lora.merge(params, adapter)}, inputs, mask, targets)
    np.testing.assert_allclose(hidden, merged, atol=1e-5)
    assert abs(hidden - network.apply({'params': params}, inputs, mask, targets)).max() > 0.1
    config = sampling.SamplingConfig(num_samples=K, max_decode_length=R, temperature=1.0)
    rollout = sampling.sample(network, bound, types.Prompts(inputs, mask), jax.random.key(0), 1, config)
    logprobs = response_logprobs(network, bound, rollout)
    np.testing.assert_allclose(jnp.where(rollout.targets_mask, logprobs, 0), rollout.logprobs, atol=1e-5)


def test_reward_and_policy_are_trained_on_it(tmp_path):
    pytest.importorskip('t5x.models')
    small = '--gin.TRAIN_STEPS=2', '--gin.EVAL_PERIOD=2'
    sources = []
    for phase in ('sft', 'reward', 'policy'):
        _, recipe, *rest = toy(phase, tmp_path / phase, *small, *sources)
        ran(phase, MODEL, recipe, NETWORK, *rest)
        values = [value for row in logged(tmp_path / phase) for value in row.values()]
        assert np.isfinite([value for value in values if not isinstance(value, str)]).all()
        name = 'REWARD_MODEL_DIR' if phase == 'reward' else 'INITIAL_CHECKPOINT_PATH'
        sources.append(quoted(name, tmp_path / phase))
    assert ran('sample', f'--model_dir={tmp_path}/policy', '--num=1').out
    _, recipe, *rest = toy('sft', tmp_path / 'again', *small)
    line = perl('sft', MODEL, recipe, NETWORK, *rest, '--gin.DROPOUT_RATE=0.1').line
    assert 'DROPOUT_RATE = 0.1 of T5X would change nothing' in line
    export = 'export', f'--model_dir={tmp_path}/sft', f'--output={tmp_path}/out'
    assert 'choose --format=t5x' in perl(*export, '--format=hf').line
    ran(*export, '--format=t5x')
    start = quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'out')
    ran('sft', MODEL, recipe, NETWORK, *rest, start)
