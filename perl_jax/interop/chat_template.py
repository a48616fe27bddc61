"""A checkpoint's own chat template, which is Jinja, as a format like those of tasks/chat.py.

    add('mine_sft', 'sft', examples, preprocessors=[chat(Template('Llama-3.2-1B-Instruct'))])

It is rendered as transformers' apply_chat_template does with add_generation_prompt, in Jinja's sandbox; a BOS that it
puts in front is the one that a run would put there. Control tokens are the template's own; what stands in a message is
text (controls.py).
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perl_jax.controls import GUARD, Formatted, mark, unmark
from perl_jax.errors import UserError
from perl_jax.interop import hf, paths, tokenizer_files

_HERE = 'here the answer stands'


@dataclasses.dataclass(frozen=True)
class Template:
    """The template that lies with a tokenizer; it is read when it is first used.

    path: a folder, hf://OWNER/NAME, a tokenizer.json or a .gguf (`package:NAME/FILE` too).
    name: of a checkpoint with several templates, such as tool_use.
    """

    path: str
    name: str = 'default'

    def __call__(self, conversation: str | Sequence[Mapping[str, Any]]) -> Formatted:
        """The text of a conversation, which ends where the answer begins.

        Raises:
          UserError: there is no template, or what it says of this conversation.
        """
        if isinstance(conversation, str):
            conversation = [{'role': 'user', 'content': conversation}]
        said, control = _loaded(self.path)
        if self.name not in said.templates:
            there = f'only those called {", ".join(said.templates)}' if said.templates else 'none'
            raise UserError(
                f'{self.path}: brings no chat template {self.name!r}, {there}; use chatml, llama3 or gemma '
                '(perl_jax/tasks/chat.py)'
            )
        return Formatted(render(said, control, conversation, add_generation_prompt=True, name=self.name))


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


def file_of(path: str) -> pathlib.Path:
    """The tokenizer's file that a path names, or one in its folder, which need not be there."""
    if path.startswith(hf.HUB):
        return hf.resolve(path, weights=False) / 'tokenizer.json'
    folder = pathlib.Path(path).expanduser()
    return folder / 'tokenizer.json' if folder.is_dir() else paths.resolve(path)


@functools.lru_cache(maxsize=8)
def _loaded(path: str) -> tuple[tokenizer_files.Beside, tuple[str, ...]]:
    """What lies with the tokenizer, and its special tokens."""
    file = file_of(path)
    said = tokenizer_files.beside(file)
    return said, said.control or (_control_of(file) if file.is_file() else ())


@functools.lru_cache(maxsize=8)
def _compiled(text: str, where: pathlib.Path) -> Any:
    try:
        return _environment().from_string(text)
    except ImportError as error:
        raise UserError(f"{where}: a chat template needs the jinja2 package; pip install 'perl_jax[hf]'") from error
    except Exception as error:  # Jinja's own kinds, which are only known where it is installed
        raise UserError(f'{where}: the chat template cannot be read ({error})') from error


def _control_of(file: pathlib.Path) -> tuple[str, ...]:
    """The special tokens of a tokenizer.json."""
    try:
        added = json.loads(file.read_text('utf-8')).get('added_tokens') or []
        return tuple(token['content'] for token in added if token.get('special'))
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f'{file}: not a tokenizer that can be read ({error})') from error


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
