"""Translates gin bindings of older versions, so that old config.gin files keep their meaning.

    train_policy.train.sampling = %SAMPLING    ->    Objective.sampling = %SAMPLING
    decoder.DecoderConfig.scan_layers = True      ->    (nothing)
"""

from __future__ import annotations

import functools
import logging
import re

_TUNING = {name: f'Tuning.{name}' for name in ('spec', 'optimizer', 'schedule', 'num_microbatches')}
_OBJECTIVE = ('sampling', 'algorithm', 'kl', 'shaping', 'entropy_bonus', 'anchor_ema')

# Parameters of the three trainings up to version 0.1, and their current names.
PARAMETERS = {
    'train_sft.train': _TUNING
    | {
        'prompts_dataset': 'Answers.dataset',
        'sampling': 'Answers.sampling',
        'metric_fns': 'Answers.metric_fns',
    },
    'train_reward.train': _TUNING,
    'train_policy.train': _TUNING
    | {name: f'Objective.{name}' for name in _OBJECTIVE}
    | {
        'value_optimizer': 'value/Tuning.optimizer',
        'value_schedule': 'value/Tuning.schedule',
        'eval_dataset': 'Answers.dataset',
        'metric_fns': 'Answers.metric_fns',
        'shared_base': 'BaseConfig.shared',
    },
}
# The arguments of the trainings that replaced them.
ARGUMENTS = {
    'train_sft.train': {'answers': '@evaluate.Answers()', 'tuning': '@tuning.Tuning()'},
    'train_reward.train': {'tuning': '@tuning.Tuning()'},
    'train_policy.train': {
        'answers': '@evaluate.Answers()',
        'objective': '@objective.Objective()',
        'tuning': '@tuning.Tuning()',
    },
}
VALUE_BINDING = 'Objective.value = @value/tuning.Tuning()'
# Removed parameters of DecoderConfig: the value that is now fixed, and why other values can be ignored.
REMOVED = {'scan_layers': ('True', 'layers are always in one loop, and compute the same')}
_HEADER = r'train_(?:sft|reward|policy)\.train|(?:[\w./]*[./])?DecoderConfig'
_BLOCK = re.compile(rf'^({_HEADER}):[ \t]*\n((?:[ \t]+\S[^\n]*\n?|[ \t]*\n)+)', re.MULTILINE)
_BINDING = re.compile(r'^([ \t]*)(?:perl_jax\.)?(train_(?:sft|reward|policy)\.train)\.(\w+)(?=\s*=)', re.MULTILINE)
_REMOVED = re.compile(
    rf'^(?:[\w./]*[./])?DecoderConfig\.({"|".join(REMOVED)})[ \t]*=[ \t]*([^#\n]*)[^\n]*', re.MULTILINE
)


def translate(text: str) -> str:
    """Translate the text of a gin file to current names; lines keep their numbers, additions go to the end."""
    text = _REMOVED.sub(_removed, _BLOCK.sub(_flatten, text))
    trainings = {training for _, training, name in _BINDING.findall(text) if name in PARAMETERS[training]}
    if not trainings:
        return text
    text = _BINDING.sub(lambda m: m[1] + PARAMETERS[m[2]].get(m[3], f'{m[2]}.{m[3]}'), text)
    arguments = [(training, *item) for training in sorted(trainings) for item in ARGUMENTS[training].items()]
    new_lines = [f'{training}.{name} = {value}' for training, name, value in arguments]
    if 'train_policy.train' in trainings:
        new_lines.append(VALUE_BINDING)
    return '\n'.join([text.rstrip('\n'), *new_lines, ''])


def _flatten(block: re.Match[str]) -> str:
    """Rewrite a block that binds an old parameter as bindings of one line each."""
    name, body = block[1], block[2]
    indent = body[: len(body) - len(body.lstrip(' \t'))]
    names = re.findall(rf'^{indent}(\w+)\s*=', body, re.MULTILINE)
    if not PARAMETERS.get(name, REMOVED).keys() & set(names):
        return block[0]
    return '\n' + re.sub(rf'^{indent}(?=\w+\s*=)', f'{name}.', body, flags=re.MULTILINE)


def _removed(binding: re.Match[str]) -> str:
    """Delete a removed setting; logs a line if its value was not the one that is now fixed."""
    if (value := binding[2].strip()) != REMOVED[binding[1]][0]:
        _log_ignored_setting(binding[1], value)
    return ''


@functools.cache
def _log_ignored_setting(name: str, value: str) -> None:
    reason = REMOVED[name][1]
    logging.getLogger('perl_jax').info(f'DecoderConfig.{name} = {value} has no effect any more: {reason}; remove it')
