"""Bindings of older versions, translated: a config.gin that was written then still says what it said.

    train_policy.train.sampling = %SAMPLING    ->    Objective.sampling = %SAMPLING
    decoder.DecoderConfig.scan_layers = True      ->    (nothing)
"""

from __future__ import annotations

import functools
import logging
import re

_TUNING = {name: f'Tuning.{name}' for name in ('spec', 'optimizer', 'schedule', 'num_microbatches')}
_OBJECTIVE = ('sampling', 'algorithm', 'kl', 'shaping', 'entropy_bonus', 'anchor_ema')

# Parameters of the three trainings until version 0.1, and what they are now.
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
# What a training is given in their place.
GIVEN = {
    'train_sft.train': {'answers': '@evaluate.Answers()', 'tuning': '@tuning.Tuning()'},
    'train_reward.train': {'tuning': '@tuning.Tuning()'},
    'train_policy.train': {
        'answers': '@evaluate.Answers()',
        'objective': '@objective.Objective()',
        'tuning': '@tuning.Tuning()',
    },
}
VALUE = 'Objective.value = @value/tuning.Tuning()'
# Of DecoderConfig: what is always so today, and why another value needs no translation.
SETTLED = {'scan_layers': ('True', 'layers are always in one loop, and compute the same')}
_HEADER = r'train_(?:sft|reward|policy)\.train|(?:[\w./]*[./])?DecoderConfig'
_BLOCK = re.compile(rf'^({_HEADER}):[ \t]*\n((?:[ \t]+\S[^\n]*\n?|[ \t]*\n)+)', re.MULTILINE)
_BINDING = re.compile(r'^([ \t]*)(?:perl_jax\.)?(train_(?:sft|reward|policy)\.train)\.(\w+)(?=\s*=)', re.MULTILINE)
_SETTLED = re.compile(
    rf'^(?:[\w./]*[./])?DecoderConfig\.({"|".join(SETTLED)})[ \t]*=[ \t]*([^#\n]*)[^\n]*', re.MULTILINE
)


def translate(text: str) -> str:
    """The text of a gin file in today's names; each line stays where it is, and what is added stands at the end."""
    text = _SETTLED.sub(_settled, _BLOCK.sub(_flat, text))
    trainings = {training for _, training, name in _BINDING.findall(text) if name in PARAMETERS[training]}
    if not trainings:
        return text
    text = _BINDING.sub(lambda m: m[1] + PARAMETERS[m[2]].get(m[3], f'{m[2]}.{m[3]}'), text)
    given = [(training, *item) for training in sorted(trainings) for item in GIVEN[training].items()]
    added = [f'{training}.{name} = {value}' for training, name, value in given]
    if 'train_policy.train' in trainings:
        added.append(VALUE)
    return '\n'.join([text.rstrip('\n'), *added, ''])


def _flat(block: re.Match[str]) -> str:
    """A block that binds an older parameter, as bindings of one line each."""
    name, body = block[1], block[2]
    indent = body[: len(body) - len(body.lstrip(' \t'))]
    names = re.findall(rf'^{indent}(\w+)\s*=', body, re.MULTILINE)
    if not PARAMETERS.get(name, SETTLED).keys() & set(names):
        return block[0]
    return '\n' + re.sub(rf'^{indent}(?=\w+\s*=)', f'{name}.', body, flags=re.MULTILINE)


def _settled(binding: re.Match[str]) -> str:
    """Nothing in the place of a setting that is always so; of another value a line is said."""
    if (value := binding[2].strip()) != SETTLED[binding[1]][0]:
        _say(binding[1], value)
    return ''


@functools.cache
def _say(name: str, value: str) -> None:
    why = SETTLED[name][1]
    logging.getLogger('perl_jax').info(f'DecoderConfig.{name} = {value} has no effect any more: {why}; take it out')
