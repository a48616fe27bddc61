r"""How a row of a user's files becomes the texts of a task: prompt and answers, by templates or a chat format."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

from perl_jax.errors import UserError
from perl_jax.tasks import chat as formats
from perl_jax.tasks.user_files import conversations, schemas
from perl_jax.tokenizers.chat import template

Chat = Literal['own', 'chatml', 'llama3', 'gemma', 'plain']
Kind = Literal['sft', 'pairs', 'thumbs', 'prompts']
_FIELDS = {'sft': ('targets',), 'pairs': ('chosen', 'rejected'), 'thumbs': ('targets',), 'prompts': ()}
_ANSWERS = ('answer', 'chosen', 'rejected', 'label')  # columns that a template of the prompt leaves as they are


@dataclasses.dataclass(frozen=True)
class Form:
    """How a row becomes texts.

    Attributes:
      kind: sft, pairs, thumbs or prompts.
      columns: (our name, the row's) of columns that are not recognised by their names.
      prompt_template: a text with the row's columns in braces, 'Q: {question}\nA:'; None takes the prompt as it is.
      answer_template: a text with {answer}.
      chat: a format of tasks/chat.py, 'own' for the template of `model`, or 'plain' for none; None is 'own' if `model`
        has a template, and else 'plain'.
      system: a system message for every prompt.
      model: where the weights and their tokenizer are.
    """

    kind: Kind
    columns: tuple[tuple[str, str], ...] = ()
    prompt_template: str | None = None
    answer_template: str = '{answer}'
    chat: Chat | None = None
    system: str | None = None
    model: str | None = None

    def __call__(self, row: Mapping[str, Any]) -> Texts:
        """Returns what a row holds.

        Raises:
          KeyError, TypeError, ValueError: what is wrong with the row.
        """
        row = self.with_prompt(row)
        examples = schemas.examples(self.recognise(row), row, self.kind)
        return Texts(examples[0].group if examples else '', tuple(map(self._texts, examples)))

    def recognise(self, row: Mapping[str, Any]) -> schemas.Recognised:
        """Returns the schema of a row; raises as `__call__`."""
        names = tuple(name for name, value in row.items() if value is not None)  # Parquet has every column in every row
        return schemas.recognise(names, self.columns)

    def with_prompt(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the row with the prompt that PROMPT_TEMPLATE makes, in place of any column that could be one."""
        if self.prompt_template is None:
            return row
        columns = {column for name in _ANSWERS for column in (name, *schemas.SPELLINGS[name])}
        columns |= {column for _, column in self.columns}
        return {x: row[x] for x in columns & row.keys()} | {'prompt': self.prompt_template.format_map(row)}

    def _texts(self, example: schemas.Example) -> dict[str, Any]:
        is_chat = not isinstance(example.prompt, str) or self.format is not None
        answers = (self._answer(text, is_chat) for text in example.answers)
        texts = {'inputs': self._prompt(example)} | dict(zip(_FIELDS[self.kind], answers, strict=True))
        for text in texts.values():
            text.encode()  # no lone surrogates, which no tokenizer reads
        return texts | ({} if example.label is None else {'label': example.label}) | {'group': example.group}

    def _prompt(self, example: schemas.Example) -> str:
        prompt, text = example.prompt, example.system or self.system
        if example.system and not isinstance(prompt, str) and prompt[0]['role'] == 'system':
            raise ValueError('it has a system message in a column, and another as its first message')
        system = () if text is None else ({'role': 'system', 'content': text},)
        if self.format is not None:
            messages = ({'role': 'user', 'content': prompt.strip()},) if isinstance(prompt, str) else prompt
            try:
                return self.format(_behind(system, messages)) + self.seam[0]
            except UserError as error:  # a template refuses this conversation: an odd row
                raise ValueError(f'{error}; CHAT = another format writes it') from error
        if not isinstance(prompt, str):
            return conversations.plain(_behind(system, prompt))
        is_separate = example.is_spaced or prompt[-1:].isspace() or self.prompt_template is not None
        return (f'{text}\n\n' if text else '') + prompt + ('' if is_separate else '\n')

    def _answer(self, text: str, is_chat: bool) -> str:
        if is_chat and self.format is None:
            text = f' {text.strip()}'  # behind `Assistant:`
        if is_chat and self.format is not None:
            text = f'{self.seam[1]}{text}'
        return self.answer_template.replace('{answer}', text)

    @functools.cached_property
    def seam(self) -> tuple[str, str]:
        """What a template puts between a prompt and its answer, at the end of the one and the start of the other."""
        return self.format.seam() if isinstance(self.format, template.Template) else ('', '')

    @functools.cached_property
    def format(self) -> Callable[..., str] | None:
        """The chat format; None writes plain text."""
        if self.chat == 'own' or (self.chat is None and self.model and template.exists(self.model)):
            if not self.model:
                raise UserError("CHAT = 'own' takes the model's template: set INITIAL_CHECKPOINT_PATH, or another CHAT")
            return template.Template(self.model)
        return None if self.chat in (None, 'plain') else getattr(formats, self.chat)


@dataclasses.dataclass(frozen=True)
class Texts:
    """The examples of a row, as a task yields them, and the group by which splits keep rows together."""

    group: str
    examples: tuple[dict[str, Any], ...]


def _behind(system: conversations.Messages, messages: conversations.Messages) -> conversations.Messages:
    return messages if messages[0]['role'] == 'system' else (*system, *messages)
