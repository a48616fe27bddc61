"""How a policy learns from judged rollouts: one page an algorithm, one code path for all (steps.py, learner.py).

    reinforce   a learned baseline, one step a rollout (the paper; the default)   ALGORITHM = @reinforce.Reinforce()
    rloo        the K - 1 other responses are the baseline                        algorithms/rloo.gin
    grpo        the K responses' mean and deviation; clipped ratios               algorithms/grpo.gin
    ppo         GAE, clipped ratios, several epochs of minibatches                algorithms/ppo.gin

Each is a frozen dataclass of its own settings, made of the formulas in losses.py and advantages.py.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float

from perl_jax.types import AnyArray

Tokens = Float[AnyArray, 'B K R']
Mask = Bool[AnyArray, 'B K R']


@runtime_checkable
class Algorithm(Protocol):
    """The interface of an algorithm.

    A frozen dataclass with these attributes and methods is enough (examples/own_algorithm.py); the properties may be
    plain attributes. An algorithm that learns a value is a ValueAlgorithm.

    All arrays are float32 [B, K, R], a number for each token of each response. Values at the padding are arbitrary in
    the arguments, and ignored in the results.
    """

    @property
    def has_value(self) -> bool:
        """Whether a value baseline is learned; it is a ValueAlgorithm then."""
        ...

    @property
    def min_samples(self) -> int:
        """The smallest K: responses to a prompt."""
        ...

    @property
    def clip(self) -> float | None:
        """eps, the bound of |pi / pi_old - 1|; None if the ratio is not used."""
        ...

    @property
    def epochs(self) -> int:
        """Passes over each rollout."""
        ...

    @property
    def minibatches(self) -> int:
        """Minibatches per epoch; each takes whole prompts."""
        ...

    @property
    def whole_batch(self) -> bool:
        """Whether a prompt's gradient depends on the other prompts of the batch."""
        ...

    def advantages(self, rewards: Tokens, values: Tokens | None, mask: Mask) -> Tokens:
        """Compute each token's advantage.

        Args:
          rewards: of each token, the KL's part in it where the KL lies in the reward.
          values: before the first update on the rollout; None where no value is learned.
          mask: bool, true at the tokens.

        Returns:
          A_t [B, K, R].
        """
        ...

    def policy_loss(self, logprobs: Tokens, old_logprobs: Tokens, advantages: Tokens) -> Tokens:
        """Compute the policy's loss of each token.

        Args:
          logprobs: log pi(A_t | X_t), which the gradient flows through.
          old_logprobs: those that the rollout was drawn with.
          advantages: of each token.

        Returns:
          L_t [B, K, R], to be weighed by `weights`.
        """
        ...

    def weights(self, mask: Mask) -> Tokens:
        """Compute the weight of each token in the policy, value and KL losses, which are weighted sums.

        Args:
          mask: bool, true at the tokens.

        Returns:
          float32 [B, K, R], 0 at the padding.
        """
        ...


@runtime_checkable
class ValueAlgorithm(Algorithm, Protocol):
    """The interface of an algorithm that learns a value, such as REINFORCE and PPO."""

    def returns(self, rewards: Tokens, values: Tokens, mask: Mask) -> Tokens:
        """Compute the regression targets of the value.

        Args:
          rewards: of each token.
          values: before the first update on the rollout.
          mask: bool, true at the tokens.

        Returns:
          Z_t [B, K, R].
        """
        ...

    def value_loss(self, values: Tokens, old_values: Tokens, returns: Tokens) -> Tokens:
        """Compute the value's loss of each token.

        Args:
          values: V(X_t), which the gradient flows through.
          old_values: those before the first update on the rollout.
          returns: Z_t.

        Returns:
          L_t [B, K, R], to be weighed by `weights`.
        """
        ...
