"""Our own runs as judges: a policy that is asked, a reward that scores.

gin calls these with the judge's own config.gin, so that its network, base and vocabulary are those it was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from perl_jax import evaluate, infer, lora, rewards, texts
from perl_jax import vocabulary as vocabularies
from perl_jax.base import BaseConfig
from perl_jax.data import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.partitioning import Partitioner
from perl_jax.sampling import SamplingConfig, sample

GREEDY = SamplingConfig(temperature=0, max_decode_length=8)  # '1', 'Answer: 1', 'YES.'
STEP = 64  # lengths are rounded up to it, so that few shapes are compiled


def ask(
    prompts: Sequence[str],
    model_dir: str,
    base: BaseConfig,
    dataset: DatasetConfig | None = None,
    vocabulary: str | None = None,
    chat: str | None = None,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> list[str]:
    """The greedy answer of an SFT run, a policy or an imported model to each prompt, none of which is cut.

    Args:
      dataset: the run's, if it has one.
      vocabulary: what VOCABULARY would be, in place of the run's own.
      chat: the format of the model's prompts (tasks/chat.py): 'chatml', 'llama3' or 'gemma'; or 'own', the template
        that lies with its tokenizer.
    """
    found = vocabularies.named(vocabulary) if vocabulary else vocabularies.of_run(model_dir, [dataset], base.path)
    words = found.vocabulary
    if chat is not None:
        prompts = [found.format(chat)(prompt) for prompt in prompts]
    longest = 1 + max(len(words.encode(prompt)) for prompt in prompts)  # 1: BOS
    asked = texts.dataset(words, prompts, -(-longest // STEP) * STEP)
    with partitioner.scope():
        frozen, adapter = infer.bound(model_dir, 'policy', base, partitioner)
        fn = jax.jit(
            lambda params, adapter, batch: sample(
                base.network, lora.bind(params, adapter), batch, jax.random.key(0), asked.eos_ids, GREEDY
            )
        )
        params = base.network.unstack(frozen.params)  # not for each batch
        respond = lambda batch, _, i: (fn(params, adapter, batch), {})  # noqa: E731
        batch_size = dataset.batch_size if dataset else partitioner.data_parallelism
        rows = evaluate.answers(asked, batch_size, partitioner, respond, {})
    return [row['response'] for row in rows]


def score(
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    model_dir: str,
    base: BaseConfig,
    dataset: DatasetConfig | None,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> np.ndarray:
    """The logits [N, K] that a reward run gives K responses to each prompt, whose end it reads as in training."""
    if dataset is None:
        raise UserError(f"judge: '{model_dir}' names no evaluation data, and so not how long its prompts are")
    length = dataset.task_feature_lengths['inputs']
    words = vocabularies.of_run(model_dir, [dataset], base.path).vocabulary
    scored = texts.dataset(words, prompts, length, responses)
    with partitioner.scope():
        frozen, adapter = infer.bound(model_dir, 'reward', base, partitioner)
        fn = jax.jit(lambda params, adapter, batch: rewards.score(base.network, lora.bind(params, adapter), batch))
        (values,) = evaluate.scores(
            [scored], dataset.batch_size, partitioner, lambda batch: fn(frozen.params, adapter, batch)
        )
    return values
