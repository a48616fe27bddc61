"""Sample one answer for each prompt of a dataset and score it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax import settings
from perl_jax.data.datasets import Dataset, DatasetConfig, Example, decode
from perl_jax.parallel import partitioning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards.text_functions import TextFunction
from perl_jax.rl.sampling import SamplingConfig
from perl_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class Answers:
    """Settings for the answers that a run samples at its evaluations, one for each prompt.

    Attributes:
      dataset: the prompts; None turns the sampling off.
      sampling: sampling settings; None uses the policy's training settings, or SamplingConfig's defaults (SFT).
      metric_fns: {name: function(prompt, response, example)}; reported only, never trained on.
    """

    dataset: DatasetConfig | None = None
    sampling: SamplingConfig | None = None
    metric_fns: Mapping[str, TextFunction] | None = None

    def __post_init__(self) -> None:
        settings.check(self)

    def sampling_config(self, default: SamplingConfig) -> SamplingConfig:
        """Return the settings for sampling one answer per prompt; `default` applies where `sampling` is None."""
        return dataclasses.replace(self.sampling or default, num_samples=1)


def answer_all(
    dataset: Dataset,
    batch_size: int,
    partitioner: Partitioner,
    respond: Callable[[Any, list[Example], int], tuple[Rollout, Mapping[str, Any]]],
    metric_fns: Mapping[str, Callable[[str, str, Mapping[str, Any]], float]],
    include_token_ids: bool = False,
) -> list[dict[str, Any]]:
    """Sample one answer to each prompt of a dataset, as rows for samples.jsonl.

    Args:
      dataset: the prompts.
      batch_size: prompts per batch, over all processes.
      partitioner: the devices.
      respond: (prompts, examples, batch index) -> rollout, {name: scores [B, K]}. The examples are those of this
        process's rows.
      metric_fns: {name: function(prompt, response, example)} of the decoded text.
      include_token_ids: whether a row also holds the token ids, as `ids`: {'prompt': .., 'response': ..}.

    Returns:
      A row for each prompt: prompt, response, tokens (the response's length), the scores, the metrics, and the task's
      `reference` where it has one.
    """
    rows = []
    for batch_index, (batch, local_examples, _) in enumerate(dataset.batches(batch_size, partitioner.rows(batch_size))):
        rollout, extra_scores = partitioning.gather(respond(partitioner.batch(batch), local_examples, batch_index))
        responses, lengths = decode(dataset.vocabulary, rollout), rollout.targets_mask.sum(-1)
        for row_index, example in enumerate(
            dataset.examples[batch_index * batch_size : (batch_index + 1) * batch_size]
        ):
            prompt, response = example['inputs_pretokenized'], responses[row_index][0]
            row = {'prompt': prompt, 'response': response, 'tokens': int(lengths[row_index, 0])}
            row |= {k: float(v[row_index, 0]) for k, v in extra_scores.items()}
            row |= {k: float(metric_fn(prompt, response, example)) for k, metric_fn in metric_fns.items()}
            row |= {'reference': example['reference']} if 'reference' in example else {}
            if include_token_ids:
                row['ids'] = {
                    'prompt': rollout.inputs[row_index][rollout.inputs_mask[row_index]].tolist(),
                    'response': rollout.targets[row_index, 0][rollout.targets_mask[row_index, 0]].tolist(),
                }
            rows.append(row)
    return rows


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A policy's answers to held-out prompts beside its anchor's.

    Attributes:
      dataset: the prompts; None measures nothing.
      batch_size: prompts per batch, over all processes.
      partitioner: the devices.
      respond: (adapter, or None for the anchor; prompts; examples; batch index) -> as `answer_all`'s.
      metric_fns: as in `answer_all`.
    """

    dataset: Dataset | None
    batch_size: int
    partitioner: Partitioner
    respond: Callable[[Any, Any, list[Example], int], tuple[Rollout, Mapping[str, Any]]]
    metric_fns: Mapping[str, Callable[[str, str, Mapping[str, Any]], float]]

    @functools.cached_property
    def anchor_rows(self) -> list[dict[str, Any]]:
        """The anchor's answers, which stay the same: sampled once, when they are first asked for."""
        return self._answer(None)

    def measure(self, adapter: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Sample the policy's answers.

        Args:
          adapter: the policy's.

        Returns:
          Means of the policy's columns; and the rows, with the anchor's columns as `anchor_columns` names them.
        """
        if self.dataset is None:
            return {}, []
        rows = self._answer(adapter)
        return means(rows), [row | anchor_columns(old) for row, old in zip(rows, self.anchor_rows, strict=True)]

    def _answer(self, adapter: Any) -> list[dict[str, Any]]:
        assert self.dataset is not None
        respond = functools.partial(self.respond, adapter)
        return answer_all(self.dataset, self.batch_size, self.partitioner, respond, self.metric_fns)


def anchor_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the columns of an anchor's row for merging into the policy's row: sft_response, sft_score .."""
    return {f'sft_{k}': v for k, v in row.items() if k not in ('prompt', 'reference')}


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of each numeric column of the rows; the column `tokens` becomes `length`."""
    numbers = [k for k, v in rows[0].items() if isinstance(v, int | float)]
    return {'length' if k == 'tokens' else k: float(np.mean([row[k] for row in rows])) for k in numbers}
