"""Metrics of a reward: how it ranks pairs and classifies responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from perl_jax.data.datasets import Dataset
from perl_jax.errors import UserError
from perl_jax.parallel import partitioning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.types import Responses

RATES = ('pairwise_accuracy', 'context_accuracy', 'accuracy', 'balanced_accuracy', 'auc')  # metrics in [0, 1]


def scores(
    datasets: Sequence[Dataset], batch_size: int, partitioner: Partitioner, score: Callable[[Responses], jax.Array]
) -> list[np.ndarray]:
    """Score every row of each dataset.

    Args:
      datasets: of pairs or thumbs.
      batch_size: rows of a batch, of all processes.
      partitioner: the devices.
      score: a batch -> its rewards, float32 [B, K].

    Returns:
      For each dataset its rewards, float32 [rows, K].
    """
    rewards = []
    for dataset in datasets:
        batches = dataset.batches(batch_size, partitioner.rows(batch_size))
        score_batches = [partitioning.gather(score(partitioner.batch(batch))) for batch, *_ in batches]
        rewards.append(np.concatenate(score_batches)[: len(dataset)])
    return rewards


def measure(datasets: Sequence[Dataset], rewards: Sequence[np.ndarray]) -> dict[str, float]:
    """Compute the metrics of rewards: `ranking` over the pairs of all datasets, `classification` over the thumbs.

    Args:
      datasets: of pairs or thumbs.
      rewards: of each dataset's rows, [rows, 2] for pairs and [rows, 1] for thumbs.

    Returns:
      {metric: value}.
    """
    metrics, labels = {}, [dataset.arrays.get('labels') for dataset in datasets]
    rewards_and_labels = list(zip(rewards, labels, strict=True))
    pairs = [
        (reward, dataset) for reward, label, dataset in zip(rewards, labels, datasets, strict=True) if label is None
    ]
    if pairs:
        contexts = np.concatenate([contexts_of(dataset, f'{i} ') for i, (_, dataset) in enumerate(pairs)])
        metrics |= ranking(np.concatenate([reward for reward, _ in pairs]), contexts)
    if thumbs := [(reward[:, 0], label[:, 0]) for reward, label in rewards_and_labels if label is not None]:
        metrics |= classification(*map(np.concatenate, zip(*thumbs)))
    return metrics


def check_metric(name: str, metric: str, datasets: Sequence[Dataset]) -> None:
    """Fail early if a metric is undefined on these rows, such as the AUC of thumbs that all have the same label.

    Args:
      name: the setting that names the metric, for the message.
      metric: its value.
      datasets: the held-out rows.

    Raises:
      UserError: the metric is unknown or undefined.
    """
    available_metrics = measure(datasets, [np.zeros((len(dataset), 2)) for dataset in datasets])
    if metric not in available_metrics:
        raise UserError(
            f"{name} = '{metric}': the held-out rows give {', '.join(available_metrics)}; name one of these"
        )


def ranking(rewards: np.ndarray, contexts: np.ndarray) -> dict[str, float]:
    """Compute the accuracy and the mean margin of pairs.

    A tie counts as half. A context with several chosen and rejected responses has a pair for each combination;
    `context_accuracy` weighs each context equally, whatever its number of pairs.

    Args:
      rewards: [rows, 2], the chosen response first.
      contexts: [rows], the name of each row's context.

    Returns:
      {metric: value}: accuracies as fractions, the margin in units of the reward.
    """
    margins = rewards[:, 0] - rewards[:, 1]
    credits = (margins > 0) + 0.5 * (margins == 0)
    _, context_ids = np.unique(contexts, return_inverse=True)
    context_accuracies = np.bincount(context_ids, credits) / np.bincount(context_ids)
    return {
        'pairwise_accuracy': float(credits.mean()),
        'context_accuracy': float(context_accuracies.mean()),
        'margin': float(margins.mean()),
    }


def contexts_of(dataset: Dataset, prefix: str = '') -> np.ndarray:
    """Name the prompt of each row by its tokens.

    Args:
      dataset: has the prompts.
      prefix: of all names, so that prompts of several datasets stay apart.

    Returns:
      The names, [rows].
    """
    inputs, masks = dataset.arrays['inputs'], dataset.arrays['inputs_mask']
    return np.array([prefix + row[mask].tobytes().hex() for row, mask in zip(inputs, masks, strict=True)])


def classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute accuracy, balanced accuracy and AUC of thumbs.

    Balanced accuracy is the mean recall of both classes; AUC counts ties as half.

    Args:
      logits: [rows]; above 0 predicts a thumb up.
      labels: [rows]; above 0.5 is a thumb up.

    Returns:
      {metric: value}. Without balanced accuracy and AUC if all labels are of one class, where they are undefined.
    """
    from scipy import stats

    up, down = logits[labels > 0.5], logits[labels <= 0.5]
    metrics = {'accuracy': float(np.mean((logits > 0) == (labels > 0.5)))}
    if len(up) and len(down):
        metrics['balanced_accuracy'] = float(((up > 0).mean() + (down <= 0).mean()) / 2)
        metrics['auc'] = float(stats.mannwhitneyu(up, down).statistic / (len(up) * len(down)))
    return metrics
