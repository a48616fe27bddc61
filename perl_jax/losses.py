"""The losses, each a formula. Nothing here knows of networks, adapters or settings."""

from __future__ import annotations

import jax
import optax
from jaxtyping import Array, Bool, Float

from perl_jax import masked


def nll(logprobs: Float[Array, 'B K R'], mask: Bool[Array, 'B K R']) -> Float[Array, '']:
    """SFT: mean over the target tokens of -log p."""
    return -masked.mean(logprobs, mask)


def pairwise(rewards: Float[Array, 'B 2']) -> Float[Array, '']:
    """Bradley-Terry: mean of -log sigmoid(r_chosen - r_rejected); the chosen response comes first (paper A.1.2)."""
    return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1]).mean()


def pointwise(rewards: Float[Array, 'B K'], labels: Float[Array, 'B K']) -> Float[Array, '']:
    """Binary cross-entropy on the logit r: mean of -p log sigmoid(r) - (1 - p) log(1 - sigmoid(r)).

    The paper prints log sigmoid(1 - r) for the negative term; this is the standard form.
    """
    return optax.sigmoid_binary_cross_entropy(rewards, labels).mean()


def reinforce(
    logprobs: Float[Array, 'B K R'], advantages: Float[Array, 'B K R'], mask: Bool[Array, 'B K R']
) -> Float[Array, '']:
    """REINFORCE for language models: -sum_t log pi(A_t | X_t) stop_grad(Z_t - V_t), mean over episodes (RLAIF, F)."""
    return -masked.total(logprobs * jax.lax.stop_gradient(advantages), mask).mean()


def value(
    values: Float[Array, 'B K R'], returns: Float[Array, 'B K R'], mask: Bool[Array, 'B K R']
) -> Float[Array, '']:
    """Squared error of the baseline: sum_t (Z_t - V_t)^2, mean over episodes (RLAIF, app. F)."""
    return masked.total((jax.lax.stop_gradient(returns) - values) ** 2, mask).mean()
