"""The reward model: an adapter and a scalar head that learn from pairs, from thumbs, or from both at once.

Each step:  1. a batch of every task   2. the reward at each response's last token
            3. -log sigmoid(r_chosen - r_rejected) for pairs, cross-entropy for thumbs, and the optimizer
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import linen as nn
from jaxtyping import PyTree

from perl_jax import base as bases
from perl_jax import data, evaluate, lora, losses, runs, train_state
from perl_jax.base import BaseConfig
from perl_jax.data import DatasetConfig
from perl_jax.partitioning import Partitioner
from perl_jax.rewards import score
from perl_jax.runs import RunConfig
from perl_jax.types import Metrics, Responses, Thumbs, TrainState


def reward_step(
    network: nn.Module,
    tx: optax.GradientTransformation,
    base: PyTree,
    state: TrainState,
    batches: Sequence[Responses],
    rng: jax.Array,
) -> tuple[TrainState, Metrics]:
    """One step on the sum of the batches' losses: `Thumbs` are classified, other `Responses` are pairs. Pure."""
    rngs = {'dropout': jax.random.fold_in(rng, state.step)}

    def loss(adapter: lora.Adapter) -> tuple[jax.Array, Metrics]:
        total, metrics, variables = 0.0, {}, lora.bind(base, adapter, train=True)
        for batch in batches:
            rewards = score(network, variables, batch, rngs=rngs)
            if isinstance(batch, Thumbs):
                total += losses.pointwise(rewards, batch.labels)
                metrics['accuracy/pointwise'] = ((rewards > 0) == (batch.labels == 1)).mean()
            else:
                total += losses.pairwise(rewards)
                metrics['accuracy/pairwise'] = (rewards[:, 0] > rewards[:, 1]).mean()
        return total, metrics

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.adapter)
    metrics |= {'loss/reward': value, 'grad_norm': optax.global_norm(grads)}
    metrics['tokens'] = sum(batch.inputs_mask.sum() + batch.targets_mask.sum() for batch in batches)
    return train_state.update(state, grads, tx), metrics


def train(
    run: RunConfig,
    base: BaseConfig,
    dataset: DatasetConfig,
    eval_dataset: DatasetConfig,
    spec: lora.LoraSpec | lora.FullSpec,
    optimizer: optax.GradientTransformation,
    best_metric: str | None = None,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Train a reward, or go on with it, in `run.model_dir`; the best checkpoint is kept beside the latest.

    Args:
      base: the policy should start from the same one.
      dataset, eval_dataset: tasks with pairs or thumbs (their features tell), one or several that are learned together,
        each with `batch_size` examples a step.
      best_metric: the evaluation metric that chooses the best checkpoint; None is 'pairwise_accuracy' where there are
        pairs (as in the paper), else 'auc'.
    """
    network, key, width = base.network, jax.random.key(run.random_seed), base.network.config.emb_dim
    kinds = [data.reward_kind(config.mixture_or_task_name) for config in dataset.each()]
    best_metric = best_metric or ('pairwise_accuracy' if 'pairs' in kinds else 'auc')
    with partitioner.scope():
        partitioner.check_batch('BATCH_SIZE', dataset.batch_size)
        streams = [data.stream(config, kind, run.random_seed) for config, kind in zip(dataset.each(), kinds)]
        heldout = [data.load(config, data.reward_kind(config.mixture_or_task_name)) for config in eval_dataset.each()]
        data.check_vocabulary(heldout[0].vocabulary, network.config.vocab_size)
        frozen = bases.load(base, partitioner, run.random_seed)

        create = functools.partial(train_state.create, spec=spec, tx=optimizer, head=(width, (width + 1) ** -0.5))
        shardings = partitioner.state(jax.eval_shape(create, key, frozen.params), frozen.axes, optimizer)
        state = jax.jit(create, out_shardings=shardings)(key, frozen.params)
        step_fn = jax.jit(
            functools.partial(reward_step, network, optimizer), donate_argnums=1, out_shardings=(shardings, None)
        )
        score_fn = jax.jit(lambda params, adapter, batch: score(network, lora.bind(params, adapter), batch))

        def measure(adapter: lora.Adapter) -> tuple[dict[str, float], list[dict[str, Any]]]:
            one = functools.partial(score_fn, frozen.params, adapter)
            return evaluate.reward_metrics(heldout, evaluate.scores(heldout, dataset.batch_size, partitioner, one)), []

        with runs.start('reward', run, spec, frozen, {'reward': state}, best_metric) as log:
            state = log.states['reward']
            for step in log.steps():
                batches = [partitioner.batch(stream(step)[0]) for stream in streams]  # 1
                state, metrics = step_fn(frozen.params, state, batches, key)  # 2, 3
                log.log(step + 1, metrics, dataset.batch_size * len(batches))
                if log.is_due(step + 1):
                    log.checkpoint(step + 1, {'reward': state}, functools.partial(measure, state.adapter))
