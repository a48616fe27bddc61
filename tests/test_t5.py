"""The encoder-decoder against itself; against transformers in tests/parity, against T5X in test_t5x.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import traverse_util
from tiny import EOS, D, P, R, V

from perl_jax import types
from perl_jax.models import lora
from perl_jax.models.logprobs import response_logprobs
from perl_jax.models.t5 import T5, T5Config
from perl_jax.parallel import partitioning
from perl_jax.rewards.scoring import score
from perl_jax.rl.sampling import SamplingConfig, sample

# No two axes are equally long, and no distance that is shorter than max_distance has the last bucket.
CONFIG = T5Config(
    vocab_size=V,
    emb_dim=D,
    num_heads=4,
    head_dim=6,
    mlp_dim=48,
    num_encoder_layers=1,
    num_decoder_layers=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
)
NETWORK = T5(CONFIG)
FIRST = T5(dataclasses.replace(CONFIG, activation='relu', gated=False, logits_via_embedding=True))
K = 3
BATCH = tiny.responses(B=3, K=K)
SPEC = tiny.SPECS['lora-all-linear']
KEY = jax.random.key(0)
networks = pytest.mark.parametrize('network', [NETWORK, FIRST], ids=['1.1', '1.0'])

hidden = functools.partial(tiny.hidden, network=NETWORK)


def read(batch):
    """Which hidden states mean something: the start token's, and those of the real response tokens."""
    return np.concatenate([np.ones_like(batch.targets_mask[..., :1]), batch.targets_mask], axis=-1)


def role(network=NETWORK):
    params = tiny.base(network)
    return params, tiny.adapter(SPEC, params, head=False)


@networks
def test_names_shapes_and_axes_are_t5x(network):
    shapes, axes = partitioning.abstract_params(network)
    attention = {'query': (D, 24), 'key': (D, 24), 'value': (D, 24), 'out': (24, D)}
    mlp = {'wi_0': (D, 48), 'wi_1': (D, 48), 'wo': (48, D)} if network is NETWORK else {'wi': (D, 48), 'wo': (48, D)}
    blocks = {
        'encoder': (1, {'attention': attention, 'mlp': mlp}, ['attention', 'mlp']),
        'decoder': (
            2,
            {'self_attention': attention, 'encoder_decoder_attention': attention, 'mlp': mlp},
            ['self_attention', 'cross_attention', 'mlp'],
        ),
    }
    want = {'token_embedder/embedding': (V, D)}
    for side, (count, parts, norms) in blocks.items():
        want |= {f'{side}/relpos_bias/rel_embedding': (4, 8), f'{side}/{side}_norm/scale': (D,)}
        layer = f'{side}/layers'
        for part, shapes_ in parts.items():
            want |= {f'{layer}/{part}/{name}/kernel': (count, *shape) for name, shape in shapes_.items()}
        want |= {f'{layer}/pre_{name}_layer_norm/scale': (count, D) for name in norms}
    if network is NETWORK:
        want['decoder/logits_dense/kernel'] = (D, V)
    assert {path: x.shape for path, x in traverse_util.flatten_dict(shapes, sep='/').items()} == want
    axes = traverse_util.flatten_dict(axes, sep='/')
    names = {D: 'embed', 24: 'joined_kv', 48: 'mlp', V: 'vocab', 4: 'heads', 8: 'relpos_buckets'}
    front = lambda path: ('layers',) if '/layers/' in path else ()  # noqa: E731
    assert axes == {path: front(path) + tuple(names[n] for n in s[len(front(path)) :]) for path, s in want.items()}
    rules = {name for name, _ in partitioning.standard_logical_axis_rules()}
    assert set(names.values()) <= rules


def test_random_weights_start_as_t5x_has_them():
    one = jnp.zeros((1, 1), int)
    params = partitioning.unbox(jax.jit(NETWORK.init)(KEY, one, one == 0, one[None]))['params']
    attention = jax.tree.map(lambda x: x[1], params['decoder']['layers']['self_attention'])
    assert np.std(params['token_embedder']['embedding']) == pytest.approx(1, rel=0.1)
    assert np.std(attention['key']['kernel']) == pytest.approx(D**-0.5, rel=0.15)
    assert np.std(attention['query']['kernel']) == pytest.approx((6 * D) ** -0.5, rel=0.15)


def test_k_branches_equal_k_sequences_values_and_gradients():
    """Each response behind a copy of its own prompt."""
    params, adapter = role()
    weights = np.random.default_rng(1).standard_normal((3, K, R + 1, D)).astype(np.float32) * read(BATCH)[..., None]
    each = lambda x: np.repeat(x, K, axis=0)  # noqa: E731
    rows = types.Responses(each(BATCH.inputs), each(BATCH.inputs_mask), BATCH.targets.reshape(3 * K, 1, R), None)

    def loss(params, adapter, batch):
        x = hidden(params, adapter, batch).reshape(3, K, R + 1, D)
        return (x * weights).sum(), jnp.where(read(BATCH)[..., None], x, 0)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    ((_, values), gradients), ((_, want), want_gradients) = run(params, adapter, BATCH), run(params, adapter, rows)
    np.testing.assert_allclose(values, want, atol=1e-5)
    flat = traverse_util.flatten_dict(want_gradients[0], sep='/')
    flat.pop('decoder/logits_dense/kernel')  # there are no logits here
    assert all(np.abs(x).max() > 0.1 for x in [*flat.values(), *jax.tree.leaves(want_gradients[1])])
    tiny.assert_close(gradients, want_gradients, atol=1e-4, rtol=1e-4)


def test_less_padding_changes_nothing():
    """The prompt of one token, and its responses, without any."""
    want = hidden(tiny.base(NETWORK), None, BATCH)[:1, :, :3]
    cut = types.Responses(BATCH.inputs[:1, :1], BATCH.inputs_mask[:1, :1], BATCH.targets[:1, :, :2], None)
    np.testing.assert_allclose(hidden(tiny.base(NETWORK), None, cut), want, atol=1e-5)


def test_logits_are_of_real_tokens_where_a_batch_says_its_fill():
    params, adapter = tiny.base(NETWORK), tiny.adapter(SPEC, tiny.base(NETWORK))

    def total(adapter, batch):
        variables = lora.bind(params, adapter, train=True)
        logps = jnp.where(batch.targets_mask, response_logprobs(NETWORK, variables, batch), 0)
        return logps.sum() + score(NETWORK, variables, batch).sum(), logps

    run, without = jax.jit(jax.value_and_grad(total, has_aux=True)), tiny.without_padding(BATCH)
    ((_, want), want_gradients), ((_, got), gradients) = run(adapter, BATCH), run(adapter, without)
    assert without.fill[1] < 1
    np.testing.assert_allclose(got, want, atol=1e-4)
    tiny.assert_close(gradients, want_gradients, atol=1e-4)


def test_positions_count():
    """Two prompts of the same tokens in another order are told apart, and so are two responses."""
    one = dataclasses.replace(BATCH, inputs=BATCH.inputs[:, ::-1], inputs_mask=BATCH.inputs_mask[:, ::-1])
    assert np.abs(hidden(tiny.base(NETWORK), None, one) - hidden(tiny.base(NETWORK), None, BATCH))[1].max() > 0.1


def test_what_stands_at_the_padding_changes_nothing():
    params, real = tiny.base(NETWORK), read(BATCH)
    other = dataclasses.replace(
        BATCH,
        inputs=np.where(BATCH.inputs_mask, BATCH.inputs, 7),
        targets=np.where(BATCH.targets_mask, BATCH.targets, V - 1),
    )
    one, two = (hidden(params, None, batch) for batch in (BATCH, other))
    np.testing.assert_array_equal(one[real], two[real])
    assert not np.array_equal(one, two)


def test_tokens_ahead_change_nothing():
    targets = BATCH.targets.copy()
    targets[:, :, 2:] = 7
    params = tiny.base(NETWORK)
    one, two = hidden(params, None, BATCH), hidden(params, None, dataclasses.replace(BATCH, targets=targets))
    np.testing.assert_array_equal(one[:, :, :3], two[:, :, :3])
    assert not np.array_equal(one[:, :, 3], two[:, :, 3])


@networks
def test_decode_through_the_cache_equals_teacher_forcing(network):
    params, adapter = role(network)
    variables = lora.bind(params, adapter)
    prefill = jax.jit(lambda v: network.apply(v, BATCH.inputs, BATCH.inputs_mask, K, R, method='prefill'))
    last, cache = prefill(variables)
    decode = jax.jit(lambda v, *step: network.apply(v, *step, method='decode'))
    got = [jnp.broadcast_to(last[:, None], (3, K, D))]
    for t in range(R):
        now, cache = decode(variables, BATCH.targets[:, :, t], t, cache)
        got.append(now)
    np.testing.assert_allclose(np.stack(got, axis=2), hidden(params, adapter, BATCH, network=network), atol=1e-5)


def test_the_prompt_is_computed_once():
    """No array holds it K times, neither in a forward pass nor in the sampler."""
    params, prompts = tiny.base(NETWORK), tiny.prompts(BATCH)
    config = SamplingConfig(num_samples=K, max_decode_length=R)
    found = {
        'forward': tiny.arrays(lambda p: hidden(p, None, BATCH), params),
        'sampler': tiny.arrays(lambda p: sample(NETWORK, {'params': p}, prompts, KEY, EOS, config), params),
    }
    for shapes in found.values():
        assert (3, P, 4, 6) in shapes  # what the branches share
        assert not {(3, K, P, 4, 6), (3 * K, P, 4, 6), (3, K, P, D), (3 * K, P, D)} & shapes


@jax.jit
def draw(params, adapter):
    config = SamplingConfig(num_samples=K, max_decode_length=R, temperature=0.7)
    return sample(NETWORK, lora.bind(params, adapter), tiny.prompts(BATCH), KEY, EOS, config)


def test_the_sampler_draws_with_the_log_probs_of_teacher_forcing():
    params, adapter = role()
    rollout = draw(params, adapter)
    want = jax.jit(lambda p, a, r: response_logprobs(NETWORK, lora.bind(p, a), r, 0.7))(params, adapter, rollout)
    np.testing.assert_allclose(rollout.logprobs, np.where(rollout.targets_mask, want, 0), atol=1e-5)
    assert len(np.unique(rollout.targets[:, :, 0])) > 3


def test_merged_equals_bound():
    params, adapter = role()
    got = hidden(lora.merge(params, adapter), None, BATCH)
    want = hidden(params, adapter, BATCH)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert np.abs(want - hidden(params, None, BATCH)).mean() > 0.1


PAIRS = tiny.responses(B=4, K=2, lengths=np.array([[5, 3], [2, 4], [1, 5], [3, 3]]))
BATCHES = {'sft': PAIRS, 'reward': (PAIRS, tiny.thumbs(B=4)), 'policy': tiny.experience(B=4)}


@pytest.mark.parametrize('kind', BATCHES)
def test_every_step_learns_and_moves_every_adapter_leaf(kind):
    """LoRA in the encoder, the decoder and between them; the base stays bit for bit."""
    tx, params = optax.adam(1e-2), jax.tree.map(jnp.copy, tiny.base(NETWORK))
    before = state = tiny.create(kind, SPEC, params, tx)
    step, metrics = jax.jit(tiny.stepper(kind, tx, NETWORK)), []
    for _ in range(8):
        state, now = step(params, state, BATCHES[kind], KEY)
        metrics.append(now[{'sft': 'loss/nll', 'reward': 'loss/reward', 'policy': 'loss/value'}[kind]])
    assert metrics[-1] < 0.9 * metrics[0]
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), tiny.adapters(before), tiny.adapters(state))
    assert all(jax.tree.leaves(moved)), moved
    assert tiny.same(params, tiny.base(NETWORK))


@functools.cache
def with_remat(remat):
    """Hidden states, an adapter's gradient with dropout on, and how much its backward pass keeps of the forward one."""
    params, network = tiny.base(NETWORK), T5(dataclasses.replace(CONFIG, remat=remat))
    adapter = tiny.adapter(dataclasses.replace(SPEC, dropout=0.5), params, head=False)

    def loss(adapter):
        x = hidden(params, adapter, BATCH, {'dropout': KEY}, network=network, train=True)
        return (x**2 * read(BATCH)[..., None]).sum(), x

    kept = jax.eval_shape(lambda a: jax.vjp(loss, a, has_aux=True)[1], adapter)
    return *jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter), sum(x.size for x in jax.tree.leaves(kept))


@pytest.mark.parametrize('remat', ['full', 'minimal'])
def test_remat_changes_nothing_but_memory(remat):
    ((_, x), gradients, kept), ((_, want), want_gradients, all_kept) = with_remat(remat), with_remat('none')
    np.testing.assert_allclose(x, want, atol=1e-5)
    tiny.assert_close(gradients, want_gradients, atol=1e-4, rtol=1e-4)
    assert kept < 0.7 * all_kept


def test_bfloat16_is_near_float32_with_float32_logits():
    low, params = T5(dataclasses.replace(CONFIG, dtype='bfloat16')), tiny.base(NETWORK)
    x = hidden(params, None, BATCH, network=low)
    assert x.dtype == jnp.bfloat16
    logits = lambda net, x: net.apply({'params': params}, x, method='logits')  # noqa: E731
    got, want = logits(low, x), logits(NETWORK, hidden(params, None, BATCH))
    assert got.dtype == jnp.float32
    assert np.abs(got - want)[read(BATCH)].mean() < 0.1
