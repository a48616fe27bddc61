"""The shares of benchmarks/value_ceiling.py, of returns whose parts are known."""

import importlib.util
import pathlib

import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[1] / 'benchmarks' / 'value_ceiling.py'
N, K, R = 300, 16, 3


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('value_ceiling', PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shares(script, returns, values, tokens, mask):
    of_prompt = [script.sums(*x) for x in zip(returns, values, tokens, mask, strict=True)]
    return dict(zip(script.COLUMNS, script.explained(np.array(of_prompt))))


@pytest.mark.parametrize('ends_early', [False, True])
def test_shares_of_variance_by_prompt_and_by_the_tokens_so_far(script, ends_early):
    rng = np.random.default_rng(0)
    prompt, noise = 2 * rng.standard_normal((N, 1, 1)), rng.standard_normal((N, K, 1))
    tokens = rng.integers(2, size=(N, K, R))
    first = np.where(tokens[..., :1] == 1, 1.0, -1.0)  # the first token is worth 1 either way: known from place 1 on
    returns = np.broadcast_to(prompt + first + noise, (N, K, R))
    mask = np.ones((N, K, R), bool)
    if ends_early:
        mask[:, ::2, 2] = False
        returns = np.where(mask, returns, np.nan)  # the padding may be anything
    variance, places = 4 + 1 + 1, mask.sum((0, 1)) / mask.sum()
    known = shares(script, returns, np.broadcast_to(prompt, returns.shape), tokens, mask)
    assert known['value'] == pytest.approx(4 / variance, abs=0.03)
    assert known['prompt'] == pytest.approx(4 / variance, abs=0.03)
    assert known['prefix'] == pytest.approx((4 + places[1:].sum()) / variance, abs=0.03)


def test_nothing_is_explained_of_noise_however_few_answers_a_prompt_has(script):
    rng = np.random.default_rng(1)
    returns = np.repeat(rng.standard_normal((1500, 2, 1)), R, axis=-1)
    tokens, mask = rng.integers(2, size=(1500, 2, R)), np.ones((1500, 2, R), bool)
    known = shares(script, returns, np.zeros_like(returns), tokens, mask)
    assert known['value'] == pytest.approx(0, abs=0.01)
    assert known['prompt'] == pytest.approx(0, abs=0.08)
