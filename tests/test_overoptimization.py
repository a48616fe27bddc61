"""The best of n of benchmarks/overoptimization.py against every subset, and its tables of several ensembles."""

import importlib.util
import itertools
import pathlib

import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[1] / 'benchmarks' / 'overoptimization.py'


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('overoptimization', PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_best_of_n_is_the_mean_over_all_subsets(script):
    rng = np.random.default_rng(0)
    proxy, gold = rng.standard_normal((3, 8)), rng.integers(0, 2, (3, 8)).astype(float)
    points = script.best_of_n(proxy, gold)
    assert [point['n'] for point in points] == [1, 2, 4, 8]
    for point in points:
        n = point['n']
        best = [[gold[i, max(s, key=lambda j, i=i: proxy[i, j])] for s in itertools.combinations(range(8), n)]
                for i in range(3)]  # fmt: skip
        assert point['gold'] == pytest.approx(np.mean(best, axis=1), abs=1e-9)
        assert point['kl'] == pytest.approx(np.log(n) - (n - 1) / n)
    # Of one answer: the mean, from which deviations are counted.
    assert points[0]['proxy'] == pytest.approx(np.zeros(3), abs=1e-6)


def ensembles(script, runs=3):
    rng = np.random.default_rng(1)
    gold = rng.integers(0, 2, (5, 8)).astype(float)
    rows = []
    for run in range(runs):
        members = rng.standard_normal((2, 5, 8))
        proxies = {'member 0': members[0], 'member 1': members[1]}
        proxies |= {name: members.mean(0) for name in script.COLORS if name != 'member'}
        rows += [{'run': f'runs/{run}', **row} for row in script.compare(proxies, gold)]
    return rows


def test_each_reward_stands_beside_the_members_of_its_own_ensemble(script):
    rows = {(row['run'], row['reward'], row['n']): row for row in ensembles(script)}
    for (run, _, n), row in rows.items():
        members = [rows[run, f'member {m}', n]['gold'] for m in (0, 1)]
        assert row['gain'] == pytest.approx(row['gold'] - np.mean(members), abs=1e-12)
        assert row['over_best'] == pytest.approx(row['gold'] - max(members), abs=1e-12)
        assert n > 1 or row['gain'] == pytest.approx(0, abs=1e-9)  # the best of one answer is any


def test_the_tables_set_the_best_member_apart_from_the_members_mean(script):
    rows = ensembles(script)
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in script.tables(rows) if line.startswith('| ')]
    tables = {}
    for title, *cells in lines:
        if cells[-1] == 'n = 8':
            tables[title] = table = {}
        else:
            table[title] = cells
    right, gain, over_best = tables.values()
    assert list(right)[:3] == ["members' mean", 'best member', 'mean']
    assert list(gain)[:2] == ['best member', 'mean'] and list(over_best)[:1] == ['mean']
    runs = [{row['reward']: row['gold'] for row in rows if (row['run'], row['n']) == (f'runs/{run}', 4)}
            for run in range(3)]  # fmt: skip
    members = np.array([[run['member 0'], run['member 1']] for run in runs])
    best, mean, ensemble = members.max(1), members.mean(1), np.array([run['mean'] for run in runs])
    assert right["members' mean"][1] == script.mean_and_range(mean)
    assert right['best member'][1] == script.mean_and_range(best)
    assert gain['best member'][0] == script.mean_and_each(best - mean) and gain['mean'][0] == script.mean_and_each(
        ensemble - mean
    )
    assert over_best['mean'][0] == script.mean_and_each(ensemble - best)


def test_a_cell_holds_the_mean_and_the_range_or_each_ensemble(script):
    assert script.mean_and_range([0.25, 0.5, 0.3]) == '35.0% (25.0-50.0)'
    assert script.mean_and_each([0.01, -0.02, 0.04]) == '+1.0 (+1.0, -2.0, +4.0)'
