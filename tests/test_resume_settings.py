"""What happens to each setting when a run goes on: taken and said, or refused by name."""

import inspect
import re

import pytest
from test_recipes import GOLDEN, ROOT

from perl_jax.cli import configurables, configure
from perl_jax.errors import UserError
from perl_jax.runs import resume
from perl_jax.runs.resume import Macro
from perl_jax.tasks.user_files import task

POLICY = configure.settings((GOLDEN / 'toy_policy.gin').read_text())
REWARD = configure.settings((GOLDEN / 'toy_reward.gin').read_text())
FILES = {f'task.{name}': 'one' for name in inspect.signature(task.task).parameters}  # of gin/data/files.gin
SFT = configure.settings((GOLDEN / 'toy_sft.gin').read_text()) | FILES
EACH = [(phase, name) for phase, settings in (('policy', POLICY), ('reward', REWARD), ('sft', SFT)) for name in settings
        if '.' in name]  # fmt: skip
NOT_COMPARED = {'RunConfig.model_dir', 'RunConfig.accept_other_data'}


def check(before, after):
    """The lines about accepted changes."""
    return sorted(set(resume.check(before, after, configurables.default).values()))


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
    return check(settings, other(settings, name, value))


def test_a_config_is_read_as_gin_reads_it():
    assert POLICY['KLConfig.beta'] == Macro('BETA') and isinstance(POLICY['KLConfig.beta'], Macro)
    assert POLICY['BETA'] == 0.1 and POLICY['TASK_FEATURE_LENGTHS'] == {'inputs': 26}
    assert POLICY['train_policy.train.dataset'] == '@train/data.DatasetConfig()'
    assert POLICY['value/adafactor.learning_rate'] == Macro('VALUE_LEARNING_RATE')
    assert resume.resolve(POLICY, Macro('VALUE_LEARNING_RATE')) == 0.005
    assert check(POLICY, POLICY) == []


@pytest.mark.parametrize(('phase', 'name'), EACH)
def test_each_setting_is_known_and_taken_or_refused_by_its_users_name(phase, name):
    settings = {'policy': POLICY, 'reward': REWARD, 'sft': SFT}[phase]
    tables = [*resume.FIXED, *resume.DATA, *resume.SAMPLED, *resume.TAKEN]
    assert resume._matching_pattern(name, tables), f'perl_jax/runs/resume.py says nothing of {name}'
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


@pytest.mark.parametrize(('macro', 'value'), [('ENTROPY_BONUS', 0.01), ('SHAPING', ['@shaping.whiten'])])
def test_what_keeps_prompts_from_being_dealt_by_length_is_of_the_data(macro, value):
    """Only between none and some of it, and only where LENGTH_BUCKETS deals."""
    dealt = POLICY | {'LENGTH_BUCKETS': 4}
    with pytest.raises(UserError, match=f'{macro} = .*which prompts share a batch.*ACCEPT_OTHER_DATA'):
        check(dealt, dealt | {macro: value})
    with pytest.raises(UserError, match=f'{macro} = .*which prompts share a batch'):
        check(dealt | {macro: value}, dealt)
    assert len(check(POLICY, POLICY | {macro: value})) == 1
    if macro == 'ENTROPY_BONUS':
        assert len(check(dealt | {macro: 0.02}, dealt | {macro: value})) == 1



def test_other_data_are_taken_on_purpose():
    accepted = POLICY | FILES | {'RunConfig.accept_other_data': True}
    for name in resume.DATA | resume.SAMPLED:
        name = name.replace('task.*', 'task.prompt')
        name = name.replace('train_*', 'train_policy').replace('*Data', 'train/Data').removeprefix('*')
        assert check(POLICY | FILES, other(accepted, name)), name
    with pytest.raises(UserError, match='rank'):  # but nothing else
        check(POLICY, other(accepted, 'LoraSpec.rank'))


def test_the_length_of_an_answer_at_evaluation_is_no_data_of_sft():
    sft = SFT | {'SamplingConfig.max_decode_length': 8}
    assert check(sft, sft | {'SamplingConfig.max_decode_length': 16})


def test_beta_is_a_setting_unless_it_is_steered():
    steered = POLICY | {'KL_TARGET': 6.0}
    assert changed(POLICY, 'KLConfig.beta', 0.2) == ['BETA = 0.2, and was 0.1 so far']
    with pytest.raises(UserError, match='BETA = 0.2, and was 0.1 so far: with KL_TARGET it has been steered'):
        changed(steered, 'KLConfig.beta', 0.2)
    assert check(steered, POLICY | {'BETA': 0.2}) == [
        'BETA = 0.2, and was 0.1 so far', 'KL_TARGET = None, and was 6.0 so far'
    ]  # fmt: skip
    assert check(POLICY, steered) == ['KL_TARGET = 6.0, and was None so far']


def test_a_scope_of_ones_own_is_training_too():
    mine = {'mine/DatasetConfig.batch_size': 4, 'x/BaseConfig.dtype': 'float32', 'big/DecoderConfig.rope_theta': 1e4}
    for name in mine:
        with pytest.raises(UserError, match=f'{name} = 8'):
            check(mine, mine | {name: 8})
    assert check({'prompts/DatasetConfig.batch_size': 4}, {'prompts/DatasetConfig.batch_size': 8})
    with pytest.raises(UserError, match='train_policy.train.dataset = .*ACCEPT_OTHER_DATA'):
        changed(POLICY, 'train_policy.train.dataset', '@mine/data.DatasetConfig()')


def test_the_macro_that_has_changed_is_named():
    decay = POLICY | {'DECAY_STEPS': Macro('TRAIN_STEPS')}
    assert check(POLICY, decay) == ['DECAY_STEPS = 240, and was None so far']
    assert check(decay, decay | {'TRAIN_STEPS': 300}) == ['TRAIN_STEPS = 300, and was 240 so far']


def test_a_function_that_is_the_default_is_not_written():
    with_aggregate = POLICY | {'LearnedReward.aggregate': '@ensembles.median'}
    for before, after in (POLICY, with_aggregate), (with_aggregate, POLICY):
        (line,) = check(before, after)
        assert line.startswith('LearnedReward.aggregate = ')
    default = {**POLICY, 'LearnedReward.aggregate': '@ensembles.mean'}
    assert check(POLICY, default) == []
    assert check(default, with_aggregate) == [
        "LearnedReward.aggregate = '@ensembles.median', and was '@ensembles.mean' so far"
    ]


def test_a_setting_that_an_older_version_did_not_know_was_at_its_default():
    newer = POLICY | {'DecoderConfig.setting_of_a_newer_version': 3}
    assert resume.check(POLICY, newer, lambda name: 3) == {}
    with pytest.raises(UserError, match='setting_of_a_newer_version = 3, and was 4 so far'):
        resume.check(POLICY, newer, lambda name: 4)


def without(settings, *names):
    return {key: value for key, value in settings.items() if key not in names}


@pytest.mark.parametrize('name', [
    'KLConfig.horizon', 'LoraSpec.dropout', 'SamplingConfig.top_p', 'adafactor.momentum', 'LearnedReward.weight',
    'linear.warmup_steps', 'value/linear.decay_steps', 'Objective.entropy_bonus', 'DecoderConfig.qk_norm',
])  # fmt: skip
def test_a_setting_that_only_one_start_has_is_compared_with_the_default(name):
    """As of an older version, which did not know it; a change is a change from the default."""
    assert check(without(POLICY, name), POLICY) == check(POLICY, without(POLICY, name)) == []


@pytest.mark.parametrize(('name', 'value', 'default'), [
    ('KLConfig.horizon', 100, '10000'), ('adafactor.decay_rate', 0.9, '0.8'), ('SamplingConfig.top_k', 5, '0'),
    ('adafactor.dtype_momentum', 'bfloat16', "'float32'"), ('Partitioner.num_partitions', 2, '1'),
    ('train_policy.train.reward', ['@x()'], 'not set'),  # which has no default
])  # fmt: skip
def test_a_setting_added_or_removed_is_reported_where_it_differs(name, value, default):
    bare, bound = without(POLICY, name), POLICY | {name: value}
    assert check(bare, bound) == [f'{name} = {value!r}, and was {default} so far']
    assert check(bound, bare) == [f'{name} = {default}, and was {value!r} so far']


def test_a_setting_added_or_removed_may_be_refused():
    name = 'DecoderConfig.qk_norm'
    for before, after in (without(POLICY, name), POLICY | {name: True}), (POLICY | {name: True}, without(POLICY, name)):
        with pytest.raises(UserError, match=f'{name} = .*: the adapters are of that network'):
            check(before, after)
    with pytest.raises(UserError, match='train/DatasetConfig.limit = 50, and was None so far: .*ACCEPT_OTHER_DATA'):
        check(without(POLICY, 'train/DatasetConfig.limit'), POLICY | {'train/DatasetConfig.limit': 50})


def test_a_function_that_is_not_called_yet_is_compared_too():
    """gin writes of it only what is bound."""
    clipped = POLICY | {'SHAPING': ['@shaping.clip']}
    limited = clipped | {'clip.limit': 2.0}
    assert check(clipped, limited) == ['clip.limit = 2.0, and was 5.0 so far']
    assert check(limited, clipped) == ['clip.limit = 5.0, and was 2.0 so far']
    assert check(clipped, clipped | {'clip.limit': 5.0}) == []
    # With the function itself, the line about it is enough.
    assert check(POLICY, limited) == ["SHAPING = ['@shaping.clip'], and was () so far"]


def test_a_scope_falls_back_to_the_one_around_it():
    both = {'a/clip.limit': 2.0, 'X.y': ['@a/shaping.clip', '@shaping.clip'], 'clip.limit': 2.0}
    assert check(without(both, 'a/clip.limit'), both) == []
    assert check(without(both, 'a/clip.limit'), both | {'a/clip.limit': 3.0}) == [
        'a/clip.limit = 3.0, and was 2.0 so far'
    ]


def test_an_anchor_that_follows_may_follow_faster_but_not_begin_to():
    following = POLICY | {'ANCHOR_EMA': 0.1}
    assert check(following, POLICY | {'ANCHOR_EMA': 0.2}) == ['ANCHOR_EMA = 0.2, and was 0.1 so far']
    for before, after in (POLICY, following), (following, POLICY):
        with pytest.raises(UserError, match='ANCHOR_EMA'):
            check(before, after)


def test_how_often_a_rollout_is_learned_from_counts_updates():
    ppo = {'Objective.algorithm': '@ppo.PPO()', 'ALGORITHM/PPO.epochs': 4, 'ALGORITHM/PPO.clip': 0.2}
    with pytest.raises(UserError, match=r'PPO.epochs = 2, and was 4 so far: updates are counted by it'):
        check(ppo, ppo | {'ALGORITHM/PPO.epochs': 2})
    assert check(ppo, ppo | {'ALGORITHM/PPO.clip': 0.1})


def test_the_page_lists_what_the_table_says():
    page = (ROOT / 'docs/reference/resume.md').read_text()
    for name in (*resume.FIXED, *resume.DATA, *resume.SAMPLED, *resume.TAKEN):
        assert f'`{name}`' in page, name
