"""The reward model: an adapter and a scalar head, trained on pairs, on thumbs, or on both at once.

Each step:  1. a batch of every task   2. the reward at each response's last token
            3. -log sigmoid(r_chosen - r_rejected) for pairs, times their weights if they have any; cross-entropy for
               thumbs; and the optimizer

An ensemble trains several adapters on one base in one program.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import PyTree

from perl_jax import sharded
from perl_jax.data import datasets, lexicon, vocabulary
from perl_jax.data.batches import bucketing
from perl_jax.data.batches.streams import common_shape
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.evals import reward_metrics, task_metrics
from perl_jax.models import lora
from perl_jax.optim import accumulate, train_state
from perl_jax.optim.accumulate import Aux
from perl_jax.optim.tuning import Tuning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import ensembles
from perl_jax.rewards.scoring import member_scores, score
from perl_jax.rl import losses
from perl_jax.runs import base as bases
from perl_jax.runs.base import BaseConfig
from perl_jax.train import loop
from perl_jax.train.loop import RunConfig
from perl_jax.types import Metrics, Responses, Thumbs, TrainState, WeightedPairs


def reward_step(
    network: nn.Module,
    tx: optax.GradientTransformation,
    base: PyTree,
    state: TrainState,
    batches: Sequence[Responses],
    rng: jax.Array,
    *,
    num_microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on the sum of the batches' mean losses. Pure.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      tx: the optimizer.
      base: the frozen parameters.
      state: of an adapter with a head.
      batches: one of each task. `Thumbs` are classified, other `Responses` are pairs, [B, 2, R] with the chosen
        response first. `WeightedPairs` are weighted in the loss, not in the accuracy.
      rng: a key of jax.random for dropout, the same at every step: the step is folded in.
      num_microbatches: microbatches whose gradients are accumulated, a divisor of every B.

    Returns:
      The next state; metrics, scalars by name: 'loss/reward' in nats, 'accuracy/pairwise' and 'accuracy/pointwise' as
      fractions.
    """
    thumbs = sum(batch.labels.size for batch in batches if isinstance(batch, Thumbs))
    pairs = sum(len(batch.inputs) for batch in batches if not isinstance(batch, Thumbs))

    def loss(adapter: lora.Adapter, microbatches: Sequence[Responses], rng: jax.Array) -> tuple[jax.Array, Aux]:
        total, variables = jnp.zeros(()), lora.bind(base, adapter, train=True)
        hits: dict[str, Any] = collections.defaultdict(int)
        for microbatch, batch in zip(microbatches, batches):
            rewards = score(network, variables, microbatch, rngs={'dropout': rng})
            if isinstance(batch, Thumbs) and isinstance(microbatch, Thumbs):
                total += losses.pointwise(rewards, microbatch.labels).sum() / batch.labels.size
                hits['accuracy/pointwise'] += ((rewards > 0) == (microbatch.labels > 0.5)).sum() / thumbs
            else:
                pair_losses = losses.pairwise(rewards)
                if isinstance(microbatch, WeightedPairs):
                    pair_losses *= microbatch.weights
                total += pair_losses.sum() / len(batch.inputs)
                hits['accuracy/pairwise'] += (rewards[:, 0] > rewards[:, 1]).sum() / pairs
        return total, Aux(sums=dict(hits), rows=())

    rng = jax.random.fold_in(rng, state.step)
    value, grads, metrics, _ = accumulate.value_and_grad(loss, state.adapter, batches, num_microbatches, rng)
    metrics |= {'loss/reward': value, 'grad_norm': optax.global_norm(grads)}
    metrics['tokens'] = sum(batch.inputs_mask.sum() + batch.targets_mask.sum() for batch in batches)
    return train_state.update(state, grads, tx), metrics


def ensemble_step(
    network: nn.Module,
    tx: optax.GradientTransformation,
    base: PyTree,
    states: Mapping[str, TrainState],
    batches: Mapping[str, Sequence[Responses]],
    rngs: Mapping[str, jax.Array],
    *,
    num_microbatches: int = 1,
) -> tuple[dict[str, TrainState], Metrics]:
    """`reward_step` of each member on its own batches, in one program.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      tx: the optimizer of all members.
      base: the frozen parameters, which they share.
      states: of each member, by role.
      batches: those of each member's step, by role.
      rngs: a key for each member's dropout, by role.
      num_microbatches: as in `reward_step`.

    Returns:
      The next states, by role; metrics, means over the members but for 'tokens', their sum.
    """
    new_states, metrics = {}, []
    for role, state in states.items():
        new_states[role], member_metrics = reward_step(
            network, tx, base, state, batches[role], rngs[role], num_microbatches=num_microbatches
        )
        metrics.append(member_metrics)
    tokens = sum(member_metrics.pop('tokens') for member_metrics in metrics)
    return new_states, jax.tree.map(lambda *x: sum(x) / len(x), *metrics) | {'tokens': tokens}


def initial(
    tuning: Tuning, width: int, head_seed: int | None, keys: Mapping[str, jax.Array], base: PyTree
) -> dict[str, TrainState]:
    """The state of each role at step 0.

    Args:
      tuning: a spec for each role, and the optimizer of all.
      width: D.
      head_seed: seed of the heads; None takes each role's own key.
      keys: a key of jax.random for each role.
      base: the frozen parameters, or their shapes.

    Returns:
      {role: TrainState}, each with a head of standard deviation 1 / sqrt(D + 1).
    """
    head, states = None if head_seed is None else jax.random.key(head_seed), {}
    for (role, key), spec in zip(keys.items(), tuning.specs, strict=True):
        states[role] = train_state.create(key, base, spec, tuning.optimizer, (width, (width + 1) ** -0.5), head)
    return states


def train(
    run: RunConfig,
    base: BaseConfig,
    dataset: DatasetConfig,
    *,
    eval_dataset: DatasetConfig | None,
    tuning: Tuning,
    best_metric: str | None = None,
    head_seed: int | None = None,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Train a reward model in `run.model_dir`, or resume. The latest and the best checkpoint are kept.

    Args:
      run: folder, length and seed of the run.
      base: weights; the policy should start from the same. It determines the vocabulary (data/vocabulary.py).
      dataset: one or several tasks of pairs or thumbs (recognised by their features), each with `batch_size` examples a
        step.
      eval_dataset: held-out examples; with None nothing is measured, and the latest checkpoint counts as the best.
      tuning: trainable parameters and optimizer. A list as its `spec` is an ensemble: rewards on one base in one
        program, each with its own seed, data order and dropout, evaluated by the mean of their scores.
      best_metric: the evaluation metric that selects the best checkpoint; None is 'pairwise_accuracy' where there are
        pairs (as in the paper), else 'auc'.
      head_seed: seed of the heads; None takes each member's own. Rewards to be averaged as in WARM must start from the
        same head, so give their runs the same number.
      partitioner: the devices and the sharding.

    Raises:
      UserError: invalid or contradictory settings, data, weights or MODEL_DIR.
    """
    network, specs = base.network, tuning.specs
    roles = ['reward'] if len(specs) == 1 else [f'reward_{i}' for i in range(len(specs))]
    seeds = [run.random_seed + 1000 * i for i in range(len(specs))]  # runs of neighbouring seeds share no member
    keys = {role: jax.random.key(seed) for role, seed in zip(roles, seeds)}
    kinds = [datasets.reward_kind(config.task_name) for config in dataset.each()]
    if eval_dataset is None and best_metric is not None:
        raise UserError(f"BEST_METRIC = '{best_metric}' is measured on EVAL_DATASET, which is None; leave one out")
    best_metric = best_metric or ('pairwise_accuracy' if 'pairs' in kinds else 'auc')
    with partitioner.scope():
        tx = tuning.tx('OPTIMIZER')
        bases.check(base)
        partitioner.check_batch('BATCH_SIZE', dataset.batch_size, tuning.num_microbatches)
        task_metrics.announce(dataset, 'reward')
        bucketing.log_shape_limit(dataset.length_buckets, 'reward')

        # The data, read with the base's own tokenizer; each member of an ensemble has its own order.
        run_vocabulary, (dataset, eval_dataset) = vocabulary.choose((dataset, eval_dataset), base.path, run.model_dir)
        make_stream = functools.partial(
            datasets.stream, rows=partitioner.rows(dataset.batch_size), groups=sharded.partitions('batch'),
            parts=tuning.num_microbatches,
        )  # fmt: skip
        streams = {
            role: [make_stream(config, kind, seed) for config, kind in zip(dataset.each(), kinds)]
            for role, seed in zip(roles, seeds)
        }
        configs = eval_dataset.each() if eval_dataset else []
        heldout = [datasets.load(config, datasets.reward_kind(config.task_name)) for config in configs]
        if heldout:
            reward_metrics.check_metric('BEST_METRIC', best_metric, heldout)
        loaded = [*(dataset for stream in streams[roles[0]] for dataset in stream.datasets), *heldout]
        lexicon.check_vocabulary(streams[roles[0]][0].vocabulary, network.config.vocab_size, loaded)

        # The frozen base and the training state; each array is created with its final sharding.
        frozen_base = bases.load(base, partitioner, run.random_seed)
        create = functools.partial(initial, tuning, network.config.emb_dim, head_seed)
        shapes = jax.eval_shape(create, keys, frozen_base.params)
        shardings = {role: partitioner.state(state, frozen_base.axes, tx) for role, state in shapes.items()}
        states = jax.jit(create, out_shardings=shardings)(keys, frozen_base.params)
        params = frozen_base.params
        if all(spec.tuning == 'full' for spec in specs):  # the states hold the weights: free the base
            params = None
        frozen_base = frozen_base.without_arrays()

        step_fn = functools.partial(ensemble_step, network, tx, num_microbatches=tuning.num_microbatches)
        step_fn = train_state.compile_step(step_fn, shardings)
        score_fn = jax.jit(functools.partial(member_scores, network))

        def measure(adapters: Sequence[lora.Adapter]) -> tuple[dict[str, float], list[dict[str, Any]]]:
            mean = lambda batch: ensembles.mean(score_fn(params, adapters, batch))  # noqa: E731
            scores = reward_metrics.scores(heldout, dataset.batch_size, partitioner, mean)
            return reward_metrics.measure(heldout, scores), []

        tunings = ' and '.join(sorted({spec.tuning for spec in specs}))
        best = best_metric if heldout else None
        with loop.start(
            'reward', run, tunings, frozen_base, states, vocabulary=run_vocabulary, best=best,
            streams=list(itertools.chain(*streams.values())),
        ) as session:  # fmt: skip
            states = session.states
            for step in session.steps():
                shape = common_shape(list(itertools.chain(*streams.values())), step)  # 1
                batches = {
                    role: [partitioner.batch(stream(step, shape)[0]) for stream in role_streams]
                    for role, role_streams in streams.items()
                }
                states, metrics = step_fn(params, states, batches, keys)  # 2, 3
                metrics = metrics | {'schedule': tuning.schedule(step)}
                session.log(step + 1, metrics, dataset.batch_size * len(kinds) * len(roles))
                adapters = [state.adapter for state in states.values()]
                session.checkpoint(step + 1, states, functools.partial(measure, adapters))
