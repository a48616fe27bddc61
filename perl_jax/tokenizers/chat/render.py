"""A chat template's text, rendered as transformers' apply_chat_template does, in Jinja's sandbox."""

from __future__ import annotations

import datetime
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perl_jax.errors import UserError
from perl_jax.tokenizers import tokenizer_files
from perl_jax.tokenizers.chat import typed
from perl_jax.tokenizers.chat.controls import OPEN, mark

_HERE = 'here the answer stands'
_ASKED, _ASKED_AGAIN = 'here a question stands', 'here another question stands'


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

    def text(messages: Any) -> str:
        try:
            return template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # raise_exception, an undefined name, the sandbox's refusal
            why = ' '.join(str(error).split())
            raise UserError(f'{said.where}: the chat template refuses this conversation: {why}') from error

    return typed.marked(text, list(conversation), control)


def end_of_turn(said: tokenizer_files.Beside, control: Iterable[str]) -> str | None:
    """The control token behind an answer, if there is a template and it puts one there."""
    before, _, behind = _talk(said, control, ['Hi', _HERE]).rpartition(_HERE)
    ends = re.match(mark('(.*?)'), behind.lstrip()) if before else None
    return ends and ends[1]


def between_turns(said: tokenizer_files.Beside, tokens: Iterable[str]) -> set[str]:
    """Which of these tokens stand between the messages of a talk: behind a question and around an answer.

    What else a template writes may be the model's to write too: '<think>' in front of the next answer.
    """
    _, _, behind = _talk(said, tokens, [_ASKED, _HERE, _ASKED_AGAIN]).partition(_ASKED)
    return set(re.findall(mark(f'([^{OPEN}]*?)'), behind.partition(_ASKED_AGAIN)[0]))


def _talk(said: tokenizer_files.Beside, tokens: Iterable[str], texts: Sequence[str]) -> str:
    """Texts of user and assistant in turns; empty where there is no template for such a talk."""
    talk = [{'role': ('user', 'assistant')[n % 2], 'content': text} for n, text in enumerate(texts)]
    try:
        return render(said, tokens, talk, add_generation_prompt=False) if 'default' in said.templates else ''
    except UserError:  # a template for other talks, or no Jinja: said when it is asked for a prompt
        return ''


@functools.lru_cache(maxsize=8)
def _compiled(text: str, where: pathlib.Path) -> Any:
    try:
        return _environment().from_string(text)
    except ImportError as error:
        raise UserError(f"{where}: a chat template needs the jinja2 package; pip install 'perl_jax[hf]'") from error
    except Exception as error:  # Jinja's own kinds, which are only known where it is installed
        raise UserError(f'{where}: the chat template cannot be read ({error})') from error


@functools.cache
def _environment() -> Any:
    """As transformers sets Jinja up (utils/chat_template_utils.py)."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which only says where the answer stands."""

        tags = {'generation'}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
            return nodes.Scope(body, lineno=line)

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
