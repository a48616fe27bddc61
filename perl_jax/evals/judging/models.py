"""Our own runs as judges: a policy that is asked, a reward that scores.

gin calls these with the judge's own config.gin, so that its network, base and vocabulary are those it was trained with.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perl_jax.data import texts
from perl_jax.data import vocabulary as vocabularies
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError, check_count
from perl_jax.evals import answering, reward_metrics
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import scoring
from perl_jax.rl.sampling import SamplingConfig, make_sampler
from perl_jax.runs.base import BaseConfig
from perl_jax.runs.bound import bound, members

Ids = Mapping[str, Any]  # prompt, response, vocabulary, ended
STEP = 64  # lengths are rounded up to it, so that few shapes are compiled


def ask(
    prompts: Sequence[str],
    model_dir: str,
    base: BaseConfig,
    dataset: DatasetConfig | None = None,
    vocabulary: str | None = None,
    chat: str | None = None,
    tokens: int = 8,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> list[str]:
    """The greedy answer of an SFT run, a policy or an imported model to each prompt, none of which is cut.

    Args:
      dataset: the run's, if it has one.
      vocabulary: what VOCABULARY would be, in place of the run's own.
      chat: the format of the model's prompts (tasks/chat.py): 'chatml', 'llama3' or 'gemma'; or 'own', the template
        that lies with its tokenizer.
      tokens: room for a reply: '1', 'Answer: 1', 'YES.' by default.
    """
    check_count('--judge_tokens', tokens)
    greedy = SamplingConfig(temperature=0, max_decode_length=tokens)
    if vocabulary is None:
        found = vocabularies.of_run(model_dir, [dataset], base.path)
    else:
        found = vocabularies.named(vocabulary)
    words = found.vocabulary
    if chat is not None:
        prompts = list(map(found.format(chat), prompts))
    longest = 1 + max(len(words.encode(prompt)) for prompt in prompts)  # 1: BOS
    asked = texts.dataset(words, prompts, -(-longest // STEP) * STEP)
    with partitioner.scope():
        frozen, adapter = bound(model_dir, 'policy', base, partitioner)
        sample_fn = make_sampler(base.network, asked.eos_ids)
        respond = lambda batch, _, i: (sample_fn(frozen.params, adapter, batch, jax.random.key(0), greedy), {})  # noqa: E731
        batch_size = dataset.batch_size if dataset else partitioner.data_parallelism
        rows = answering.answer_all(asked, batch_size, partitioner, respond, {})
    return [row['response'] for row in rows]


def score(
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    ids: Sequence[Sequence[Ids | None]],
    model_dir: str,
    base: BaseConfig,
    dataset: DatasetConfig | None,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> np.ndarray:
    """The logits that the members of a reward run give K responses to each of N prompts, as in training.

    Args:
      prompts: of them the END is read, as much as the reward was trained with.
      responses: K for each prompt.
      ids: the tokens that a run sampled (infer.answer_split), or None for a text of the task. A reward that reads with
        the same vocabulary scores these very tokens, an answer that was cut without EOS; another one reads the texts.

    Returns:
      [M, N, K] float32; M is 1 but for an ensemble.
    """
    if dataset is None:
        raise UserError(f"judge: '{model_dir}' names no evaluation data, and so not how long its prompts are")
    length = dataset.task_feature_lengths['inputs']
    words = vocabularies.of_run(model_dir, [dataset], base.path)
    alike = functools.cache(words.alike)

    def answer(text: str, own: Ids | None) -> texts.Text:
        if own is None or (own['ended'] and not alike(own['vocabulary'])):
            return text
        return own['response'] if alike(own['vocabulary']) else words.vocabulary.encode(text)

    ours = [row[0] for row in ids]
    asked = [x['prompt'] if x and alike(x['vocabulary']) else text for text, x in zip(prompts, ours, strict=True)]
    answers = [[answer(*each) for each in zip(row, x, strict=True)] for row, x in zip(responses, ids, strict=True)]
    scored = texts.dataset(words.vocabulary, asked, length, answers)
    with partitioner.scope():
        frozen, adapters = members(model_dir, base, partitioner)
        fn = jax.jit(functools.partial(scoring.member_scores, base.network))
        scores = lambda batch: jnp.moveaxis(fn(frozen.params, adapters, batch), 0, 1)  # noqa: E731 (rows come first)
        (values,) = reward_metrics.scores([scored], dataset.batch_size, partitioner, scores)
    return np.moveaxis(values, 1, 0)
