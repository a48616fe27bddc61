"""The batches and states that everything else passes on, and the axis legend that every shape uses.

    B prompts            V vocabulary         F mlp width
    K responses each     D model width        L layers
    P prompt length      H heads              r LoRA rank
    R response length    N key/value heads    E head width
    T tokens of a run, P + K R     S keys     M members of an ensemble     G data partitions (unpadding.py)

In datasets and evaluations N counts rows ([N, K]), in unpadding.py the slots of a group ([G, N]).

One prompt has K responses in every batch: K = 1 for SFT and thumbs, 2 for preference pairs (the chosen one first), the
number of samples for rollouts. Tokens are padded on the right; the masks say which are real, so no token id is special.
Whatever is said of a response token (log-prob, value, return) has the shape [B, K, R].
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree


class Prompts(struct.PyTreeNode):
    """A batch of prompts, padded on the right.

    Attributes:
      inputs: int32 [B, P], the tokens; what stands at the padding may be anything.
      inputs_mask: bool [B, P], true at the tokens.
    """

    inputs: Int[Array, 'B P']
    inputs_mask: Bool[Array, 'B P']


class Responses(Prompts):
    """Prompts and K responses each, padded on the right.

    Attributes:
      targets: int32 [B, K, R]; a response's last token is its EOS, unless it ran out of room.
      targets_mask: bool [B, K, R], true at the tokens, EOS included.
      fill: upper bounds on the share of tokens that is no padding, of the whole run and of the targets, in any data
        shard: dense layers then compute no more (unpadding.py). None computes the padding too.
    """

    targets: Int[Array, 'B K R']
    targets_mask: Bool[Array, 'B K R']
    fill: tuple[Fraction, Fraction] | None = struct.field(pytree_node=False, default=None, kw_only=True)


class Thumbs(Responses):
    """Responses that a rater labelled: 1 is a thumb up, 0 a thumb down."""

    labels: Float[Array, 'B K']


class WeightedPairs(Responses):
    """Pairs that do not all count alike in the loss, the chosen first; on average over their data set the weight is 1.

    Pairs that count alike are plain Responses.
    """

    weights: Float[Array, ' B']


class Rollout(Responses):
    """Responses that the policy sampled.

    Attributes:
      logprobs: float32 [B, K, R], nats: the log-probability that each token was drawn with; 0 at the padding.
    """

    logprobs: Float[Array, 'B K R']


class Experience(Rollout):
    """A rollout that has been judged: what the learning steps need.

    Attributes:
      rewards: float32 [B, K, R], of each token, the KL's part in it: -beta KL, and at the last token (1 - beta) score
        (the paper, eq. 1); 0 at the padding.
      anchor_logprobs: float32 [B, K, R], nats: those of the anchor for the same tokens.
      values: float32 [B, K, R], before any update of this rollout; None where the value's own step computes them.
    """

    rewards: Float[Array, 'B K R']
    anchor_logprobs: Float[Array, 'B K R']
    values: Float[Array, 'B K R'] | None = None


class TrainState(struct.PyTreeNode):
    """All that a role learns. The frozen base is not in it: it is an argument of every step."""

    step: Int[Array, '']
    adapter: Any  # lora.Adapter
    opt_state: PyTree


class PolicyState(struct.PyTreeNode):
    """The policy and its value baseline: two adapters of one base, two optimizers.

    `value` is None where the algorithm learns none, `anchor` where it is the base itself. `beta` weighs the KL.
    """

    policy: TrainState
    beta: Float[Array, '']
    value: TrainState | None = None
    anchor: Any = None  # lora.Adapter


class Roles(struct.PyTreeNode):
    """The frozen base of each role: the same tree, or a copy each for the comparator (the paper, section 4.2).

    Attributes:
      policy: parameters that the policy's adapter is bound to.
      value: those of the value baseline.
      anchor: those of the anchor, the reference of the KL.
      reward: those of a learned reward.
    """

    policy: PyTree
    value: PyTree
    anchor: PyTree
    reward: PyTree

    @classmethod
    def sharing(cls, base: PyTree) -> Roles:
        """Put one base under all four roles."""
        return cls(policy=base, value=base, anchor=base, reward=base)

    @classmethod
    def copies(cls, base: PyTree, copy: Callable[[PyTree], PyTree]) -> Roles:
        """Give each role a base of its own; the policy's is `base` itself."""
        return cls(policy=base, value=copy(base), anchor=copy(base), reward=copy(base))


Variables = dict[str, Any]  # linen collections: {'params': ..., 'lora': ..., 'head': ...}
Metrics = dict[str, jax.Array]
