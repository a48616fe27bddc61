"""Encoders that read the name of a control token as text, except where controls.py marks it.

An encoder is a copy of the tokenizer in which each control token is spelled with its marks, in the model's vocabulary
and among the added tokens. So a token is found only where it is marked, in one pass, and a template's text gets the ids
that transformers gives it. An unmarked name meets a vocabulary without the token, and is split into pieces, or becomes
the unknown token, like other text.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from perl_jax.tokenizers.chat.controls import CLOSE, OPEN, mark


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A copy of a tokenizer that finds control tokens only where they are marked.

    Attributes:
      tokenizer: the copy.
      control: from the copy's ids to the ids of control tokens.
      ids: from the copy's ids to the original ids of other tokens, where they differ.
    """

    tokenizer: Any
    control: Mapping[int, int]
    ids: Mapping[int, int]

    def __call__(self, text: str) -> list[int]:
        """Returns the ids of a text with marks. A mark where transformers finds no token is read as plain text."""
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        while unmatched := OPEN in text and self._unmatched_marks(text, encoded):
            for start, end in reversed(unmatched):
                text = text[:start] + text[start + 1 : end - 1] + text[end:]
            encoded = self.tokenizer.encode(text, add_special_tokens=False)
        return [self.control.get(i, self.ids.get(i, i)) for i in encoded.ids]

    def _unmatched_marks(self, text: str, encoded: Any) -> list[tuple[int, int]]:
        """Returns the spans of marks that became no control token, such as a whole-word token behind a letter."""
        spans = [span for i, span in zip(encoded.ids, encoded.offsets) if i in self.control]
        positions = {position for start, end in spans for position in range(start, end)}
        return [match.span() for match in re.finditer(f'{OPEN}.*?{CLOSE}', text) if match.start() not in positions]


def encoder_pair(tokenizer: Any, control: Iterable[str], continues: bool) -> tuple[Encoder, Encoder]:
    """Returns the encoders of a tokenizer for texts that begin a sequence, and for texts that continue one.

    Args:
      tokenizer: the `tokenizers.Tokenizer`.
      control: its control tokens.
      continues: whether the second omits the space that the first adds in front of a text; else both are the same.
    """
    tokenizer_json, control = json.loads(tokenizer.to_str()), tuple(control)
    begin_encoder = _encoder(tokenizer, tokenizer_json, control)
    continuing_json = without_leading_space(tokenizer_json) if continues else tokenizer_json
    return begin_encoder, begin_encoder if continuing_json == tokenizer_json else _encoder(
        tokenizer, continuing_json, control
    )


def _encoder(tokenizer: Any, tokenizer_json: Mapping[str, Any], control: tuple[str, ...]) -> Encoder:
    from tokenizers import Tokenizer

    added = {token['content'] for token in tokenizer_json['added_tokens']}
    marked_names = {text: mark(text) for text in control}
    renamed = {text: name for text, name in marked_names.items() if not _is_part_of_text(text, tokenizer_json['model'])}
    normalizes = tokenizer.normalizer and tokenizer.normalizer.normalize_str
    tokens = [
        token | {'content': marked_names[token['content']], 'special': False}
        | ({} if not normalizes or OPEN in normalizes(OPEN + token['content']) else {'normalized': False})
        if token['content'] in marked_names else token
        for token in tokenizer_json['added_tokens']
    ]  # fmt: skip
    tokenizer_json = {
        **tokenizer_json,
        'model': _with_renamed_pieces(tokenizer_json['model'], renamed),
        'added_tokens': tokens,
        'post_processor': None,
    }
    copy: Any = Tokenizer.from_str(json.dumps(tokenizer_json))
    id_map = {copy.token_to_id(marked_names.get(text, text)): tokenizer.token_to_id(text) for text in added}
    control_ids = {copy.token_to_id(marked_names[text]): tokenizer.token_to_id(text) for text in control}
    return Encoder(
        copy, control_ids, {copy_id: original_id for copy_id, original_id in id_map.items() if copy_id != original_id}
    )


def _is_part_of_text(text: str, model: Mapping[str, Any]) -> bool:
    """Returns whether other text is encoded with this piece, so that it cannot be renamed."""
    return len(text) == 1 or bool(model.get('byte_fallback') and re.fullmatch('<0x[0-9A-F]{2}>', text))


def _with_renamed_pieces(model: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns a tokenizer's model with some pieces renamed, so that no text is encoded to them."""
    vocab = model['vocab']
    if isinstance(vocab, list):  # of Unigram: pieces and their scores
        return {**model, 'vocab': [[names.get(piece, piece), score] for piece, score in vocab]}
    changed: dict[str, Any] = {'vocab': {names.get(piece, piece): i for piece, i in vocab.items()}}
    if 'merges' in model:
        pairs = [tuple(merge.split(' ', 1)) if isinstance(merge, str) else tuple(merge) for merge in model['merges']]
        prefix = model.get('continuing_subword_prefix') or ''
        changed['merges'] = [[a, b] for a, b in pairs if not names.keys() & {a, b, a + b.removeprefix(prefix)}]
    if model.get('unk_token') in names:
        changed['unk_token'] = names[model['unk_token']]
    return {**model, **changed}


def without_leading_space(node: Any) -> Any:
    """Returns a tokenizer's JSON without the rule that adds a space in front of a text, as Llama 2's does."""
    if isinstance(node, list):
        return [
            without_leading_space(child)
            for child in node
            if not (isinstance(child, dict) and child.get('type') == 'Prepend')
        ]
    if not isinstance(node, dict):
        return node
    if node.get('type') == 'Metaspace' and 'prepend_scheme' in node:
        node = node | {'prepend_scheme': 'never'}
    if node.get('type') == 'ByteLevel' and 'add_prefix_space' in node:
        node = node | {'add_prefix_space': False}
    prepend = {'normalizer': None} if (node.get('normalizer') or {}).get('type') == 'Prepend' else {}
    nested_keys = ('normalizer', 'pre_tokenizer', 'normalizers', 'pretokenizers')
    return node | {key: without_leading_space(node[key]) for key in nested_keys if key in node} | prepend
