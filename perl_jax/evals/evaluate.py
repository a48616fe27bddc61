"""Measuring: answers sampled from a policy and what they are worth, and how well a reward ranks and classifies."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from perl_jax.data.datasets import Dataset, DatasetConfig, Example, decode
from perl_jax.errors import UserError
from perl_jax.evals import intervals
from perl_jax.parallel import partitioning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards.scoring import TextFunction
from perl_jax.rl.sampling import SamplingConfig
from perl_jax.types import Responses, Rollout

BLOCKS = 200  # of groups, each left out once
NEARNESS = 'nearness'  # of a row's group to those of train: tasks/splits.py


class Figure(NamedTuple):
    """A metric, its 95% interval, and how many rows it is of."""

    value: float
    low: float
    high: float
    rows: int


@dataclasses.dataclass(frozen=True)
class Answers:
    """Which prompts a run answers at its evaluations, one answer each, and what judges them.

    Attributes:
      dataset: the prompts; None answers none.
      sampling: how; None is as the policy samples while it learns, or SamplingConfig's defaults.
      metric_fns: {name: function(prompt, response, example)}; training never sees them.
    """

    dataset: DatasetConfig | None = None
    sampling: SamplingConfig | None = None
    metric_fns: Mapping[str, TextFunction] | None = None

    def one_each(self, default: SamplingConfig) -> SamplingConfig:
        """How one answer is drawn."""
        return dataclasses.replace(self.sampling or default, num_samples=1)


def answers(
    dataset: Dataset,
    batch_size: int,
    partitioner: Partitioner,
    respond: Callable[[Any, list[Example], int], tuple[Rollout, Mapping[str, Any]]],
    functions: Mapping[str, Callable[[str, str, Mapping[str, Any]], float]],
    ids: bool = False,
) -> list[dict[str, Any]]:
    """One sampled answer to each prompt of a dataset, as rows for samples.jsonl.

    `respond(prompts, examples, i)` answers batch number i and may give scores [B, K] and the like beside the rollout
    (the examples are this process's); `functions` judge the text. A row holds prompt, response, tokens, whatever was
    given, and the task's `reference`; with `ids` also the tokens of both, {'prompt': .., 'response': ..}.
    """
    rows = []
    for i, (batch, mine, _) in enumerate(dataset.batches(batch_size, partitioner.rows(batch_size))):
        rollout, given = partitioning.gather(respond(partitioner.batch(batch), mine, i))
        responses, lengths = decode(dataset.vocabulary, rollout), rollout.targets_mask.sum(-1)
        for b, example in enumerate(dataset.examples[i * batch_size : (i + 1) * batch_size]):
            prompt, response = example['inputs_pretokenized'], responses[b][0]
            row = {'prompt': prompt, 'response': response, 'tokens': int(lengths[b, 0])}
            row |= {k: float(v[b, 0]) for k, v in given.items()}
            row |= {k: float(f(prompt, response, example)) for k, f in functions.items()}
            row |= {'reference': example['reference']} if 'reference' in example else {}
            if ids:
                row['ids'] = {
                    'prompt': rollout.inputs[b][rollout.inputs_mask[b]].tolist(),
                    'response': rollout.targets[b, 0][rollout.targets_mask[b, 0]].tolist(),
                }
            rows.append(row)
    return rows


def beside(row: Mapping[str, Any]) -> dict[str, Any]:
    """The anchor's answer to the same prompt, named to go beside the policy's own: sft_response, sft_score .."""
    return {f'sft_{k}': v for k, v in row.items() if k not in ('prompt', 'reference')}


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of everything that is a number in the rows; tokens are called length."""
    numbers = [k for k, v in rows[0].items() if isinstance(v, int | float)]
    return {'length' if k == 'tokens' else k: float(np.mean([row[k] for row in rows])) for k in numbers}


def scores(
    datasets: Sequence[Dataset], batch_size: int, partitioner: Partitioner, score: Callable[[Responses], jax.Array]
) -> list[np.ndarray]:
    """Rewards [N, K] of every row of each dataset."""
    out = []
    for dataset in datasets:
        batches = dataset.batches(batch_size, partitioner.rows(batch_size))
        parts = [partitioning.gather(score(partitioner.batch(batch))) for batch, *_ in batches]
        out.append(np.concatenate(parts)[: len(dataset)])
    return out


def reward_metrics(datasets: Sequence[Dataset], rewards: Sequence[np.ndarray]) -> dict[str, float]:
    """Accuracy by pair and by context of all pairs [N, 2]; accuracies and AUC of the logit of all thumbs [N, 1]."""
    metrics, labels = {}, [dataset.arrays.get('labels') for dataset in datasets]
    found = list(zip(rewards, labels, strict=True))
    pairs = [(reward, one) for reward, label, one in zip(rewards, labels, datasets, strict=True) if label is None]
    if pairs:
        contexts = np.concatenate([_contexts(one, f'{i} ') for i, (_, one) in enumerate(pairs)])
        metrics |= ranking(np.concatenate([reward for reward, _ in pairs]), contexts)
    if thumbs := [(reward[:, 0], label[:, 0]) for reward, label in found if label is not None]:
        metrics |= classification(*map(np.concatenate, zip(*thumbs)))
    return metrics


def check_metric(name: str, metric: str, datasets: Sequence[Dataset]) -> None:
    """What these rows can give is known before they are scored: of thumbs that are all alike there is no AUC."""
    given = reward_metrics(datasets, [np.zeros((len(dataset), 2)) for dataset in datasets])
    if metric not in given:
        raise UserError(f"{name} = '{metric}': the held-out rows give {', '.join(given)}; name one of these")


def ranking(rewards: np.ndarray, contexts: np.ndarray) -> dict[str, float]:
    """Pairs [N, 2], the chosen one first: how often it gets more (a tie is half), and by how much on average.

    Where a context has several answers of both kinds, its pairs are their product; `context_accuracy` counts each of
    the contexts [N] once.
    """
    margin = rewards[:, 0] - rewards[:, 1]
    right = (margin > 0) + 0.5 * (margin == 0)
    _, of = np.unique(contexts, return_inverse=True)
    by_context = np.bincount(of, right) / np.bincount(of)
    return {
        'pairwise_accuracy': float(right.mean()),
        'context_accuracy': float(by_context.mean()),
        'margin': float(margin.mean()),
    }


def _contexts(dataset: Dataset, prefix: str) -> np.ndarray:
    """A name for the prompt of each row."""
    inputs, real = dataset.arrays['inputs'], dataset.arrays['inputs_mask']
    return np.array([prefix + row[mask].tobytes().hex() for row, mask in zip(inputs, real, strict=True)])


def classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Logits and labels [N], which are up above a half.

    Balanced accuracy is the mean of both classes' recall; AUC counts ties as half. With one class alone the two are not
    defined and are left out.
    """
    from scipy import stats

    up, down = logits[labels > 0.5], logits[labels <= 0.5]
    metrics = {'accuracy': float(np.mean((logits > 0) == (labels > 0.5)))}
    if len(up) and len(down):
        metrics['balanced_accuracy'] = float(((up > 0).mean() + (down <= 0).mean()) / 2)
        metrics['auc'] = float(stats.mannwhitneyu(up, down).statistic / (len(up) * len(down)))
    return metrics


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
        names = groups(f'{name}, {by} {part[:-1]}' if part else name, [examples[i] for i in rows], group)
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
        figures = [np.array([one[k] for one in each if k in one]) for each in (drawn, without)]
        result[k] = v, *intervals.bca(v, *figures)
    return result
