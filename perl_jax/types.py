"""The batches and states that all modules pass on, and the legend of the axes in all shapes.

    B prompts            V vocabulary         F mlp width
    K responses each     D model width        L layers
    P prompt length      H heads              r LoRA rank
    R response length    N key/value heads    E head width
    T tokens of a sequence, packed: P + K R   Q queries   S keys   M members of an ensemble   U updates

    b k t: B K R, or G 1 C where the padding is removed (unpadding.py): G groups of rows, each with A tokens in all and
    C slots for the real ones. `rows` are those of a data set or an evaluation; n and m are any other numbers.

One prompt has K responses in every batch: K = 1 for SFT and thumbs, 2 for preference pairs (the chosen one first), the
number of samples for rollouts. Tokens are padded on the right; the masks mark the real ones, so no token id is special.
Every quantity of a response token (log-prob, value, return) has the shape [B, K, R].
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

AnyArray = jax.Array | np.ndarray  # of a formula that serves both traced and NumPy's arrays


class Prompts(struct.PyTreeNode):
    """A batch of prompts, padded on the right.

    Attributes:
      inputs: int32 [B, P], the tokens; any value at the padding.
      inputs_mask: bool [B, P], true at the tokens.
    """

    inputs: Int[Array, 'B P']
    inputs_mask: Bool[Array, 'B P']


class Responses(Prompts):
    """Prompts and K responses each, padded on the right.

    Attributes:
      targets: int32 [B, K, R]; a response's last token is its EOS, unless it was cut at R tokens.
      targets_mask: bool [B, K, R], true at the tokens, EOS included.
      fill: upper bounds on the fraction of real tokens in any data partition, of prompts with responses and of
        responses alone: dense layers compute that fraction (unpadding.py). With None they compute the padding as well.
    """

    targets: Int[Array, 'B K R']
    targets_mask: Bool[Array, 'B K R']
    fill: tuple[Fraction, Fraction] | None = struct.field(pytree_node=False, default=None, kw_only=True)


class Thumbs(Responses):
    """Responses with binary labels.

    Attributes:
      labels: float32 [B, K]: 1 is a thumb up, 0 a thumb down.
    """

    labels: Float[Array, 'B K']


class WeightedPairs(Responses):
    """Preference pairs with weights in the loss, the chosen response first. Pairs without weights are plain Responses.

    Attributes:
      weights: float32 [B]; their mean over a data set is 1.
    """

    weights: Float[Array, ' B']


class Rollout(Responses):
    """Responses that the policy sampled.

    Attributes:
      logprobs: float32 [B, K, R], nats: the log-probability with which each token was drawn; 0 at the padding.
    """

    logprobs: Float[Array, 'B K R']


class Experience(Rollout):
    """A rollout with the rewards of its tokens: the input of the learning steps.

    Attributes:
      rewards: float32 [B, K, R]: -beta KL at each token, plus (1 - beta) score at the last (the paper, eq. 1); 0 at the
        padding.
      anchor_logprobs: float32 [B, K, R], nats: the anchor's log-probabilities of the same tokens.
      values: float32 [B, K, R], before the first update of this rollout; None where the value step computes them.
    """

    rewards: Float[Array, 'B K R']
    anchor_logprobs: Float[Array, 'B K R']
    values: Float[Array, 'B K R'] | None = None


class TrainState(struct.PyTreeNode):
    """The state of one role's training. The frozen base is not part of it but an argument of every step.

    Attributes:
      step: int32 [], updates so far.
      adapter: the trainable parameters.
      opt_state: the optimizer's state.
    """

    step: Int[Array, '']
    adapter: Any  # lora.Adapter
    opt_state: PyTree


class PolicyState(struct.PyTreeNode):
    """The policy and its value baseline: two adapters of one base, two optimizers.

    Attributes:
      policy: the policy's state.
      beta: float32 [], the weight of the KL.
      value: the baseline's state; None where the algorithm has none.
      anchor: the anchor's adapter; None where the anchor is the base itself.
    """

    policy: TrainState
    beta: Float[Array, '']
    value: TrainState | None = None
    anchor: Any = None  # lora.Adapter


class Roles(struct.PyTreeNode):
    """The frozen parameters of each role: one tree for all, or copies for the comparator (the paper, section 4.2).

    Attributes:
      policy: the base under the policy's adapter.
      value: the base under the value baseline's adapter.
      anchor: the base of the anchor, the reference of the KL.
      reward: the base under the adapters of learned rewards.
    """

    policy: PyTree
    value: PyTree
    anchor: PyTree
    reward: PyTree

    @classmethod
    def sharing(cls, base: PyTree) -> Roles:
        """Share one base among all four roles."""
        return cls(policy=base, value=base, anchor=base, reward=base)

    @classmethod
    def copies(cls, base: PyTree, copy: Callable[[PyTree], PyTree]) -> Roles:
        """Give each role a base of its own.

        Args:
          base: the policy's, which is not copied.
          copy: makes a copy of its arrays.

        Returns:
          Roles with four trees.
        """
        return cls(policy=base, value=copy(base), anchor=copy(base), reward=copy(base))


Variables = dict[str, Any]  # linen collections: {'params': ..., 'lora': ..., 'head': ...}
Metrics = dict[str, jax.Array]
