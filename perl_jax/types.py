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


@struct.dataclass
class Prompts:
    """What is asked."""

    inputs: Int[Array, 'B P']
    inputs_mask: Bool[Array, 'B P']


@struct.dataclass
class Responses(Prompts):
    """Prompts and their responses; a response's last real token is its EOS, unless it ran out of room.

    `fill` is what share of all tokens, and of the targets, is real at most, in any part of the batch: unpadding.py.
    """

    targets: Int[Array, 'B K R']
    targets_mask: Bool[Array, 'B K R']
    fill: tuple[Fraction, Fraction] | None = struct.field(pytree_node=False, default=None, kw_only=True)


@struct.dataclass
class Thumbs(Responses):
    """Responses that a rater labelled: 1 is a thumb up, 0 a thumb down."""

    labels: Float[Array, 'B K']


@struct.dataclass
class WeightedPairs(Responses):
    """Pairs that do not all count alike in the loss, the chosen first; on average over their data set the weight is 1.

    Pairs that count alike are plain Responses.
    """

    weights: Float[Array, ' B']


@struct.dataclass
class Rollout(Responses):
    """Responses that the policy sampled, with the log-probability that each token was drawn with."""

    logprobs: Float[Array, 'B K R']


@struct.dataclass
class Experience(Rollout):
    """A rollout that has been judged: what the learning steps need.

    `values` are those before it was learned from; None where the value's own step has them (rl.values_first).
    """

    rewards: Float[Array, 'B K R']
    anchor_logprobs: Float[Array, 'B K R']
    values: Float[Array, 'B K R'] | None = None


@struct.dataclass
class TrainState:
    """All that a role learns. The frozen base is not in it: it is an argument of every step."""

    step: Int[Array, '']
    adapter: Any  # lora.Adapter
    opt_state: PyTree


@struct.dataclass
class PolicyState:
    """The policy and its value baseline: two adapters of one base, two optimizers.

    `value` is None where the algorithm learns none, `anchor` where it is the base itself. `beta` weighs the KL.
    """

    policy: TrainState
    beta: Float[Array, '']
    value: TrainState | None = None
    anchor: Any = None  # lora.Adapter


@struct.dataclass
class Roles:
    """The frozen base of each role: the same tree, or a copy each for the comparator (the paper, section 4.2)."""

    policy: PyTree
    value: PyTree
    anchor: PyTree
    reward: PyTree

    @classmethod
    def sharing(cls, base: PyTree) -> Roles:
        """One base under all four."""
        return cls(policy=base, value=base, anchor=base, reward=base)

    @classmethod
    def copies(cls, base: PyTree, copy: Callable[[PyTree], PyTree]) -> Roles:
        """A base each; the policy's is `base` itself."""
        return cls(policy=base, value=copy(base), anchor=copy(base), reward=copy(base))


Variables = dict[str, Any]  # linen collections: {'params': ..., 'lora': ..., 'head': ...}
Metrics = dict[str, jax.Array]
