"""Sources of reward that a policy learns from: learned rewards, functions of the text, or a sum of both."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from perl_jax.data import datasets
from perl_jax.errors import UserError
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import ensembles
from perl_jax.rewards.scoring import compiled
from perl_jax.rewards.text_functions import TextFunction, function
from perl_jax.runs import base as bases
from perl_jax.runs import finished
from perl_jax.runs.base import Base
from perl_jax.types import Metrics, Responses

Scorer = Callable[[Responses, Sequence[Mapping[str, Any]]], tuple[jax.Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class LearnedReward:
    """The best checkpoint of a reward run, or of several: an ensemble, scored in one program.

    Rewards share the policy's base if they were trained on it, else bring their own, one for all.

    Attributes:
      model_dir: the MODEL_DIR of a reward run, or of several; a run of several members (tuning/lora_ensemble.gin)
        brings all of them.
      weight: what its scores are multiplied by, beside other sources.
      aggregate: makes one score [B, K] of the members' [M, B, K]; see rewards/ensembles.py.
    """

    model_dir: str | Sequence[str]
    weight: float = 1.0
    aggregate: Callable[[Float[Array, 'M B K']], Float[Array, 'B K']] = ensembles.mean

    def scorer(self, network: nn.Module, base: Base, partitioner: Partitioner, vocabulary: Any) -> Scorer:
        """Read the rewards, and make the function that scores by them.

        Args:
          network: the policy's, which has to be the rewards' too.
          base: the policy's.
          partitioner: the devices.
          vocabulary: unused; the scores are of tokens.

        Returns:
          (rollout, examples) -> scores float32 [B, K], metrics. It is jitted, and does not look at the examples.

        Raises:
          UserError: no reward run there, or members that were trained on different bases.
        """
        del vocabulary
        runs, own = [], base
        for folder in [self.model_dir] if isinstance(self.model_dir, str) else self.model_dir:
            run = finished.best(folder, phase='reward', flag='LearnedReward.model_dir')
            _check_network(folder, run, network, base)
            if _on_base(run) and run.about['base']['fingerprint'] != own.fingerprint:
                if own is not base or any(map(_on_base, runs)):
                    raise UserError(
                        f"LearnedReward.model_dir: '{folder}' was trained on another base than those before it; "
                        'the members of an ensemble share one'
                    )
                own = bases.named(network, run.about['base'], partitioner)
            runs.append(run)
        # A reward is not trained any more: of full tuning, its weights come in the base's dtype.
        members = [x for run in runs for x in run.placed(partitioner, base.axes, dtype=own.name['dtype']).values()]

        judge = compiled(network, self.aggregate, partitioner)
        return lambda rollout, examples: judge(own.params, members, rollout)


def _check_network(folder: str, run: finished.Finished, network: nn.Module, base: Base) -> None:
    """A reward has to be of the policy's network, and one with weights of its own of its shapes."""
    bases.check_network(network, run.about['base'], f"LearnedReward.model_dir: '{folder}'")
    for adapter in run.shapes.values():
        if adapter.params is None:
            continue
        theirs, ours = (
            {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.leaves_with_path(tree)}
            for tree in (adapter.params, base.params)
        )
        if theirs != ours:
            name = min(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
            raise UserError(
                f"LearnedReward.model_dir: '{folder}' is of another network than the policy: {name} has shape "
                f'{theirs.get(name)} there and {ours.get(name)} here'
            )


def _on_base(run: finished.Finished) -> bool:
    """Whether a reward of the run needs the base that it was trained on, as LoRA's do."""
    return any(adapter.params is None for adapter in run.shapes.values())


@dataclasses.dataclass(frozen=True)
class TextReward:
    """A Python function of the text.

    Attributes:
      function: (prompt, response, example) -> float, or its dotted name 'module.function'; `example` holds the task's
        other fields, as SeqIO gives them.
      weight: what its scores are multiplied by, beside other sources.
    """

    function: TextFunction
    weight: float = 1.0

    def scorer(self, network: nn.Module, base: Base, partitioner: Partitioner, vocabulary: Any) -> Scorer:
        """Make the function that scores a rollout, on the host; each process judges its own rows.

        Args:
          network: unused.
          base: unused.
          partitioner: where the scores lie.
          vocabulary: what the responses are decoded with.

        Returns:
          (rollout, this process's examples) -> scores float32 [B, K], no metrics.

        Raises:
          UserError: no function has this name.
        """
        del network, base
        judge = function(self.function)

        def one(rollout: Responses, examples: Sequence[Mapping[str, Any]]) -> tuple[jax.Array, Metrics]:
            rows = zip(datasets.decode(vocabulary, partitioner.local(rollout)), examples, strict=True)
            values = [[judge(e['inputs_pretokenized'], r, e) for r in answers] for answers, e in rows]
            return partitioner.batch(np.array(values, np.float32)), {}

        return one


def scorer(
    sources: Sequence[LearnedReward | TextReward],
    network: nn.Module,
    base: Base,
    partitioner: Partitioner,
    vocabulary: Any,
) -> Scorer:
    """The weighted sum of several sources of reward: (rollout, own examples) -> float32 [B, K], and metrics."""
    parts = [(source.weight, source.scorer(network, base, partitioner, vocabulary)) for source in sources]

    def all_of_them(rollout: Responses, examples: Sequence[Mapping[str, Any]]) -> tuple[jax.Array, Metrics]:
        judged = [(weight, *one(rollout, examples)) for weight, one in parts]
        metrics = {name: value for _, _, found in judged for name, value in found.items()}
        return functools.reduce(operator.add, [weight * scores for weight, scores, _ in judged]), metrics

    return all_of_them
