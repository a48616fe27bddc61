"""How a policy learns from judged rollouts: one page an algorithm, one code path for all (steps.py, learner.py).

    reinforce   a learned baseline, one step a rollout (the paper; the default)   ALGORITHM = @reinforce.Reinforce()
    rloo        the K - 1 other responses are the baseline                        algorithms/rloo.gin
    grpo        the K responses' mean and deviation; clipped ratios               algorithms/grpo.gin
    ppo         GAE, clipped ratios, several epochs of minibatches                algorithms/ppo.gin

Each is a frozen dataclass of its own settings, made of the formulas in losses.py and advantages.py.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float

Tokens = Float[Array, 'B K R']
Mask = Bool[Array, 'B K R']


class Algorithm(Protocol):
    """What an algorithm has to have; any frozen dataclass with these will do (examples/own_algorithm.py).

    All arrays are float32 [B, K, R], a number for each token of each response; what stands at the padding may be
    anything. One that learns a value is a ValueAlgorithm. The properties may be plain attributes.
    """

    @property
    def has_value(self) -> bool:
        """Whether a value baseline is learned; it is a ValueAlgorithm then."""
        ...

    @property
    def min_samples(self) -> int:
        """The least K."""
        ...

    @property
    def clip(self) -> float | None:
        """Of the ratio pi / pi_old; None if the ratio is not used."""
        ...

    @property
    def epochs(self) -> int:
        """How often a rollout is learned from."""
        ...

    @property
    def minibatches(self) -> int:
        """In how many parts of its prompts each time."""
        ...

    @property
    def whole_batch(self) -> bool:
        """Whether what is learned from one prompt's responses depends on the other prompts of its batch."""
        ...

    def advantages(self, rewards: Tokens, values: Tokens | None, mask: Mask) -> Tokens:
        """Compute each token's advantage.

        Args:
          rewards: of each token, the KL's part in it where the KL lies in the reward.
          values: before the rollout was learned from; None where none is learned.
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
        """Say what each token counts in the loss, a weighted sum: the policy's, the value's, a KL in the loss.

        Args:
          mask: bool, true at the tokens.

        Returns:
          float32 [B, K, R], 0 at the padding.
        """
        ...


@runtime_checkable
class ValueAlgorithm(Algorithm, Protocol):
    """What is also asked of an algorithm that learns a value, as REINFORCE and PPO do."""

    def returns(self, rewards: Tokens, values: Tokens, mask: Mask) -> Tokens:
        """Compute what the value is to learn.

        Args:
          rewards: of each token.
          values: before the rollout was learned from.
          mask: bool, true at the tokens.

        Returns:
          Z_t [B, K, R].
        """
        ...

    def value_loss(self, values: Tokens, old_values: Tokens, returns: Tokens) -> Tokens:
        """Compute the value's loss of each token.

        Args:
          values: V(X_t), which the gradient flows through.
          old_values: those before the rollout was learned from.
          returns: Z_t.

        Returns:
          L_t [B, K, R], to be weighed by `weights`.
        """
        ...
