"""A chat template, rendered as transformers' apply_chat_template does, in Jinja's sandbox."""

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

_ANSWER = 'here the answer stands'
_QUESTION_1, _QUESTION_2 = 'here a question stands', 'here another question stands'


def render(
    metadata: tokenizer_files.TokenizerMetadata,
    control: Iterable[str],
    conversation: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    name: str = 'default',
) -> str:
    """Render a conversation, with its control tokens marked.

    Args:
      metadata: has the template, and the tokens that the template can refer to.
      control: every special token.
      conversation: messages with role and content.
      add_generation_prompt: whether to end with the beginning of an answer.
      name: which of several templates.

    Raises:
      UserError: a template that cannot be read, or that refuses the conversation.
    """
    template = _compiled(metadata.templates[name], metadata.where)
    variables = {f'{kind}_token': token for kind, token in metadata.tokens.items()}

    def render_messages(messages: Any) -> str:
        try:
            return template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # raise_exception, an undefined name, the sandbox's refusal
            reason = ' '.join(str(error).split())
            raise UserError(f'{metadata.where}: the chat template refuses this conversation: {reason}') from error

    return typed.marked(render_messages, list(conversation), control)


def end_of_turn(metadata: tokenizer_files.TokenizerMetadata, control: Iterable[str]) -> str | None:
    """Returns the control token that the template puts after an answer, or None."""
    before, _, after = _rendered_turns(metadata, control, ['Hi', _ANSWER]).rpartition(_ANSWER)
    match = re.match(mark('(.*?)'), after.lstrip()) if before else None
    return match and match[1]


def between_turns(metadata: tokenizer_files.TokenizerMetadata, tokens: Iterable[str]) -> set[str]:
    """Returns those tokens that the template puts between messages: after a question and around an answer.

    Other tokens of a template may also be written by the model, such as '<think>' at the start of the next answer.
    """
    _, _, after = _rendered_turns(metadata, tokens, [_QUESTION_1, _ANSWER, _QUESTION_2]).partition(_QUESTION_1)
    return set(re.findall(mark(f'([^{OPEN}]*?)'), after.partition(_QUESTION_2)[0]))


def _rendered_turns(metadata: tokenizer_files.TokenizerMetadata, tokens: Iterable[str], texts: Sequence[str]) -> str:
    """Returns texts rendered as turns of user and assistant; empty without a template for such conversations."""
    conversation = [{'role': ('user', 'assistant')[index % 2], 'content': text} for index, text in enumerate(texts)]
    try:
        return (
            render(metadata, tokens, conversation, add_generation_prompt=False)
            if 'default' in metadata.templates
            else ''
        )
    except (
        UserError
    ):  # reported when a prompt is rendered: the template takes other conversations, or there is no Jinja
        return ''


@functools.lru_cache(maxsize=8)
def _compiled(text: str, path: pathlib.Path) -> Any:
    try:
        return _environment().from_string(text)
    except ImportError as error:
        raise UserError(f"{path}: a chat template needs the jinja2 package; pip install 'perl_jax[hf]'") from error
    except Exception as error:  # Jinja's exceptions, which can only be named if it is installed
        raise UserError(f'{path}: the chat template cannot be read ({error})') from error


@functools.cache
def _environment() -> Any:
    """As transformers sets Jinja up (utils/chat_template_utils.py)."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks the answer and changes no text."""

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
