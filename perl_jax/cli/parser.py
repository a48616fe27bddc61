"""The parser of every command's flags, and the nearest names of wrong ones."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from perl_jax.errors import UserError


def nearest(word: str, known: Iterable[str]) -> str:
    """Return '; nearest: A, B' for a flag or command that is not known, or nothing if none is near."""
    names = difflib.get_close_matches(word.partition('=')[0], list(known), n=2)
    return f'; nearest: {", ".join(names)}' if names else ''


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises errors as UserError."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        if (unknown := message.removeprefix('unrecognized arguments: ')) != message and unknown.startswith('-'):
            message += nearest(unknown.split()[0], self._option_string_actions)
        raise UserError(f'{self.prog.removeprefix("perl_jax ")}: {message}')

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse as argparse does, which makes an empty list of `--flag=--`."""
        for word in args or ():
            if word.startswith('--') and word.endswith('=--'):
                self.error(f"argument {word.removesuffix('=--')}: '--' is no value")
        return super().parse_known_args(args, namespace)
