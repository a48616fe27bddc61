"""Where a response's score comes from: the learned reward, a Python function of the text, or a sum of both."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from perl_jax import base as bases
from perl_jax import data, lora, masked, partitioning
from perl_jax.base import Base
from perl_jax.errors import UserError
from perl_jax.partitioning import Partitioner
from perl_jax.types import Responses, Variables


def score(network: nn.Module, variables: Variables, batch: Responses, **apply: Any) -> Float[Array, 'B K']:
    """The reward of each response: the scalar head on the state that has read its last token. A logit.

    `apply` goes to `network.apply` (`rngs` for dropout).
    """
    hidden = network.apply(variables, batch.inputs, batch.inputs_mask, batch.targets, **apply)
    end = masked.lengths(batch.targets_mask)[..., None, None]
    return lora.readout(variables, jnp.take_along_axis(hidden, end, axis=2)[:, :, 0])


TextFunction = Callable[[str, str, Mapping[str, Any]], float] | str  # or its dotted name, 'my_module.my_function'
Scorer = Callable[[Responses, Sequence[Mapping[str, Any]]], jax.Array]


def function(name: TextFunction) -> Callable[[str, str, Mapping[str, Any]], float]:
    """A text function, by itself or by its dotted name."""
    if not isinstance(name, str):
        return name
    try:
        found, why = pkgutil.resolve_name(name), 'that is none'
    except (ImportError, AttributeError, ValueError) as error:
        found, why = None, error
    if not callable(found):
        raise UserError(f"no function '{name}': {why}; write 'module.function', with the module on the path")
    return found


def functions(names: Mapping[str, TextFunction] | None) -> dict[str, Callable[[str, str, Mapping[str, Any]], float]]:
    """Several of them, by what they are called; None is none."""
    return {name: function(f) for name, f in (names or {}).items()}


@dataclasses.dataclass(frozen=True)
class LearnedReward:
    """The best checkpoint of a reward run. It shares the policy's base if it was trained on it, else brings its own."""

    model_dir: str
    weight: float = 1.0

    def scorer(self, network: nn.Module, base: Base, partitioner: Partitioner, vocabulary: Any) -> Scorer:
        """A jitted function of a rollout; the examples are not looked at."""
        del vocabulary
        adapter, about = bases.read_adapter(self.model_dir, 'reward', phase='reward', flag='LearnedReward.model_dir')
        own = base
        if adapter.params is None and about['base']['fingerprint'] != base.fingerprint:
            own = bases.named(network, about['base'], partitioner)
        adapter = partitioning.place(adapter, partitioner.tree(partitioning.adapter_axes(adapter, base.axes)))
        one = jax.jit(lambda params, adapter, batch: score(network, lora.bind(params, adapter), batch))
        return lambda rollout, examples: one(own.params, adapter, rollout)


@dataclasses.dataclass(frozen=True)
class TextReward:
    """`function(prompt, response, example) -> float`; `example` holds the task's other fields, as SeqIO gives them."""

    function: TextFunction
    weight: float = 1.0

    def scorer(self, network: nn.Module, base: Base, partitioner: Partitioner, vocabulary: Any) -> Scorer:
        """A function of the text on the host, [B, K] float32."""
        del network, base
        judge = function(self.function)

        def one(rollout: Responses, examples: Sequence[Mapping[str, Any]]) -> jax.Array:
            rows = zip(data.decode(vocabulary, rollout), examples, strict=True)
            values = [[judge(e['inputs_pretokenized'], r, e) for r in answers] for answers, e in rows]
            return partitioner.batch(np.array(values, np.float32))

        return one


def scorer(
    sources: Sequence[LearnedReward | TextReward],
    network: nn.Module,
    base: Base,
    partitioner: Partitioner,
    vocabulary: Any,
) -> Scorer:
    """The weighted sum of several sources of reward: (rollout, its B examples) -> float32 [B, K]."""
    parts = [(source.weight, source.scorer(network, base, partitioner, vocabulary)) for source in sources]
    return lambda rollout, examples: sum(weight * one(rollout, examples) for weight, one in parts)
