"""Bootstrap confidence intervals: BCa (Efron 1987), widened for few groups.

    quantiles of the draws at Phi(z0 + w / (1 - a w)),   w = z0 -+ t s

z0 is the median bias of the draws, and a is the acceleration, computed from the skewness of the jackknife values. The
plain quantiles of the draws (z0 = a = 0, t s = 1.96) are too narrow for few groups G. Here t is Student's quantile, and
s is the ratio of the jackknife's standard error to the draws', at least the ratio for a mean, sqrt(G / (G - 1))
(Hesterberg 2015). tests/test_intervals.py measures the coverage.

Draws that are all equal say nothing of the groups that were not seen. A rate has an exact interval then
(`equal_groups`), any other figure none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from perl_jax.errors import UserError

LEVEL = 0.95
ROUNDING = 1e-9  # means of equal values differ by this at most, relative to values above 1
Interval = tuple[float, float] | tuple[None, None]


def bca(estimate: float, draws: np.ndarray, leave_one_out: np.ndarray, level: float = LEVEL) -> Interval:
    """Return a confidence interval, which never exceeds the range of the draws; (None, None) if these are all equal.

    Args:
      estimate: the figure over all groups.
      draws: the figure of each bootstrap draw, [D].
      leave_one_out: the figure without each group, or block of groups, in turn: [m]. With m < 2 the interval is made of
        the plain quantiles of the draws.
      level: the probability with which the interval is to cover the true value.
    """
    if np.ptp(draws) <= ROUNDING * max(1.0, abs(estimate)):
        return None, None
    num_blocks, tails = len(leave_one_out), np.array([(1 - level) / 2, (1 + level) / 2])
    influence, draws_std = leave_one_out.mean() - leave_one_out if num_blocks else leave_one_out, draws.std()
    if num_blocks < 2 or not influence.any():
        return _pair(np.quantile(draws, tails))
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    fraction_below = ((draws < estimate).mean() + (draws <= estimate).mean()) / 2
    bias = special.ndtri(np.clip(fraction_below, 1 / len(draws), 1 - 1 / len(draws)))
    width_factor = max(
        np.sqrt((num_blocks - 1) / num_blocks * (influence**2).sum()) / draws_std,
        np.sqrt(num_blocks / (num_blocks - 1)),
    )
    w = bias + special.stdtrit(num_blocks - 1, tails) * width_factor
    denominator = 1 - acceleration * w
    z = np.where(denominator > 0, bias + w / np.where(denominator > 0, denominator, 1), np.sign(w) * np.inf)
    return _pair(np.quantile(draws, special.ndtr(z)))


def _pair(quantiles: np.ndarray) -> tuple[float, float]:
    low, high = quantiles.tolist()
    return low, high


def equal_groups(value: float, num_groups: int, level: float = LEVEL) -> tuple[float, float]:
    """Return an interval for a rate that is the same in all groups: the mean of a quantity between 0 and 1.

    If a share q of all groups has this value, n groups all have it with probability q^n. This is at least the tail
    probability a = (1 - level) / 2 for every q >= a^(1/n); the other groups may have any rate from 0 to 1:

        [q value, q value + 1 - q],   q = a^(1/n)

    For 0 and 1 this is the exact interval of Clopper and Pearson (1934, Biometrika 26), with two tails, for groups of
    equal weight. (With one tail of 5%, 1 - q is about 3 / n: the rule of three.)

    Args:
      value: the rate, in [0, 1].
      num_groups: n.
      level: the probability with which the interval is to cover the true value.
    """
    share = ((1 - level) / 2) ** (1 / num_groups)
    return share * value, share * value + 1 - share


def describe(low: float | None, high: float | None) -> str:
    """Return an interval as it is printed."""
    interval = 'none, all groups are equal' if low is None or high is None else f'{low:.4f}, {high:.4f}'
    return f'{LEVEL:.0%} [{interval}]'


BLOCKS = 200  # the most blocks of groups in the jackknife
NEARNESS = 'nearness'  # the field for the nearness of a row's group to the groups of train: tasks/splits.py


class Figure(NamedTuple):
    """A metric with its 95% interval, and what they were computed from.

    Attributes:
      value: the metric.
      low: the lower end of the interval; None if no interval can be given, since all groups are equal.
      high: its upper end, or None.
      rows: the number of rows.
      groups: the number of groups that the bootstrap draws.
      group_field: the field with the group's name; None: each row is its own group.
      contexts: the number of contexts, for a metric in which each context counts once; None for others.
    """

    value: float
    low: float | None
    high: float | None
    rows: int
    groups: int
    group_field: str | None
    contexts: int | None = None


def figures(
    name: str,
    examples: Sequence[Mapping[str, Any]],
    measure: Callable[[np.ndarray], Mapping[str, float]],
    *,
    group: str | None = None,
    by: str | None = None,
    contexts: Mapping[str, Sequence[str]] | None = None,
    rates: Collection[str] = (),
) -> dict[str, Figure]:
    """Compute every metric with its interval: over all rows, and over subsets of them as VALUE/METRIC.

    Args:
      name: the name of the rows, for log lines and errors.
      examples: those of the rows.
      measure: (row indices) -> {metric: value}.
      group: the field by which rows are grouped in the bootstrap (`groups`).
      by: the field whose values define the subsets (`subset_field`).
      contexts: the names of the rows' contexts, for each metric in which a context counts once.
      rates: the metrics that are rates in [0, 1] (`with_intervals`).

    Raises:
      UserError: an example lacks the field `group` or `by`.
    """
    by, result = subset_field(name, examples, by), {}
    for prefix, rows in subsets(len(examples), [str(example[by]) for example in examples] if by else None).items():
        subset_figures = row_figures(
            f'{name}, {by} {prefix[:-1]}' if prefix else name,
            [examples[i] for i in map(int, rows)],
            lambda index, rows=rows: measure(rows[index]),
            group=group,
            contexts={metric: [names[i] for i in map(int, rows)] for metric, names in (contexts or {}).items()},
            rates=rates,
        )
        result |= {f'{prefix}{metric}': figure for metric, figure in subset_figures.items()}
    return result


def row_figures(
    name: str,
    examples: Sequence[Mapping[str, Any]],
    measure: Callable[[np.ndarray], Mapping[str, float]],
    *,
    group: str | None = None,
    draws: int = 1000,
    contexts: Mapping[str, Sequence[str]] | None = None,
    rates: Collection[str] = (),
) -> dict[str, Figure]:
    """Compute every metric with its interval over all rows; `draws` are the bootstrap's, the rest as in `figures`."""
    names, field, contexts = groups(name, examples, group), group_field(name, examples, group), contexts or {}
    return {
        metric: Figure(
            *interval, len(examples), len(set(names)), field, len(set(contexts[metric])) if metric in contexts else None
        )
        for metric, interval in with_intervals(measure, names, draws, rates=rates).items()
    }


def subsets(num_rows: int, values: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Return the rows to measure together, by the prefix of their metrics: '' is all, 'VALUE/' those of a value.

    Args:
      num_rows: the number of rows.
      values: what the rows are divided by, [rows]; None gives no subsets.
    """
    row_values = np.array(values or [])
    value_rows = {f'{value}/': np.flatnonzero(row_values == value) for value in sorted(set(values or []))}
    return {'': np.arange(num_rows)} | value_rows


def check_fields(
    name: str, examples: Sequence[Mapping[str, Any]], group: str | None = None, by: str | None = None
) -> None:
    """Raise the errors of `figures`; called before the rows are scored or answered, which may take hours."""
    group_field(name, examples, group)
    subset_field(name, examples, by)


def subset_field(name: str, examples: Sequence[Mapping[str, Any]], by: str | None = None) -> str | None:
    """Return the field whose values are also measured separately: `by`, or `nearness` if all rows have it, or None."""
    return _field('--by', by, NEARNESS, name, examples)


def group_field(name: str, examples: Sequence[Mapping[str, Any]], group: str | None = None) -> str | None:
    """Return the field with the group's name: `group`, or the field `group` if all rows have it, or None."""
    return _field('--group', group, 'group', name, examples)


def groups(name: str, examples: Sequence[Mapping[str, Any]], field: str | None = None) -> list[str]:
    """Return the group name of each row; rows of one group are not independent.

    Args:
      name: the name of the rows, for log lines and errors.
      examples: the examples of the rows.
      field: the field with the group's name; None is `group` if all rows have it, else each row is its own group.

    Raises:
      UserError: an example lacks the field.
    """
    field = group_field(name, examples, field)
    names = [str(i) if field is None else str(example[field]) for i, example in enumerate(examples)]
    units = 'each by itself' if field is None else f'in {len(set(names)):,} groups by `{field}`'
    logging.getLogger('perl_jax').info(f'{name}: intervals over {len(names):,} rows, {units}')
    return names


def _field(flag: str, field: str | None, default: str, name: str, examples: Sequence[Mapping[str, Any]]) -> str | None:
    if field is None:
        return default if examples and all(default in example for example in examples) else None
    if (incomplete_example := next((example for example in examples if field not in example), None)) is not None:
        fields = ', '.join(key for key in incomplete_example if not key.endswith('_pretokenized')) or 'none'
        raise UserError(f'{flag}={field}: an example of {name} has no such field; it has {fields}')
    return field


def with_intervals(
    measure: Callable[[np.ndarray], Mapping[str, float]],
    groups: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
    *,
    rates: Collection[str] = (),
) -> dict[str, tuple[float, float | None, float | None]]:
    """Compute every metric of `measure(row indices)` with its 95% interval, from a bootstrap over groups of rows.

    Rows of one group (such as one conversation) are not independent. So both the bootstrap and the jackknife resample
    groups, not rows; the jackknife leaves out one group at a time, or one of at most BLOCKS blocks of groups.

    Args:
      measure: (row indices) -> {metric: value}.
      groups: the group of each row.
      draws: of the bootstrap.
      seed: of the bootstrap.
      rates: the metrics that are rates in [0, 1]: they have an interval even if all groups are equal.

    Returns:
      {metric: (value, low, high)}; low and high are None if all groups are equal and the metric is no rate.
    """
    rng, group_names = np.random.default_rng(seed), sorted(set(groups))
    row_groups = np.array(groups)
    members = [np.flatnonzero(row_groups == name) for name in group_names]

    def measure_groups(group_indices: np.ndarray) -> Mapping[str, float]:
        return measure(np.concatenate([members[i] for i in group_indices]))

    draw_figures = [measure_groups(rng.integers(len(group_names), size=len(group_names))) for _ in range(draws)]
    blocks = np.array_split(rng.permutation(len(group_names)), min(len(group_names), draws, BLOCKS))
    leave_one_out_figures = (
        [measure_groups(np.setdiff1d(np.arange(len(group_names)), block)) for block in blocks]
        if len(blocks) > 1
        else []
    )
    result = {}
    for metric, estimate in measure(np.arange(len(groups))).items():
        values = [
            np.array([figures[metric] for figures in sample_figures if metric in figures])
            for sample_figures in (draw_figures, leave_one_out_figures)
        ]
        low, high = bca(estimate, values[0], values[1])
        if low is None and metric in rates:
            low, high = equal_groups(estimate, len(group_names))
        result[metric] = estimate, low, high
    return result
