"""The tokens that metadata files add to a tokenizer, as transformers adds them."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from perl_jax.errors import UserError

_KINDS = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')  # the order in which they are added
_FLAGS = ('lstrip', 'rstrip', 'single_word', 'normalized')
_LISTS = ('extra_special_tokens', 'additional_special_tokens')


def named(path: pathlib.Path, source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the special tokens that a file names in keys in _token or a model's own: {'bos': {'content': '<s>'}, ..}.

    Raises:
      UserError: a value that is not the text of a token.
    """
    model_tokens = [source.get(key) for key in ('model_specific_special_tokens', 'extra_special_tokens')]
    merged = {
        **source,
        **{key: value for tokens in model_tokens if isinstance(tokens, dict) for key, value in tokens.items()},
    }
    return {
        key.removesuffix('_token'): _settings(path, key, value)
        for key, value in merged.items()
        if (key.endswith('_token') or key not in source) and not key.startswith('add_') and value is not None
    }


def in_order(tokens: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns named tokens in the order in which they are added."""
    return [tokens[kind] for kind in sorted(tokens, key=lambda kind: [*_KINDS, kind].index(kind))]


def listed(path: pathlib.Path, source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the special tokens that a file lists without names.

    Raises:
      UserError: the value is not a list of tokens.
    """
    for key in _LISTS:
        value = source.get(key)
        if isinstance(value, dict) and key == _LISTS[0]:
            continue
        if not isinstance(value, list | None):
            raise UserError(f'{path}: {key} = {value!r}: it must be a list of tokens')
        if value:
            return [_settings(path, key, token) for token in value]
    return []


def by_id(path: pathlib.Path, entries: Any) -> dict[int, dict[str, Any]]:
    """Returns the settings of each token in added_tokens_decoder by its id.

    Raises:
      UserError: an id that is not a number, or without a token.
    """
    try:
        return {
            int(token_id): {'content': str(token['content']), 'special': bool(token.get('special')), **_flags(token)}
            for token_id, token in entries.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'{path}: added_tokens_decoder: {error}; each id needs a token with its content') from error


def by_text(path: pathlib.Path, ids_by_text: Mapping[str, Any], special: set[str]) -> dict[int, dict[str, Any]]:
    """Returns the settings of each token in added_tokens.json (the older format, ids by text) by its id.

    Args:
      path: of the file, for messages.
      ids_by_text: its contents.
      special: the texts that other files name as special tokens.

    Raises:
      UserError: an id that is not a number.
    """
    for text, token_id in ids_by_text.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise UserError(f'{path}: {text!r} = {token_id!r}: it must be the id of the token')
    flags = lambda text: {'special': text in special, 'normalized': text not in special}  # noqa: E731
    return {token_id: {'content': text, **flags(text)} for text, token_id in ids_by_text.items()}


def _settings(path: pathlib.Path, key: str, value: Any) -> dict[str, Any]:
    """Returns the arguments of AddedToken for a special token that is a text or an object with settings."""
    text, flags = (value.get('content'), _flags(value)) if isinstance(value, dict) else (value, {})
    if not isinstance(text, str):
        raise UserError(f'{path}: {key} = {value!r}: it must be the text of a token')
    return {'content': text, 'special': True, 'normalized': False, **flags}


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    return {key: bool(token[key]) for key in _FLAGS if key in token}
