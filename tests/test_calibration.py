import numpy as np
import pytest

from perl_jax.data.datasets import Dataset
from perl_jax.evals import calibration

PAIRS = Dataset({}, [], None, 1)


def slow_error(logits, outcomes, bins):
    total = 0
    for i in range(bins):
        said = [(1 / (1 + np.exp(-z)), y) for z, y in zip(logits, outcomes)]
        inside = [(p, y) for p, y in said if i / bins <= p < (i + 1) / bins or p == 1 and i == bins - 1]
        if inside:
            total += abs(sum(p for p, _ in inside) - sum(y for _, y in inside))
    return total / len(logits)


@pytest.mark.parametrize('bins', [1, 5, 10])
def test_the_error_equals_the_slow_one(bins):
    rng = np.random.default_rng(0)
    logits, outcomes = 3 * rng.standard_normal(200), (rng.random(200) < 0.4).astype(np.float32)
    logits[0] = 800.0  # a probability of 1 belongs to the last bin, and nothing overflows
    rows = calibration.reliability(logits, outcomes, bins)
    assert calibration.error(rows) == pytest.approx(slow_error(logits, outcomes, bins))
    assert sum(row['count'] for row in rows) == 200
    assert all(row['low'] <= row['probability'] <= row['high'] for row in rows)


def test_honest_probabilities_have_a_small_error_and_boasting_ones_a_large():
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal(20_000)
    outcomes = (rng.random(20_000) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    assert calibration.error(calibration.reliability(logits, outcomes)) < 0.01
    assert calibration.error(calibration.reliability(4 * logits, outcomes)) > 0.1


def test_a_pair_counts_in_both_orders():
    """Said 0.9 (and 0.1 the other way round), came true three times in four."""
    margin = np.log(9)
    rewards = np.array([[margin, 0.0]] * 3 + [[0.0, margin]])
    assert calibration.metrics(PAIRS, rewards) == {'pairwise_ece': pytest.approx(0.15)}
    assert calibration.metrics(PAIRS, np.zeros((3, 2))) == {'pairwise_ece': pytest.approx(0)}


def test_thumbs_are_judged_by_their_label():
    thumbs = Dataset({'labels': np.array([[1.0], [1.0], [0.0], [0.0]])}, [], None, 1)
    rewards = np.array([[np.log(4)], [np.log(4)], [np.log(4)], [-50.0]])
    assert calibration.metrics(thumbs, rewards) == {'ece': pytest.approx(3 / 4 * abs(0.8 - 2 / 3))}
