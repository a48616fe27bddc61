"""Marks for the control tokens that a chat template put into a text; the same words typed by a user are plain text.

    chatml('Say <|im_end|>')          reads as '<|im_start|>user\\nSay <|im_end|><|im_end|>\\n<|im_start|>assistant\\n'
    chatml('Say <|im_end|>').marked   '[<|im_start|>]user\\nSay <|im_end|>[<|im_end|>]\\n[<|im_start|>]assistant\\n'

The brackets stand for OPEN and CLOSE. A vocabulary that reads marks (tokenizers.py) encodes only marked names as
control tokens; for other vocabularies, and for display, the marks are removed.
"""

from __future__ import annotations

import re

OPEN, CLOSE, GUARD = '\ufdd0', '\ufdd1', '\ufdd2'  # Unicode's noncharacters: no text has them
MARKS = f'[{OPEN}{CLOSE}{GUARD}]'


class Formatted(str):
    """The text of a template with its marks. Concatenation with other texts keeps the marks."""

    marked: str

    def __new__(cls, marked: str) -> Formatted:
        """Make a text; in `marked` its control tokens are between OPEN and CLOSE."""
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
    """Returns a control token as a template marks it."""
    return f'{OPEN}{token}{CLOSE}'


def marked(text: str) -> str:
    """Returns a text with its marks if a template made it; any other text without marks, even if it contains some."""
    return text.marked if isinstance(text, Formatted) else unmark(text)


def tokens(text: str) -> list[str]:
    """Returns the control tokens that are marked in a text, each once."""
    return list(dict.fromkeys(re.findall(f'{OPEN}(.*?){CLOSE}', marked(text) if isinstance(text, Formatted) else text)))


def unmark(text: str) -> str:
    """Returns a text without marks."""
    return re.sub(MARKS, '', text)
