"""What ends a command early and is no fault of the program."""

from __future__ import annotations

import math


class UserError(Exception):
    """One line that names the file, row, key or flag and says what to do; the command line then exits with 2."""


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`; `name` is the macro or flag as its user writes it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f'{name} = {value!r}: give a whole number of at least {least}')


def check_number(
    name: str, value: object, least: float = -math.inf, most: float = math.inf, *, above: float | None = None
) -> None:
    """Refuse what is no finite number in a range.

    Args:
      name: the macro or flag as its user writes it.
      least, most: the range's ends, both of it.
      above: in place of `least`, an end that is not of the range.

    Raises:
      UserError: naming it.
    """
    in_range = lambda x: (x >= least if above is None else x > above) and x <= most  # noqa: E731
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and in_range(value):
        return
    low = f'of at least {least:g}' if above is None else f'above {above:g}'
    low = '' if above is None and least == -math.inf else f' {low}'
    high = '' if most == math.inf else f'{" and" if low else ""} at most {most:g}'
    raise UserError(f'{name} = {value!r}: give a number{low}{high}')


class Preempted(Exception):
    """The machine is being taken away, and everything is saved: the same command goes on."""


class Lost(Exception):
    """Another process of this job is gone, or did not come: to be started again with it."""
