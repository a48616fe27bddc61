"""Distinguish the control tokens that a chat template writes from those that a user typed into a message.

The text is what the template makes of the original messages. To see who wrote a token, the template also renders
messages in which typed control tokens are changed: their letters are substituted, or the token is wrapped in
private-use characters where the template looks for the token itself. If the result equals the text apart from the
change, all unchanged tokens are the template's. If no change gives that, the tokens in the parts that both texts have
in common are the template's, and all others are text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from perl_jax.errors import UserError
from perl_jax.tokenizers.chat.controls import mark, unmark

_SUBSTITUTES = 0xF0000  # private-use characters: substitutes of letters, and wrappers of tokens
_WRAPPERS = 0x100000
_SIDES = ((1, 1), (0, 1), (1, 0))  # on both sides, only after, only before: a template may test how a message begins


def marked(render: Callable[[Any], str], messages: Any, control: Iterable[str]) -> str:
    """Returns the text of a conversation in which the template's own control tokens are marked.

    Args:
      render: the template: messages -> text.
      messages: dictionaries and lists of texts.
      control: every control token.

    Raises:
      UserError: if `render` raises it for the original messages.
    """
    messages = _changed(messages, unmark)
    text, control = render(messages), sorted(control, key=len, reverse=True)
    if not control:
        return text
    names = '|'.join(map(re.escape, control))
    typed: list[str] = []
    _changed(messages, lambda text: typed.extend(re.findall(names, text)) or text)
    if not typed:
        return re.sub(names, lambda token: mark(token[0]), text)
    substitutes = {ord(letter): _SUBSTITUTES + index for index, letter in enumerate(sorted(set(''.join(control))))}
    originals = {other: letter for letter, other in substitutes.items()}
    disguised = _rendered(render, messages, names, lambda token: token.translate(substitutes))
    if disguised.translate(originals) == text:
        return re.sub(names, lambda token: mark(token[0]), disguised).translate(originals)
    for before, after in _SIDES:  # each token has its own wrappers, so that adjacent tokens stay distinct
        wrapped = {
            token: before * chr(_WRAPPERS + 2 * index) + token + after * chr(_WRAPPERS + 2 * index + 1)
            for index, token in enumerate(control)
        }
        rendered = _rendered(render, messages, names, wrapped.__getitem__)
        marks = f'[{chr(_WRAPPERS)}-{chr(_WRAPPERS + 2 * len(control))}]'
        if re.sub(marks, '', rendered) == text:
            wrapped_names = '|'.join(map(re.escape, wrapped.values()))
            remarked = re.sub(f'({wrapped_names})|{names}', lambda token: token[1] or mark(token[0]), rendered)
            return re.sub(marks, '', remarked)
    return _mark_common(text, disguised, names)


def _rendered(render: Callable[[Any], str], messages: Any, names: str, change: Callable[[str], str]) -> str:
    """Returns the text of messages whose typed tokens are changed; empty if the template refuses them."""
    try:
        return render(_changed(messages, lambda text: re.sub(names, lambda token: change(token[0]), text)))
    except UserError:
        return ''


def _mark_common(text: str, disguised: str, names: str) -> str:
    """Returns the text with those tokens marked that also occur in `disguised`, in parts that both have in common."""
    split = lambda value: [piece for piece in re.split(f'({names}|\\W)', value) if piece]  # noqa: E731
    pieces, disguised_pieces = split(text), split(disguised)
    for block in difflib.SequenceMatcher(None, pieces, disguised_pieces, autojunk=False).get_matching_blocks():
        for i in range(block.a, block.a + block.size):
            pieces[i] = re.sub(f'^({names})$', lambda token: mark(token[0]), pieces[i])
    return ''.join(pieces)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Returns messages with each text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _changed(item, change) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_changed(item, change) for item in value]
    return value
