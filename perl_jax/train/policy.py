"""The policy, by the paper's RL loop on one frozen base.

Each step:  1. a batch of prompts              2. the policy answers each K times
            3. the frozen reward judges        4. the anchor, the base itself: KL, and the reward of every token
            5. a step of the value baseline, and one of the policy (algorithms/)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from perl_jax.data import datasets, lexicon, vocabulary
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError, check_number
from perl_jax.evals import evaluate, task_metrics
from perl_jax.models import lora
from perl_jax.optim import schedules
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import scoring
from perl_jax.rewards.scoring import LearnedReward, TextFunction, TextReward
from perl_jax.rl import learner, steps
from perl_jax.rl.algorithms import Algorithm
from perl_jax.rl.kl import KLConfig
from perl_jax.rl.sampling import SamplingConfig
from perl_jax.runs import base as bases
from perl_jax.runs.base import BaseConfig
from perl_jax.train import loop
from perl_jax.train.loop import RunConfig
from perl_jax.types import PolicyState, Rollout


def train(
    run: RunConfig,
    base: BaseConfig,
    dataset: DatasetConfig,
    eval_dataset: DatasetConfig | None,
    spec: lora.LoraSpec | lora.FullSpec,
    optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
    reward: Sequence[LearnedReward | TextReward],
    sampling: SamplingConfig,
    algorithm: Algorithm,
    kl: KLConfig,
    schedule: optax.Schedule = schedules.constant,
    value_schedule: optax.Schedule = schedules.constant,
    shaping: Sequence[steps.Shaping] = (),
    entropy_bonus: float = 0.0,
    anchor_ema: float = 0.0,
    shared_base: bool = True,
    metric_fns: Mapping[str, TextFunction] | None = None,
    num_microbatches: int = 1,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Train a policy, or go on with it, in `run.model_dir`.

    Args:
      base: where the policy starts, and the anchor it is held to: an SFT run, or weights. It brings the vocabulary too.
      dataset, eval_dataset: prompts (inputs). A step takes `batch_size` prompts, K answers each (paper: 128 in all).
        Without the second no answers are measured or kept.
      spec: LoRA or full tuning, for the policy and for its value baseline (the paper: the same rank).
      reward: where scores come from; several are added up by their weights.
      sampling: how the policy answers, K times each prompt; evaluation takes one answer.
      algorithm, kl: see algorithms/ and kl.py.
      schedule, value_schedule: the share of the policy's and of the value's learning rate at each step.
      shaping: what is done to scores before they become rewards, in turn; evaluation never does it.
      entropy_bonus: weight of the policy's entropy (nats a token) in its loss.
      anchor_ema: how far the anchor follows the policy each step (WARP's mu); 0 leaves it at the base.
      shared_base: False gives policy, value, anchor and learned reward a copy of the base each, as the paper did.
      metric_fns: {name: function(prompt, response, example)} that judge evaluation answers; training never sees them.
      num_microbatches: the learning steps take their (mini)batch in so many parts, one after the other.
    """
    network, key, judges = base.network, jax.random.key(run.random_seed), scoring.functions(metric_fns)
    _check(base, spec, reward, sampling, algorithm, dataset, shared_base, anchor_ema, entropy_bonus)
    txs = _scheduled((optimizer, value_optimizer), (schedule, value_schedule), algorithm)
    with partitioner.scope():
        partitioner.check_batch(
            'BATCH_SIZE / minibatches', dataset.batch_size // algorithm.minibatches, num_microbatches
        )
        words, (dataset, eval_dataset) = vocabulary.choose((dataset, eval_dataset), base.path, run.model_dir)
        vocabulary.check_rewards([source.model_dir for source in reward if isinstance(source, LearnedReward)], words)
        stream = dataclasses.replace(
            datasets.stream(dataset, 'prompts', run.random_seed, partitioner.rows(dataset.batch_size)),
            dealt=not (algorithm.whole_batch or shaping),  # a shaping may look over a whole batch too: bucketing.py
        )
        heldout = datasets.load(eval_dataset, 'prompts') if eval_dataset else None
        lexicon.check_vocabulary(stream.vocabulary, network.config.vocab_size)
        frozen = bases.load(base, partitioner, run.random_seed)

        create = functools.partial(learner.initial, spec, txs, algorithm, kl, anchor_ema, network.config.emb_dim)
        shardings = learner.layout(jax.eval_shape(create, key, frozen.params), txs, frozen.axes, partitioner)
        state = jax.jit(create, out_shardings=shardings)(key, frozen.params)

        held, frozen = frozen.params, frozen.released()
        of = dict.fromkeys(learner.ROLES, held)
        if not shared_base:
            of |= {role: jax.tree.map(jnp.copy, held) for role in ('value', 'anchor', 'reward')}
        judge = dataclasses.replace(frozen, params=of['reward'])
        score_fn = scoring.scorer(reward, network, judge, partitioner, stream.vocabulary)
        programs = learner.compiled(
            network, txs, sampling, algorithm, kl, shaping, entropy_bonus, num_microbatches, stream.eos_ids, shardings,
            partitioner, dataset.length_buckets,
        )  # fmt: skip

        def answer(adapter: lora.Adapter | None) -> list[dict[str, Any]]:
            def respond(prompts: Any, examples: Any, i: int) -> tuple[Rollout, dict[str, Any]]:
                one = dataclasses.replace(sampling, num_samples=1)
                rollout = programs.sample(of['policy'], adapter, prompts, jax.random.fold_in(key, i), one)
                return rollout, {'score': score_fn(rollout, examples)[0]}

            return evaluate.answers(heldout, dataset.batch_size, partitioner, respond, judges)

        with loop.start('policy', run, spec.tuning, frozen, _kept(state), words) as log:
            state = _with_beta(PolicyState(**log.states), kl, shardings.beta)
            before = functools.cache(lambda: answer(None))  # the anchor's answers, to stand beside the policy's
            if heldout is not None and int(state.policy.step) == 0:
                log.evaluated(0, evaluate.means(before()))

            def measure(adapter: lora.Adapter) -> tuple[dict[str, float], list[dict[str, Any]]]:
                if heldout is None:
                    return {}, []
                rows = answer(adapter)
                pairs = zip(rows, before(), strict=True)
                return evaluate.means(rows), [row | evaluate.beside(old) for row, old in pairs]

            for step in log.steps():
                (prompts, examples), turns = stream(step), _turns(run, dataset, algorithm, step)  # 1
                rng = jax.random.fold_in(jax.random.fold_in(key, 2), step)
                policy, anchor = (of['policy'], state.policy.adapter), (of['anchor'], state.anchor)
                rollout = programs.fit(programs.sample(*policy, partitioner.batch(prompts), rng, sampling), turns)  # 2
                scores, judged = score_fn(rollout, examples)  # 3
                experience, metrics = programs.experience(policy, anchor, rollout, scores, state.beta)  # 4
                state, more = learner.learn(programs, algorithm, of, state, anchor, experience, turns, key)  # 5
                metrics |= judged | more | {'schedule/policy': schedule(step), 'schedule/value': value_schedule(step)}
                if anchor_ema:
                    state = state.replace(anchor=programs.follow(state.anchor, state.policy.adapter, anchor_ema))
                if kl.target is not None:
                    metrics['kl/beta'] = state.beta
                    state = state.replace(beta=kl.adapt(state.beta, metrics['kl/anchor'], scores.size))
                log.log(step + 1, metrics, scores.size)
                log.checkpoint(step + 1, _kept(state), functools.partial(measure, state.policy.adapter))


def _with_beta(state: PolicyState, kl: KLConfig, where: jax.sharding.Sharding) -> PolicyState:
    """A restored state with the run's own BETA, unless it is steered: then it is what it came to be."""
    return state if kl.target is not None else state.replace(beta=jax.device_put(jnp.float32(kl.beta), where))


def _kept(state: PolicyState) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {name: part for name, part in vars(state).items() if part is not None}


def _turns(run: RunConfig, dataset: DatasetConfig, algorithm: Algorithm, step: int) -> np.ndarray:
    """Which prompts each update of a step learns from."""
    return steps.turns(run.random_seed, step, dataset.batch_size, algorithm.epochs, algorithm.minibatches)


def _scheduled(
    optimizers: learner.Transformations, shares: tuple[optax.Schedule, optax.Schedule], algorithm: Algorithm
) -> learner.Transformations:
    """The optimizers of policy and value, whose schedules go by steps of the loop."""
    updates = algorithm.epochs * algorithm.minibatches
    named = zip(('OPTIMIZER', 'VALUE_OPTIMIZER'), optimizers, shares, strict=True)
    return tuple(schedules.scheduled(name, tx, schedule, updates) for name, tx, schedule in named)


def _check(
    base: BaseConfig,
    spec: lora.LoraSpec | lora.FullSpec,
    reward: Sequence[LearnedReward | TextReward],
    sampling: SamplingConfig,
    algorithm: Algorithm,
    dataset: DatasetConfig,
    shared: bool,
    anchor_ema: float,
    entropy_bonus: float,
) -> None:
    bases.check(base)
    name = type(algorithm).__name__
    if not reward:
        raise UserError('REWARD = []: name a source of reward, such as @scoring.LearnedReward()')
    if any(isinstance(source, LearnedReward) and not source.model_dir for source in reward):
        raise UserError(
            'REWARD_MODEL_DIR is not given; add --gin.REWARD_MODEL_DIR=VALUE, or a REWARD without a LearnedReward'
        )
    check_number('ANCHOR_EMA', anchor_ema, 0, 1)
    check_number('ENTROPY_BONUS', entropy_bonus)
    if sampling.temperature == 0:
        raise UserError('TEMPERATURE = 0: a policy learns from answers that are drawn; give a number above 0')
    if sampling.num_samples < algorithm.min_samples:
        raise UserError(
            f'NUM_SAMPLES = {sampling.num_samples}: {name} compares the answers to one prompt; '
            f'give at least {algorithm.min_samples}'
        )
    if dataset.batch_size % algorithm.minibatches:
        into = f'{name}.minibatches = {algorithm.minibatches}'
        raise UserError(f'BATCH_SIZE = {dataset.batch_size} does not divide into {into}')
    if not shared and spec.tuning == 'full':
        raise UserError('SHARED_BASE = False is for LoRA: with full tuning every role has its own copy already')
    task_metrics.announce(dataset, 'policy')
