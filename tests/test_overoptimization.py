"""The best of n of benchmarks/overoptimization.py, against drawing every subset."""

import importlib.util
import itertools
import pathlib

import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[1] / 'benchmarks' / 'overoptimization.py'


def test_best_of_n_is_the_mean_over_all_subsets():
    spec = importlib.util.spec_from_file_location('overoptimization', PATH)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rng = np.random.default_rng(0)
    proxy, gold = rng.standard_normal((3, 8)), rng.integers(0, 2, (3, 8)).astype(float)
    rows = script.best_of_n(proxy, gold)
    assert [row['n'] for row in rows] == [1, 2, 4, 8]
    for row in rows:
        n = row['n']
        best = [[gold[i, max(s, key=lambda j, i=i: proxy[i, j])] for s in itertools.combinations(range(8), n)]
                for i in range(3)]  # fmt: skip
        assert row['gold'] == pytest.approx(np.mean(best), abs=1e-9)
        assert row['kl'] == pytest.approx(np.log(n) - (n - 1) / n)
    assert rows[0]['proxy'] == pytest.approx(0, abs=1e-6)  # of one answer: the mean, from which deviations are counted
