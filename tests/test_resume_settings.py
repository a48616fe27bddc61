"""What happens to each setting when a run goes on: taken and said, or refused by name."""

import re

import pytest
from test_recipes import GOLDEN, ROOT

from perl_jax.cli import configure
from perl_jax.errors import UserError
from perl_jax.runs import resume
from perl_jax.runs.resume import Macro

POLICY = configure.settings((GOLDEN / 'toy_policy.gin').read_text())
REWARD = configure.settings((GOLDEN / 'toy_reward.gin').read_text())
SFT = configure.settings((GOLDEN / 'toy_sft.gin').read_text())
EACH = [(phase, name) for phase, settings in (('policy', POLICY), ('reward', REWARD), ('sft', SFT)) for name in settings
        if '.' in name]  # fmt: skip
NOT_COMPARED = {'RunConfig.model_dir', 'RunConfig.accept_other_data'}


def other(settings, name, value='another'):
    """The settings with one changed, at its macro if it has one."""
    while isinstance(settings[name], Macro):
        name = settings[name]
    return settings | {name: value}


def called(settings, name):
    """What its user calls it: the last macro."""
    while isinstance(settings[name], Macro):
        name = settings[name]
    return name


def changed(settings, name, value='another'):
    return resume.check(settings, other(settings, name, value))


def test_a_config_is_read_as_gin_reads_it():
    assert POLICY['KLConfig.beta'] == Macro('BETA') and isinstance(POLICY['KLConfig.beta'], Macro)
    assert POLICY['BETA'] == 0.1 and POLICY['TASK_FEATURE_LENGTHS'] == {'inputs': 26}
    assert POLICY['train_policy.train.dataset'] == '@train/data.DatasetConfig()'
    assert POLICY['value/adafactor.learning_rate'] == Macro('VALUE_LEARNING_RATE')
    assert resume.resolve(POLICY, Macro('VALUE_LEARNING_RATE')) == 0.005
    assert resume.check(POLICY, POLICY) == []


@pytest.mark.parametrize(('phase', 'name'), EACH)
def test_each_setting_is_known_and_taken_or_refused_by_its_users_name(phase, name):
    settings = {'policy': POLICY, 'reward': REWARD, 'sft': SFT}[phase]
    tables = [*resume.FIXED, *resume.DATA, *resume.SAMPLED, *resume.TAKEN]
    assert resume._first(name, tables), f'perl_jax/runs/resume.py says nothing of {name}'
    if name in NOT_COMPARED:
        assert changed(settings, name) == []
        return
    try:
        lines = changed(settings, name)
    except UserError as error:
        assert str(error).startswith(tuple(f'{called(settings, x)} = ' for x in settings if '.' in x))
        assert called(settings, name) in str(error) and 'another MODEL_DIR' in str(error)
    else:
        assert any(line.startswith(f"{called(settings, name)} = 'another', and was ") for line in lines)


REFUSED = {
    'Objective.algorithm', 'LoraSpec.rank', 'LoraSpec.alpha', 'LoraSpec.targets', 'BaseConfig.dtype',
    'DecoderConfig.rope_theta', 'train/DatasetConfig.batch_size', 'train/DatasetConfig.task_feature_lengths',
    'train/DatasetConfig.length_buckets', 'RunConfig.random_seed', 'SamplingConfig.num_samples',
    'SamplingConfig.max_decode_length', 'Tuning.optimizer',
    'Objective.anchor_ema',
}  # fmt: skip
TAKEN = {
    'KLConfig.beta', 'KLConfig.target', 'KLConfig.estimator', 'adafactor.learning_rate',
    'value/adafactor.learning_rate', 'RunConfig.total_steps', 'RunConfig.eval_period', 'SamplingConfig.temperature',
    'LoraSpec.dropout',
    'Objective.entropy_bonus', 'Objective.shaping', 'LearnedReward.model_dir', 'BaseConfig.path',
    'DecoderConfig.remat', 'DecoderConfig.dtype', 'train/DatasetConfig.tokens_dir', 'Partitioner.num_partitions',
    'Tuning.num_microbatches', 'Answers.dataset',
    'train/DatasetConfig.max_dropped',
    'train/DatasetConfig.vocabulary',  # by whatever name: vocabulary.py compares its tokens
}  # fmt: skip


@pytest.mark.parametrize('name', sorted(REFUSED))
def test_what_a_checkpoint_holds_or_batches_hang_on_is_refused(name):
    with pytest.raises(UserError, match=re.escape(called(POLICY, name))):
        changed(POLICY, name)


@pytest.mark.parametrize('name', sorted(TAKEN))
def test_what_is_given_anew_at_each_start_is_taken(name):
    assert changed(POLICY, name)


def test_other_data_are_taken_on_purpose():
    accepted = POLICY | {'RunConfig.accept_other_data': True}
    for name in resume.DATA | resume.SAMPLED:
        name = name.replace('train_*', 'train_policy').replace('*Data', 'train/Data').removeprefix('*')
        assert resume.check(POLICY, other(accepted, name)), name
    with pytest.raises(UserError, match='rank'):  # but nothing else
        resume.check(POLICY, other(accepted, 'LoraSpec.rank'))


def test_the_length_of_an_answer_at_evaluation_is_no_data_of_sft():
    sft = SFT | {'SamplingConfig.max_decode_length': 8}
    assert resume.check(sft, sft | {'SamplingConfig.max_decode_length': 16})


def test_beta_is_a_setting_unless_it_is_steered():
    steered = POLICY | {'KL_TARGET': 6.0}
    assert changed(POLICY, 'KLConfig.beta', 0.2) == ['BETA = 0.2, and was 0.1 so far']
    with pytest.raises(UserError, match='BETA = 0.2, and was 0.1 so far: with KL_TARGET it has been steered'):
        changed(steered, 'KLConfig.beta', 0.2)
    assert resume.check(steered, POLICY | {'BETA': 0.2}) == [
        'BETA = 0.2, and was 0.1 so far', 'KL_TARGET = None, and was 6.0 so far'
    ]  # fmt: skip
    assert resume.check(POLICY, steered) == ['KL_TARGET = 6.0, and was None so far']


def test_a_scope_of_ones_own_is_training_too():
    mine = {'mine/DatasetConfig.batch_size': 4, 'x/BaseConfig.dtype': 'float32', 'big/DecoderConfig.rope_theta': 1e4}
    for name in mine:
        with pytest.raises(UserError, match=f'{name} = 8'):
            resume.check(mine, mine | {name: 8})
    assert resume.check({'prompts/DatasetConfig.batch_size': 4}, {'prompts/DatasetConfig.batch_size': 8})
    with pytest.raises(UserError, match='train_policy.train.dataset = .*ACCEPT_OTHER_DATA'):
        changed(POLICY, 'train_policy.train.dataset', '@mine/data.DatasetConfig()')


def test_the_macro_that_has_changed_is_named():
    decay = POLICY | {'DECAY_STEPS': Macro('TRAIN_STEPS')}
    assert resume.check(POLICY, decay) == ['DECAY_STEPS = 240, and was None so far']
    assert resume.check(decay, decay | {'TRAIN_STEPS': 300}) == ['TRAIN_STEPS = 300, and was 240 so far']


def test_a_function_that_is_the_default_is_not_written():
    with_aggregate = POLICY | {'LearnedReward.aggregate': '@ensembles.median'}
    for before, after in (POLICY, with_aggregate), (with_aggregate, POLICY):
        (line,) = resume.check(before, after)
        assert line.startswith('LearnedReward.aggregate = ')
    newer = POLICY | {'DecoderConfig.setting_of_a_newer_version': 3}
    assert resume.check(POLICY, newer) == []


def test_an_anchor_that_follows_may_follow_faster_but_not_begin_to():
    following = POLICY | {'ANCHOR_EMA': 0.1}
    assert resume.check(following, POLICY | {'ANCHOR_EMA': 0.2}) == ['ANCHOR_EMA = 0.2, and was 0.1 so far']
    for before, after in (POLICY, following), (following, POLICY):
        with pytest.raises(UserError, match='ANCHOR_EMA'):
            resume.check(before, after)


def test_how_often_a_rollout_is_learned_from_counts_updates():
    ppo = {'Objective.algorithm': '@ppo.PPO()', 'ALGORITHM/PPO.epochs': 4, 'ALGORITHM/PPO.clip': 0.2}
    with pytest.raises(UserError, match=r'PPO.epochs = 2, and was 4 so far: updates are counted by it'):
        resume.check(ppo, ppo | {'ALGORITHM/PPO.epochs': 2})
    assert resume.check(ppo, ppo | {'ALGORITHM/PPO.clip': 0.1})


def test_the_page_lists_what_the_table_says():
    page = (ROOT / 'docs/resume.md').read_text()
    for name in (*resume.FIXED, *resume.DATA, *resume.SAMPLED, *resume.TAKEN):
        assert f'`{name}`' in page, name
