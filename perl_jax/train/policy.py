"""The policy, trained by the paper's RL loop on one frozen base.

Each step:  1. a batch of prompts              2. K responses to each, sampled from the policy
            3. scores by the frozen reward     4. KL to the anchor (the base itself), and the rewards of all tokens
            5. a step of the value baseline, and one of the policy (rl/algorithms/)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from perl_jax.data import datasets, lexicon, vocabulary
from perl_jax.data.batches import bucketing
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
from perl_jax.rl.learner import ROLLOUT_KEY, Learner, learn, make_learner
from perl_jax.rl.objective import Objective
from perl_jax.runs import base as bases
from perl_jax.runs.base import Base, BaseConfig
from perl_jax.train import loop
from perl_jax.train.loop import RunConfig
from perl_jax.types import PolicyState, Roles, Rollout


def train(
    run: RunConfig,
    base: BaseConfig,
    dataset: DatasetConfig,
    *,
    answers: Answers,
    objective: Objective,
    tuning: Tuning,
    reward: Sequence[LearnedReward | TextReward],
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Train a policy in `run.model_dir`, or resume.

    Args:
      run: folder, length and seed of the run.
      base: an SFT run, or weights: the policy's initial weights, and the anchor. It determines the vocabulary.
      dataset: prompts (inputs). A step takes `batch_size` of them with K responses each (paper: 128 responses in all).
      answers: prompts that each evaluation answers, and metrics of the answers.
      objective: algorithm, KL, sampling, shaping.
      tuning: the policy's trainable parameters and optimizer.
      reward: sources of scores; several are summed by their weights.
      partitioner: the devices and the sharding.

    Raises:
      UserError: invalid or contradictory settings, data, weights, rewards or MODEL_DIR.
    """
    network, key = base.network, jax.random.key(run.random_seed)
    metric_fns = text_functions.resolve_functions(answers.metric_fns)
    with partitioner.scope():
        # Before anything is read: a wrong setting or a missing folder ends the run at once.
        _check(base, dataset, objective, tuning, reward, partitioner)

        # The base's own tokenizer reads the prompts; learned rewards score its tokens, so they must have it too.
        run_vocabulary, (dataset, prompts) = vocabulary.choose((dataset, answers.dataset), base.path, run.model_dir)
        vocabulary.check_rewards(_reward_folders(reward), run_vocabulary)

        # The prompts, before the weights: errors in them are found sooner.
        stream = datasets.stream(dataset, 'prompts', run.random_seed, partitioner.rows(dataset.batch_size))
        stream = dataclasses.replace(stream, sort_by_length=objective.prompts_are_independent)  # batches/bucketing
        heldout = datasets.load(prompts, 'prompts') if prompts else None
        lexicon.check_vocabulary(stream.vocabulary, network.config.vocab_size, [*stream.datasets, heldout])

        # The functions of a step, which are compiled when first called. One frozen base for four roles.
        learner = make_learner(
            network=network, objective=objective, tuning=tuning, eos_ids=stream.eos_ids, partitioner=partitioner,
            length_buckets=dataset.length_buckets,
        )  # fmt: skip
        frozen_base, roles, state = _load(base, partitioner, run.random_seed, learner, key)

        # The scores: the reward's adapters are frozen too.
        reward_base = dataclasses.replace(frozen_base, params=roles.reward)
        score_fn = sources.scorer(reward, network, reward_base, partitioner, stream.vocabulary)

        # The evaluation: answers to held-out prompts, compared with the anchor's.
        sampling = answers.sampling_config(objective.sampling)

        def respond(
            adapter: lora.Adapter | None, prompts: Any, examples: Any, i: int
        ) -> tuple[Rollout, dict[str, Any]]:
            rollout = learner.sample(roles.policy, adapter, prompts, jax.random.fold_in(key, i), sampling)
            return rollout, {'score': score_fn(rollout, examples)[0]}

        evaluation = answering.Comparison(heldout, dataset.batch_size, partitioner, respond, metric_fns)

        with loop.start(
            'policy', run, tuning.only_spec.tuning, frozen_base, _saved(state), vocabulary=run_vocabulary,
            learns_from=[*_reward_folders(reward), frozen_base.path], streams=[stream],
        ) as session:
            state = _with_beta(session, objective.kl, learner.shardings.beta)
            if heldout is not None and int(state.policy.step) == 0:
                session.evaluated(0, answering.means(evaluation.anchor_rows))

            rollout_key = jax.random.fold_in(key, ROLLOUT_KEY)
            for step in session.steps():
                (prompts, examples), rng = stream(step), jax.random.fold_in(rollout_key, step)  # 1
                indices = steps.minibatch_indices(objective, dataset.batch_size, run.random_seed, step)
                policy, anchor = (roles.policy, state.policy.adapter), (roles.anchor, state.anchor)
                rollout = learner.sample(*policy, partitioner.batch(prompts), rng, objective.sampling)  # 2
                rollout = learner.with_fill(rollout, indices)
                scores, reward_metrics = score_fn(rollout, examples)  # 3
                experience, metrics = learner.experience(  # 4
                    policy=policy, anchor=anchor, rollout=rollout, scores=scores, beta=state.beta
                )
                state, learn_metrics = learn(learner, roles, state, experience, indices, key)  # 5
                metrics |= reward_metrics | learn_metrics | _schedules(objective, tuning, step)
                if objective.anchor_ema:
                    state = state.replace(anchor=learner.follow(state.anchor, state.policy.adapter))
                if objective.kl.target is not None:
                    metrics['kl/beta'] = state.beta
                    state = state.replace(beta=objective.kl.adapt(state.beta, metrics['kl/anchor'], scores.size))
                session.log(step + 1, metrics, scores.size)
                session.checkpoint(step + 1, _saved(state), functools.partial(evaluation.measure, state.policy.adapter))


def _reward_folders(reward: Sequence[LearnedReward | TextReward]) -> list[str]:
    return [folder for source in reward if isinstance(source, LearnedReward) for folder in source.folders]


def _load(
    base: BaseConfig, partitioner: Partitioner, seed: int, learner: Learner, key: jax.Array
) -> tuple[Base, Roles, PolicyState]:
    """Load the base, share or copy it among the roles, and create the state at step 0 with its final sharding.

    The Base that is returned has no arrays: those of `roles` are the only ones.
    """
    frozen_base = bases.load(base, partitioner, seed)
    params, state = frozen_base.params, learner.init(key, frozen_base.params)
    copy = functools.partial(jax.tree.map, jnp.copy)
    return frozen_base.without_arrays(), Roles.sharing(params) if base.shared else Roles.copies(params, copy), state


def _with_beta(session: loop.Session, kl: KLConfig, sharding: Any) -> PolicyState:
    """The restored state with the BETA of this start, unless KL_TARGET adapts it: then the restored one stays.

    Reports the beta that is used where KL_TARGET has changed.
    """
    state = PolicyState(**session.states)
    if any(name.endswith('KLConfig.target') for name in session.changes):
        session.report(
            f'beta = {kl.beta:.4g} (BETA), and was {float(state.beta):.4g} so far (adapted to KL_TARGET)'
            if kl.target is None
            else f'beta is adapted to KL_TARGET = {kl.target:g}, beginning with its last value, {float(state.beta):.4g}'
        )
    return state if kl.target is not None else state.replace(beta=jax.device_put(jnp.float32(kl.beta), sharding))


def _saved(state: PolicyState) -> dict[str, Any]:
    """The parts of the state that a checkpoint stores."""
    return {name: value for name, value in vars(state).items() if value is not None}


def _schedules(objective: Objective, tuning: Tuning, step: int) -> dict[str, Any]:
    shares = {'schedule/policy': tuning.schedule(step)}
    if objective.value and objective.algorithm.has_value:  # recipes give all algorithms a tuning of the value
        shares['schedule/value'] = objective.value.schedule(step)
    return shares


def _check(
    base: BaseConfig,
    dataset: DatasetConfig,
    objective: Objective,
    tuning: Tuning,
    reward: Sequence[LearnedReward | TextReward],
    partitioner: Partitioner,
) -> None:
    """Raise for settings that contradict each other, and if weights or reward runs are not where they should be."""
    minibatches = objective.algorithm.minibatches
    tuning.check('OPTIMIZER', objective.updates)
    if objective.value is not None:
        objective.value.check('VALUE_OPTIMIZER', objective.updates)
    if not reward:
        raise UserError('REWARD = []: name a source of reward, such as @rewards.LearnedReward()')
    if any(isinstance(source, LearnedReward) and not source.folders for source in reward):
        raise UserError(
            'REWARD_MODEL_DIR is not given; add --gin.REWARD_MODEL_DIR="\'runs/reward\'", or a REWARD without a '
            'LearnedReward'
        )
    if dataset.batch_size % minibatches:
        setting = f'{type(objective.algorithm).__name__}.minibatches = {minibatches}'
        raise UserError(f'BATCH_SIZE = {dataset.batch_size} does not divide into {setting}')
    if not base.shared and tuning.only_spec.tuning == 'full':
        raise UserError('SHARED_BASE = False is for LoRA: with full tuning every role has its own parameters already')
    task_metrics.announce(dataset, 'policy')
    bucketing.log_shape_limit(dataset.length_buckets, 'policy')
    bases.check(base)
    for source in reward:
        if isinstance(source, LearnedReward):
            source.runs()
    partitioner.check_batch('BATCH_SIZE / minibatches', dataset.batch_size // minibatches, tuning.num_microbatches)
