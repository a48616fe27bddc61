import numpy as np
import pytest
import tiny

from perl_jax import types
from perl_jax.rl import shaping

B, K, R, EOS = 3, 2, 5, 1
RNG = np.random.default_rng(0)
SCORES = RNG.standard_normal((B, K)).astype(np.float32) * 3
RESPONSES = tiny.responses(B, K)


def test_whiten_is_over_the_batch():
    got = np.asarray(shaping.whiten(SCORES, RESPONSES, EOS))
    np.testing.assert_allclose(got, (SCORES - SCORES.mean()) / SCORES.std(), rtol=1e-5, atol=1e-6)
    assert not np.asarray(shaping.whiten(np.full((B, K), 0.5, np.float32), RESPONSES, EOS)).any()


@pytest.mark.parametrize('size', [3, 5, 7])
def test_whitened_equal_scores_are_exactly_zero(size):
    assert not np.asarray(shaping.whiten(np.full((1, size), 0.1, np.float32), RESPONSES, 1)).any()


def test_clip_keeps_what_lies_within():
    got = np.asarray(shaping.clip(SCORES, RESPONSES, EOS, limit=1.0))
    for x, y in zip(SCORES.ravel(), got.ravel()):
        assert y == (x if abs(x) <= 1 else np.sign(x))
    assert (np.abs(SCORES) > 1).any() and (np.abs(SCORES) < 1).any()


def test_length_costs_by_the_token():
    got = np.asarray(shaping.length(SCORES, RESPONSES, EOS, per_token=0.5))
    for b, k in np.ndindex(B, K):
        assert np.isclose(got[b, k], SCORES[b, k] - 0.5 * RESPONSES.targets_mask[b, k].sum())


def test_missing_eos_costs_those_that_ran_out_of_room():
    targets = np.array([[[4, EOS, 0], [4, 5, 6]], [[EOS, 0, 0], [4, 5, EOS]], [[4, 4, 4], [4, 5, 0]]])
    mask = np.array([[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 1]], [[1, 1, 1], [1, 1, 0]]], bool)
    cut = np.array([[0, 1], [0, 0], [1, 1]])
    responses = types.Responses(np.zeros((3, 1), int), np.ones((3, 1), bool), targets, mask)
    np.testing.assert_allclose(shaping.missing_eos(SCORES, responses, EOS, penalty=2.0), SCORES - 2.0 * cut, rtol=1e-6)


def test_an_eos_id_at_the_padding_is_not_an_end():
    responses = types.Responses(
        np.zeros((1, 1), int), np.ones((1, 1), bool), np.array([[[4, 5, EOS]]]), np.array([[[True, True, False]]])
    )
    np.testing.assert_allclose(shaping.missing_eos(np.zeros((1, 1)), responses, EOS), -1.0)


def test_any_of_several_eos_ids_is_an_end():
    targets = np.array([[[4, EOS, 0], [4, 5, 7]], [[7, 0, 0], [4, 5, EOS]], [[4, 4, 4], [4, 5, 6]]])
    mask = np.array([[[True, True, False], [True] * 3], [[True, False, False], [True] * 3], [[True] * 3] * 2])
    responses = types.Responses(np.zeros((3, 1), int), np.ones((3, 1), bool), targets, mask)
    cut = np.array([[0, 0], [0, 0], [1, 1]])
    np.testing.assert_allclose(shaping.missing_eos(SCORES, responses, (EOS, 7), penalty=2.0), SCORES - 2.0 * cut)
