"""Encoders for which words spelled like a control token are text, but where controls.py marks them.

An encoder is a copy of the tokenizer in which each control token is spelled with its marks, in the model's vocabulary
and among the added tokens. So it is found where it is marked and nowhere else, in one pass, where the token itself
would have been: a template's text has the ids that transformers gives it. What else is spelled like the token meets a
vocabulary without it, and gets the pieces, or the unknown token, of any other text.
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
    """tokenizer: the copy.   control: the control tokens' ids by the copy's.   ids: others that are not the same."""

    tokenizer: Any
    control: Mapping[int, int]
    ids: Mapping[int, int]

    def __call__(self, text: str) -> list[int]:
        """The ids of a text with marks. A mark that is no token where it stands, as transformers reads it, is text."""
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        while loose := OPEN in text and self._loose(text, encoded):
            for start, end in reversed(loose):
                text = text[:start] + text[start + 1 : end - 1] + text[end:]
            encoded = self.tokenizer.encode(text, add_special_tokens=False)
        return [self.control.get(i, self.ids.get(i, i)) for i in encoded.ids]

    def _loose(self, text: str, encoded: Any) -> list[tuple[int, int]]:
        """Where the marks are that became no control token: a token of whole words only, behind a letter."""
        tokens = [span for i, span in zip(encoded.ids, encoded.offsets) if i in self.control]
        inside = {place for start, end in tokens for place in range(start, end)}
        return [each.span() for each in re.finditer(f'{OPEN}.*?{CLOSE}', text) if each.start() not in inside]


def pair(tokenizer: Any, control: Iterable[str], continues: bool) -> tuple[Encoder, Encoder]:
    """The encoders of a tokenizer, for texts that begin a sequence and for those that go on from another.

    Args:
      control: the tokens that are no text.
      continues: whether the second puts no space in front of a text where the first does; else both are one.
    """
    form, control = json.loads(tokenizer.to_str()), tuple(control)
    first = _encoder(tokenizer, form, control)
    plain = without_space(form) if continues else form
    return first, first if plain == form else _encoder(tokenizer, plain, control)


def _encoder(tokenizer: Any, form: Mapping[str, Any], control: tuple[str, ...]) -> Encoder:
    from tokenizers import Tokenizer

    added = {token['content'] for token in form['added_tokens']}
    names = {text: mark(text) for text in control}
    spelled = {text: name for text, name in names.items() if not _is_a_letter(text, form['model'])}
    normalizes = tokenizer.normalizer and tokenizer.normalizer.normalize_str
    tokens = [
        token | {'content': names[token['content']], 'special': False}
        | ({} if not normalizes or OPEN in normalizes(OPEN + token['content']) else {'normalized': False})
        if token['content'] in names else token
        for token in form['added_tokens']
    ]  # fmt: skip
    form = {**form, 'model': _renamed(form['model'], spelled), 'added_tokens': tokens, 'post_processor': None}
    made: Any = Tokenizer.from_str(json.dumps(form))
    ids = {made.token_to_id(names.get(text, text)): tokenizer.token_to_id(text) for text in added}
    of_control = {made.token_to_id(names[text]): tokenizer.token_to_id(text) for text in control}
    return Encoder(made, of_control, {mine: theirs for mine, theirs in ids.items() if mine != theirs})


def _is_a_letter(text: str, model: Mapping[str, Any]) -> bool:
    """Whether other text is spelled with it, so that the vocabulary cannot be without."""
    return len(text) == 1 or bool(model.get('byte_fallback') and re.fullmatch('<0x[0-9A-F]{2}>', text))


def _renamed(model: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer's model with other spellings of some pieces, which it then never makes of a text."""
    vocab = model['vocab']
    if isinstance(vocab, list):  # of Unigram: pieces and their scores
        return {**model, 'vocab': [[names.get(piece, piece), score] for piece, score in vocab]}
    changed: dict[str, Any] = {'vocab': {names.get(piece, piece): i for piece, i in vocab.items()}}
    if 'merges' in model:
        pairs = [tuple(each.split(' ', 1)) if isinstance(each, str) else tuple(each) for each in model['merges']]
        prefix = model.get('continuing_subword_prefix') or ''
        changed['merges'] = [[a, b] for a, b in pairs if not names.keys() & {a, b, a + b.removeprefix(prefix)}]
    if model.get('unk_token') in names:
        changed['unk_token'] = names[model['unk_token']]
    return {**model, **changed}


def without_space(part: Any) -> Any:
    """The form of a tokenizer that puts no space in front of a text (Llama 2's does)."""
    if isinstance(part, list):
        return [without_space(each) for each in part if not (isinstance(each, dict) and each.get('type') == 'Prepend')]
    if not isinstance(part, dict):
        return part
    if part.get('type') == 'Metaspace' and 'prepend_scheme' in part:
        part = part | {'prepend_scheme': 'never'}
    if part.get('type') == 'ByteLevel' and 'add_prefix_space' in part:
        part = part | {'add_prefix_space': False}
    prepend = {'normalizer': None} if (part.get('normalizer') or {}).get('type') == 'Prepend' else {}
    changed = ('normalizer', 'pre_tokenizer', 'normalizers', 'pretokenizers')
    return part | {key: without_space(part[key]) for key in changed if key in part} | prepend
