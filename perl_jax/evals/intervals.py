"""The interval of a figure from its bootstrap: BCa (Efron 1987), as wide as few groups have to make it.

    quantiles of the draws at Phi(z0 + w / (1 - a w)),   w = z0 -+ t s

z0 is the median bias of the draws and a the acceleration, from the skew of the jackknife. The draws' plain quantiles
(z0 = a = 0, t s = 1.96) are too narrow for few groups G. Here t is Student's quantile, and s the jackknife's standard
error over the draws', at least that of a mean, sqrt(G / (G - 1)) (Hesterberg 2015). How often the truth is inside:
tests/test_intervals.py counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from perl_jax.errors import UserError


def bca(whole: float, draws: np.ndarray, without: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """An interval that covers the truth with about the probability `level`; never outside of the draws.

    Args:
      whole: the figure itself.
      draws: the figure of each draw of as many groups, [D].
      without: the figure without each group in turn, or each block of groups, [m]; with fewer than 2 the interval is
        the draws' own quantiles.
    """
    m, tails = len(without), np.array([(1 - level) / 2, (1 + level) / 2])
    u, spread = without.mean() - without if m else without, draws.std()
    if m < 2 or spread == 0 or not u.any():
        return tuple(np.quantile(draws, tails).tolist())
    acceleration = (u**3).sum() / (6 * (u**2).sum() ** 1.5)
    below = ((draws < whole).mean() + (draws <= whole).mean()) / 2
    bias = special.ndtri(np.clip(below, 1 / len(draws), 1 - 1 / len(draws)))
    wider = max(np.sqrt((m - 1) / m * (u**2).sum()) / spread, np.sqrt(m / (m - 1)))
    w = bias + special.stdtrit(m - 1, tails) * wider
    room = 1 - acceleration * w
    z = np.where(room > 0, bias + w / np.where(room > 0, room, 1), np.sign(w) * np.inf)
    return tuple(np.quantile(draws, special.ndtr(z)).tolist())


BLOCKS = 200  # of groups, each left out once
NEARNESS = 'nearness'  # of a row's group to those of train: tasks/splits.py


class Figure(NamedTuple):
    """A metric, its 95% interval, and how many rows it is of."""

    value: float
    low: float
    high: float
    rows: int


def figures(
    name: str,
    examples: Sequence[Mapping[str, Any]],
    measure: Callable[[np.ndarray], Mapping[str, float]],
    group: str | None = None,
    by: str | None = None,
) -> dict[str, Figure]:
    """Every metric of `measure(row indices)` with its interval, of all rows and of their parts as VALUE/METRIC.

    Args:
      name: of the rows, for the lines that say how intervals are made.
      examples: of the N rows.
      group: the field by which rows are drawn (`groups`).
      by: the field whose values are the parts; None is `nearness` where all rows have it, and else no parts.

    Raises:
      UserError: a field that was asked for and that an example has not.
    """
    if by is None:
        by = NEARNESS if examples and all(NEARNESS in example for example in examples) else None
    else:
        _check_field('--by', by, name, examples)
    values = np.array(['' if by is None else str(example[by]) for example in examples])
    parts = {'': np.arange(len(examples))}
    parts |= {f'{value}/': np.flatnonzero(values == value) for value in sorted(set(values))} if by is not None else {}
    result = {}
    for part, rows in parts.items():
        names = groups(f'{name}, {by} {part[:-1]}' if part else name, [examples[i] for i in map(int, rows)], group)
        found = with_intervals(lambda index, rows=rows: measure(rows[index]), names)
        result |= {f'{part}{metric}': Figure(*figure, len(rows)) for metric, figure in found.items()}
    return result


def groups(name: str, examples: Sequence[Mapping[str, Any]], field: str | None = None) -> list[str]:
    """Say which rows belong together: by a field of the examples, by default `group` where all have it.

    Args:
      name: of the rows, for the line that says how intervals are made.
      field: None is the default; without it each row stands for itself.

    Raises:
      UserError: a field that was asked for and that an example has not.
    """
    if field is None:
        field = 'group' if examples and all('group' in example for example in examples) else None
    else:
        _check_field('--group', field, name, examples)
    names = [str(i) if field is None else str(example[field]) for i, example in enumerate(examples)]
    how = 'each by itself' if field is None else f'in {len(set(names)):,} groups by `{field}`'
    logging.getLogger('perl_jax').info(f'{name}: intervals over {len(names):,} rows, {how}')
    return names


def _check_field(flag: str, field: str, name: str, examples: Sequence[Mapping[str, Any]]) -> None:
    if lacking := next((example for example in examples if field not in example), None):
        fields = ', '.join(key for key in lacking if not key.endswith('_pretokenized')) or 'none'
        raise UserError(f'{flag}={field}: an example of {name} has no such field; it has {fields}')


def with_intervals(
    measure: Callable[[np.ndarray], Mapping[str, float]], groups: Sequence[str], draws: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Every metric of `measure(row indices)`, with its 95% interval from a bootstrap over whole groups of rows.

    Rows of one group (of one conversation, say) are not independent, so groups are what is drawn, and what is left out
    in turn: one at a time, or where there are many a block of them (intervals.py).
    """
    rng, names = np.random.default_rng(seed), sorted(set(groups))
    of = np.array(groups)
    members = [np.flatnonzero(of == name) for name in names]

    def some(chosen: np.ndarray) -> Mapping[str, float]:
        return measure(np.concatenate([members[i] for i in chosen]))

    drawn = [some(rng.integers(len(names), size=len(names))) for _ in range(draws)]
    blocks = np.array_split(rng.permutation(len(names)), min(len(names), draws, BLOCKS))
    without = [some(np.setdiff1d(np.arange(len(names)), block)) for block in blocks] if len(blocks) > 1 else []
    result = {}
    for k, v in measure(np.arange(len(groups))).items():
        values = [np.array([figures[k] for figures in each if k in figures]) for each in (drawn, without)]
        result[k] = v, *bca(v, values[0], values[1])
    return result
