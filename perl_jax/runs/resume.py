"""Resuming a run with changed settings: each change is accepted and reported, or refused by name.

Settings that are read anew at each start take effect (TAKEN). Settings that the checkpoint fixes are refused (FIXED).
So are changes of the data (DATA), since batches would differ from what the earlier steps have seen;
ACCEPT_OTHER_DATA = True accepts them. Settings are named as in config.gin, SCOPE/CONFIGURABLE.PARAMETER. Those of a
user's own functions and classes are all accepted. An optimizer's settings are accepted if they do not change the
shapes of its state, which are compared when it is restored (checkpoints.py).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
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
    'task.paths': 'the rows',
    'task.kind': 'the rows',
    'task.columns': 'the rows',
    'task.*_template': 'their texts',
    'task.chat': 'their texts',
    'task.system': 'their texts',
    '*RunConfig.random_seed': 'the order of the rows, and every draw',
}
SAMPLED = {  # in a policy run, whose batches are its own answers
    '*SamplingConfig.num_samples': 'how many answers a prompt gets',
    '*SamplingConfig.max_decode_length': 'where answers are cut',
}
# With LENGTH_BUCKETS prompts are sorted by length only if none of these is set (Objective.prompts_are_independent).
TOGETHER = ('Objective.entropy_bonus', 'Objective.shaping')
# How a network is computed: the results are the same up to rounding.
COMPUTATION = ('*DecoderConfig.dtype', '*T5Config.dtype', '*Config.flash', '*Config.remat')
OPTIMIZERS = ('*adafactor.*', '*adam.*', '*adamw.*', '*sgd.*', '*chain.*', '*clip_by_global_norm.*', '*_schedule.*')
TAKEN = (
    'BaseConfig.path',  # the weights may have moved: their fingerprint is compared
    '*DatasetConfig.vocabulary',  # likewise, its tokens are compared (vocabulary.py)
    *COMPUTATION, 'Decoder.*', 'T5.*',
    'task.model',  # likewise: where a chat template is read
    'train/DatasetConfig.tokens_dir', 'train/DatasetConfig.max_dropped',
    'eval/DatasetConfig.*', 'prompts/DatasetConfig.*', 'DatasetConfig.*', 'prompts/task.*',
    '*LoraSpec.dropout', 'RunConfig.*', 'Partitioner.*', 'standard_logical_axis_rules.*',
    *OPTIMIZERS, '*linear.*',
    '*KLConfig.*', '*PPO.*', '*GRPO.*', '*SamplingConfig.*', '*LearnedReward.*', '*TextReward.*',
    '*whiten.*', '*clip.*', '*length.*', '*missing_eos.*', '*lower_bound.*', '*TokenizersVocabulary.*',
    'Objective.*', '*Tuning.*', '*Answers.*', 'BaseConfig.shared',
    'train_sft.train.*', 'train_reward.train.*', 'train_policy.train.*',
)  # fmt: skip
_ACCEPT = 'RunConfig.accept_other_data'

Settings = Mapping[str, Any]  # the contents of config.gin: settings and macros by name


class Macro(str):
    """The name of a macro, where a value refers to it."""


class _NotSet:
    def __repr__(self) -> str:
        return 'not set'


NOT_SET = _NotSet()  # a setting that a configuration does not have, and that has no default


def check(
    old_settings: Settings, new_settings: Settings, default: Callable[[str], Any] = lambda name: NOT_SET
) -> dict[str, str]:
    """Compare the configuration of a run's last start with that of the next.

    Args:
      old_settings: of the last start.
      new_settings: of the next.
      default: the name of a setting -> its value where a configuration does not have it, or NOT_SET.

    Returns:
      The settings that changed and are accepted: {name: line about it}.

    Raises:
      UserError: a change that is refused, by the name that the user gives the setting.
    """
    changes = {}
    for name in sorted(old_settings.keys() | new_settings.keys()):
        if '.' not in name or name in ('RunConfig.model_dir', _ACCEPT):
            continue
        if not (_is_used(name, old_settings) and _is_used(name, new_settings)):
            continue  # its class or function was added or removed by another setting, which is compared
        old_value, new_value = (value_of(settings, name, default) for settings in (old_settings, new_settings))
        if old_value == new_value:
            continue
        change = f'{user_name(old_settings, new_settings, name)} = {new_value!r}, and was {old_value!r} so far'
        if reason := refusal(name, old_settings, new_settings):
            raise UserError(f'{change}: {reason}; put it back, or name another MODEL_DIR')
        accepted = resolve(new_settings, new_settings.get(_ACCEPT, False))
        if (reason := _data_reason(name, old_settings, new_settings)) and not accepted:
            raise UserError(
                f'{change}: batches would differ from those of the earlier steps ({reason}); put it back, name another '
                'MODEL_DIR, or take it on purpose with --gin.ACCEPT_OTHER_DATA=True'
            )
        changes[name] = change
    return changes


def may_change_state(name: str) -> bool:
    """Returns whether a setting may change an optimizer's state: an optimizer's, or one of a user's own function."""
    return bool(_matching_pattern(name, OPTIMIZERS)) or not _matching_pattern(name, [*FIXED, *DATA, *SAMPLED, *TAKEN])


def _is_used(name: str, settings: Settings) -> bool:
    """Returns whether a configuration uses the configurable of a setting.

    It has other settings of it, or refers to it: of functions that are not called yet, gin writes only what is bound.
    """
    configurable = name.rpartition('.')[0]
    scope, slash, selector = configurable.rpartition('/')
    reference = re.compile(rf'@{re.escape(scope + slash)}([\w.]+\.)?{re.escape(selector)}(?![\w./(])')
    return any(
        key.startswith(f'{configurable}.') or ('@' in (text := repr(value)) and reference.search(text))
        for key, value in settings.items()
    )


def value_of(settings: Settings, name: str, default: Callable[[str], Any]) -> Any:
    """Returns the value of a setting: its own, that of the enclosing scope (as gin has it), or the default."""
    if name in settings:
        return resolve(settings, settings[name])
    scope, slash, parameter = name.rpartition('/')
    outer_scope = scope.rpartition('/')[0]
    return value_of(settings, f'{outer_scope}/{parameter}'.lstrip('/'), default) if slash else default(name)


def refusal(name: str, old_settings: Settings, new_settings: Settings) -> str | None:
    """Returns why a setting cannot change when a run resumes; None if it can."""
    is_set = lambda settings, key: bool(resolve(settings, settings.get(key)))  # noqa: E731
    if name == 'KLConfig.beta' and is_set(new_settings, 'KLConfig.target'):
        if is_set(old_settings, 'KLConfig.target'):
            return 'with KL_TARGET it has been steered since, and goes on from where it is'
        return 'KL_TARGET begins to steer it from where it is'
    anchor = 'Objective.anchor_ema'
    if name == anchor and is_set(old_settings, anchor) != is_set(new_settings, anchor):
        return 'an anchor of its own is saved or is not'
    key = None if _matching_pattern(name, COMPUTATION) else _matching_pattern(name, FIXED)
    return None if key is None else FIXED[key]


def _data_reason(name: str, old_settings: Settings, new_settings: Settings) -> str | None:
    settings = new_settings
    is_set = [bool(resolve(either, either.get(name))) for either in (old_settings, new_settings)]
    buckets = resolve(settings, settings.get('train/DatasetConfig.length_buckets', 1))
    if name in TOGETHER and buckets != 1 and is_set[0] != is_set[1]:
        return 'which prompts share a batch, with LENGTH_BUCKETS above 1'
    if name.startswith(('eval/', 'prompts/')):  # all other scopes are of training data
        return None
    table = DATA | (SAMPLED if any(key.startswith('train_policy.') for key in settings) else {})
    key = _matching_pattern(name, table)
    return None if key is None else table[key]


def _matching_pattern(name: str, patterns: Any) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def resolve(settings: Settings, value: Any) -> Any:
    """Returns a value with its macros replaced by their values."""
    if isinstance(value, Macro):
        return resolve(settings, settings.get(value))
    if isinstance(value, list | tuple):
        return type(value)(resolve(settings, x) for x in value)
    if isinstance(value, dict):
        return {key: resolve(settings, x) for key, x in value.items()}
    return value


def user_name(old_settings: Settings, new_settings: Settings, name: str) -> str:
    """Returns the name that a user gives a setting: that of the macro that changed, if it is bound to one."""
    while (
        isinstance(value := new_settings.get(name), Macro) and value in new_settings and old_settings.get(name) == value
    ):
        name = value
    return name
