import functools

import jax
import numpy as np
import pytest
import tiny
from flax import traverse_util

from perl_jax.models import averaging, lora
from perl_jax.models.lora import FullSpec, LoraSpec
from perl_jax.rl import anchors

SPECS = [LoraSpec(rank=4, alpha=12.0), LoraSpec(rank=2, alpha=1.0), LoraSpec(rank=1, targets=lora.ALL_LINEAR)]
WEIGHTS = (0.5, 0.3, 0.2)


def members(specs=SPECS, **kwargs):
    return [tiny.adapter(spec, tiny.base(), seed=i, **kwargs) for i, spec in enumerate(specs)]


def deltas(adapter):
    """{layer: what the adapter adds to its kernel, in float64}"""
    flat = traverse_util.flatten_dict(adapter.lora, sep='/')
    layers = [path.removesuffix('/a') for path in flat if path.endswith('/a')]
    return {x: adapter.scale * (np.float64(flat[f'{x}/a']) @ np.float64(flat[f'{x}/b'])) for x in layers}


def mean(adapters, weights):
    layers = {layer for adapter in adapters for layer in deltas(adapter)}
    return {x: sum(w * deltas(a).get(x, 0) for a, w in zip(adapters, weights)) for x in layers}


def test_concatenating_is_the_average_of_the_products():
    got, want = averaging.concatenate(members(), WEIGHTS), mean(members(), WEIGHTS)
    assert deltas(got).keys() == want.keys()
    for layer, x in deltas(got).items():
        np.testing.assert_allclose(x, want[layer], atol=1e-6)
    heads = np.average([m.head['kernel'] for m in members()], axis=0, weights=WEIGHTS)
    np.testing.assert_allclose(got.head['kernel'], heads, atol=1e-6)
    flat = traverse_util.flatten_dict(got.lora, sep='/')
    assert {x.shape[-1] for path, x in flat.items() if path.endswith('query/a')} == {4 + 2 + 1}


def test_averaging_a_and_b_would_be_something_else():
    pair = members([SPECS[0]] * 2)
    wrong = pair[0].replace(lora=jax.tree.map(lambda x, y: (x + y) / 2, pair[0].lora, pair[1].lora))
    right = mean(pair, (0.5, 0.5))
    gaps = [np.abs(x - right[layer]).max() / np.abs(right[layer]).max() for layer, x in deltas(wrong).items()]
    assert min(gaps) > 0.1


def test_full_tuning_is_the_average_of_the_parameters():
    pair = members([FullSpec()] * 2)
    got = averaging.concatenate(pair, (0.25, 0.75))
    want = jax.tree.map(lambda x, y: 0.25 * np.asarray(x) + 0.75 * np.asarray(y), pair[0].params, pair[1].params)
    tiny.assert_close(got.params, want, atol=1e-6)
    assert got.lora is None


@pytest.mark.parametrize('rank', [1, 3, 6])
def test_truncating_is_the_singular_value_decomposition_of_the_whole_matrix(rank):
    whole = averaging.concatenate(members(SPECS[:2]), WEIGHTS[:2])  # of rank 6
    got, error = jax.jit(averaging.truncate, static_argnums=1)(whole, rank)
    tail = size = 0.0
    for layer, delta in deltas(whole).items():
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        want = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
        np.testing.assert_allclose(deltas(got)[layer], want, atol=1e-5)
        tail, size = tail + (s[..., rank:] ** 2).sum(), size + (s**2).sum()
    assert float(error) == pytest.approx(np.sqrt(tail / size), abs=1e-4)
    assert float(error) > 0.1 or rank == 6


def test_another_scale_computes_the_same():
    one = members()[0]
    got = lora.rescaled(one, 0.25)
    assert got.scale == 0.25
    for layer, x in deltas(got).items():
        np.testing.assert_allclose(x, deltas(one)[layer], atol=1e-6)


# The anchor that follows.


def test_an_anchor_of_lora_follows_in_weight_space():
    policy = tiny.adapter(SPECS[0], tiny.base(), head=False)
    anchor = SPECS[0].init(jax.random.key(1), tiny.base())  # B is zero: the base itself
    follow = jax.jit(functools.partial(anchors.follow, rate=0.25))
    for step in range(1, 4):
        anchor = follow(anchor, policy)
        for layer, x in deltas(anchor).items():
            np.testing.assert_allclose(x, (1 - 0.75**step) * deltas(policy)[layer], atol=1e-5)
    assert jax.tree.structure(anchor) == jax.tree.structure(policy)


def test_an_anchor_of_full_tuning_follows_too():
    policy, anchor = members([FullSpec()] * 2, head=False)
    got = anchors.follow(anchor, policy, 0.1).params
    want = jax.tree.map(lambda a, p: 0.9 * np.asarray(a) + 0.1 * np.asarray(p), anchor.params, policy.params)
    tiny.assert_close(got, want, atol=1e-6)
