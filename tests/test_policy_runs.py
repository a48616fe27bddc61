"""Whole small policy runs of everything that one gin line changes: algorithms, the KL, shaping, anchors, copies."""

import json
import shutil

import numpy as np
import pytest
from toy_runs import configured, perl, quoted, ran, rows, state, toy, toys  # noqa: F401

from perl_jax.cli import configure
from perl_jax.runs import resume

pytestmark = pytest.mark.slow

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
DECAY = '--gin_file=tuning/decay.gin'


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


def test_buckets_take_padding_from_ppo_and_nothing_else(toys, tmp_path):
    """The same prompts in the same shuffled minibatches; a fill that holds too few of these would lose a token."""
    flags = '--gin_file=algorithms/ppo.gin', '--gin.ppo.PPO.minibatches=2', '--gin.TRAIN_STEPS=1'
    plain, cut = (training(train(toys, tmp_path / str(n), *flags, f'--gin.LENGTH_BUCKETS={n}'))[0] for n in (1, 4))
    assert cut['length/mean'] == plain['length/mean']
    for name in ('reward/score', 'loss/policy', 'loss/value', 'grad_norm/policy', 'grad_norm/value'):
        assert cut[name] == pytest.approx(plain[name], rel=1e-2, abs=1e-5), name


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
    base = toy('policy', tmp_path / 'run', toys.sources[0], *SHORT)
    argv = [*base, '--gin.REWARD=[@rewards.TextReward()]', truth]
    ran(*argv)
    assert training(tmp_path / 'run')
    assert ran('sample', f'--model_dir={tmp_path}/run', '--num=1').out
    both = '--gin.REWARD=[@rewards.LearnedReward(), @rewards.TextReward()]'
    line = perl(*argv, both, quoted('MODEL_DIR', tmp_path / 'both')).line
    assert 'REWARD_MODEL_DIR is not given' in line and not (tmp_path / 'both').exists()
    assert 'REWARD = []' in perl(*base, '--gin.REWARD=[]', quoted('MODEL_DIR', tmp_path / 'none')).line


def test_warm_up_and_decay_are_also_the_values():
    sources = quoted('INITIAL_CHECKPOINT_PATH', 'x'), quoted('REWARD_MODEL_DIR', 'y')
    warmup = '--gin_file=tuning/warmup.gin'
    for files in ((warmup,), (warmup, DECAY), (DECAY, warmup)):  # in any order
        for own, value_steps in ((), 7), (('--gin.VALUE_WARMUP_STEPS=0',), 0), (('--gin.VALUE_WARMUP_STEPS=9',), 9):
            text = configured(*toy('policy', 'z', *sources, *files, '--gin.WARMUP_STEPS=7', *own))
            settings = configure.settings(text)
            total = settings['TRAIN_STEPS'] if DECAY in files else None
            for scope, steps in ('', 7), ('value/', value_steps):
                values = (settings[f'{scope}linear.{name}_steps'] for name in ('warmup', 'decay'))
                assert [resume.resolve(settings, x) for x in values] == [steps, total]


def test_config_gin_has_what_functions_that_are_not_called_yet_are_given():
    sources = quoted('INITIAL_CHECKPOINT_PATH', 'x'), quoted('REWARD_MODEL_DIR', 'y')
    flags = (
        '--gin.SHAPING=[@shaping.clip, @shaping.length]', '--gin.shaping.clip.limit=%LIMIT', '--gin.LIMIT=2.0',
        '--gin.rewards.LearnedReward.aggregate=@ensembles.lower_bound', '--gin.ensembles.lower_bound.penalty=0.25',
    )  # fmt: skip
    text = configured(*toy('policy', 'z', *sources, *flags))
    settings = configure.settings(text)
    assert settings['clip.limit'] == 'LIMIT' and settings['LIMIT'] == 2.0 and settings['lower_bound.penalty'] == 0.25
    other = configure.settings(text.replace('LIMIT = 2.0', 'LIMIT = 3.0'))
    assert resume.check(settings, other) == {'clip.limit': 'LIMIT = 3.0, and was 2.0 so far'}


def test_ppo_learns_to_the_last_step_under_decay(toys, tmp_path):
    """A step makes four updates; the rate rises and falls by the step, the value's too."""
    warmup = '--gin_file=tuning/warmup.gin', '--gin.WARMUP_STEPS=4'
    flags = '--gin_file=algorithms/ppo.gin', DECAY, *warmup, '--gin.TRAIN_STEPS=8', '--gin.EVAL_PERIOD=2'
    ran(*toy('policy', tmp_path / 'run', *toys.sources, *flags, '--gin.runs.RunConfig.log_period=1'))
    rows = training(tmp_path / 'run')
    for name in 'schedule/policy', 'schedule/value':
        np.testing.assert_allclose(
            [row[name] for row in rows],
            [0, 1 / 4 * 7 / 8, 2 / 4 * 6 / 8, 3 / 4 * 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8], rtol=1e-6,
        )  # fmt: skip
    assert all(row['kl/update'] for row in rows[1:])  # the last update of a step is at a policy that has moved


def test_a_schedule_of_optax_counts_updates_and_so_is_refused_under_ppo(toys, tmp_path):
    schedule = '--gin.optax.linear_schedule.{}'.format
    inside = '--gin.optax.adafactor.learning_rate=@optax.linear_schedule()', schedule('init_value=1e-3')
    more = schedule('end_value=0.0'), schedule('transition_steps=8')
    argv = toy('policy', tmp_path / 'run', *toys.sources, *SHORT, *inside, *more)
    line = perl(*argv, '--gin_file=algorithms/ppo.gin').line
    assert 'OPTIMIZER has a schedule of its own, which counts updates' in line and not (tmp_path / 'run').exists()


def test_beta_is_taken_when_a_run_goes_on_and_every_start_is_kept(toys, tmp_path):
    folder = tmp_path / 'run'
    argv = lambda *more: toy('policy', folder, *toys.sources, '--gin.EVAL_PERIOD=2', *more)  # noqa: E731
    ran(*argv('--gin.TRAIN_STEPS=2', '--gin.KL_TARGET=3.0', '--gin.BETA=0.2'))
    line = perl(*argv('--gin.TRAIN_STEPS=4', '--gin.KL_TARGET=3.0', '--gin.BETA=0.3')).line
    assert 'BETA = 0.3, and was 0.2 so far: with KL_TARGET it has been steered' in line
    shutil.copytree(folder, tmp_path / 'copy')
    said = ran(*argv('--gin.TRAIN_STEPS=4', '--gin.BETA=0.3')).err
    assert 'policy: from step 2 on BETA = 0.3, and was 0.2 so far' in said
    assert 'policy: from step 2 on KL_TARGET = None, and was 3.0 so far' in said
    adapted = state(tmp_path / 'copy', 2)["['beta']"]
    assert adapted != np.float32(0.2)
    assert f'policy: from step 2 on beta = 0.3 (BETA), and was {adapted:.4g} so far (adapted to KL_TARGET)' in said
    assert state(folder, 4)["['beta']"] == np.float32(0.3)
    starts = {path.stem: configure.settings(path.read_text()) for path in (folder / 'configs').iterdir()}
    assert {step: (x['BETA'], x['KL_TARGET']) for step, x in starts.items()} == {'0': (0.2, 3.0), '2': (0.3, None)}
    line = perl(*argv('--gin.TRAIN_STEPS=6', '--gin.BETA=0.3', '--gin.ANCHOR_EMA=0.1')).line
    assert 'ANCHOR_EMA = 0.1, and was 0.0 so far: an anchor of its own' in line
    line = perl(*argv('--gin.TRAIN_STEPS=6', '--gin.BETA=0.3', '--gin.BATCH_SIZE=8')).line
    assert 'BATCH_SIZE = 8, and was 4 so far' in line and 'ACCEPT_OTHER_DATA' in line
    more = '--gin.BATCH_SIZE=8', '--gin.ACCEPT_OTHER_DATA=True', '--gin.KL_TARGET=6'
    said = ran(*argv('--gin.TRAIN_STEPS=6', '--gin.BETA=0.3', *more)).err
    assert 'from step 4 on BATCH_SIZE = 8' in said
    assert 'from step 4 on beta is adapted to KL_TARGET = 6, beginning with its last value, 0.3' in said


def test_a_setting_of_the_optimizer_that_its_state_depends_on_is_named(toys, tmp_path):
    argv = lambda *more: toy('policy', tmp_path / 'run', *toys.sources, '--gin.EVAL_PERIOD=1', *more)  # noqa: E731
    ran(*argv('--gin.TRAIN_STEPS=1'))
    momentum = '--gin.optax.adafactor.momentum={}'.format
    line = perl(*argv('--gin.TRAIN_STEPS=2', momentum('%MINE'), '--gin.MINE=0.9')).line
    assert 'adafactor.momentum = 0.9, and was None so far' in line and 'put it back' in line
    assert 'TRAIN_STEPS' not in line  # which has changed too
    own = momentum(0.9).replace('optax', 'value/optax')
    line = perl(*argv('--gin.TRAIN_STEPS=2', own)).line
    assert 'value/opt_state/' in line and 'value/adafactor.momentum = 0.9, and was None so far' in line
    said = ran(*argv('--gin.TRAIN_STEPS=2', '--gin.optax.adafactor.clipping_threshold=2.0')).err
    assert 'policy: from step 1 on adafactor.clipping_threshold = 2.0, and was 1.0 so far' in said
