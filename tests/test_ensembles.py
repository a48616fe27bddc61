import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.rewards import ensembles

M, B, K = 4, 3, 5
SCORES = np.random.default_rng(0).standard_normal((M, B, K)).astype(np.float32)
ONE_LINE = {
    'mean': np.mean,
    'minimum': min,
    'median': lambda x: (sorted(x)[1] + sorted(x)[2]) / 2,
    'lower_bound': lambda x: np.mean(x) - sum((y - np.mean(x)) ** 2 for y in x) / M,
}


@pytest.mark.parametrize('name', ONE_LINE)
def test_aggregates_of_each_response(name):
    got = np.asarray(getattr(ensembles, name)(jnp.array(SCORES)))
    for b, k in np.ndindex(B, K):
        assert got[b, k] == pytest.approx(ONE_LINE[name](SCORES[:, b, k].tolist()), abs=1e-5)


def test_the_penalty_weighs_the_variance():
    got = ensembles.lower_bound(jnp.array(SCORES), penalty=0.25)
    np.testing.assert_allclose(got, SCORES.mean(0) - 0.25 * SCORES.var(0), atol=1e-5)


def test_disagreement_is_counted_pair_by_pair():
    got = ensembles.disagreement(jnp.array(SCORES))
    stds = [np.std(SCORES[:, b, k]) for b, k in np.ndindex(B, K)]
    assert float(got['reward/disagreement']) == pytest.approx(np.mean(stds), rel=1e-5)
    differ = []
    for (i, j), b in itertools.product(itertools.combinations(range(M), 2), range(B)):
        for k, other in itertools.combinations(range(K), 2):
            differ.append((SCORES[i, b, k] > SCORES[i, b, other]) != (SCORES[j, b, k] > SCORES[j, b, other]))
    assert float(got['reward/order_disagreement']) == pytest.approx(np.mean(differ), rel=1e-5)


def test_members_that_agree_and_a_single_one():
    same = ensembles.disagreement(jnp.stack([SCORES[0]] * 3))
    assert float(same['reward/disagreement']) == pytest.approx(0, abs=1e-6)
    assert float(same['reward/order_disagreement']) == 0
    assert ensembles.disagreement(jnp.array(SCORES[:1])) == {}
    assert set(ensembles.disagreement(jnp.array(SCORES[..., :1]))) == {'reward/disagreement'}
