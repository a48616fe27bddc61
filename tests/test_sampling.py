import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats
from tiny import EOS, NETWORK, R

from perl_jax import types
from perl_jax.errors import UserError
from perl_jax.models import lora
from perl_jax.models.logprobs import response_logprobs
from perl_jax.rl.sampling import SamplingConfig, categorical, sample, truncate

K = 3
BATCH = tiny.responses(B=3, K=K)
CONFIG = SamplingConfig(num_samples=K, max_decode_length=R, temperature=0.7)
KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnames=('config', 'network', 'eos_id'))
def draw(params, adapter, prompts, rng, config, network=NETWORK, eos_id=EOS):
    return sample(network, lora.bind(params, adapter), prompts, rng, eos_id, config)


def policy():
    return tiny.base(), tiny.adapter(tiny.SPECS['lora'], tiny.base(), head=False)


def teacher_forced(rollout, temperature):
    run = jax.jit(lambda b, a, r: response_logprobs(NETWORK, lora.bind(b, a), r, temperature))
    return run(*policy(), rollout)


# Against the network.


def test_log_probs_equal_teacher_forcing():
    rollout = draw(*policy(), tiny.prompts(BATCH), KEY, CONFIG)
    assert rollout.targets.shape == rollout.logprobs.shape == (3, K, R)
    assert rollout.targets.dtype == jnp.int32 and rollout.logprobs.dtype == jnp.float32
    want = np.where(rollout.targets_mask, teacher_forced(rollout, CONFIG.temperature), 0)
    np.testing.assert_allclose(rollout.logprobs, want, atol=1e-5)
    assert tiny.same(tiny.prompts(rollout), tiny.prompts(BATCH))


def test_greedy_takes_the_best_token_each_time():
    rollout = draw(*policy(), tiny.prompts(BATCH), KEY, dataclasses.replace(CONFIG, temperature=0.0))
    hidden = tiny.hidden(*policy(), rollout)
    best = NETWORK.apply(lora.bind(*policy()), hidden[:, :, :-1], method='logits').argmax(-1)
    np.testing.assert_array_equal(rollout.targets, np.where(rollout.targets_mask, best, 0))
    assert all(tiny.same(rollout.targets[:, 0], rollout.targets[:, k]) for k in range(K))


def test_parts_of_the_prompts_in_turn():
    """Every second prompt, then the others, each part with noise of its own."""
    prompts = tiny.prompts(tiny.responses(B=4, K=K))
    parts = dataclasses.replace(CONFIG, num_microbatches=2)
    rollout = draw(*policy(), prompts, KEY, parts)
    for i in range(2):
        half = jax.tree.map(lambda x, i=i: x[i::2], prompts)
        want = draw(*policy(), half, jax.random.fold_in(KEY, i), CONFIG)
        tiny.assert_close(jax.tree.map(lambda x, i=i: x[i::2], rollout), want, atol=1e-5)
    assert len(np.unique(rollout.targets[:, :, 0])) > 3
    greedy = dataclasses.replace(CONFIG, temperature=0.0)
    halves = dataclasses.replace(parts, temperature=0.0)
    np.testing.assert_array_equal(
        draw(*policy(), prompts, KEY, halves).targets, draw(*policy(), prompts, KEY, greedy).targets
    )


def test_parts_that_do_not_divide():
    with pytest.raises(UserError, match='num_microbatches = 2: 3 prompts on a data-parallel size of 1'):
        draw(*policy(), tiny.prompts(BATCH), KEY, dataclasses.replace(CONFIG, num_microbatches=2))


def test_padding_of_the_prompt_does_not_matter():
    other = types.Prompts(np.where(BATCH.inputs_mask, BATCH.inputs, 7), BATCH.inputs_mask)
    one, two = (draw(*policy(), prompts, KEY, CONFIG) for prompts in (tiny.prompts(BATCH), other))
    assert tiny.same((one.targets, one.logprobs), (two.targets, two.logprobs))


# Against a table of probabilities.

VOCAB = 6
TABLE = tiny.table(VOCAB)
LOGITS = np.random.default_rng(0).standard_normal((VOCAB, VOCAB)).astype(np.float32)


def from_table(logits, config, key=KEY, B=2, first=2, eos_id=EOS):
    prompts = types.Prompts(np.full((B, 1), first), np.ones((B, 1), bool))
    return draw({'table': logits}, None, prompts, key, config, TABLE, eos_id)


def markov(*successors):
    """Logits by which each token is followed by the one given, for certain."""
    return np.where(np.arange(VOCAB) == np.array(successors)[:, None], 0, -1e9).astype(np.float32)


def test_eos_is_kept_and_all_behind_it_is_masked():
    rollout = from_table(markov(5, 4, 3, EOS, 4, 4), dataclasses.replace(CONFIG, max_decode_length=5))
    assert rollout.targets[0, 0].tolist() == [3, EOS, 0, 0, 0]
    assert rollout.targets_mask[0, 0].tolist() == [True, True, False, False, False]
    assert not rollout.logprobs[~rollout.targets_mask].any()


def test_any_of_several_eos_ids_ends_a_response():
    """A chat model's `<|eot_id|>` beside its `<|end_of_text|>`: the one that was drawn is the last real token."""
    chain, config = markov(5, 4, 3, EOS, 4, 4), dataclasses.replace(CONFIG, max_decode_length=5)
    for ends, want in {(EOS,): [3, EOS, 0, 0, 0], (EOS, 3): [3, 0, 0, 0, 0], (4, EOS): [3, EOS, 0, 0, 0]}.items():
        rollout = from_table(chain, config, eos_id=ends)
        assert rollout.targets[0, 0].tolist() == want
        assert rollout.targets_mask[0, 0].sum() == want.index(0)


def test_a_second_eos_id_that_never_comes_changes_no_draw():
    config = dataclasses.replace(CONFIG, num_samples=20, max_decode_length=8)
    one, several = (from_table(LOGITS, config, eos_id=ends) for ends in (EOS, (EOS, VOCAB)))
    for name in ('targets', 'targets_mask', 'logprobs'):
        np.testing.assert_array_equal(getattr(one, name), getattr(several, name))


def test_a_response_that_runs_out_of_room_has_no_eos():
    rollout = from_table(markov(5, 4, 3, 4, 5, 2), dataclasses.replace(CONFIG, max_decode_length=5))
    assert rollout.targets[0, 0].tolist() == [3, 4, 5, 2, 3]
    assert rollout.targets_mask.all()


def test_rows_end_each_at_their_own_time():
    rollout = from_table(LOGITS, dataclasses.replace(CONFIG, num_samples=50, max_decode_length=8))
    lengths = rollout.targets_mask.sum(-1)
    assert set(lengths.ravel().tolist()) >= {1, 2, 3, 8}
    for tokens, mask in zip(rollout.targets.reshape(-1, 8), rollout.targets_mask.reshape(-1, 8)):
        n = mask.sum()
        assert mask[:n].all()
        assert EOS not in tokens[: n - 1]
        assert n == 8 or tokens[n - 1] == EOS
        assert not tokens[n:].any()


class Counting(tiny.Table):
    """Counts how often it is asked for one more token."""

    def decode(self, tokens, step, cache):
        jax.debug.callback(lambda _: COUNTED.append(1), step)
        return super().decode(tokens, step, cache)


COUNTED = []


@pytest.mark.parametrize(('successors', 'steps'), [((5, 4, 3, EOS, 4, 4), 1), ((5, 4, 3, 4, 5, 2), 19), ((1,) * 6, 0)])
def test_sampling_stops_when_all_have_ended(successors, steps):
    COUNTED.clear()
    prompts = types.Prompts(np.full((2, 1), 2), np.ones((2, 1), bool))
    config = dataclasses.replace(CONFIG, max_decode_length=20)
    jax.block_until_ready(draw({'table': markov(*successors)}, None, prompts, KEY, config, Counting(TABLE.config), EOS))
    jax.effects_barrier()
    assert len(COUNTED) == steps


def test_noise_differs_by_step_branch_and_row_and_repeats_with_the_key():
    flat, config = np.zeros((VOCAB, VOCAB), np.float32), SamplingConfig(4, 64)
    one, two, other = (from_table(flat, config, jax.random.key(seed), eos_id=-1).targets for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    agree = lambda x, y: np.mean(np.asarray(x) == np.asarray(y))  # noqa: E731
    assert agree(one, other) < 0.3
    assert agree(one[0], one[1]) < 0.3
    assert agree(one[:, 0], one[:, 1]) < 0.3
    assert agree(one[..., 1:], one[..., :-1]) < 0.3


@pytest.mark.parametrize('config', [
    SamplingConfig(), SamplingConfig(temperature=0.5), SamplingConfig(top_k=3), SamplingConfig(top_p=0.8),
    SamplingConfig(temperature=2.0, top_k=4, top_p=0.9),
], ids=['plain', 'temperature', 'top-k', 'top-p', 'all'])  # fmt: skip
def test_frequencies_match_the_probabilities(config):
    config = dataclasses.replace(config, num_samples=100, max_decode_length=30)
    rollout = from_table(LOGITS, config, B=4, eos_id=-1)
    tokens = np.concatenate([np.full((400, 1), 2), rollout.targets.reshape(400, 30)], axis=1)
    counts = np.zeros((VOCAB, VOCAB), int)
    np.add.at(counts, (tokens[:, :-1], tokens[:, 1:]), 1)
    for before in range(VOCAB):
        p = probabilities(LOGITS[before], config)
        assert not counts[before][p == 0].any()
        seen = p > 0
        n = counts[before].sum()
        if n > 100 and seen.sum() > 1:
            assert stats.chisquare(counts[before][seen], n * p[seen]).pvalue > 1e-4
    drawn = np.log([probabilities(LOGITS[x], config)[y] for x, y in zip(tokens[:, :-1].ravel(), tokens[:, 1:].ravel())])
    np.testing.assert_allclose(rollout.logprobs.ravel(), drawn, atol=1e-5)


@pytest.mark.parametrize('size', [1, 2, 3, 10, 16, 17, 1000])
def test_categorical_draws_what_the_probabilities_say(size):
    """Vocabularies that fill their blocks and that do not; every third token impossible, the last one too."""
    rng = np.random.default_rng(size)
    p = rng.dirichlet(np.ones(size)) * (np.arange(size)[::-1] % 3 > 0) if size > 2 else rng.dirichlet(np.ones(size))
    p = (p / p.sum()).astype(np.float32)
    tokens = np.asarray(jax.jit(lambda key: categorical(key, jnp.broadcast_to(p, (50, 400, size))))(KEY))
    counts = np.bincount(tokens.ravel(), minlength=size)
    assert tokens.shape == (50, 400) and len(counts) == size
    assert not counts[p == 0].any()
    expected = np.float64(p) / np.float64(p).sum() * tokens.size
    seen = expected > 0
    if seen.sum() > 1:
        assert stats.chisquare(counts[seen], expected[seen]).pvalue > 1e-4


# top-k and top-p.


def probabilities(logits, config):
    """What is drawn from, the obvious way: logits [V] -> float64 [V]."""
    z = np.float64(logits) / config.temperature
    keep = np.ones(len(z), bool)
    if config.top_k:
        keep &= z >= sorted(z, reverse=True)[min(config.top_k, len(z)) - 1]  # more than there are is all
    p = np.exp(z) * keep / np.exp(z)[keep].sum()
    if config.top_p < 1:
        total, nucleus = 0.0, set()
        for token in np.argsort(-p, kind='stable'):
            if total >= config.top_p:
                break
            nucleus.add(p[token])
            total += p[token]
        p = np.where(np.isin(p, list(nucleus)), p, 0)
    return p / p.sum()


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize(('top_k', 'top_p'), [
    (0, 1.0), (1, 1.0), (5, 1.0), (20, 1.0), (21, 1.0), (50257, 0.9), (0, 0.5), (0, 0.95), (0, 1e-6), (5, 0.5),
])  # fmt: skip
def test_truncation_equals_numpy(top_k, top_p, temperature):
    logits = np.random.default_rng(1).standard_normal((7, 2, 20)).astype(np.float32) * 2
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    got = jax.nn.softmax(truncate(jnp.asarray(logits), config))
    for row in np.ndindex(7, 2):
        np.testing.assert_allclose(got[row], probabilities(logits[row], config), atol=1e-6)


def test_ties_are_kept():
    logits = jnp.array([2.0, 1.0, 2.0, 0.0])
    assert np.isfinite(truncate(logits, SamplingConfig(top_k=1))).tolist() == [True, False, True, False]
    assert np.isfinite(truncate(logits, SamplingConfig(top_p=0.1))).tolist() == [True, False, True, False]


@pytest.mark.parametrize(('setting', 'said'), [
    ({'top_p': 0.0}, 'top_p = 0.0'), ({'top_p': 1.5}, 'top_p'), ({'top_k': -1}, 'top_k'),
    ({'num_samples': 0}, 'num_samples = 0'), ({'top_p': '0.9'}, "top_p = '0.9'"), ({'top_k': 2.5}, 'top_k = 2.5'),
    ({'num_microbatches': 0}, 'num_microbatches = 0'), ({'temperature': float('inf')}, 'temperature = inf'),
    ({'temperature': -1.0}, 'temperature'), ({'temperature': float('nan')}, 'temperature'),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(setting, said):
    with pytest.raises(UserError, match=said):
        SamplingConfig(**setting)


def test_truncates_tells():
    assert not SamplingConfig(temperature=0.3).truncates
    assert SamplingConfig(top_k=1).truncates and SamplingConfig(top_p=0.99).truncates
