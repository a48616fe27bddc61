"""How well a reward ranks pairs and classifies answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from perl_jax.data.datasets import Dataset
from perl_jax.errors import UserError
from perl_jax.parallel import partitioning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.types import Responses


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


def measure(datasets: Sequence[Dataset], rewards: Sequence[np.ndarray]) -> dict[str, float]:
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
    given = measure(datasets, [np.zeros((len(dataset), 2)) for dataset in datasets])
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
