"""The reward model: an adapter and a scalar head that learn from pairs, from thumbs, or from both at once.

Each step:  1. a batch of every task   2. the reward at each response's last token
            3. -log sigmoid(r_chosen - r_rejected) for pairs, times their weight if they have one, cross-entropy for
               thumbs, and the optimizer

Several adapters may be trained side by side on the one base, an ensemble.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import PyTree

from perl_jax import sharded
from perl_jax.data import bucketing, datasets, lexicon, vocabulary
from perl_jax.data.datasets import DatasetConfig
from perl_jax.data.streams import alike
from perl_jax.errors import UserError
from perl_jax.evals import reward_metrics, task_metrics
from perl_jax.models import lora
from perl_jax.optim import accumulate, train_state
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
    """One step on the sum of the batches' mean losses: `Thumbs` are classified, other `Responses` are pairs. Pure.

    `WeightedPairs` count in the loss by their weights, and in the accuracy alike.
    """

    thumbs = sum(batch.labels.size for batch in batches if isinstance(batch, Thumbs))
    pairs = sum(len(batch.inputs) for batch in batches if not isinstance(batch, Thumbs))

    def loss(adapter: lora.Adapter, parts: Sequence[Responses], rng: jax.Array) -> tuple[jax.Array, Any]:
        total, variables = jnp.zeros(()), lora.bind(base, adapter, train=True)
        hits: dict[str, Any] = collections.defaultdict(int)
        for part, batch in zip(parts, batches):
            rewards = score(network, variables, part, rngs={'dropout': rng})
            if isinstance(batch, Thumbs) and isinstance(part, Thumbs):
                total += losses.pointwise(rewards, part.labels).sum() / batch.labels.size
                hits['accuracy/pointwise'] += ((rewards > 0) == (part.labels > 0.5)).sum() / thumbs
            else:
                each = losses.pairwise(rewards)
                each = each * part.weights if isinstance(part, WeightedPairs) else each
                total += each.sum() / len(batch.inputs)
                hits['accuracy/pairwise'] += (rewards[:, 0] > rewards[:, 1]).sum() / pairs
        return total, (dict(hits), ())

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
    """`reward_step` of each member, on its own batches: one program, one base. The metrics are the members' means."""
    after, metrics = {}, []
    for role, state in states.items():
        after[role], each = reward_step(
            network, tx, base, state, batches[role], rngs[role], num_microbatches=num_microbatches
        )
        metrics.append(each)
    tokens = sum(each.pop('tokens') for each in metrics)
    return after, jax.tree.map(lambda *x: sum(x) / len(x), *metrics) | {'tokens': tokens}


def initial(
    tuning: Tuning, width: int, head_seed: int | None, keys: Mapping[str, jax.Array], base: PyTree
) -> dict[str, TrainState]:
    """Each role of `keys` at step 0, by its own spec; `width` is D."""
    head, states = None if head_seed is None else jax.random.key(head_seed), {}
    for (role, key), spec in zip(keys.items(), tuning.specs, strict=True):
        states[role] = train_state.create(key, base, spec, tuning.optimizer, (width, (width + 1) ** -0.5), head)
    return states


def compiled(
    network: nn.Module,
    tx: optax.GradientTransformation,
    num_microbatches: int,
    shardings: Mapping[str, TrainState],
) -> Callable[..., tuple[dict[str, TrainState], Metrics]]:
    """`ensemble_step` as a run compiles it: the states are donated, and the next lie where they lay."""
    step = functools.partial(ensemble_step, network, tx, num_microbatches=num_microbatches)
    return jax.jit(step, donate_argnums=1, out_shardings=(shardings, None))


def train(
    run: RunConfig,
    base: BaseConfig,
    dataset: DatasetConfig,
    eval_dataset: DatasetConfig | None,
    tuning: Tuning,
    best_metric: str | None = None,
    head_seed: int | None = None,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Train a reward, or go on with it, in `run.model_dir`; the best checkpoint is kept beside the latest.

    Args:
      run: where it goes, and how long.
      base: the policy should start from the same one. It brings the vocabulary: vocabulary.py.
      dataset: tasks with pairs or thumbs (their features tell), one or several that are learned together, each with
        `batch_size` examples a step.
      eval_dataset: held-out ones; None measures nothing, and the latest checkpoint is the best.
      tuning: what is trained, and how. Its `spec` may be a list, an ensemble of rewards that share the base and the
        program, each with its own seed, order of the data and dropout. It is measured by the mean of its members.
      best_metric: the evaluation metric that chooses the best checkpoint; None is 'pairwise_accuracy' where there are
        pairs (as in the paper), else 'auc'.
      head_seed: where heads start; None takes each member's own seed. Rewards that are to be averaged as in WARM have
        to start from one head, here and in other runs: give them the same number.
      partitioner: the devices, and how arrays are split over them.

    Raises:
      UserError: settings, data, weights or a MODEL_DIR that do not go together.
    """
    network, specs = base.network, tuning.specs
    roles = ['reward'] if len(specs) == 1 else [f'reward_{i}' for i in range(len(specs))]
    seeds = [run.random_seed + 1000 * i for i in range(len(specs))]  # so that neighbouring seeds share no member
    keys = {role: jax.random.key(seed) for role, seed in zip(roles, seeds)}
    kinds = [datasets.reward_kind(config.task_name) for config in dataset.each()]
    if eval_dataset is None and best_metric is not None:
        raise UserError(f"BEST_METRIC = '{best_metric}' is measured on EVAL_DATASET, which is None; leave one out")
    best_metric = best_metric or ('pairwise_accuracy' if 'pairs' in kinds else 'auc')
    with partitioner.scope():
        bases.check(base)
        partitioner.check_batch('BATCH_SIZE', dataset.batch_size, tuning.num_microbatches)
        task_metrics.announce(dataset, 'reward')
        tx = tuning.tx('OPTIMIZER')
        bucketing.announce(dataset.length_buckets, 'reward')

        # The data, read with the base's own tokenizer; each member of an ensemble has its own order of them.
        words, (dataset, eval_dataset) = vocabulary.choose((dataset, eval_dataset), base.path, run.model_dir)
        rows, split = partitioner.rows(dataset.batch_size), (sharded.partitions('batch'), tuning.num_microbatches)
        streams = {
            role: [datasets.stream(config, kind, seed, rows, *split) for config, kind in zip(dataset.each(), kinds)]
            for role, seed in zip(roles, seeds)
        }
        configs = eval_dataset.each() if eval_dataset else []
        heldout = [datasets.load(config, datasets.reward_kind(config.task_name)) for config in configs]
        if heldout:
            reward_metrics.check_metric('BEST_METRIC', best_metric, heldout)
        lexicon.check_vocabulary(streams[roles[0]][0].vocabulary, network.config.vocab_size)

        # The frozen base, and the state that is trained; each array is made where it will lie.
        frozen = bases.load(base, partitioner, run.random_seed)
        create = functools.partial(initial, tuning, network.config.emb_dim, head_seed)
        shapes = jax.eval_shape(create, keys, frozen.params)
        shardings = {role: partitioner.state(state, frozen.axes, tx) for role, state in shapes.items()}
        states = jax.jit(create, out_shardings=shardings)(keys, frozen.params)
        full = all(spec.tuning == 'full' for spec in specs)  # whose weights are in the states
        params, frozen = None if full else frozen.params, frozen.released()

        step_fn = compiled(network, tx, tuning.num_microbatches, shardings)
        score_fn = jax.jit(functools.partial(member_scores, network))

        def measure(adapters: Sequence[lora.Adapter]) -> tuple[dict[str, float], list[dict[str, Any]]]:
            mean = lambda batch: ensembles.mean(score_fn(params, adapters, batch))  # noqa: E731
            scores = reward_metrics.scores(heldout, dataset.batch_size, partitioner, mean)
            return reward_metrics.measure(heldout, scores), []

        tunings = ' and '.join(sorted({spec.tuning for spec in specs}))
        best = best_metric if heldout else None
        with loop.start('reward', run, tunings, frozen, states, vocabulary=words, best=best) as log:
            states = log.states
            for step in log.steps():
                shape = alike([stream for each in streams.values() for stream in each], step)  # 1
                batches = {
                    role: [partitioner.batch(stream(step, shape)[0]) for stream in each]
                    for role, each in streams.items()
                }
                states, metrics = step_fn(params, states, batches, keys)  # 2, 3
                metrics = metrics | {'schedule': tuning.schedule(step)}
                log.log(step + 1, metrics, dataset.batch_size * len(kinds) * len(roles))
                adapters = [state.adapter for state in states.values()]
                log.checkpoint(step + 1, states, functools.partial(measure, adapters))
