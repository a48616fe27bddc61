"""Which control tokens in a chat template's text are the template's own, and which somebody typed into a message.

The text is the one that the template makes of the messages as they are. Who wrote what is seen in a second one, made of
messages whose control tokens are changed: letter by letter into others, or with a mark around them where the template
looks for the token. It says so if it is the same text but for the change; if none is, the template's own are those in
the parts that both texts have in common, and any other is text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from perl_jax.errors import UserError
from perl_jax.tokenizers.chat.controls import mark, unmark

_OTHERS = 0xF0000  # what stands for letters, and around tokens: letters for private use
_AROUND = 0x100000
_SIDES = ((1, 1), (0, 1), (1, 0))  # around, only behind, only in front: a template may ask what a message starts with


def marked(render: Callable[[Any], str], messages: Any, control: Iterable[str]) -> str:
    """The text of a conversation with the control tokens marked that the template put there.

    Args:
      render: the template: messages -> text.
      messages: dictionaries and lists of texts.
      control: every control token.

    Raises:
      UserError: what `render` raises for the messages as they are.
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
    others = {ord(letter): _OTHERS + n for n, letter in enumerate(sorted(set(''.join(control))))}
    letters = {other: letter for letter, other in others.items()}
    hidden = _rendered(render, messages, names, lambda token: token.translate(others))
    if hidden.translate(letters) == text:
        return re.sub(names, lambda token: mark(token[0]), hidden).translate(letters)
    for front, back in _SIDES:  # with marks of each token's own, which say nothing of another that they come to touch
        around = {t: front * chr(_AROUND + 2 * n) + t + back * chr(_AROUND + 2 * n + 1) for n, t in enumerate(control)}
        seen = _rendered(render, messages, names, around.__getitem__)
        marks = f'[{chr(_AROUND)}-{chr(_AROUND + 2 * len(control))}]'
        if re.sub(marks, '', seen) == text:
            by_hand = '|'.join(map(re.escape, around.values()))
            own = re.sub(f'({by_hand})|{names}', lambda token: token[1] or mark(token[0]), seen)
            return re.sub(marks, '', own)
    return _in_common(text, hidden, names)


def _rendered(render: Callable[[Any], str], messages: Any, names: str, change: Callable[[str], str]) -> str:
    """The text where typed tokens are changed; empty if the template refuses such messages."""
    try:
        return render(_changed(messages, lambda text: re.sub(names, lambda token: change(token[0]), text)))
    except UserError:
        return ''


def _in_common(text: str, hidden: str, names: str) -> str:
    """The text with those tokens marked that stand in `hidden` too, in parts that are alike."""
    cut = lambda whole: [part for part in re.split(f'({names}|\\W)', whole) if part]  # noqa: E731
    parts, others = cut(text), cut(hidden)
    for block in difflib.SequenceMatcher(None, parts, others, autojunk=False).get_matching_blocks():
        for i in range(block.a, block.a + block.size):
            parts[i] = re.sub(f'^({names})$', lambda token: mark(token[0]), parts[i])
    return ''.join(parts)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Messages with each text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _changed(each, change) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_changed(each, change) for each in value]
    return value
