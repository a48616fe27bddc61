import dataclasses
import functools
import inspect

import golden_llama
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from tiny import CONFIG, NETWORK, UNTIED, D, L, P, R, V

from perl_jax.interop.t5x_network import T5XNetwork
from perl_jax.models import lora
from perl_jax.models.decoder import Decoder
from perl_jax.models.network import Network
from perl_jax.models.t5 import T5
from perl_jax.parallel import partitioning

BATCH = tiny.responses(B=3, K=3)
SPEC = tiny.SPECS['lora']
networks = pytest.mark.parametrize('network', [NETWORK, UNTIED], ids=['tied', 'untied'])


@pytest.mark.parametrize('network', [Decoder, T5, T5XNetwork, tiny.Table])
def test_every_network_takes_what_the_protocol_says(network):
    for name in ('__call__', 'logits', 'prefill', 'decode'):
        expected, actual = ([*inspect.signature(getattr(x, name)).parameters] for x in (Network, network))
        assert actual == expected, name


def logits(params, hidden, network=NETWORK):
    return network.apply({'params': params}, hidden, method='logits')


def read(batch):
    """Which hidden states mean something: the prompt's last, and those of the real response tokens."""
    return np.concatenate([np.ones_like(batch.targets_mask[..., :1]), batch.targets_mask], axis=-1)


def test_the_batch_has_every_edge():
    assert BATCH.inputs_mask.sum(-1).tolist()[:2] == [1, P]
    assert {0, R} <= set(BATCH.targets_mask.sum(-1).ravel().tolist())
    assert BATCH.inputs[~BATCH.inputs_mask].any() and BATCH.targets[~BATCH.targets_mask].any()


@networks
def test_names_and_shapes_are_t5x(network):
    shapes, axes = partitioning.abstract_params(network)
    attention, mlp = 'decoder/layers/self_attention', 'decoder/layers/mlp'
    want = {
        'token_embedder/embedding': (V, D),
        'decoder/layers/pre_self_attention_layer_norm/scale': (L, D),
        f'{attention}/query/kernel': (L, D, 24),
        f'{attention}/key/kernel': (L, D, 12),
        f'{attention}/value/kernel': (L, D, 12),
        f'{attention}/out/kernel': (L, 24, D),
        'decoder/layers/pre_mlp_layer_norm/scale': (L, D),
        f'{mlp}/wi_0/kernel': (L, D, 48),
        f'{mlp}/wi_1/kernel': (L, D, 48),
        f'{mlp}/wo/kernel': (L, 48, D),
        'decoder/decoder_norm/scale': (D,),
    }
    if network is UNTIED:
        want['decoder/logits_dense/kernel'] = (D, V)
    assert {path: x.shape for path, x in traverse_util.flatten_dict(shapes, sep='/').items()} == want
    axes = traverse_util.flatten_dict(axes, sep='/')
    assert {path: len(names) for path, names in axes.items()} == {path: len(shape) for path, shape in want.items()}
    assert axes[f'{attention}/query/kernel'] == ('layers', 'embed', 'joined_kv')
    assert axes[f'{mlp}/wo/kernel'] == ('layers', 'mlp', 'embed')


@networks
def test_every_branch_equals_an_obvious_llama(network):
    """K branches equal K separate sequences, with the edges of the batch: lengths 1 and 0, padding full of garbage."""
    params = tiny.base(network)
    got = logits(params, tiny.hidden(params, None, BATCH, network=network), network)
    assert got.shape == (3, 3, R + 1, V)
    for b, k, tokens, p in tiny.one_by_one(BATCH):
        want = golden_llama.logits(params, network.config, tokens)[p - 1 :]
        np.testing.assert_allclose(got[b, k, : len(want)], want, atol=1e-4)


def test_k_branches_equal_k_sequences_values_and_gradients():
    """Each response behind a copy of its prompt, as one long response to the prompt's first token."""
    params, adapter = tiny.base(), tiny.adapter(SPEC, tiny.base(), head=False)
    weights = np.random.default_rng(1).standard_normal((3, 3, R + 1, D)).astype(np.float32) * read(BATCH)[..., None]

    def together(params, adapter):
        hidden = tiny.hidden(params, adapter, BATCH)
        return (hidden * weights).sum(), jnp.where(read(BATCH)[..., None], hidden, 0)

    tokens, mask, at = np.zeros((9, P + R), np.int32), np.zeros((9, P + R), bool), np.zeros((9, R + 1), int)
    for row, (_, _, sequence, p) in enumerate(tiny.one_by_one(BATCH)):
        tokens[row, : len(sequence)], mask[row, : len(sequence)] = sequence, True
        at[row] = p - 1 + np.arange(R + 1)

    def apart(params, adapter):
        one = dataclasses.replace(
            BATCH, inputs=tokens[:, :1], inputs_mask=mask[:, :1], targets=tokens[:, None, 1:], targets_mask=None
        )
        hidden = tiny.hidden(params, adapter, one)[:, 0]
        hidden = jnp.take_along_axis(hidden, jnp.minimum(at, P + R - 1)[..., None], axis=1).reshape(3, 3, R + 1, D)
        return (hidden * weights).sum(), jnp.where(read(BATCH)[..., None], hidden, 0)

    run = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, adapter)  # noqa: E731
    ((_, values), gradients), ((_, want), want_gradients) = run(together), run(apart)
    np.testing.assert_allclose(values, want, atol=1e-5)
    assert all(np.abs(x).max() > 0.1 for x in jax.tree.leaves(want_gradients))
    tiny.assert_close(gradients, want_gradients, atol=2e-4, rtol=1e-4)


def test_what_stands_at_the_padding_changes_nothing():
    params, real = tiny.base(), read(BATCH)
    other = dataclasses.replace(
        BATCH,
        inputs=np.where(BATCH.inputs_mask, BATCH.inputs, 7),
        targets=np.where(BATCH.targets_mask, BATCH.targets, V - 1),
    )
    one, two = (tiny.hidden(params, None, batch) for batch in (BATCH, other))
    np.testing.assert_array_equal(one[real], two[real])
    assert not np.array_equal(one, two)


def test_more_padding_changes_nothing():
    params, real = tiny.base(), read(BATCH)
    wide = lambda x, n: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n)])  # noqa: E731
    padded = dataclasses.replace(
        BATCH,
        inputs=wide(BATCH.inputs, 3),
        inputs_mask=wide(BATCH.inputs_mask, 3),
        targets=wide(BATCH.targets, 2),
        targets_mask=wide(BATCH.targets_mask, 2),
    )
    got = tiny.hidden(params, None, padded)[:, :, : R + 1]
    np.testing.assert_allclose(got[real], tiny.hidden(params, None, BATCH)[real], atol=1e-5)


def test_tokens_ahead_change_nothing():
    params = tiny.base()
    targets = BATCH.targets.copy()
    targets[:, :, 3:] = 7
    one = tiny.hidden(params, None, BATCH)
    two = tiny.hidden(params, None, dataclasses.replace(BATCH, targets=targets))
    np.testing.assert_array_equal(one[:, :, :4], two[:, :, :4])
    assert not np.array_equal(one[:, :, 4], two[:, :, 4])


WINDOWS = Decoder(dataclasses.replace(CONFIG, sliding_window=3, global_every=2, local_rope_theta=100.0))


@pytest.mark.parametrize('network', [NETWORK, WINDOWS], ids=['plain', 'windows'])
def test_decode_through_the_cache_equals_teacher_forcing(network):
    (params, adapter), batch, K = (tiny.base(), tiny.adapter(SPEC, tiny.base(), head=False)), BATCH, 3
    variables = lora.bind(params, adapter)
    want = tiny.hidden(params, adapter, batch, network=network)
    prefill = jax.jit(lambda v: network.apply(v, batch.inputs, batch.inputs_mask, K, R, method='prefill'))
    last, cache = prefill(variables)
    decode = jax.jit(lambda v, *step: network.apply(v, *step, method='decode'))
    got = [jnp.broadcast_to(last[:, None], (3, K, D))]
    for t in range(R):
        hidden, cache = decode(variables, batch.targets[:, :, t], t, cache)
        got.append(hidden)
    np.testing.assert_allclose(np.stack(got, axis=2), want, atol=1e-5)


@functools.cache
def with_remat(remat):
    """Hidden states, and an adapter's gradient, with dropout on."""
    adapter = tiny.adapter(dataclasses.replace(SPEC, dropout=0.5), tiny.base(), head=False)
    network, rngs = Decoder(dataclasses.replace(CONFIG, remat=remat)), {'dropout': jax.random.key(0)}

    def loss(adapter):
        hidden = tiny.hidden(tiny.base(), adapter, BATCH, rngs, network=network, train=True)
        return (hidden**2 * read(BATCH)[..., None]).sum(), hidden

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter)


@pytest.mark.parametrize('remat', ['full', 'minimal'])
def test_remat_changes_nothing(remat):
    ((_, hidden), gradients), ((_, want), want_gradients) = with_remat(remat), with_remat('none')
    np.testing.assert_allclose(hidden, want, atol=1e-5)
    tiny.assert_close(gradients, want_gradients, atol=1e-4, rtol=1e-4)


def test_remat_saves_less():
    """Of the backward pass of each, what it keeps of the forward one."""
    params, sizes = tiny.base(), {}
    for remat in ('none', 'minimal', 'full'):
        network = Decoder(dataclasses.replace(CONFIG, remat=remat))
        loss = lambda p, network=network: tiny.hidden(p, None, BATCH, network=network).sum()  # noqa: E731
        kept = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        sizes[remat] = sum(x.size for x in jax.tree.leaves(kept))
    assert sizes['full'] < sizes['minimal'] < sizes['none']


def test_bfloat16_is_near_float32_with_float32_logits():
    network, params = Decoder(dataclasses.replace(CONFIG, dtype='bfloat16')), tiny.base()
    hidden = tiny.hidden(params, None, BATCH, network=network)
    assert hidden.dtype == jnp.bfloat16
    got = logits(params, hidden, network)
    assert got.dtype == jnp.float32
    want = logits(params, tiny.hidden(params, None, BATCH))
    assert np.abs(got - want)[read(BATCH)].mean() < 0.1


def test_the_prompt_is_computed_once():
    """4 answers to one prompt cost much less than 4 times one answer."""

    def flops(K):
        batch = jax.tree.map(jnp.array, tiny.responses(B=2, K=K))
        batch = dataclasses.replace(batch, inputs=jnp.zeros((2, 64), int), inputs_mask=jnp.ones((2, 64), bool))
        lowered = jax.jit(lambda p, b: tiny.hidden(p, None, b)).lower(tiny.base(), batch)
        return lowered.cost_analysis()['flops']

    assert flops(4) < 1.4 * flops(1)


@pytest.mark.parametrize('network', [NETWORK, WINDOWS], ids=['plain', 'windows'])
def test_of_ends_only_their_states_are_handed_back(network):
    params, ends = tiny.base(), BATCH.targets_mask.sum(-1)
    variables = lora.bind(params, adapter := tiny.adapter(SPEC, params, head=False))
    run = jax.jit(lambda v: network.apply(v, BATCH.inputs, BATCH.inputs_mask, BATCH.targets, ends))
    whole = tiny.hidden(params, adapter, BATCH, network=network)
    np.testing.assert_allclose(run(variables), np.take_along_axis(whole, ends[..., None, None], 2)[:, :, 0], atol=1e-5)
