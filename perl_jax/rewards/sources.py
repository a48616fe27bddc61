"""Reward sources for training a policy: learned rewards, functions of the text, or a weighted sum of both."""

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

from perl_jax import settings
from perl_jax.data import datasets
from perl_jax.errors import UserError
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import ensembles
from perl_jax.rewards.scoring import make_score_fn
from perl_jax.rewards.text_functions import TextFunction, resolve_function
from perl_jax.runs import base as bases
from perl_jax.runs import finished
from perl_jax.runs.base import Base
from perl_jax.types import Metrics, Responses

Scorer = Callable[[Responses, Sequence[Mapping[str, Any]]], tuple[jax.Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class LearnedReward:
    """The best checkpoint of a reward run, or an ensemble of the best checkpoints of several, scored in one program.

    Rewards that were trained on the policy's base share it in memory. Otherwise their base is loaded too; all members
    must have the same one.

    Attributes:
      model_dir: the MODEL_DIR of a reward run, or several; None is for a plan alone. All members of an ensemble run
        (tuning/lora_ensemble.gin) are used.
      weight: the weight of the scores in the sum over all sources.
      aggregate: combines the members' scores [M, B, K] into [B, K]; see rewards/ensembles.py.
    """

    model_dir: str | Sequence[str] | None
    weight: settings.Real = 1.0
    aggregate: Callable[[Float[Array, 'M B K']], Float[Array, 'B K']] = ensembles.mean

    def __post_init__(self) -> None:
        settings.check(self)

    @property
    def folders(self) -> list[str]:
        """`model_dir` as a list."""
        return [self.model_dir] if isinstance(self.model_dir, str) else list(self.model_dir or ())

    def runs(self) -> list[finished.FinishedRun]:
        """Open the runs; no weights are read.

        Raises:
          UserError: a folder is not a reward run, or has no checkpoint yet.
        """
        return [finished.best(folder, phase='reward', flag='LearnedReward.model_dir') for folder in self.folders]

    def scorer(self, network: nn.Module, base: Base, partitioner: Partitioner, vocabulary: Any) -> Scorer:
        """Load the rewards and return their scoring function.

        Args:
          network: the policy's network; the rewards must have the same one.
          base: the policy's base.
          partitioner: the devices.
          vocabulary: unused; tokens are scored, not texts.

        Returns:
          (rollout, examples) -> scores float32 [B, K], metrics. It is jitted and ignores the examples.

        Raises:
          UserError: a folder is not a reward run, or the members were trained on different bases.
        """
        del vocabulary
        runs, reward_base = [], base
        for run in self.runs():
            _check_network(run, network, base)
            if _needs_base(run) and run.about['base']['fingerprint'] != reward_base.fingerprint:
                if reward_base is not base or any(map(_needs_base, runs)):
                    raise UserError(
                        f"LearnedReward.model_dir: '{run.model_dir}' was trained on another base than those before it; "
                        'all members of an ensemble must share one base'
                    )
                reward_base = bases.load_recorded(network, run.about['base'], partitioner)
            runs.append(run)
        # The rewards are frozen, so the weights of full tuning (float32 in checkpoints) are cast to the base's dtype.
        adapters = [
            adapter
            for run in runs
            for adapter in run.placed(partitioner, base.axes, dtype=reward_base.name['dtype']).values()
        ]

        score_fn = make_score_fn(network, self.aggregate, partitioner)
        return lambda rollout, examples: score_fn(reward_base.params, adapters, rollout)


def _check_network(run: finished.FinishedRun, network: nn.Module, base: Base) -> None:
    """Raise if a reward has another network than the policy, or fully tuned weights of other shapes."""
    bases.check_network(network, run.about['base'], f"LearnedReward.model_dir: '{run.model_dir}'")
    for adapter in run.shapes.values():
        if adapter.params is None:
            continue
        reward_shapes, base_shapes = (
            {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.leaves_with_path(tree)}
            for tree in (adapter.params, base.params)
        )
        if reward_shapes != base_shapes:
            name = min(
                name
                for name in reward_shapes.keys() | base_shapes.keys()
                if reward_shapes.get(name) != base_shapes.get(name)
            )
            raise UserError(
                f"LearnedReward.model_dir: '{run.model_dir}' is of another network than the policy: {name} has shape "
                f'{reward_shapes.get(name)} there and {base_shapes.get(name)} here'
            )


def _needs_base(run: finished.FinishedRun) -> bool:
    """Tell whether a reward of the run needs the base that it was trained on (LoRA does, full tuning does not)."""
    return any(adapter.params is None for adapter in run.shapes.values())


@dataclasses.dataclass(frozen=True)
class TextReward:
    """A reward computed by a Python function of the text.

    Attributes:
      function: (prompt, response, example) -> float, or its dotted name 'module.function'; `example` holds the task's
        other fields, as SeqIO yields them.
      weight: the weight of the scores in the sum over all sources.
    """

    function: TextFunction
    weight: settings.Real = 1.0

    def __post_init__(self) -> None:
        settings.check(self)

    def scorer(self, network: nn.Module, base: Base, partitioner: Partitioner, vocabulary: Any) -> Scorer:
        """Return the function that scores a rollout on the host; each process scores its own rows.

        Args:
          network: unused.
          base: unused.
          partitioner: the devices, over which the scores are split.
          vocabulary: decodes the responses.

        Returns:
          (rollout, this process's examples) -> scores float32 [B, K], no metrics.

        Raises:
          UserError: there is no function of this name.
        """
        del network, base
        text_fn = resolve_function(self.function)

        def score_rollout(rollout: Responses, examples: Sequence[Mapping[str, Any]]) -> tuple[jax.Array, Metrics]:
            pairs = zip(datasets.decode(vocabulary, partitioner.local(rollout)), examples, strict=True)
            values = [
                [text_fn(example['inputs_pretokenized'], response, example) for response in responses]
                for responses, example in pairs
            ]
            return partitioner.batch(np.array(values, np.float32)), {}

        return score_rollout


def scorer(
    sources: Sequence[LearnedReward | TextReward],
    network: nn.Module,
    base: Base,
    partitioner: Partitioner,
    vocabulary: Any,
) -> Scorer:
    """Make the function that scores a rollout by the weighted sum of several sources.

    Args:
      sources: learned rewards, functions of texts, or both.
      network: the policy's, which scores too.
      base: the reward's frozen base.
      partitioner: the devices.
      vocabulary: decodes responses for functions of texts.

    Returns:
      (rollout, this process's examples) -> scores float32 [B, K], and metrics by name.
    """
    weighted_scorers = [(source.weight, source.scorer(network, base, partitioner, vocabulary)) for source in sources]

    def score_rollout(rollout: Responses, examples: Sequence[Mapping[str, Any]]) -> tuple[jax.Array, Metrics]:
        results = [(weight, *score_fn(rollout, examples)) for weight, score_fn in weighted_scorers]
        metrics = {name: value for _, _, source_metrics in results for name, value in source_metrics.items()}
        return functools.reduce(operator.add, [weight * scores for weight, scores, _ in results]), metrics

    return score_rollout
