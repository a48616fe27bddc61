"""The flags of `perl_jax judge`, and which kinds of judge use each; a flag that the judge does not use is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Interval

from perl_jax.errors import UserError
from perl_jax.settings import Count, Natural, flag

COUNT = flag(Count)

FLAGS: dict[str, dict[str, Any]] = {
    '--model_dir': {'required': True, 'help': 'MODEL_DIR of the run whose answers are judged'},
    '--against': {
        'help': "what to compare with: another MODEL_DIR, sft (the policy's base), or reference (the task's answers)"
    },
    '--judge': {
        'required': True,
        'help': 'MODEL_DIR of a reward (or several, comma-separated) or of a language model; or http://HOST/v1',
    },
    '--rubric': {'help': 'summarization, helpful, harmless, or your module.function'},
    '--split': {'default': 'validation'},
    '--num': {'type': COUNT, 'help': 'how many prompts; default: all'},
    '--group': {'help': 'the field by which examples are grouped in the bootstrap; default: group'},
    '--by': {'help': 'the field whose values are also judged separately; default: nearness, if the rows have it'},
    '--judge_model': {'help': "the endpoint's name of its model"},
    '--judge_key': {'help': "the environment variable with the endpoint's key"},
    '--judge_chat': {
        'choices': ('chatml', 'llama3', 'gemma', 'own'),
        'help': 'the chat format of the prompts, for a run as the judge',
    },
    '--judge_vocabulary': {'help': "the run's tokenizer, if not the one it was trained with"},
    '--judge_timeout': {'type': flag(Annotated[float, Interval(gt=0, le=86_400)]), 'help': 'seconds; default: 60'},
    '--judge_retries': {'type': flag(Natural), 'help': 'default: 5'},
    '--judge_concurrency': {
        'type': flag(Annotated[int, Interval(ge=1, le=1000)]),
        'help': 'requests at a time; default: 8',
    },
    '--judge_tokens': {'type': COUNT, 'help': 'maximum tokens of a reply; default: 16 for an endpoint, 8 for a run'},
}
ENDPOINT, RUN, REWARD = 'an endpoint', 'a language model run', 'a reward'
_READ_BY = {
    ENDPOINT: ('model', 'key', 'timeout', 'retries', 'concurrency', 'tokens'),
    RUN: ('chat', 'vocabulary', 'tokens'),
    REWARD: (),
}


def settings(flags: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the flags that are set, by their names without `judge_`.

    Args:
      flags: judge_model, judge_tokens ..; None is not set.
      kind: ENDPOINT, RUN or REWARD.

    Raises:
      UserError: a flag is set that this kind of judge does not use.
    """
    judge_settings = {name.removeprefix('judge_'): value for name, value in flags.items() if value is not None}
    for name in judge_settings:
        if name not in _READ_BY[kind]:
            readers = ' or '.join(reader for reader, reader_flags in _READ_BY.items() if name in reader_flags)
            raise UserError(f'--judge_{name} is for {readers}, and --judge is {kind}; remove the flag')
    return judge_settings
