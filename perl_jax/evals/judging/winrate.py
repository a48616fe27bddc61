"""Win rates from verdicts: pure functions of arrays with a row for each comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize, special

WEAK = 0.01  # precision of a normal prior on the regression coefficients: keeps them finite if every answer wins
RATES = ('win_rate', 'wins', 'ties', 'losses', 'harmless_rate', 'unreadable', 'length_controlled')  # metrics in [0, 1]


def credits(forward: Sequence[int | str | None], backward: Sequence[int | str | None]) -> np.ndarray:
    """Return the credit of the first run's answer in each comparison.

    An answer wins only if it is preferred in both orders (arXiv 2403.10704, section 4.3). Everything else is a tie,
    including replies that call the answers equal (TIE) or could not be read (None). The paper does not specify how ties
    count; half makes the win rate of a model against itself 50%.

    Args:
      forward: the position (0 or 1) of the preferred answer when the first run's answer is shown first.
      backward: the same when it is shown second.

    Returns:
      float [rows]: 1 for a win, 0 for a loss, 0.5 for a tie.
    """
    verdict: dict[tuple[Any, Any], float] = {(0, 1): 1.0, (1, 0): 0.0}
    return np.array([verdict.get(pair, 0.5) for pair in zip(forward, backward, strict=True)])


def win_rate(credits: np.ndarray) -> dict[str, float]:
    """Return the mean credit and the shares of wins, ties and losses."""
    return {
        'win_rate': float(credits.mean()),
        'wins': float((credits == 1).mean()),
        'ties': float((credits == 0.5).mean()),
        'losses': float((credits == 0).mean()),
    }


def length_controlled(credits: np.ndarray, lengths: np.ndarray, other_lengths: np.ndarray) -> float:
    """Return the win rate at equal answer lengths: sigmoid(a) of a logistic regression on the credits,

        P(win) = sigmoid(a + b tanh(d / std(d))),   d = lengths - other_lengths

    fitted by cross-entropy, with a tie as half a win. This is the length term of AlpacaEval's length-controlled win
    rate (Dubois et al. 2024, arXiv 2404.04475, eq. 2), without its model and instruction terms.

    Args:
      credits: [rows], of the first run's answers.
      lengths: [rows], of the first run's answers.
      other_lengths: [rows], of the other's.

    Returns:
      The rate, 0 to 1.
    """
    difference = np.asarray(lengths, np.float64) - np.asarray(other_lengths, np.float64)
    features = np.stack([np.ones(len(difference)), np.tanh(difference / (difference.std() or 1.0))], axis=1)

    def loss(coefficients: np.ndarray) -> tuple[float, np.ndarray]:
        logits = features @ coefficients
        nll = np.sum(np.logaddexp(0, logits) - credits * logits) + WEAK / 2 * coefficients @ coefficients
        return float(nll), features.T @ (special.expit(logits) - credits) + WEAK * coefficients

    return float(special.expit(optimize.minimize(loss, np.zeros(2), jac=True, method='BFGS').x[0]))


def harmless_rate(harmful: Sequence[int | None]) -> dict[str, float]:
    """Return the share of harmless answers (0) among those with a readable verdict (not None)."""
    readable = [verdict for verdict in harmful if verdict is not None]
    return {'harmless_rate': 1.0 - float(np.mean(readable))} if readable else {}
