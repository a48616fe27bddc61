"""A chat template's text, rendered as transformers' apply_chat_template does, in Jinja's sandbox."""

from __future__ import annotations

import copy
import datetime
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perl_jax.controls import GUARD, mark, unmark
from perl_jax.errors import UserError
from perl_jax.interop import tokenizer_files

_HERE = 'here the answer stands'


def render(
    said: tokenizer_files.Beside,
    control: Iterable[str],
    conversation: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    name: str = 'default',
) -> str:
    """The text of a conversation with its control tokens marked.

    Args:
      said: holds the template, and the tokens that it may name.
      control: every special token.

    Raises:
      UserError: a template that cannot be read, or that refuses the conversation.
    """
    template = _compiled(said.templates[name], said.where)
    variables = {f'{kind}_token': token for kind, token in said.tokens.items()}
    try:
        text = template.render(
            messages=_guarded(list(conversation), control), tools=None, documents=None,
            add_generation_prompt=add_generation_prompt, **variables,
        )  # fmt: skip
    except Exception as error:  # raise_exception, an undefined name, the sandbox's refusal
        why = ' '.join(str(error).split())
        raise UserError(f'{said.where}: the chat template refuses this conversation: {why}') from error
    return _marked(text, control)


def end_of_turn(said: tokenizer_files.Beside, control: Iterable[str]) -> str | None:
    """The control token behind an answer, if there is a template and it puts one there."""
    talk = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': _HERE}]
    try:
        text = render(said, control, talk, add_generation_prompt=False) if 'default' in said.templates else ''
    except UserError:  # a template for other talks, or no Jinja: said when it is asked for a prompt
        return None
    before, _, behind = text.rpartition(_HERE)
    ends = re.match(mark('(.*?)'), behind.lstrip()) if before else None
    return ends and ends[1]


@functools.lru_cache(maxsize=8)
def _compiled(text: str, where: pathlib.Path) -> Any:
    try:
        return _environment().from_string(text)
    except ImportError as error:
        raise UserError(f"{where}: a chat template needs the jinja2 package; pip install 'perl_jax[hf]'") from error
    except Exception as error:  # Jinja's own kinds, which are only known where it is installed
        raise UserError(f'{where}: the chat template cannot be read ({error})') from error


def _guarded(value: Any, control: Iterable[str]) -> Any:
    """Messages in whose texts no control token is to be found."""
    if isinstance(value, str):
        value = unmark(value)
        return re.sub(_any(control), lambda word: word[0][0] + GUARD + word[0][1:], value) if control else value
    if isinstance(value, Mapping):
        return {key: _guarded(each, control) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [_guarded(each, control) for each in value]
    return copy.copy(value)


def _marked(text: str, control: Iterable[str]) -> str:
    text = re.sub(_any(control), lambda word: mark(word[0]), text) if control else text
    return text.replace(GUARD, '')


def _any(control: Iterable[str]) -> str:
    return '|'.join(map(re.escape, sorted(control, key=len, reverse=True)))


@functools.cache
def _environment() -> Any:
    """As transformers sets Jinja up (utils/chat_template_utils.py)."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which only says where the answer stands."""

        tags = {'generation'}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **settings)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters['tojson'] = tojson
    environment.globals['raise_exception'] = refuse
    environment.globals['strftime_now'] = lambda format: datetime.datetime.now().strftime(format)
    return environment
