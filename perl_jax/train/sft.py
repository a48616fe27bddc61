"""Supervised fine-tuning: the demonstrations that give the anchor policy.

Each step:  1. a batch of prompts and demonstrations   2. log-probs of the demonstrations   3. -log p, and the optimizer
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from perl_jax import masked, sharded
from perl_jax.data import bucketing, datasets, lexicon, vocabulary
from perl_jax.data.datasets import DatasetConfig
from perl_jax.evals import answering, reward_metrics, task_metrics
from perl_jax.evals.answering import Answers
from perl_jax.models import lora
from perl_jax.models.logprobs import response_logprobs
from perl_jax.optim import accumulate, train_state
from perl_jax.optim.tuning import Tuning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import text_functions
from perl_jax.rl.sampling import SamplingConfig, make_sampler
from perl_jax.runs import base as bases
from perl_jax.runs.base import BaseConfig
from perl_jax.train import loop
from perl_jax.train.loop import RunConfig
from perl_jax.types import Metrics, Responses, TrainState


def sft_step(
    network: nn.Module,
    tx: optax.GradientTransformation,
    base: PyTree,
    state: TrainState,
    batch: Responses,
    rng: jax.Array,
    *,
    num_microbatches: int = 1,
    tokens: Float[Array, ' B'] | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of SFT: the mean over the target tokens of -log p.

    Pure; `rng` is for dropout and the same at every step of a run. With `tokens` (Stream.tokens_as_drawn) each row is
    divided by its own number of them in place of the batch's; the loss that is logged is the batch's mean all the same.
    """
    share = masked.share(batch.targets_mask)
    weights = share if tokens is None else batch.targets_mask / tokens[:, None, None]

    def loss(adapter: lora.Adapter, part: Any, rng: jax.Array) -> tuple[jax.Array, Any]:
        batch, share, weights = part
        variables = lora.bind(base, adapter, train=True)
        logprobs = response_logprobs(network, variables, batch, rngs={'dropout': rng})
        return -masked.weighted(logprobs, weights), ({'loss/nll': -masked.weighted(logprobs, share)}, ())

    rng, part = jax.random.fold_in(rng, state.step), (batch, share, weights)
    _, grads, metrics, _ = accumulate.value_and_grad(loss, state.adapter, part, num_microbatches, rng)
    metrics |= {'grad_norm': optax.global_norm(grads), 'tokens': batch.targets_mask.sum()}
    return train_state.update(state, grads, tx), metrics


def compiled(
    network: nn.Module, tx: optax.GradientTransformation, num_microbatches: int, shardings: TrainState
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`sft_step` as a run compiles it: the state is donated, and the next lies where it lay."""
    step = functools.partial(sft_step, network, tx, num_microbatches=num_microbatches)
    return jax.jit(step, donate_argnums=1, out_shardings=(shardings, None))


def train(
    run: RunConfig,
    base: BaseConfig,
    dataset: DatasetConfig,
    eval_dataset: DatasetConfig | None,
    answers: Answers,
    tuning: Tuning,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Run SFT, or go on with it, in `run.model_dir`.

    Args:
      run: where it goes, and how long.
      base: where it starts. All tasks are read with its tokenizer, unless they are given another: vocabulary.py.
      dataset: prompts and demonstrations (inputs, targets).
      eval_dataset: held-out ones; None measures no loss on any.
      answers: prompts that an evaluation answers, and what judges the answers.
      tuning: what is trained, and how.
      partitioner: the devices, and how arrays are split over them.

    Raises:
      UserError: settings, data, weights or a MODEL_DIR that do not go together.
    """
    network, key = base.network, jax.random.key(run.random_seed)
    judges, sampling = text_functions.functions(answers.metric_fns), answers.one_each(SamplingConfig())
    with partitioner.scope():
        bases.check(base)
        partitioner.check_batch('BATCH_SIZE', dataset.batch_size, tuning.num_microbatches)
        task_metrics.announce(dataset, 'sft')
        tx = tuning.tx('OPTIMIZER')
        bucketing.announce(dataset.length_buckets, 'sft')

        # The data, read with the base's own tokenizer: before any weight is, since they are refused sooner.
        configs = dataset, eval_dataset, answers.dataset
        words, (dataset, eval_dataset, prompts_dataset) = vocabulary.choose(configs, base.path, run.model_dir)
        split = sharded.partitions('batch'), tuning.num_microbatches
        stream = datasets.stream(dataset, 'sft', run.random_seed, partitioner.rows(dataset.batch_size), *split)
        heldout = datasets.load(eval_dataset, 'sft') if eval_dataset else None
        lexicon.check_vocabulary(stream.vocabulary, network.config.vocab_size)
        prompts = datasets.load(prompts_dataset, 'prompts') if prompts_dataset else None

        # The frozen base, and the state that is trained; each array is made where it will lie.
        frozen = bases.load(base, partitioner, run.random_seed)
        create = functools.partial(train_state.create, spec=tuning.only_spec, tx=tx)
        shardings = partitioner.state(jax.eval_shape(create, key, frozen.params), frozen.axes, tx)
        state = jax.jit(create, out_shardings=shardings)(key, frozen.params)
        params = frozen.params
        if tuning.only_spec.tuning == 'full':  # whose weights are in the state: the base need not lie there too
            params, frozen = None, frozen.released()

        step_fn = compiled(network, tx, tuning.num_microbatches, shardings)
        sample_fn = make_sampler(network, stream.eos_ids)

        @jax.jit
        def logprob_fn(params: PyTree, adapter: lora.Adapter, batch: Responses) -> jax.Array:
            return masked.total(response_logprobs(network, lora.bind(params, adapter), batch), batch.targets_mask)

        def measure(adapter: lora.Adapter) -> tuple[dict[str, float], list[dict[str, Any]]]:
            metrics, rows = {}, []
            if heldout is not None:
                score = functools.partial(logprob_fn, params, adapter)
                (total,) = reward_metrics.scores([heldout], dataset.batch_size, partitioner, score)  # [N, 1]
                metrics['nll'] = float(-total.sum() / heldout.arrays['targets_mask'].sum())
            if prompts is not None:
                respond = lambda batch, _, i: (  # noqa: E731
                    sample_fn(params, adapter, batch, jax.random.fold_in(key, i), sampling), {})  # fmt: skip
                rows = answering.answer_all(prompts, dataset.batch_size, partitioner, respond, judges)
                metrics |= answering.means(rows)
            return metrics, rows

        with loop.start('sft', run, tuning.only_spec.tuning, frozen, {'policy': state}, vocabulary=words) as log:
            state = log.states['policy']
            for step in log.steps():
                batch, tokens = partitioner.batch((stream(step)[0], stream.tokens_as_drawn(step)))  # 1
                state, metrics = step_fn(params, state, batch, key, tokens=tokens)  # 2, 3
                log.log(step + 1, metrics | {'schedule': tuning.schedule(step)}, dataset.batch_size)
                log.checkpoint(step + 1, {'policy': state}, functools.partial(measure, state.adapter))
