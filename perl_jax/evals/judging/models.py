"""perl_jax runs as judges: a language model that replies, or a reward that scores.

gin calls these functions with the judge's config.gin, so that network, base and vocabulary match its training.
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
from perl_jax.errors import UserError
from perl_jax.evals import answering, reward_metrics
from perl_jax.evals.judging.replies import CUT
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import scoring
from perl_jax.rl.sampling import SamplingConfig, make_sampler
from perl_jax.runs.base import BaseConfig
from perl_jax.runs.bound import load_members, load_role

Ids = Mapping[str, Any]  # prompt, response, vocabulary, ended
STEP = 64  # lengths are rounded up to a multiple of it, so that few shapes are compiled


def ask(
    prompts: Sequence[str],
    model_dir: str,
    base: BaseConfig,
    dataset: DatasetConfig | None = None,
    *,
    vocabulary: str | None = None,
    chat: str | None = None,
    tokens: int = 8,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> list[str]:
    """Return the greedy reply of an SFT run, a policy or an imported model to each prompt; prompts are never truncated.

    A reply without EOS within `tokens` ends with replies.CUT.

    Args:
      prompts: the texts.
      model_dir: the MODEL_DIR of the run.
      base: the base of the run.
      dataset: the run's dataset, if it has one.
      vocabulary: a value of VOCABULARY that replaces the run's.
      chat: the chat format of the model's prompts (tasks/chat.py): 'chatml', 'llama3' or 'gemma'; or 'own', the
        template of its tokenizer.
      tokens: the maximum length of a reply; the default suffices for '1', 'Answer: 1' or 'YES.'.
      partitioner: the devices.
    """
    greedy = SamplingConfig(temperature=0, max_decode_length=tokens)
    if vocabulary is None:
        run_vocabulary = vocabularies.of_run(model_dir, [dataset], base.path)
    else:
        run_vocabulary = vocabularies.from_name(vocabulary)
    tokenizer = run_vocabulary.vocabulary
    if chat is not None:
        prompts = list(map(run_vocabulary.format(chat), prompts))
    max_length = 1 + max(len(tokenizer.encode(prompt)) for prompt in prompts)  # 1: BOS
    prompt_dataset = texts.dataset(tokenizer, prompts, -(-max_length // STEP) * STEP)
    with partitioner.scope():
        frozen_base, adapter = load_role(model_dir, 'policy', base, partitioner)
        sample_fn = make_sampler(base.network, prompt_dataset.eos_ids)
        respond = lambda batch, _, i: (sample_fn(frozen_base.params, adapter, batch, jax.random.key(0), greedy), {})  # noqa: E731
        batch_size = dataset.batch_size if dataset else partitioner.data_parallel_size
        rows = answering.answer_all(prompt_dataset, batch_size, partitioner, respond, {}, include_token_ids=True)
    eos_ids = prompt_dataset.eos_ids
    return [row['response'] + ('' if row['ids']['response'][-1] in eos_ids else CUT) for row in rows]


def score(
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    ids: Sequence[Sequence[Ids | None]],
    model_dir: str,
    base: BaseConfig,
    dataset: DatasetConfig | None,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> np.ndarray:
    """Score K responses to each prompt by the members of a reward run, as in training.

    Args:
      prompts: the texts; their START is cut off where they exceed the prompt length of the reward's training.
      responses: K texts for each prompt.
      ids: for each response the token ids that a run sampled (infer.answer_split), or None for a text of the task. A
        reward with the same vocabulary scores these tokens, a truncated answer without EOS; others tokenize the texts.
      model_dir: the MODEL_DIR of the reward run.
      base: the base of the run.
      dataset: the run's evaluation dataset, which specifies the prompt length.
      partitioner: the devices.

    Returns:
      Logits, float32 [M, rows, K]; M is 1 unless the run is an ensemble.
    """
    if dataset is None:
        raise UserError(
            f"judge: '{model_dir}' has no evaluation data, which specify the prompt length; add --gin.EVAL_DATASET"
        )
    prompt_length = dataset.task_feature_lengths['inputs']
    run_vocabulary = vocabularies.of_run(model_dir, [dataset], base.path)
    is_same_vocabulary = functools.cache(run_vocabulary.has_same_tokens)

    def response_text(text: str, sampled: Ids | None) -> texts.Text:
        if sampled is None or (sampled['ended'] and not is_same_vocabulary(sampled['vocabulary'])):
            return text
        return (
            sampled['response'] if is_same_vocabulary(sampled['vocabulary']) else run_vocabulary.vocabulary.encode(text)
        )

    first_ids = [row[0] for row in ids]
    prompt_texts = [
        x['prompt'] if x and is_same_vocabulary(x['vocabulary']) else text
        for text, x in zip(prompts, first_ids, strict=True)
    ]
    answers = [
        [response_text(*each) for each in zip(row, x, strict=True)] for row, x in zip(responses, ids, strict=True)
    ]
    response_dataset = texts.dataset(run_vocabulary.vocabulary, prompt_texts, prompt_length, answers)
    with partitioner.scope():
        frozen_base, adapters = load_members(model_dir, base, partitioner)
        score_fn = jax.jit(functools.partial(scoring.member_scores, base.network))
        batch_scores = lambda batch: jnp.moveaxis(score_fn(frozen_base.params, adapters, batch), 0, 1)  # noqa: E731 (rows come first)
        (values,) = reward_metrics.scores([response_dataset], dataset.batch_size, partitioner, batch_scores)
    return np.moveaxis(values, 1, 0)
