import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from tiny import D, L, specs

from perl_jax.errors import UserError
from perl_jax.models import lora
from perl_jax.models.lora import FullSpec, LoraSpec

KEY = jax.random.key(0)
BATCH = tiny.responses()
EVERYTHING = LoraSpec(rank=3, alpha=6.0, targets='.*')  # the output layer too, where there is one


def flat(tree):
    return traverse_util.flatten_dict(tree, sep='/')


@specs
def test_policy_equals_anchor_at_init_exactly(spec):
    base = tiny.base()
    policy = tiny.hidden(base, spec.init(KEY, base), BATCH)
    np.testing.assert_array_equal(policy, tiny.hidden(base, None, BATCH))


@specs
def test_a_trained_policy_is_not_the_anchor(spec):
    base = tiny.base()
    policy = tiny.hidden(base, tiny.adapter(spec, base, head=False), BATCH)
    assert np.abs(policy - tiny.hidden(base, None, BATCH)).max() > 0.1


def test_default_targets_are_every_attention_projection():
    layers = flat(LoraSpec(rank=3).init(KEY, tiny.base()).lora)
    at = 'decoder/layers/self_attention'
    assert {path: x.shape for path, x in layers.items()} == {
        f'{at}/query/a': (L, D, 3), f'{at}/query/b': (L, 3, 24),
        f'{at}/key/a': (L, D, 3), f'{at}/key/b': (L, 3, 12),
        f'{at}/value/a': (L, D, 3), f'{at}/value/b': (L, 3, 12),
        f'{at}/out/a': (L, 24, 3), f'{at}/out/b': (L, 3, D),
    }  # fmt: skip


def test_all_linear_layers_are_one_setting_away():
    layers = flat(LoraSpec(targets=lora.ALL_LINEAR).init(KEY, tiny.base(tiny.UNTIED)).lora)
    names = {path.split('/')[-2] for path in layers}
    assert names == {'query', 'key', 'value', 'out', 'wi_0', 'wi_1', 'wo'}


def test_a_is_gaussian_and_b_is_zero():
    adapter = LoraSpec(rank=64).init(KEY, tiny.base())
    for path, x in flat(adapter.lora).items():
        assert x.dtype == jnp.float32
        if path.endswith('/b'):
            assert not x.any()
        else:
            assert np.std(x) == pytest.approx(x.shape[1] ** -0.5, rel=0.05)
            assert np.abs(np.mean(x)) < 0.01
            assert not np.array_equal(x[0], x[1])  # each layer of the stack draws its own


def test_another_target_does_not_change_the_init_of_the_others():
    few = flat(LoraSpec(targets=r'.*attention/(query|value)').init(KEY, tiny.base()).lora)
    many = flat(LoraSpec(targets=lora.ALL_LINEAR).init(KEY, tiny.base()).lora)
    assert len(few) == 4 < len(many)
    for path, x in few.items():
        np.testing.assert_array_equal(x, many[path])
    drawn = [x for path, x in many.items() if path.endswith('/a') and x.shape == (L, D, 8)]
    assert not any(np.array_equal(x, y) for i, x in enumerate(drawn) for y in drawn[:i])


def test_init_follows_the_key():
    one, two, other = (LoraSpec().init(jax.random.key(seed), tiny.base()) for seed in (5, 5, 6))
    assert tiny.same(one, two)
    assert not tiny.same(one, other)


def test_targets_that_match_nothing_are_answered_with_the_layers():
    with pytest.raises(UserError, match='matches no layer') as error:
        LoraSpec(targets='.*attention/q').init(KEY, tiny.base())
    for layer in ('decoder/layers/self_attention/query', 'decoder/layers/mlp/wo'):
        assert layer in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('spec', 'network'), [
    *[(spec, tiny.NETWORK) for spec in tiny.SPECS.values()], (EVERYTHING, tiny.UNTIED),
], ids=[*tiny.SPECS, 'lora-everything'])  # fmt: skip
def test_merged_equals_bound(spec, network):
    base = tiny.base(network)
    adapter = tiny.adapter(spec, base, head=False)

    def logits(base, adapter):
        hidden = tiny.hidden(base, adapter, BATCH, network=network)
        return network.apply(lora.bind(base, adapter), hidden, method='logits')

    np.testing.assert_allclose(logits(lora.merge(base, adapter), None), logits(base, adapter), atol=3e-5, rtol=3e-5)


def test_a_pair_is_scaled_by_alpha_over_rank():
    base, spec = tiny.base(), LoraSpec(rank=4, alpha=12.0)
    adapter = tiny.adapter(spec, base)
    merged, pair = flat(lora.merge(base, adapter)), flat(adapter.lora)
    for layer in {path.rpartition('/')[0] for path in pair}:
        delta = 3.0 * np.stack([a @ b for a, b in zip(pair[f'{layer}/a'], pair[f'{layer}/b'])])
        np.testing.assert_allclose(merged[f'{layer}/kernel'] - flat(base)[f'{layer}/kernel'], delta, atol=1e-6)
    bound = flat(lora.bind(base, adapter)['lora'])
    np.testing.assert_allclose(bound[f'{layer}/b'], 3.0 * pair[f'{layer}/b'], rtol=1e-6)


def test_merge_keeps_the_dtype_and_leaves_the_base_alone():
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.base())
    before = jax.tree.map(np.array, base)
    merged = lora.merge(base, tiny.adapter(LoraSpec(), base))
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    assert tiny.same(before, base)
    assert not tiny.same(merged, base)


def test_bind_copies_nothing_of_the_base():
    base = tiny.base()
    for adapter in (None, LoraSpec().init(KEY, base)):
        bound, given = (jax.tree.leaves(tree) for tree in (lora.bind(base, adapter)['params'], base))
        assert all(x is y for x, y in zip(bound, given, strict=True))
    assert lora.bind(base, None).keys() == {'params'}


def test_full_tuning_is_a_float32_copy():
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.base())
    adapter = FullSpec().init(KEY, base)
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype(jnp.float32)}
    assert tiny.same(adapter.params, jax.tree.map(lambda x: x.astype(jnp.float32), base))
    own = FullSpec().init(KEY, tiny.base())  # must be a copy even where there is nothing to convert: steps donate it
    pairs = zip(jax.tree.leaves(own.params), jax.tree.leaves(tiny.base()), strict=True)
    assert not any(x.unsafe_buffer_pointer() == y.unsafe_buffer_pointer() for x, y in pairs)


def test_count():
    base = tiny.base()
    adapter = LoraSpec(rank=3).init(KEY, base)
    assert lora.count(adapter) == L * 3 * ((D + 24) + 2 * (D + 12) + (24 + D))
    assert lora.count(lora.with_head(adapter, KEY, D, 1.0)) == lora.count(adapter) + D
    assert lora.count(FullSpec().init(KEY, base)) == lora.count(base)
    assert lora.count(jax.eval_shape(lambda: adapter)) == lora.count(adapter)


def test_head_reads_a_hidden_state():
    adapter = lora.with_head(lora.Adapter(), KEY, D, 0.5)
    kernel = adapter.head['kernel']
    assert np.std(lora.with_head(adapter, KEY, 4096, 0.5).head['kernel']) == pytest.approx(0.5, rel=0.05)
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, D)), jnp.float32)
    got = lora.readout(lora.bind({}, adapter), hidden)
    np.testing.assert_allclose(got, np.einsum('bkd,d->bk', hidden, kernel), rtol=1e-4, atol=1e-5)
    assert lora.readout(lora.bind({}, adapter), hidden.astype(jnp.bfloat16)).dtype == jnp.float32
    assert not lora.with_head(adapter, KEY, D, 0).head['kernel'].any()


# Dropout.


def dropped(rate, train=True, seed=0, rngs=True):
    base = tiny.base()
    adapter = tiny.adapter(dataclasses.replace(tiny.SPECS['lora'], dropout=rate), base, head=False)
    return tiny.hidden(base, adapter, BATCH, {'dropout': jax.random.key(seed)} if rngs else None, train=train)


@pytest.mark.parametrize('arguments', [{'train': False}, {'rngs': False}], ids=['eval', 'no-randomness'])
def test_dropout_needs_train_and_randomness(arguments):
    plain = dropped(0.0, train=False, rngs=False)
    np.testing.assert_array_equal(dropped(0.5, **arguments), plain)
    assert np.abs(dropped(0.5) - plain).max() > 0.01


def test_dropout_repeats_with_its_key():
    np.testing.assert_array_equal(dropped(0.5, seed=3), dropped(0.5, seed=3))
    assert not np.array_equal(dropped(0.5, seed=3), dropped(0.5, seed=4))


def test_dropout_of_all_but_everything_leaves_the_anchor():
    np.testing.assert_allclose(dropped(1 - 1e-7), tiny.hidden(tiny.base(), None, BATCH), atol=1e-4)


def test_dropout_is_on_in_every_layer_and_differs_between_them():
    """With the pairs of one layer alone, each layer's noise must show, and not be the other's."""
    base, noise = tiny.base(), []
    spec = dataclasses.replace(tiny.SPECS['lora'], dropout=0.5)
    for layer in range(L):
        adapter = tiny.adapter(spec, base, head=False)
        only = jax.tree.map(lambda x, layer=layer: x.at[1 - layer].set(0), adapter)
        rngs = {'dropout': jax.random.key(0)}
        noise.append(tiny.hidden(base, only, BATCH, rngs, train=True) - tiny.hidden(base, only, BATCH, rngs))
    assert all(np.abs(x).max() > 0.01 for x in noise)


@pytest.mark.parametrize('pattern', [lora.ATTENTION, lora.ALL_LINEAR])
def test_patterns_take_whole_paths(pattern):
    assert not re.fullmatch(pattern, 'decoder/layers/self_attention/query_norm')
    assert re.fullmatch(pattern, 'encoder/layers_3/attention/query')  # T5X's name
