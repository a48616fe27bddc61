"""Ids of a tokenizer's tokens by text, read from its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perl_jax import json_files
from perl_jax.tokenizers import tokenizer_files

_MODELS = ('tokenizer.model', 'spiece.model')


def read(files: Mapping[str, bytes]) -> tuple[dict[str, int], dict[str, int]]:
    """Read the ids of all tokens, and of those that are not ordinary text.

    Args:
      files: contents by name, from a model's folder: a tokenizer.json or a sentencepiece model, and metadata files.

    Returns:
      All tokens; and special tokens, or all again if none is declared special.
    """
    config = json_files.parse(files.get(tokenizer_files.CONFIG) or '{}', tokenizer_files.CONFIG)
    decoder_entries = config.get('added_tokens_decoder') or {}
    added = {token['content']: (int(i), bool(token.get('special'))) for i, token in decoder_entries.items()}
    if 'tokenizer.json' in files:
        tokenizer_json = json_files.parse(files['tokenizer.json'], 'tokenizer.json')
        vocab = tokenizer_json['model']['vocab']
        ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        added |= {t['content']: (t['id'], bool(t.get('special'))) for t in tokenizer_json.get('added_tokens', [])}
        special = {}
    elif model := next((files[name] for name in _MODELS if name in files), None):
        ids, special = _of_sentencepiece(model)
    else:
        ids, special = {}, {}
    ids |= {token: i for token, (i, _) in added.items()}
    special |= {token: i for token, (i, is_special) in added.items() if is_special}
    return ids, special or ids


def model_proto(model: bytes) -> Any:
    """Returns the message (ModelProto) in the file of a sentencepiece model."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    # protobuf makes its classes at run time
    return messages.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]


def _of_sentencepiece(model: bytes) -> tuple[dict[str, int], dict[str, int]]:
    pieces = model_proto(model).pieces
    special = {p.piece: i for i, p in enumerate(pieces) if p.type in (p.UNKNOWN, p.CONTROL, p.USER_DEFINED, p.UNUSED)}
    return {p.piece: i for i, p in enumerate(pieces)}, special
