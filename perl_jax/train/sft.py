"""Supervised fine-tuning on demonstrations, which gives the anchor policy.

Each step:  1. a batch of prompts and demonstrations   2. log-probs of the demonstrations   3. -log p, and the optimizer
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from perl_jax import masked, sharded
from perl_jax.data import datasets, lexicon, vocabulary
from perl_jax.data.batches import bucketing
from perl_jax.data.datasets import DatasetConfig
from perl_jax.evals import answering, reward_metrics, task_metrics
from perl_jax.evals.answering import Answers
from perl_jax.models import lora
from perl_jax.models.logprobs import response_logprobs
from perl_jax.optim import accumulate, train_state
from perl_jax.optim.accumulate import Aux
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
    """One optimizer step of SFT on the mean of -log p over target tokens. Pure.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      tx: the optimizer.
      base: the frozen parameters.
      state: of the adapter that is trained.
      batch: prompts and demonstrations, K = 1.
      rng: a key of jax.random for dropout, the same at every step: the step is folded in.
      num_microbatches: microbatches whose gradients are accumulated, a divisor of B.
      tokens: float32 [B] (Stream.tokens_as_drawn): each row is divided by its own number of tokens instead of the
        batch's. The logged loss is the batch's mean in both cases.

    Returns:
      The next state; metrics, scalars by name: 'loss/nll' in nats a token.
    """
    share = masked.share(batch.targets_mask)
    weights = share if tokens is None else batch.targets_mask / tokens[:, None, None]
    arrays = batch, share, weights

    def loss(
        adapter: lora.Adapter, arrays: tuple[Responses, jax.Array, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, Aux]:
        batch, share, weights = arrays
        variables = lora.bind(base, adapter, train=True)
        logprobs = response_logprobs(network, variables, batch, rngs={'dropout': rng})
        return -masked.weighted(logprobs, weights), Aux({'loss/nll': -masked.weighted(logprobs, share)}, rows=())

    rng = jax.random.fold_in(rng, state.step)
    _, grads, metrics, _ = accumulate.value_and_grad(loss, state.adapter, arrays, num_microbatches, rng)
    metrics |= {'grad_norm': optax.global_norm(grads), 'tokens': batch.targets_mask.sum()}
    return train_state.update(state, grads, tx), metrics


def train(
    run: RunConfig,
    base: BaseConfig,
    dataset: DatasetConfig,
    *,
    eval_dataset: DatasetConfig | None,
    answers: Answers,
    tuning: Tuning,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Run SFT in `run.model_dir`, or resume.

    Args:
      run: folder, length and seed of the run.
      base: initial weights. Their tokenizer reads all tasks, unless VOCABULARY names another (data/vocabulary.py).
      dataset: prompts and demonstrations (inputs, targets).
      eval_dataset: held-out examples; with None no held-out loss is measured.
      answers: prompts that each evaluation answers, and metrics of the answers.
      tuning: trainable parameters and optimizer.
      partitioner: the devices and the sharding.

    Raises:
      UserError: invalid or contradictory settings, data, weights or MODEL_DIR.
    """
    network, key = base.network, jax.random.key(run.random_seed)
    metric_fns = text_functions.resolve_functions(answers.metric_fns)
    sampling = answers.sampling_config(SamplingConfig())
    with partitioner.scope():
        tx = tuning.tx('OPTIMIZER')
        bases.check(base)
        partitioner.check_batch('BATCH_SIZE', dataset.batch_size, tuning.num_microbatches)
        task_metrics.announce(dataset, 'sft')
        bucketing.log_shape_limit(dataset.length_buckets, 'sft')

        # The data, read with the base's own tokenizer, before the weights: errors in them are found sooner.
        configs = dataset, eval_dataset, answers.dataset
        run_vocabulary, (dataset, eval_dataset, prompts_dataset) = vocabulary.choose(configs, base.path, run.model_dir)
        stream = datasets.stream(
            dataset, 'sft', run.random_seed, partitioner.rows(dataset.batch_size), groups=sharded.partitions('batch'),
            parts=tuning.num_microbatches,
        )  # fmt: skip
        heldout = datasets.load(eval_dataset, 'sft') if eval_dataset else None
        prompts = datasets.load(prompts_dataset, 'prompts') if prompts_dataset else None
        loaded = *stream.datasets, heldout, prompts
        lexicon.check_vocabulary(stream.vocabulary, network.config.vocab_size, loaded)

        # The frozen base and the training state; each array is created with its final sharding.
        frozen_base = bases.load(base, partitioner, run.random_seed)
        create = functools.partial(train_state.create, spec=tuning.only_spec, tx=tx)
        shardings = partitioner.state(jax.eval_shape(create, key, frozen_base.params), frozen_base.axes, tx)
        state = jax.jit(create, out_shardings=shardings)(key, frozen_base.params)
        params = frozen_base.params
        if tuning.only_spec.tuning == 'full':  # the state holds the weights: free the base
            params, frozen_base = None, frozen_base.without_arrays()

        step_fn = functools.partial(sft_step, network, tx, num_microbatches=tuning.num_microbatches)
        step_fn = train_state.compile_step(step_fn, shardings)
        sample_fn = make_sampler(network, stream.eos_ids)

        @jax.jit
        def logprob_fn(params: PyTree, adapter: lora.Adapter, batch: Responses) -> jax.Array:
            return masked.total(response_logprobs(network, lora.bind(params, adapter), batch), batch.targets_mask)

        def measure(adapter: lora.Adapter) -> tuple[dict[str, float], list[dict[str, Any]]]:
            metrics, rows = {}, []
            if heldout is not None:
                score = functools.partial(logprob_fn, params, adapter)
                (total,) = reward_metrics.scores([heldout], dataset.batch_size, partitioner, score)  # [rows, 1]
                metrics['nll'] = float(-total.sum() / heldout.arrays['targets_mask'].sum())
            if prompts is not None:
                respond = lambda batch, _, i: (  # noqa: E731
                    sample_fn(params, adapter, batch, jax.random.fold_in(key, i), sampling), {})  # fmt: skip
                rows = answering.answer_all(prompts, dataset.batch_size, partitioner, respond, metric_fns)
                metrics |= answering.means(rows)
            return metrics, rows

        with loop.start(
            'sft', run, tuning.only_spec.tuning, frozen_base, {'policy': state}, vocabulary=run_vocabulary,
            streams=[stream],
        ) as session:  # fmt: skip
            state = session.states['policy']
            for step in session.steps():
                batch, tokens = partitioner.batch((stream(step)[0], stream.tokens_as_drawn(step)))  # 1
                state, metrics = step_fn(params, state, batch, key, tokens=tokens)  # 2, 3
                session.log(step + 1, metrics | {'schedule': tuning.schedule(step)}, dataset.batch_size)
                session.checkpoint(step + 1, {'policy': state}, functools.partial(measure, state.adapter))
