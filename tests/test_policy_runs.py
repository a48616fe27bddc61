"""Whole small policy runs of everything that one gin line changes: algorithms, the KL, shaping, anchors, copies."""

import json

import numpy as np
import pytest
from toy_runs import configured, perl, quoted, ran, rows, state, toy, toys  # noqa: F401

# ruff: noqa: F811 (a fixture is shared by importing it)

CASES = {
    'rloo': ('--gin_file=algorithms/rloo.gin', "--gin.KL_ESTIMATOR='full'", "--gin.KL_PLACE='loss'"),
    'grpo': ('--gin_file=algorithms/grpo.gin', '--gin.ENTROPY_BONUS=0.01', '--gin.NUM_SAMPLES=3'),
    'ppo': (
        '--gin_file=algorithms/ppo.gin', '--gin.ppo.PPO.minibatches=2', '--gin.KL_TARGET=0.05',
        '--gin.LENGTH_BUCKETS=4',
    ),
    'anchor': (
        '--gin.ANCHOR_EMA=0.1', '--gin.SHAPING=[@shaping.whiten, @shaping.clip, @shaping.missing_eos]',
        '--gin.shaping.missing_eos.penalty=0.5',
    ),
}  # fmt: skip
SHORT = '--gin.TRAIN_STEPS=4', '--gin.EVAL_PERIOD=2'


def train(toys, folder, *flags):
    ran(*toy('policy', folder, *toys.sources, *SHORT, *flags))
    return folder


def training(folder):
    return [row for row in rows(folder) if 'loss/policy' in row]


@pytest.mark.parametrize('name', CASES)
def test_one_line_changes_the_algorithm_and_a_run_goes_on_bit_for_bit(toys, tmp_path, name):
    whole = train(toys, tmp_path / 'whole', *CASES[name])
    last = training(whole)[-1]
    assert all(np.isfinite(value) for key, value in last.items() if key != 'phase')
    assert ('loss/value' in last) == (name in ('ppo', 'anchor'))
    assert ('ratio/clipped' in last) == (name in ('grpo', 'ppo'))
    assert ('entropy/exact' in last) == (name == 'grpo')
    assert ('reward/shaped' in last) == (name == 'anchor')
    assert ('kl/beta' in last) == (name == 'ppo')
    saved = state(whole)
    assert any(path.startswith("['value']") for path in saved) == (name in ('ppo', 'anchor'))
    assert any(path.startswith("['anchor']") for path in saved) == (name == 'anchor')
    assert (saved["['beta']"] != np.float32(0.1)) == (name == 'ppo')  # it adapted, and the checkpoint knows
    part = train(toys, tmp_path / 'part', *CASES[name], '--gin.TRAIN_STEPS=2')
    assert rows(train(toys, part, *CASES[name])) == rows(whole)
    again = state(part)
    assert saved.keys() == again.keys() and all(np.array_equal(saved[path], again[path]) for path in saved)


def test_copies_of_the_base_change_nothing_but_the_memory(toys, tmp_path):
    folder = train(toys, tmp_path / 'run', '--gin_file=tuning/lora_unshared.gin')
    shared = train(toys, tmp_path / 'shared')
    assert rows(folder) == rows(shared)
    about = [json.loads((x / 'run.json').read_text()) for x in (folder, shared)]
    assert about[0]['trainable_parameters'] == about[1]['trainable_parameters']


def test_an_anchor_that_follows_ends_elsewhere(toys, tmp_path):
    """At rate 1 it is the policy itself, so the KL after a step is that of the step alone."""
    fixed = training(train(toys, tmp_path / 'fixed'))[-1]
    following = training(train(toys, tmp_path / 'following', '--gin.ANCHOR_EMA=1.0'))[-1]
    assert abs(following['kl/anchor']) < 0.5 * abs(fixed['kl/anchor'])


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        (('--gin_file=algorithms/rloo.gin', '--gin.NUM_SAMPLES=1'), 'NUM_SAMPLES = 1: RLOO compares'),
        (('--gin_file=algorithms/ppo.gin', '--gin.ppo.PPO.minibatches=3'), 'BATCH_SIZE = 4 does not divide'),
        (('--gin_file=tuning/full.gin', '--gin.SHARED_BASE=False'), 'SHARED_BASE = False is for LoRA'),
        (("--gin.KL_PLACE='loss'",), "KL_ESTIMATOR = 'k1' has no gradient in the loss"),
    ],
    ids=['rloo', 'ppo', 'unshared', 'k1'],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(tmp_path, flags, said):
    sources = quoted('INITIAL_CHECKPOINT_PATH', 'x'), quoted('REWARD_MODEL_DIR', 'y')
    result = perl(*toy('policy', tmp_path / 'run', *sources, *flags))
    assert said in result.line
    assert not (tmp_path / 'run').exists()


def test_a_policy_of_text_rewards_alone_needs_no_reward_run(toys, tmp_path):
    truth = quoted('rewards.TextReward.function', 'perl_jax.tasks.toy_grammar.truth')
    argv = toy('policy', tmp_path / 'run', toys.sources[0], *SHORT, '--gin.REWARD=[@rewards.TextReward()]', truth)
    ran(*argv)
    assert training(tmp_path / 'run')
    assert ran('sample', f'--model_dir={tmp_path}/run', '--num=1').out
    both = '--gin.REWARD=[@rewards.LearnedReward(), @rewards.TextReward()]'
    line = perl(*argv, both, quoted('MODEL_DIR', tmp_path / 'both')).line
    assert 'REWARD_MODEL_DIR is not given' in line and not (tmp_path / 'both').exists()
    assert 'REWARD = []' in perl(*argv, '--gin.REWARD=[]', quoted('MODEL_DIR', tmp_path / 'none')).line


def test_warm_up_is_the_policys():
    sources = quoted('INITIAL_CHECKPOINT_PATH', 'x'), quoted('REWARD_MODEL_DIR', 'y')
    flags = '--gin_file=tuning/warmup.gin', '--gin.WARMUP_STEPS=7'
    text = configured(*toy('policy', 'z', *sources, *flags))
    assert 'warmup_constant_schedule.warmup_steps = %WARMUP_STEPS' in text and 'WARMUP_STEPS = 7' in text
    assert '\nadafactor.learning_rate = @optax.warmup_constant_schedule()' in text
