"""Whether a reward's probabilities are what they say: reliability bins and the expected calibration error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from perl_jax.data.datasets import Dataset


def outcomes(dataset: Dataset, rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rewards [N, K] as logits and what they claim to foretell, 0 or 1: both [N] for thumbs, [2 N] for pairs.

    A thumb's logit is its reward. A pair's is the margin; as pairs stand every outcome would be 1, whatever the
    probability, so each is asked in both orders.
    """
    if 'labels' in dataset.arrays:
        return rewards[:, 0], dataset.arrays['labels'][:, 0]
    margin = rewards[:, 0] - rewards[:, 1]
    return np.concatenate([margin, -margin]), np.repeat([1.0, 0.0], len(margin))


def reliability(logits: np.ndarray, outcomes: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """The bins of equal width of sigmoid(logit) that hold any of the [N]: what a reliability diagram draws.

    Each has low, high, count, and the means of what was said (`probability`) and of what came true (`outcome`).
    """
    probability = np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64)))
    index = np.minimum((probability * bins).astype(int), bins - 1)
    return [
        {
            'low': i / bins,
            'high': (i + 1) / bins,
            'count': int((index == i).sum()),
            'probability': float(probability[index == i].mean()),
            'outcome': float(outcomes[index == i].mean()),
        }
        for i in np.unique(index).tolist()
    ]


def error(bins: Sequence[Mapping[str, float]]) -> float:
    """The expected calibration error: |probability - outcome| on average over the bins, weighted by their counts.

    Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599), eq. 3, here for the probability of one class.
    """
    gaps = [abs(one['probability'] - one['outcome']) for one in bins]
    return float(np.average(gaps, weights=[one['count'] for one in bins]))


def metrics(dataset: Dataset, rewards: np.ndarray) -> dict[str, float]:
    """The calibration error of rewards [N, K]: `ece` for thumbs, `pairwise_ece` for pairs."""
    name = 'ece' if 'labels' in dataset.arrays else 'pairwise_ece'
    return {name: error(reliability(*outcomes(dataset, rewards)))}
