"""The jitted functions of an RL run: rl/steps.py with donation and output shardings.

    learner = make_learner(network=.., objective=.., tuning=.., eos_ids=.., partitioner=..)
    roles, state = Roles.sharing(base), learner.init(key, base)
    each step:   rollout = learner.sample(..)   experience = learner.experience(..)   state = learn(learner, ..)

The loop (train/policy.py) runs these programs; the plan (tools/plan/) compiles them for a TPU that is not there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from perl_jax import sharded
from perl_jax.models import unpadding
from perl_jax.optim import train_state
from perl_jax.optim.tuning import Tuning
from perl_jax.parallel import partitioning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rl import anchors, steps
from perl_jax.rl.objective import Objective
from perl_jax.rl.sampling import make_sampler
from perl_jax.types import Experience, Metrics, PolicyState, Roles, Rollout


@dataclasses.dataclass(frozen=True)
class Learner:
    """The functions of a run, all but `with_fill` jitted. Arguments are named as in steps.py.

    Attributes:
      objective: what the policy learns by.
      shardings: the sharding of each array of a PolicyState.
      init: (key, base) -> the PolicyState at step 0.
      sample: (base, adapter, prompts, rng, config) -> Rollout; `config` is a SamplingConfig.
      with_fill: (rollout, minibatch indices) -> the rollout with its `fill`, where length_buckets > 1. It waits for the
        device: the fill is part of the compiled shapes.
      experience: (*, policy, anchor, rollout, scores, beta) -> Experience, metrics.
      values: (base, adapter, experience) -> [B, K, R].
      value_step: (*, base, state, batch, rng) -> state, values, metrics. The state is donated.
      policy_step: (*, base, anchor, state, batch, values, beta, rng) -> state, metrics. The state is donated.
      follow: (anchor adapter, policy adapter) -> the next anchor adapter. The anchor is donated.
    """

    objective: Objective
    shardings: PolicyState
    init: Callable[..., PolicyState]
    sample: Callable[..., Rollout]
    with_fill: Callable[[Rollout, np.ndarray], Rollout]
    experience: Callable[..., tuple[Experience, Metrics]]
    values: Callable[..., jax.Array]
    value_step: Callable[..., Any]
    policy_step: Callable[..., Any]
    follow: Callable[..., Any]


def make_learner(
    *,
    network: nn.Module,
    objective: Objective,
    tuning: Tuning,
    eos_ids: int | Sequence[int],
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
    length_buckets: int = 1,
) -> Learner:
    """Make the functions of an RL run, jitted for a network on a mesh. Nothing is computed yet.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      objective: what the policy learns by.
      tuning: the policy's trainable parameters and optimizer; the value's are `objective.value`.
      eos_ids: any of these tokens ends a response.
      partitioner: the devices, and how arrays are split over them.
      length_buckets: above 1, dense layers skip the padding; the number of real tokens is rounded up to a multiple of
        1 / length_buckets of the batch.

    Returns:
      A Learner. Call its functions within `partitioner.scope()`.

    Raises:
      UserError: an optimizer that cannot be scheduled.
    """
    if objective.algorithm.has_value and objective.value is None:
        objective = dataclasses.replace(objective, value=tuning)
    batch, (base, axes) = partitioner.sharding('batch'), partitioning.abstract_params(network)
    policy_tx = tuning.tx('OPTIMIZER', objective.updates)
    value_tx = objective.value and objective.value.tx('VALUE_OPTIMIZER', objective.updates)
    init = functools.partial(initial, objective, tuning, network.config.emb_dim)
    shapes = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), base)
    # Donation needs explicit output shardings: left to XLA, the new state gets another layout and aliases nothing.
    shardings = shapes.replace(
        policy=partitioner.state(shapes.policy, axes, policy_tx),
        beta=partitioner.sharding(),
        value=shapes.value and value_tx and partitioner.state(shapes.value, axes, value_tx),
        anchor=shapes.anchor and partitioner.tree(partitioning.adapter_axes(shapes.anchor, axes)),
    )
    static, microbatches = {'network': network, 'objective': objective}, tuning.num_microbatches
    experience = functools.partial(steps.experience, **static, eos_ids=eos_ids)
    value_step = functools.partial(steps.value_step, **static, tx=value_tx, num_microbatches=microbatches)
    policy_step = functools.partial(steps.policy_step, **static, tx=policy_tx, num_microbatches=microbatches)
    follow = functools.partial(anchors.follow, rate=objective.anchor_ema)
    return Learner(
        objective=objective,
        shardings=shardings,
        init=jax.jit(init, out_shardings=shardings),
        sample=make_sampler(network, eos_ids, batch),
        with_fill=_make_with_fill(length_buckets, microbatches, partitioner),
        experience=jax.jit(experience, out_shardings=(batch, None)),
        values=jax.jit(functools.partial(steps.values, network), out_shardings=batch),
        value_step=jax.jit(value_step, donate_argnames='state', out_shardings=(shardings.value, batch, None)),
        policy_step=jax.jit(policy_step, donate_argnames='state', out_shardings=(shardings.policy, None)),
        follow=jax.jit(follow, donate_argnums=0, out_shardings=shardings.anchor),
    )


VALUE_KEY, ROLLOUT_KEY, ANCHOR_KEY = 1, 2, 3  # what a run's random key is folded with for each


def initial(objective: Objective, tuning: Tuning, width: int, key: jax.Array, base: PyTree) -> PolicyState:
    """The state at step 0. Pure.

    Args:
      objective: has a `value` if its algorithm learns one.
      tuning: the policy's trainable parameters and optimizer.
      width: D.
      key: a key of jax.random.
      base: the frozen parameters, or their shapes.

    Returns:
      A PolicyState; its value's outputs are 0.
    """
    policy = train_state.create(key, base, tuning.only_spec, tuning.optimizer)
    value, anchor = None, None
    if objective.algorithm.has_value:
        assert objective.value is not None  # make_learner gives one
        spec, tx = objective.value.only_spec, objective.value.optimizer
        value = train_state.create(jax.random.fold_in(key, VALUE_KEY), base, spec, tx, (width, 0))
    if objective.anchor_ema:
        anchor = tuning.only_spec.init(jax.random.fold_in(key, ANCHOR_KEY), base)
    return PolicyState(policy, jnp.float32(objective.kl.beta), value, anchor)


def learn(
    learner: Learner, roles: Roles, state: PolicyState, experience: Experience, indices: np.ndarray, key: jax.Array
) -> tuple[PolicyState, Metrics]:
    """Learn from one rollout: each update is a step of the value, if there is one, and a step of the policy.

    Args:
      learner: from `make_learner`.
      roles: the frozen base of each role.
      state: policy, value and beta; its buffers are donated.
      experience: from `learner.experience`, [B, K, R], made with the anchor of `roles` and `state`.
      indices: int [U, n], the n prompts of each of U updates: `np.arange(B)[None]` for one update of all, and
        `rl.steps.minibatch_indices` for an algorithm with epochs and minibatches.
      key: a key of jax.random, for dropout; each update folds its own step in.

    Returns:
      The next state, and the metrics of the last update: float32 [] by name.
    """
    anchor, values, metrics = (roles.anchor, state.anchor), None, {}
    if state.value is not None and steps.precomputes_values(learner.objective, state.value.adapter.dropout):
        experience = experience.replace(values=learner.values(roles.value, state.value.adapter, experience))
    for batch in steps.minibatches(experience, indices):
        if state.value is not None:
            value, values, step_metrics = learner.value_step(base=roles.value, state=state.value, batch=batch, rng=key)
            state, metrics = state.replace(value=value), metrics | step_metrics
        policy, step_metrics = learner.policy_step(
            base=roles.policy, anchor=anchor, state=state.policy, batch=batch, values=values, beta=state.beta, rng=key
        )
        state, metrics = state.replace(policy=policy), metrics | step_metrics
    return state, metrics


def _make_with_fill(
    length_buckets: int, num_microbatches: int, partitioner: Partitioner
) -> Callable[[Rollout, np.ndarray], Rollout]:
    @functools.partial(jax.jit, out_shardings=partitioner.sharding())
    def count_buckets(rollout: Rollout, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How many buckets the fullest data partition needs for its real tokens, in the rollout or in a minibatch."""
        prompts, responses = rollout.inputs_mask, rollout.targets_mask.reshape(len(rollout.targets), -1)
        widths, groups = (prompts.shape[-1], responses.shape[-1]), sharded.partitions('batch')
        lengths = prompts.sum(-1), responses.sum(-1)
        shuffled = lengths[0][indices.ravel()], lengths[1][indices.ravel()]
        count = functools.partial(unpadding.count_buckets, buckets=length_buckets)
        rollout_buckets = count(*lengths, *widths, groups=groups, num_microbatches=1)
        minibatch_buckets = count(*shuffled, *widths, groups=len(indices) * groups, num_microbatches=num_microbatches)
        return jax.tree.map(jnp.maximum, rollout_buckets, minibatch_buckets)

    def with_fill(rollout: Rollout, indices: np.ndarray) -> Rollout:
        if length_buckets == 1:
            return rollout
        # One number for packed run and targets, so that fewer shapes are compiled.
        buckets = max(map(int, jax.device_get(count_buckets(rollout, indices))))
        return unpadding.with_fill(rollout, (buckets, buckets), length_buckets)

    return with_fill
