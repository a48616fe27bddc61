"""Going on with a run under other settings: each is taken, and said, or refused by name.

What a run is given anew at each start takes effect (TAKEN). What its checkpoint holds would stay as it was (FIXED), and
other data would make batches that the steps before have not seen (DATA: ACCEPT_OTHER_DATA = True takes them). A setting
is called as in config.gin, SCOPE/CONFIGURABLE.PARAMETER. Of the user's own functions and classes all is taken.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from perl_jax.errors import UserError

FIXED = {
    '*BaseConfig.network': 'the adapters are of that network',
    '*BaseConfig.dtype': 'the adapters were trained on the base in it',
    '*DecoderConfig.*': 'the adapters are of that network',
    '*T5Config.*': 'the adapters are of that network',
    '*RopeScaling.*': 'the adapters are of that network',
    '*T5XNetwork.*': 'the adapters are of that network',
    '*Tuning.spec': 'the adapters are of that kind',
    '*LoraSpec.rank': 'the adapters are of that rank',
    '*LoraSpec.targets': 'the adapters are of those layers',
    '*LoraSpec.alpha': 'the adapters were trained at that scale',
    '*Tuning.optimizer': 'its state is saved',
    'train_reward.train.head_seed': 'heads have started from it',
    'Objective.algorithm': 'the value and the updates so far are of it',
    '*.epochs': 'updates are counted by it',
    '*.minibatches': 'updates are counted by it',
}
DATA = {
    'train_*.train.dataset': 'the data set',
    '*DatasetConfig.mixture_or_task_name': 'the task',
    '*DatasetConfig.task_feature_lengths': 'what is cut or dropped',
    '*DatasetConfig.batch_size': 'which rows a step takes',
    '*DatasetConfig.split': 'the rows',
    '*DatasetConfig.limit': 'the rows',
    '*DatasetConfig.use_cached': 'how rows were prepared',
    '*DatasetConfig.length_buckets': 'which rows come together',
    '*RunConfig.random_seed': 'the order of the rows, and every draw',
}
SAMPLED = {  # in a policy run, whose batches are its own answers
    '*SamplingConfig.num_samples': 'how many answers a prompt gets',
    '*SamplingConfig.max_decode_length': 'where answers are cut',
}
# How a network is computed, not what.
HOW = ('*DecoderConfig.dtype', '*T5Config.dtype', '*Config.flash', '*Config.remat')
TAKEN = (
    'BaseConfig.path',  # where the same weights lie now: their fingerprint is compared
    '*DatasetConfig.vocabulary',  # likewise its tokens, by whatever name: vocabulary.py
    *HOW, 'Decoder.*', 'T5.*',
    'train/DatasetConfig.tokens_dir', 'train/DatasetConfig.max_dropped',
    'eval/DatasetConfig.*', 'prompts/DatasetConfig.*', 'DatasetConfig.*',
    '*LoraSpec.dropout', 'RunConfig.*', 'Partitioner.*', 'standard_logical_axis_rules.*',
    '*adafactor.*', '*adam.*', '*adamw.*', '*sgd.*', '*chain.*', '*clip_by_global_norm.*', '*_schedule.*', '*linear.*',
    '*KLConfig.*', '*PPO.*', '*GRPO.*', '*SamplingConfig.*', '*LearnedReward.*', '*TextReward.*',
    '*whiten.*', '*clip.*', '*length.*', '*missing_eos.*', '*lower_bound.*', '*TokenizersVocabulary.*',
    'Objective.*', '*Tuning.*', '*Answers.*', 'BaseConfig.shared',
    'train_sft.train.*', 'train_reward.train.*', 'train_policy.train.*',
)  # fmt: skip
_ACCEPT = 'RunConfig.accept_other_data'

Settings = Mapping[str, Any]  # what config.gin says: each setting, and each macro, by its name


class Macro(str):
    """What stands in a value in the place of a macro's: its name."""


def check(before: Settings, after: Settings) -> list[str]:
    """Compare the configuration of a run's last start with that of the next.

    Returns:
      A line for each setting that is another one and is taken.

    Raises:
      UserError: one that is not, by the name that its user gives it.
    """
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if '.' not in name or name in ('RunConfig.model_dir', _ACCEPT):
            continue
        was, now = (resolve(settings, settings.get(name)) for settings in (before, after))
        if was == now or not (name in before and name in after or _may_be_left_out(name, before, after)):
            continue
        said = f'{written(before, after, name)} = {now!r}, and was {was!r} so far'
        if why := refused(name, before, after):
            raise UserError(f'{said}: {why}; put it back, or name another MODEL_DIR')
        if (why := _of_data(name, after)) and not resolve(after, after.get(_ACCEPT, False)):
            raise UserError(
                f'{said}: batches would be other ones than the steps before have seen ({why}); put it back, name '
                'another MODEL_DIR, or take it on purpose with --gin.ACCEPT_OTHER_DATA=True'
            )
        lines.append(said)
    return sorted(set(lines))


def _may_be_left_out(name: str, before: Settings, after: Settings) -> bool:
    """Whether a setting that stands in one of two texts is one that gin writes only where it is not the default.

    That is so of functions. Anything else is left out by a version that did not know it, or with all of what it is of,
    because of another setting.
    """
    value = before.get(name, after.get(name))
    others = [any(key.startswith(f'{name.rpartition(".")[0]}.') for key in settings) for settings in (before, after)]
    return isinstance(value, str) and value.startswith('@') and all(others)


def refused(name: str, before: Settings, after: Settings) -> str | None:
    """Why a setting cannot change while a run goes on; None if it can."""
    is_on = lambda settings, key: bool(resolve(settings, settings.get(key)))  # noqa: E731
    if name == 'KLConfig.beta' and is_on(after, 'KLConfig.target'):
        if is_on(before, 'KLConfig.target'):
            return 'with KL_TARGET it has been steered since, and goes on from where it is'
        return 'KL_TARGET begins to steer it from where it is'
    anchor = 'Objective.anchor_ema'
    if name == anchor and is_on(before, anchor) != is_on(after, anchor):
        return 'an anchor of its own is saved or is not'
    key = None if _first(name, HOW) else _first(name, FIXED)
    return None if key is None else FIXED[key]


def _of_data(name: str, settings: Settings) -> str | None:
    if name.startswith(('eval/', 'prompts/')):  # all others are of training, whatever scope they are given
        return None
    table = DATA | (SAMPLED if any(key.startswith('train_policy.') for key in settings) else {})
    key = _first(name, table)
    return None if key is None else table[key]


def _first(name: str, patterns: Any) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def resolve(settings: Settings, value: Any) -> Any:
    """A value with what its macros stand for."""
    if isinstance(value, Macro):
        return resolve(settings, settings.get(value))
    if isinstance(value, list | tuple):
        return type(value)(resolve(settings, x) for x in value)
    if isinstance(value, dict):
        return {key: resolve(settings, x) for key, x in value.items()}
    return value


def written(before: Settings, after: Settings, name: str) -> str:
    """The name that a user gives a setting: that of the macro that has changed, where it has one."""
    while isinstance(value := after.get(name), Macro) and value in after and before.get(name) == value:
        name = value
    return name
