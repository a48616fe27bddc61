"""Which columns a row has, and what it therefore holds: the forms of rows that data sets of preferences come in."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from perl_jax.tasks import splits
from perl_jax.tasks.user_files import conversations
from perl_jax.tasks.user_files.conversations import Messages

Prompt = str | Messages


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with its answers.

    Attributes:
      prompt: a text or messages.
      answers: (chosen, rejected) of a pair, one answer of a demonstration or rating, none of a prompt.
      label: of a rating, from 0 (bad) to 1 (good).
      system: the row's own system message, which no message of `prompt` is.
      is_spaced: whether its answers begin with the white space that separates them from the prompt.
    """

    prompt: Prompt
    answers: tuple[str, ...] = ()
    label: float | None = None
    system: str | None = None
    is_spaced: bool = False

    @property
    def group(self) -> str:
        """What the rows of one prompt share, by which splits and intervals take them together."""
        if isinstance(self.prompt, str):
            return splits.normalised(self.prompt)
        return splits.normalised(next((m['content'] for m in self.prompt if m['role'] == 'user'), ''))


@dataclasses.dataclass(frozen=True)
class Schema:
    """A form of rows.

    Attributes:
      name: for messages.
      columns: the columns that make a row one of this form.
      kind: pairs, thumbs, sft or prompts: the most that it can train.
      read: from a row, its columns by the names above, to its examples; a KeyError, TypeError or ValueError says what
        is wrong with it.
    """

    name: str
    columns: tuple[str, ...]
    kind: str
    read: Callable[[Mapping[str, Any]], list[Example]]


# Other names of a column. Of two that mean the same in one row, COLUMNS has to say which.
SPELLINGS = {
    'prompt': ('inputs', 'question', 'query'),
    'answer': ('completion', 'response', 'targets', 'output'),
    'messages': ('conversations', 'conversation', 'dialog'),
    'instruction': (),
    'input': ('context',),
    'system': ('system_prompt',),
    'chosen': (),
    'rejected': (),
    'label': (),
    'history': (),
    'human_ref_A': (),
    'human_ref_B': (),
    'labels': (),
}

USES = {  # of rows of a kind
    'pairs': ('pairs', 'sft', 'prompts'),
    'thumbs': ('thumbs', 'sft', 'prompts'),
    'sft': ('sft', 'prompts'),
    'prompts': ('prompts',),
}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{name} is no text but {str(value)[:40]!r}')
    if not value.strip():
        raise ValueError(f'{name} is empty')
    return value


def _prompt(row: Mapping[str, Any]) -> Prompt:
    value = row['prompt']
    if conversations.is_transcript(value) or (conversations.is_messages(value) and value):
        messages = conversations.messages(value)
        if messages[-1]['role'] == 'assistant' and not messages[-1]['content']:  # `Assistant:`, to be answered
            messages = messages[:-1]
        return messages
    return _text(value, 'prompt')


def _answers(row: Mapping[str, Any], *columns: str) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt and the answers in these columns: texts, or messages that continue the prompt or repeat it."""
    prompt, values = _prompt(row), [row[column] for column in columns]
    if not any(map(_is_dialog, values)):
        texts = tuple(_text(value, column) for value, column in zip(values, columns))
        if len(texts) > 1 and isinstance(prompt, str) and all(text.startswith(prompt) for text in texts):
            texts = tuple(_text(text[len(prompt) :], 'an answer') for text in texts)  # they repeat it
        return prompt, texts
    before = ({'role': 'user', 'content': prompt},) if isinstance(prompt, str) else prompt
    dialogs = [conversations.continued(before, _messages(value, column)) for value, column in zip(values, columns)]
    shared_prompt, answers = _split_last(dialogs)
    return prompt if shared_prompt == before else shared_prompt, answers


def _split_last(dialogs: Iterable[Messages]) -> tuple[Messages, tuple[str, ...]]:
    """What dialogs share, and the last answer of each."""
    prompts, answers = zip(*map(conversations.split_last, dialogs), strict=True)
    if any(other != prompts[0] for other in prompts):
        raise ValueError('chosen and rejected part before the last answer')
    return prompts[0], tuple(_text(answer, 'an answer') for answer in answers)


def _is_dialog(value: Any) -> bool:
    return conversations.is_messages(value) or conversations.is_message(value) or conversations.is_transcript(value)


def _messages(value: Any, column: str) -> Messages:
    if conversations.is_message(value):
        value = [value]
    if not _is_dialog(value):
        value = [{'role': 'assistant', 'content': _text(value, column)}]
    return conversations.messages(value)


def _preference(row: Mapping[str, Any]) -> list[Example]:
    return [Example(*_answers(row, 'chosen', 'rejected'))]


def _after_messages(row: Mapping[str, Any]) -> list[Example]:
    chosen = row['chosen']
    if conversations.is_messages(chosen) and chosen and chosen[0] == row['messages'][0]:
        return _transcripts(row)  # `messages` is a copy of the chosen dialog
    return _preference({**row, 'prompt': row['messages']})


def _transcripts(row: Mapping[str, Any]) -> list[Example]:
    if not _is_dialog(row['chosen']) or not _is_dialog(row['rejected']):
        raise ValueError('chosen and rejected are no dialogs, and no column is the prompt: say which, as prompt=COLUMN')
    return [Example(*_split_last(conversations.messages(row[column]) for column in ('chosen', 'rejected')))]


def _shp(row: Mapping[str, Any]) -> list[Example]:
    answers = tuple(_text(row[column], column) for column in ('human_ref_A', 'human_ref_B'))
    if row['labels'] not in (0, 1, '0', '1'):
        raise ValueError(f'labels is {row["labels"]!r}, not 1 (A is better) or 0')
    better, worse = answers if int(row['labels']) else answers[::-1]
    return [Example(_text(row['history'], 'history'), (better, worse))]


def _rating(row: Mapping[str, Any]) -> list[Example]:
    return [Example(*_answers(row, 'answer'), _label(row['label']))]


_LABELS = {'true': '1', 'false': '0'}  # as a .csv writes them


def _label(value: Any) -> float:
    number = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = float(_LABELS.get(value.strip().lower(), value))
    if not isinstance(number, bool | int | float) or not 0 <= number <= 1:
        raise ValueError(f'label is {value!r}; give true or false, or a number from 0 to 1')
    return float(number)


def _rated_dialog(row: Mapping[str, Any]) -> list[Example]:
    prompt, answer = conversations.split_last(conversations.messages(row['messages']))
    return [Example(prompt, (_text(answer, 'the last message'),), _label(row['label']))]


def _dialog(row: Mapping[str, Any]) -> list[Example]:
    turns = conversations.answers(conversations.messages(row['messages']))
    return [Example(prompt, (_text(answer, 'a message'),)) for prompt, answer in turns]


def _instruction(row: Mapping[str, Any]) -> list[Example]:
    further = row.get('input')
    parts = [_text(row['instruction'], 'instruction')]
    parts += [_text(further, 'input')] if further not in (None, '') else []
    return [Example('\n\n'.join(parts), (_text(row['answer'], 'answer'),))]


def _demonstration(row: Mapping[str, Any]) -> list[Example]:
    return [Example(*_answers(row, 'answer'))]


def _only_prompt(row: Mapping[str, Any]) -> list[Example]:
    return [Example(_prompt(row))]


SCHEMAS = (  # the first whose columns a row has
    Schema('SHP', ('history', 'human_ref_A', 'human_ref_B', 'labels'), 'pairs', _shp),
    Schema('preferences', ('prompt', 'chosen', 'rejected'), 'pairs', _preference),
    Schema('preferences after messages', ('messages', 'chosen', 'rejected'), 'pairs', _after_messages),
    Schema('preferences in dialogs', ('chosen', 'rejected'), 'pairs', _transcripts),
    Schema('ratings', ('prompt', 'answer', 'label'), 'thumbs', _rating),
    Schema('rated dialogs', ('messages', 'label'), 'thumbs', _rated_dialog),
    Schema('dialogs', ('messages',), 'sft', _dialog),
    Schema('instructions', ('instruction', 'answer'), 'sft', _instruction),
    Schema('demonstrations', ('prompt', 'answer'), 'sft', _demonstration),
    Schema('prompts', ('prompt',), 'prompts', _only_prompt),
)


@dataclasses.dataclass(frozen=True)
class Recognised:
    """The form of a row.

    Attributes:
      schema: the first that fits.
      columns: {our name: the row's} of the columns that it reads.
    """

    schema: Schema
    columns: Mapping[str, str]


@functools.lru_cache(maxsize=256)
def recognise(names: tuple[str, ...], user_columns: tuple[tuple[str, str], ...] = ()) -> Recognised:
    """Returns the form of rows with these columns.

    Args:
      names: the row's columns.
      user_columns: (our name, the row's) of columns that the user names: COLUMNS.

    Raises:
      ValueError: no form has them, or two columns mean the same.
    """
    columns = dict(user_columns)
    if lacking := [column for column in columns.values() if column not in names]:
        raise ValueError(f'it lacks {lacking[0]!r}, which COLUMNS names; it has {", ".join(names)}')
    taken = set(columns.values())
    for name, spellings in SPELLINGS.items():
        known = {x.casefold() for x in (name, *spellings)}
        present = [x for x in names if x.strip().casefold() in known and x not in taken]
        if name in columns or not present:
            continue
        if len(present) > 1:
            example = f"COLUMNS = {{'{name}': '{present[0]}'}}"
            raise ValueError(f'columns {" and ".join(present)} may each be the {name}; say which, as in {example}')
        columns[name] = present[0]
    for schema in SCHEMAS:
        if columns.keys() >= set(schema.columns):
            optional = ('input', 'system') if schema.name == 'instructions' else ('system',)
            return Recognised(schema, {x: columns[x] for x in (*schema.columns, *optional) if x in columns})
    raise ValueError(f'columns {", ".join(names)} are of no known form: {known_forms()}; name yours with COLUMNS')


def known_forms() -> str:
    """Returns the known forms for a message: 'prompt, chosen, rejected (preferences); ..'."""
    return '; '.join(f'{", ".join(schema.columns)} ({schema.name})' for schema in SCHEMAS)


def examples(recognised: Recognised, row: Mapping[str, Any], kind: str) -> list[Example]:
    """Returns the examples of a row for a kind of training.

    Args:
      recognised: the row's form.
      row: a row of a file.
      kind: sft, pairs, thumbs or prompts. Pairs give their chosen answer to sft, and ratings the liked ones.

    Returns:
      Those that it has; none of a pair of equal texts, and for sft none of a rating below 0.5.

    Raises:
      KeyError, TypeError, ValueError: what is wrong with the row.
    """
    schema = recognised.schema
    if kind not in USES[schema.kind]:
        raise ValueError(
            f'columns {", ".join(row)} are {schema.name}, which give {", ".join(USES[schema.kind])} and no {kind}'
        )
    values = {name: row.get(column) for name, column in recognised.columns.items()}
    system = values.pop('system', None)
    if system is not None and not isinstance(system, str):
        raise ValueError(f'system is no text but {str(system)[:40]!r}')
    examples = [
        dataclasses.replace(example, system=system or None, is_spaced=any(x[:1].isspace() for x in example.answers))
        for example in schema.read(values)
    ]
    return list(_as_kind(examples, kind))


def _as_kind(read: Iterable[Example], kind: str) -> Iterable[Example]:
    for example in read:
        if kind == 'prompts':
            yield dataclasses.replace(example, answers=(), label=None)
        elif kind == 'sft' and (example.label is None or example.label >= 0.5):
            yield dataclasses.replace(example, answers=example.answers[:1], label=None)
        elif kind == 'thumbs' or (kind == 'pairs' and example.answers[0] != example.answers[1]):
            yield example
