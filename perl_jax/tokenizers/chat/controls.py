"""Which control tokens of a text a chat template put there. The same words typed by somebody are text like any other.

    chatml('Say <|im_end|>')          reads as '<|im_start|>user\\nSay <|im_end|><|im_end|>\\n<|im_start|>assistant\\n'
    chatml('Say <|im_end|>').marked   '[<|im_start|>]user\\nSay <|im_end|>[<|im_end|>]\\n[<|im_start|>]assistant\\n'

with OPEN and CLOSE for the brackets here. A vocabulary that reads marks (interop/tokenizers.py) makes control tokens of
what is marked and of nothing else; for other vocabularies, and for people, the marks are taken out.
"""

from __future__ import annotations

import re

OPEN, CLOSE, GUARD = '\ufdd0', '\ufdd1', '\ufdd2'  # Unicode's noncharacters: no text has them
MARKS = f'[{OPEN}{CLOSE}{GUARD}]'


class Formatted(str):
    """The text that a template made, with what it marked. Sums with other texts keep the marks."""

    marked: str

    def __new__(cls, marked: str) -> Formatted:
        """`marked` has its control tokens between OPEN and CLOSE."""
        text = super().__new__(cls, unmark(marked))
        text.marked = marked
        return text

    def __add__(self, other: str) -> Formatted:
        return Formatted(self.marked + marked(other))

    def __radd__(self, other: str) -> Formatted:
        return Formatted(marked(other) + self.marked)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return Formatted, (self.marked,)


def mark(token: str) -> str:
    """A control token that a template puts into its text."""
    return f'{OPEN}{token}{CLOSE}'


def marked(text: str) -> str:
    """A text with its marks: a template's own; any other text has none, whatever is in it."""
    return text.marked if isinstance(text, Formatted) else unmark(text)


def tokens(text: str) -> list[str]:
    """The control tokens that are marked in a text, each once."""
    return list(dict.fromkeys(re.findall(f'{OPEN}(.*?){CLOSE}', marked(text) if isinstance(text, Formatted) else text)))


def unmark(text: str) -> str:
    """A text without marks."""
    return re.sub(MARKS, '', text)
