"""The tokens that are added to a tokenizer by the small files beside it, as transformers adds them."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from perl_jax.errors import UserError

_KINDS = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')  # the order in which they are added
_FLAGS = ('lstrip', 'rstrip', 'single_word', 'normalized')
_LISTS = ('extra_special_tokens', 'additional_special_tokens')


def named(path: pathlib.Path, source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The special tokens that a file names, {'bos': {'content': '<s>', ..}, ..}: keys in _token, and models' own.

    Raises:
      UserError: one that is no text of a token.
    """
    own = [source.get(key) for key in ('model_specific_special_tokens', 'extra_special_tokens')]
    whole = {**source, **{key: value for each in own if isinstance(each, dict) for key, value in each.items()}}
    return {
        key.removesuffix('_token'): _settings(path, key, value)
        for key, value in whole.items()
        if (key.endswith('_token') or key not in source) and not key.startswith('add_') and value is not None
    }


def in_order(tokens: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Named tokens in the order in which they are added."""
    return [tokens[kind] for kind in sorted(tokens, key=lambda kind: [*_KINDS, kind].index(kind))]


def listed(path: pathlib.Path, source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The special tokens that a file lists without a name.

    Raises:
      UserError: it is no list of tokens.
    """
    for key in _LISTS:
        value = source.get(key)
        if isinstance(value, dict) and key == _LISTS[0]:
            continue
        if not isinstance(value, list | None):
            raise UserError(f'{path}: {key} = {value!r}: it must be a list of tokens')
        if value:
            return [_settings(path, key, each) for each in value]
    return []


def by_id(path: pathlib.Path, said: Any) -> dict[int, dict[str, Any]]:
    """added_tokens_decoder: what is said of each token by its id.

    Raises:
      UserError: an id that is no number, or without a token.
    """
    try:
        return {
            int(i): {'content': str(token['content']), 'special': bool(token.get('special')), **_flags(token)}
            for i, token in said.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'{path}: added_tokens_decoder: {error}; each id needs a token with its content') from error


def by_text(path: pathlib.Path, said: Mapping[str, Any], special: set[str]) -> dict[int, dict[str, Any]]:
    """added_tokens.json, the older form: ids by text.

    Args:
      special: the texts that other files name as special tokens.

    Raises:
      UserError: an id that is no number.
    """
    for text, i in said.items():
        if isinstance(i, bool) or not isinstance(i, int):
            raise UserError(f'{path}: {text!r} = {i!r}: it must be the id of the token')
    flags = lambda text: {'special': text in special, 'normalized': text not in special}  # noqa: E731
    return {i: {'content': text, **flags(text)} for text, i in said.items()}


def _settings(path: pathlib.Path, key: str, value: Any) -> dict[str, Any]:
    """What AddedToken takes, of a special token that is given by its text or with its settings."""
    text, flags = (value.get('content'), _flags(value)) if isinstance(value, dict) else (value, {})
    if not isinstance(text, str):
        raise UserError(f'{path}: {key} = {value!r}: it must be the text of a token')
    return {'content': text, 'special': True, 'normalized': False, **flags}


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    return {key: bool(token[key]) for key in _FLAGS if key in token}
