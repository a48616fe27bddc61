"""The calibration of a reward's probabilities: reliability bins and the expected calibration error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from perl_jax.data.datasets import Dataset


def outcomes(dataset: Dataset, rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of rewards and the outcomes that they predict.

    The logit of a thumb is its reward, that of a pair the margin. The chosen response always comes first, so every
    outcome would be 1; each pair is therefore counted in both orders.

    Args:
      dataset: of thumbs or pairs.
      rewards: [rows, K].

    Returns:
      Logits, and outcomes 0 or 1: [rows] each for thumbs, [2 rows] for pairs.
    """
    if 'labels' in dataset.arrays:
        return rewards[:, 0], dataset.arrays['labels'][:, 0]
    margins = rewards[:, 0] - rewards[:, 1]
    return np.concatenate([margins, -margins]), np.repeat([1.0, 0.0], len(margins))


def reliability(logits: np.ndarray, outcomes: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """Return the non-empty bins of a reliability diagram: predictions in bins of equal width of sigmoid(logit).

    Args:
      logits: [n], of the predictions.
      outcomes: [n], 0 or 1.
      bins: their number, empty ones included.

    Returns:
      For each bin its bounds (`low`, `high`), its `count`, and the means of the predicted `probability` and the
      observed `outcome`.
    """
    probabilities = np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64)))
    bin_indices = np.minimum((probabilities * bins).astype(int), bins - 1)
    return [
        {
            'low': bin_index / bins,
            'high': (bin_index + 1) / bins,
            'count': int((bin_indices == bin_index).sum()),
            'probability': float(probabilities[bin_indices == bin_index].mean()),
            'outcome': float(outcomes[bin_indices == bin_index].mean()),
        }
        for bin_index in np.unique(bin_indices).tolist()
    ]


def error(bins: Sequence[Mapping[str, float]]) -> float:
    """Return the expected calibration error: the mean of |probability - outcome| over the bins, weighted by count.

    Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599), eq. 3, applied to the probability of one class.
    """
    gaps = [abs(each['probability'] - each['outcome']) for each in bins]
    return float(np.average(gaps, weights=[each['count'] for each in bins]))


def metrics(dataset: Dataset, rewards: np.ndarray) -> dict[str, float]:
    """Return the expected calibration error of rewards [rows, K]: `ece` for thumbs, `pairwise_ece` for pairs."""
    name = 'ece' if 'labels' in dataset.arrays else 'pairwise_ece'
    return {name: error(reliability(*outcomes(dataset, rewards)))}
