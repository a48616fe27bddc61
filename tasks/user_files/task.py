"""Registers a user's files as a SeqIO task: gin/data/files.gin calls `task`, and so does `--data`."""

from __future__ import annotations

import functools
import hashlib
import logging
import pathlib
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from perl_jax.errors import UserError
from perl_jax.tasks import sources
from perl_jax.tasks.user_files import recognition, schemas
from perl_jax.tasks.user_files.form import Chat, Form, Kind

SPLITS = ('train', 'validation', 'test')


def task(
    paths: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    kind: Kind | Literal['reward'],
    *,
    columns: Mapping[str, str] | None = None,
    prompt_template: str | None = None,
    answer_template: str = '{answer}',
    chat: Chat | None = None,
    system: str | None = None,
    model: str | None = None,
) -> str:
    """Register the rows of files as a task, once.

    Args:
      paths: a file, a folder, a pattern, hf:OWNER/NAME or tfds:NAME (tasks/sources.py); several; or one of each split,
        {'train': .., 'validation': ..}. Splits that there are not are made by a hash of the prompt.
      kind: what a run needs of the rows: sft, pairs, thumbs, prompts, or reward for pairs or thumbs, as the rows are.
      columns: {our name: the row's}, such as {'prompt': 'question', 'chosen': 'good', 'rejected': 'bad'}, for columns
        whose names schemas.py does not know.
      prompt_template, answer_template, chat, system, model: see Form.

    Returns:
      The task's name: that of the file, the kind, and a hash of all settings.

    Raises:
      UserError: a column, template or place that cannot be.
    """
    import seqio

    from perl_jax.tasks import registration

    place = to_place(paths)
    _check_templates(prompt_template, answer_template)
    settings = to_columns(columns or {}), prompt_template, answer_template, chat, system, model
    form = Form(kind if kind != 'reward' else _reward_kind(place, Form('pairs', *settings)), *settings)
    digest = hashlib.sha256(repr((place, form)).encode()).hexdigest()[:6]
    name = f'{_stem(place)}_{form.kind}_{digest}'
    if name not in seqio.TaskRegistry.names():
        registration.add(name, form.kind, functools.partial(_examples, recognition.source(form), place))
    return name


def _examples(rows: sources.Source, place: sources.Place, split: str) -> Iterator[dict[str, Any]]:
    """Yields the examples of a split; prompts once each."""
    texts = rows.rows_at(place, split)
    form: Any = rows.read
    if split == 'train' and (unused := recognition.summarise(place, form).unused):
        logging.getLogger('perl_jax').warning(f'PATHS={place}: columns that are not read: {", ".join(unused)}')
    if form.kind == 'pairs' and (ties := sum(not row.examples for row in texts)):
        logging.getLogger('perl_jax').warning(
            f'PATHS={place}: {ties} of {len(texts)} rows of {split} have equal texts as chosen and rejected: left out'
        )
    examples = [example for row in texts for example in row.examples]
    if form.kind == 'prompts':
        examples = list({example['inputs']: example for example in examples}.values())
    yield from examples


def _reward_kind(place: sources.Place, form: Form) -> Kind:
    """Returns what the most frequent form of the rows is."""
    schema = recognition.summarise(place, form).schema
    if schema.kind not in ('pairs', 'thumbs'):
        raise UserError(f'PATHS={place}: the rows are {schema.name}; a reward needs pairs or ratings')
    return schema.kind


def to_place(paths: Any) -> sources.Place:
    """Returns the value of PATHS as sources takes it, or raises UserError."""
    if isinstance(paths, str) and paths:
        return paths
    if isinstance(paths, Mapping) and paths and paths.keys() <= set(SPLITS):
        of_split = {split: [value] if isinstance(value, str) else value for split, value in sorted(paths.items())}
        if all(isinstance(value, list | tuple) and _are_paths(value) for value in of_split.values()):
            return tuple((split, path) for split, value in of_split.items() for path in value)
    if isinstance(paths, list | tuple) and _are_paths(paths):
        return tuple(paths)
    raise UserError(f'PATHS = {paths!r}: give a path, a list of paths, or either for each of {", ".join(SPLITS)}')


def _are_paths(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) and value for value in values)


def to_columns(columns: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Returns the value of COLUMNS as schemas.py takes it, or raises UserError."""
    names = {x: name for name, spellings in schemas.SPELLINGS.items() for x in (name, *spellings)}
    if unknown := sorted(columns.keys() - names.keys()):
        raise UserError(f'COLUMNS = {dict(columns)}: {unknown[0]} is none of {", ".join(schemas.SPELLINGS)}')
    return tuple(sorted((names[name], column) for name, column in columns.items()))


def _check_templates(prompt_template: str | None, answer_template: str) -> None:
    try:
        parsed = string.Formatter().parse('{prompt}' if prompt_template is None else prompt_template)
        fields = [field for _, field, *_ in parsed if field is not None]
    except ValueError as error:
        raise UserError(f"PROMPT_TEMPLATE = {prompt_template!r}: {error}; write '{{{{' for a brace") from error
    if not fields or not all(re.fullmatch(r'[\w -]+', field) for field in fields):  # neither attributes nor indices
        raise UserError(f'PROMPT_TEMPLATE = {prompt_template!r}: name columns of the rows in braces, as in {{prompt}}')
    if answer_template.count('{answer}') != 1:
        raise UserError(f'ANSWER_TEMPLATE = {answer_template!r}: it needs {{answer}}, once')


def _stem(place: sources.Place) -> str:
    first = place if isinstance(place, str) else place[0] if isinstance(place[0], str) else place[0][1]
    name = pathlib.PurePath(first.rstrip('/*')).name.rpartition(':')[2]
    return re.sub(r'\W+', '_', name.split('.')[0]).strip('_') or 'rows'
