"""How a policy learns from judged rollouts: one page an algorithm, one code path for all (steps.py, learner.py).

    reinforce   a learned baseline, one step a rollout (the paper; the default)   ALGORITHM = @reinforce.Reinforce()
    rloo        the K - 1 other responses are the baseline                        algorithms/rloo.gin
    grpo        the K responses' mean and deviation; clipped ratios               algorithms/grpo.gin
    ppo         GAE, clipped ratios, several epochs of minibatches                algorithms/ppo.gin

Each is a frozen dataclass of its own settings, made of the formulas in losses.py and advantages.py.
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Array, Bool, Float

Tokens = Float[Array, 'B K R']
Mask = Bool[Array, 'B K R']


class Algorithm(Protocol):
    """What rl/steps.py asks of an algorithm. What stands at the padding may be anything.

    has_value: a value is learned.   min_samples: the least K.   clip: of the ratio pi / pi_old, None if it is not used.
    epochs, minibatches: how often a rollout is learned from, and in how many parts of its prompts.
    whole_batch: what is learned from one prompt's responses hangs on the other prompts of its batch (bucketing.py).

    `returns` and `value_loss` are asked for only where a value is learned: RLOO and GRPO have neither.
    """

    has_value: bool
    min_samples: int
    clip: float | None
    epochs: int
    minibatches: int
    whole_batch: bool

    def advantages(self, rewards: Tokens, values: Tokens | None, mask: Mask) -> Tokens:
        """Of each token; `values` is None where none is learned."""

    def returns(self, rewards: Tokens, values: Tokens, mask: Mask) -> Tokens:
        """What the value is to learn."""

    def policy_loss(self, logprobs: Tokens, old_logprobs: Tokens, advantages: Tokens) -> Tokens:
        """Of each token; `old_logprobs` are those that the rollout was drawn with."""

    def value_loss(self, values: Tokens, old_values: Tokens, returns: Tokens) -> Tokens:
        """Of each token; `old_values` are those before the rollout was learned from."""

    def weights(self, mask: Mask) -> Tokens:
        """What each token counts in the loss, which is a weighted sum: the policy's, the value's, a KL, an entropy."""
