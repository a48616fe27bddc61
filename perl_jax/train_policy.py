"""The policy, by the paper's RL loop on one frozen base.

Each step:  1. a batch of prompts              2. the policy answers each K times
            3. the frozen reward judges        4. the anchor is the base itself: KL, token rewards, returns
            5. a step of REINFORCE for the policy, and of its value baseline
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from perl_jax import base as bases
from perl_jax import data, evaluate, lora, reinforce, rewards, runs, train_state
from perl_jax.base import BaseConfig
from perl_jax.data import DatasetConfig
from perl_jax.partitioning import Partitioner
from perl_jax.rewards import LearnedReward, TextFunction, TextReward
from perl_jax.runs import RunConfig
from perl_jax.sampling import SamplingConfig, sample
from perl_jax.types import PolicyState, Rollout


def train(
    run: RunConfig,
    base: BaseConfig,
    dataset: DatasetConfig,
    eval_dataset: DatasetConfig,
    spec: lora.LoraSpec | lora.FullSpec,
    optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
    reward: Sequence[LearnedReward | TextReward],
    sampling: SamplingConfig,
    beta: float = 0.05,
    metric_fns: Mapping[str, TextFunction] | None = None,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Train a policy, or go on with it, in `run.model_dir`.

    Args:
      base: where the policy starts, and the anchor it is held to: an SFT run, or weights.
      dataset, eval_dataset: prompts (inputs). A step takes `batch_size` prompts, K answers each (paper: 128 in all).
      spec: LoRA or full tuning, for the policy and for its value baseline (the paper: the same rank).
      reward: where scores come from; several are added up by their weights.
      sampling: how the policy answers, K times each prompt; evaluation takes one answer.
      beta: weight of the KL, against (1 - beta) for the reward (paper, eq. 1).
      metric_fns: {name: function(prompt, response, example)} that judge evaluation answers; training never sees them.
    """
    judges = rewards.functions(metric_fns)
    network, key, width = base.network, jax.random.key(run.random_seed), base.network.config.emb_dim
    with partitioner.scope():
        partitioner.check_batch('BATCH_SIZE', dataset.batch_size)
        stream = data.stream(dataset, 'prompts', run.random_seed)
        heldout = data.load(eval_dataset, 'prompts')
        data.check_vocabulary(heldout.vocabulary, network.config.vocab_size)
        frozen = bases.load(base, partitioner, run.random_seed)
        score_fn = rewards.scorer(reward, network, frozen, partitioner, heldout.vocabulary)

        def create(key: jax.Array, params: Any) -> PolicyState:
            policy = train_state.create(key, params, spec, optimizer)
            return PolicyState(
                policy, train_state.create(jax.random.fold_in(key, 1), params, spec, value_optimizer, (width, 0))
            )

        shapes = jax.eval_shape(create, key, frozen.params)
        shardings = PolicyState(
            partitioner.state(shapes.policy, frozen.axes, optimizer),
            partitioner.state(shapes.value, frozen.axes, value_optimizer),
        )
        state = jax.jit(create, out_shardings=shardings)(key, frozen.params)
        sample_fn = jax.jit(
            lambda params, adapter, prompts, rng, config: sample(
                network, lora.bind(params, adapter), prompts, rng, stream.eos_id, config
            ),
            static_argnums=4,
        )
        experience_fn = jax.jit(functools.partial(reinforce.experience, network, beta=beta, sampling=sampling))
        step_fn = jax.jit(
            functools.partial(reinforce.policy_step, network, (optimizer, value_optimizer), sampling.temperature),
            donate_argnums=1,
            out_shardings=(shardings, None),
        )

        def answer(adapter: lora.Adapter | None) -> list[dict[str, Any]]:
            def respond(prompts: Any, examples: Any, i: int) -> tuple[Rollout, dict[str, Any]]:
                one = dataclasses.replace(sampling, num_samples=1)
                rollout = sample_fn(frozen.params, adapter, prompts, jax.random.fold_in(key, i), one)
                return rollout, {'score': score_fn(rollout, examples)}

            return evaluate.answers(heldout, dataset.batch_size, partitioner, respond, judges)

        with runs.start('policy', run, spec, frozen, {'policy': state.policy, 'value': state.value}) as log:
            state = PolicyState(log.states['policy'], log.states['value'])
            before = functools.cache(lambda: answer(None))  # the anchor's answers, to stand beside the policy's
            if int(state.policy.step) == 0:
                log.evaluated(0, evaluate.means(before()))

            def measure(adapter: lora.Adapter) -> tuple[dict[str, float], list[dict[str, Any]]]:
                rows = answer(adapter)
                pairs = zip(rows, before(), strict=True)
                return evaluate.means(rows), [row | evaluate.beside(old) for row, old in pairs]

            for step in log.steps():
                prompts, examples = stream(step)  # 1
                rng = jax.random.fold_in(jax.random.fold_in(key, 2), step)
                rollout = sample_fn(frozen.params, state.policy.adapter, partitioner.batch(prompts), rng, sampling)  # 2
                scores = score_fn(rollout, examples)  # 3
                experience, metrics = experience_fn(frozen.params, state.policy.adapter, rollout, scores)  # 4
                state, more = step_fn(frozen.params, state, experience, key)  # 5
                log.log(step + 1, metrics | more, scores.size)
                if log.is_due(step + 1):
                    roles = {'policy': state.policy, 'value': state.value}
                    log.checkpoint(step + 1, roles, functools.partial(measure, state.policy.adapter))
