"""The ids of a tokenizer's tokens by text, out of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from perl_jax.tokenizers import tokenizer_files

_MODELS = ('tokenizer.model', 'spiece.model')


def read(files: Mapping[str, bytes]) -> tuple[dict[str, int], dict[str, int]]:
    """All tokens, and those that are no ordinary text (all where none is marked), of tokenizer.json or a sentencepiece.

    Args:
      files: contents by name, as they lie in a model's folder.
    """
    config = json.loads(files.get(tokenizer_files.CONFIG) or '{}')
    said = config.get('added_tokens_decoder') or {}
    added = {token['content']: (int(i), bool(token.get('special'))) for i, token in said.items()}
    if 'tokenizer.json' in files:
        whole = json.loads(files['tokenizer.json'])
        vocab = whole['model']['vocab']
        every = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        added |= {t['content']: (t['id'], bool(t.get('special'))) for t in whole.get('added_tokens', [])}
        special = {}
    elif model := next((files[name] for name in _MODELS if name in files), None):
        every, special = _of_sentencepiece(model)
    else:
        every, special = {}, {}
    every |= {token: i for token, (i, _) in added.items()}
    special |= {token: i for token, (i, is_special) in added.items() if is_special}
    return every, special or every


def model_proto(model: bytes) -> Any:
    """The message (ModelProto) of a sentencepiece model's file."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    # protobuf makes its classes at run time
    return messages.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]


def _of_sentencepiece(model: bytes) -> tuple[dict[str, int], dict[str, int]]:
    pieces = model_proto(model).pieces
    special = {p.piece: i for i, p in enumerate(pieces) if p.type in (p.UNKNOWN, p.CONTROL, p.USER_DEFINED, p.UNUSED)}
    return {p.piece: i for i, p in enumerate(pieces)}, special
