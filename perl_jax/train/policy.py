"""The policy, by the paper's RL loop on one frozen base.

Each step:  1. a batch of prompts              2. the policy answers each K times
            3. the frozen reward judges        4. the anchor, the base itself: KL, and the reward of every token
            5. a step of the value baseline, and one of the policy (algorithms/)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from perl_jax.data import bucketing, datasets, lexicon, vocabulary
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.evals import answering, task_metrics
from perl_jax.evals.answering import Answers
from perl_jax.models import lora
from perl_jax.optim.tuning import Tuning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import sources, text_functions
from perl_jax.rewards.sources import LearnedReward, TextReward
from perl_jax.rl import steps
from perl_jax.rl.kl import KLConfig
from perl_jax.rl.learner import learn, make_learner
from perl_jax.rl.objective import Objective
from perl_jax.runs import base as bases
from perl_jax.runs.base import BaseConfig
from perl_jax.train import loop
from perl_jax.train.loop import RunConfig
from perl_jax.types import PolicyState, Roles, Rollout


def train(
    run: RunConfig,
    base: BaseConfig,
    dataset: DatasetConfig,
    answers: Answers,
    objective: Objective,
    tuning: Tuning,
    reward: Sequence[LearnedReward | TextReward],
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Train a policy, or go on with it, in `run.model_dir`.

    Args:
      run: where it goes, and how long.
      base: where the policy starts, and the anchor it is held to: an SFT run, or weights. It brings the vocabulary too.
      dataset: prompts (inputs). A step takes `batch_size` of them, K answers each (paper: 128 in all).
      answers: the prompts that an evaluation answers, and what judges the answers; without any none is kept.
      objective: what the policy learns by.
      tuning: what of the policy is trained, and how.
      reward: where scores come from; several are added up by their weights.
      partitioner: the devices, and how arrays are split over them.

    Raises:
      UserError: settings, data, weights, rewards or a MODEL_DIR that do not go together.
    """
    network, key, judges = base.network, jax.random.key(run.random_seed), text_functions.functions(answers.metric_fns)
    _check(base, dataset, objective, tuning, reward)
    with partitioner.scope():
        minibatch = dataset.batch_size // objective.algorithm.minibatches
        partitioner.check_batch('BATCH_SIZE / minibatches', minibatch, tuning.num_microbatches)

        # The data, read with the base's own tokenizer, which has to be the rewards' too: they score its tokens.
        words, (dataset, prompts) = vocabulary.choose((dataset, answers.dataset), base.path, run.model_dir)
        vocabulary.check_rewards([source.model_dir for source in reward if isinstance(source, LearnedReward)], words)
        stream = datasets.stream(dataset, 'prompts', run.random_seed, partitioner.rows(dataset.batch_size))
        stream = dataclasses.replace(stream, dealt=objective.takes_prompts_apart)  # by length: bucketing.py
        heldout = datasets.load(prompts, 'prompts') if prompts else None
        lexicon.check_vocabulary(stream.vocabulary, network.config.vocab_size)

        # One frozen base under four roles. What learns is compiled for it, and the state made where it will lie.
        frozen = bases.load(base, partitioner, run.random_seed)
        learner = make_learner(
            network=network, objective=objective, tuning=tuning, eos_ids=stream.eos_ids, partitioner=partitioner,
            length_buckets=dataset.length_buckets,
        )  # fmt: skip
        state = learner.init(key, frozen.params)
        params, frozen = frozen.params, frozen.released()
        roles = Roles.sharing(params) if base.shared else Roles.copies(params, _copy)

        # The reward stays as it is.
        judge = dataclasses.replace(frozen, params=roles.reward)
        score_fn = sources.scorer(reward, network, judge, partitioner, stream.vocabulary)

        def answer(adapter: lora.Adapter | None) -> list[dict[str, Any]]:
            assert heldout is not None
            sampling = answers.one_each(objective.sampling)

            def respond(prompts: Any, examples: Any, i: int) -> tuple[Rollout, dict[str, Any]]:
                rollout = learner.sample(roles.policy, adapter, prompts, jax.random.fold_in(key, i), sampling)
                return rollout, {'score': score_fn(rollout, examples)[0]}

            return answering.answer_all(heldout, dataset.batch_size, partitioner, respond, judges)

        with loop.start('policy', run, tuning.only_spec.tuning, frozen, _saved(state), vocabulary=words) as log:
            state = _with_beta(PolicyState(**log.states), objective.kl, learner.shardings.beta)
            before = functools.cache(lambda: answer(None))  # the anchor's answers, to stand beside the policy's
            if heldout is not None and int(state.policy.step) == 0:
                log.evaluated(0, answering.means(before()))

            def measure(adapter: lora.Adapter) -> tuple[dict[str, float], list[dict[str, Any]]]:
                if heldout is None:
                    return {}, []
                rows = answer(adapter)
                pairs = zip(rows, before(), strict=True)
                return answering.means(rows), [row | answering.beside(old) for row, old in pairs]

            for step in log.steps():
                (prompts, examples), rng = stream(step), jax.random.fold_in(jax.random.fold_in(key, 2), step)  # 1
                turns = steps.turns(objective, dataset.batch_size, run.random_seed, step)
                policy, anchor = (roles.policy, state.policy.adapter), (roles.anchor, state.anchor)
                rollout = learner.sample(*policy, partitioner.batch(prompts), rng, objective.sampling)  # 2
                rollout = learner.fit(rollout, turns)
                scores, judged = score_fn(rollout, examples)  # 3
                experience, metrics = learner.experience(  # 4
                    policy=policy, anchor=anchor, rollout=rollout, scores=scores, beta=state.beta
                )
                state, more = learn(learner, roles, state, experience, turns, key)  # 5
                metrics |= judged | more | _schedules(objective, tuning, step)
                if objective.anchor_ema:
                    state = state.replace(anchor=learner.follow(state.anchor, state.policy.adapter))
                if objective.kl.target is not None:
                    metrics['kl/beta'] = state.beta
                    state = state.replace(beta=objective.kl.adapt(state.beta, metrics['kl/anchor'], scores.size))
                log.log(step + 1, metrics, scores.size)
                log.checkpoint(step + 1, _saved(state), functools.partial(measure, state.policy.adapter))


def _copy(params: Any) -> Any:
    return jax.tree.map(jnp.copy, params)


def _with_beta(state: PolicyState, kl: KLConfig, where: Any) -> PolicyState:
    """A restored state with the run's own BETA, unless it is steered: then it is what it came to be."""
    return state if kl.target is not None else state.replace(beta=jax.device_put(jnp.float32(kl.beta), where))


def _saved(state: PolicyState) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {name: part for name, part in vars(state).items() if part is not None}


def _schedules(objective: Objective, tuning: Tuning, step: int) -> dict[str, Any]:
    shares = {'schedule/policy': tuning.schedule(step)}
    return shares | ({'schedule/value': objective.value.schedule(step)} if objective.value else {})


def _check(
    base: BaseConfig,
    dataset: DatasetConfig,
    objective: Objective,
    tuning: Tuning,
    reward: Sequence[LearnedReward | TextReward],
) -> None:
    bases.check(base)
    tuning.tx('OPTIMIZER', objective.updates)  # refused before anything is read
    if objective.value is not None:
        objective.value.tx('VALUE_OPTIMIZER', objective.updates)
    if not reward:
        raise UserError('REWARD = []: name a source of reward, such as @rewards.LearnedReward()')
    if any(isinstance(source, LearnedReward) and not source.model_dir for source in reward):
        raise UserError(
            'REWARD_MODEL_DIR is not given; add --gin.REWARD_MODEL_DIR=VALUE, or a REWARD without a LearnedReward'
        )
    if dataset.batch_size % objective.algorithm.minibatches:
        into = f'{type(objective.algorithm).__name__}.minibatches = {objective.algorithm.minibatches}'
        raise UserError(f'BATCH_SIZE = {dataset.batch_size} does not divide into {into}')
    if not base.shared and tuning.only_spec.tuning == 'full':
        raise UserError('SHARED_BASE = False is for LoRA: with full tuning every role has its own copy already')
    task_metrics.announce(dataset, 'policy')
    bucketing.announce(dataset.length_buckets, 'policy')
