"""One sampled answer to each prompt of a data set, and what it is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.data.datasets import Dataset, DatasetConfig, Example, decode
from perl_jax.parallel import partitioning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards.text_functions import TextFunction
from perl_jax.rl.sampling import SamplingConfig
from perl_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class Answers:
    """Which prompts a run answers at its evaluations, one answer each, and what judges them.

    Attributes:
      dataset: the prompts; None answers none.
      sampling: how; None is as the policy samples while it learns, or SamplingConfig's defaults.
      metric_fns: {name: function(prompt, response, example)}; training never sees them.
    """

    dataset: DatasetConfig | None = None
    sampling: SamplingConfig | None = None
    metric_fns: Mapping[str, TextFunction] | None = None

    def one_each(self, default: SamplingConfig) -> SamplingConfig:
        """How one answer is drawn."""
        return dataclasses.replace(self.sampling or default, num_samples=1)


def answer_all(
    dataset: Dataset,
    batch_size: int,
    partitioner: Partitioner,
    respond: Callable[[Any, list[Example], int], tuple[Rollout, Mapping[str, Any]]],
    functions: Mapping[str, Callable[[str, str, Mapping[str, Any]], float]],
    ids: bool = False,
) -> list[dict[str, Any]]:
    """One sampled answer to each prompt of a dataset, as rows for samples.jsonl.

    `respond(prompts, examples, i)` answers batch number i and may give scores [B, K] and the like beside the rollout
    (the examples are this process's); `functions` judge the text. A row holds prompt, response, tokens, whatever was
    given, and the task's `reference`; with `ids` also the tokens of both, {'prompt': .., 'response': ..}.
    """
    rows = []
    for i, (batch, mine, _) in enumerate(dataset.batches(batch_size, partitioner.rows(batch_size))):
        rollout, given = partitioning.gather(respond(partitioner.batch(batch), mine, i))
        responses, lengths = decode(dataset.vocabulary, rollout), rollout.targets_mask.sum(-1)
        for b, example in enumerate(dataset.examples[i * batch_size : (i + 1) * batch_size]):
            prompt, response = example['inputs_pretokenized'], responses[b][0]
            row = {'prompt': prompt, 'response': response, 'tokens': int(lengths[b, 0])}
            row |= {k: float(v[b, 0]) for k, v in given.items()}
            row |= {k: float(f(prompt, response, example)) for k, f in functions.items()}
            row |= {'reference': example['reference']} if 'reference' in example else {}
            if ids:
                row['ids'] = {
                    'prompt': rollout.inputs[b][rollout.inputs_mask[b]].tolist(),
                    'response': rollout.targets[b, 0][rollout.targets_mask[b, 0]].tolist(),
                }
            rows.append(row)
    return rows


def beside(row: Mapping[str, Any]) -> dict[str, Any]:
    """The anchor's answer to the same prompt, named to go beside the policy's own: sft_response, sft_score .."""
    return {f'sft_{k}': v for k, v in row.items() if k not in ('prompt', 'reference')}


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of everything that is a number in the rows; tokens are called length."""
    numbers = [k for k, v in rows[0].items() if isinstance(v, int | float)]
    return {'length' if k == 'tokens' else k: float(np.mean([row[k] for row in rows])) for k in numbers}


