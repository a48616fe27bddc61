"""The parser of every command's flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from perl_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises errors as UserError."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        raise UserError(f'{self.prog.removeprefix("perl_jax ")}: {message}')

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse as argparse does, which makes an empty list of `--flag=--`."""
        for word in args or ():
            if word.startswith('--') and word.endswith('=--'):
                self.error(f"argument {word.removesuffix('=--')}: '--' is no value")
        return super().parse_known_args(args, namespace)
