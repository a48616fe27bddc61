"""The flags of `perl_jax judge`, and which kind of judge reads which: one that is not read is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perl_jax.errors import UserError

FLAGS: dict[str, dict[str, Any]] = {
    '--model_dir': {'required': True, 'help': 'MODEL_DIR of the run whose answers are judged'},
    '--against': {'help': 'another MODEL_DIR; sft, what a policy started from; or reference, of the task'},
    '--judge': {
        'required': True,
        'help': 'MODEL_DIR of a reward (or several, with commas), or of a model to ask; or http://HOST/v1',
    },
    '--rubric': {'help': 'summarization, helpful, harmless, or your module.function'},
    '--split': {'default': 'validation'},
    '--num': {'type': int, 'help': 'how many prompts; default: all'},
    '--group': {'help': 'a field of the examples: its rows are drawn together for the intervals (group)'},
    '--judge_model': {'help': 'what the endpoint calls its model'},
    '--judge_key': {'help': 'the environment variable that holds its key'},
    '--judge_chat': {'choices': ('chatml', 'llama3', 'gemma', 'own'), 'help': 'the prompt format of a run to ask'},
    '--judge_vocabulary': {'help': 'its tokenizer, if not the one it was trained with'},
    '--judge_timeout': {'type': float, 'help': 'seconds; default: 60'},
    '--judge_retries': {'type': int, 'help': 'default: 5'},
    '--judge_concurrency': {'type': int, 'help': 'requests at a time; default: 8'},
    '--judge_tokens': {'type': int, 'help': "room for its reply; default: 16, a run's 8"},
}
ENDPOINT, RUN, REWARD = 'an endpoint', 'a run that is asked', 'a reward'
_READ_BY = {
    ENDPOINT: ('model', 'key', 'timeout', 'retries', 'concurrency', 'tokens'),
    RUN: ('chat', 'vocabulary', 'tokens'),
    REWARD: (),
}


def settings(flags: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What is set of a judge, by the names without `judge_`.

    Args:
      flags: judge_model, judge_tokens ..; None is not given.
      kind: ENDPOINT, RUN or REWARD.

    Raises:
      UserError: a flag that this kind does not read.
    """
    given = {name.removeprefix('judge_'): value for name, value in flags.items() if value is not None}
    for name in given:
        if name not in _READ_BY[kind]:
            readers = ' or '.join(other for other, names in _READ_BY.items() if name in names)
            raise UserError(f'--judge_{name} is for {readers}, and --judge is {kind}; leave it out')
    return given
