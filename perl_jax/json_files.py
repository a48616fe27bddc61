"""Files of JSON from outside, checked where they are read: encoding, syntax, depth, numbers, and the types of fields.

    CONFIG = {'phase': Literal['sft', 'reward', 'policy'], 'base.path': str, 'seconds': NonNegative | None}
    run_info = json_files.read(path, CONFIG, remedy='name another folder')
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from perl_jax import settings
from perl_jax.errors import UserError

DOWNLOAD = 'download it again'


def read(path: Any, fields: Mapping[str, Any] | None = None, remedy: str = DOWNLOAD) -> dict[str, Any]:
    """Read a file that holds an object of JSON.

    Args:
      path: a pathlib.Path or epath.Path.
      fields: the annotation of each field, 'base.path' for one of an object inside; other fields may be anything. A
        field that is absent is checked as null.
      remedy: what to do about a file that is wrong.

    Raises:
      UserError: it cannot be read, is no object of JSON, or has a field of another type.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or type(error).__name__}); {remedy}') from error
    return parse(content, path, fields, remedy)


def parse(
    content: str | bytes, path: pathlib.Path | str, fields: Mapping[str, Any] | None = None, remedy: str = DOWNLOAD
) -> dict[str, Any]:
    """Read an object of JSON from the contents of the file at `path`; raises as `read`."""
    tree = _parse(content, path, remedy)
    if not isinstance(tree, dict):
        raise UserError(f'{path}: not an object of JSON; {remedy}')
    check(tree, path, fields or {})
    return tree


def parse_list(content: str | bytes, path: pathlib.Path | str, remedy: str = DOWNLOAD) -> list[Any]:
    """Read a list of JSON from the contents of the file at `path`; raises as `read`."""
    tree = _parse(content, path, remedy)
    if not isinstance(tree, list):
        raise UserError(f'{path}: not a list of JSON; {remedy}')
    return tree


def _parse(content: str | bytes, path: pathlib.Path | str, remedy: str) -> Any:
    try:
        return loads(content)
    except ValueError as error:
        raise UserError(f'{path}: not JSON ({error}); {remedy}') from error


def check(tree: Mapping[str, Any], path: pathlib.Path | str, fields: Mapping[str, Any]) -> None:
    """Check fields by their annotations.

    Raises:
      UserError: naming the file and the first field that has another type, or is out of its range.
    """
    for name, annotation in fields.items():
        value: Any = tree
        for key in name.split('.'):
            value = value.get(key) if isinstance(value, dict) else None
        if problem := settings.find_problem(annotation, value):
            raise UserError(f'{path}: {name}{problem}')


def loads(content: str | bytes) -> Any:
    """Parse JSON in UTF-8.

    Raises:
      ValueError: whatever is wrong: also objects that are too deep, numbers that are not finite, and halves of
        surrogate pairs, which are no text.
    """
    try:
        tree = json.loads(content.decode('utf-8') if isinstance(content, bytes) else content)
    except RecursionError:
        raise ValueError('it is nested too deeply') from None
    values = [('', tree)]  # with the key of each, 'a.b' of one inside another
    while values:
        name, value = values.pop()
        if isinstance(value, dict):
            values += [(name, key) for key in value]
            values += [(f'{name}.{key}' if name else key, item) for key, item in value.items()]
        elif isinstance(value, list):
            values += [(name, item) for item in value]
        elif isinstance(value, str):
            value.encode()
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f'{name or "it"} = {value}: give a finite number')
    return tree
