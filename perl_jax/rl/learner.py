"""The RL of a policy as it is compiled: what each program is given and gives up, and where its results lie.

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
    """The jitted functions of a run, but for `fit`; what they take is called as in steps.py.

    Attributes:
      objective: what they learn by.
      shardings: where each array of a PolicyState lies.
      init: (key, base) -> the PolicyState at step 0.
      sample: (base, adapter, prompts, rng, config) -> Rollout; `config` is a SamplingConfig.
      fit: (rollout, turns) -> the rollout, saying its fill (unpadding.py) if there are buckets: the host waits.
      experience: (*, policy, anchor, rollout, scores, beta) -> Experience, metrics.
      values: (base, adapter, experience) -> [B, K, R].
      value_step: (*, base, state, batch, rng) -> state, values, metrics. The state is donated.
      policy_step: (*, base, anchor, state, batch, values, beta, rng) -> state, metrics. The state is donated.
      follow: (anchor adapter, policy adapter) -> the anchor's next. The anchor is donated.
    """

    objective: Objective
    shardings: PolicyState
    init: Callable[..., PolicyState]
    sample: Callable[..., Rollout]
    fit: Callable[[Rollout, np.ndarray], Rollout]
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
      network: a Decoder, a T5, or a module with their methods.
      objective: what the policy learns by.
      tuning: what the policy trains, and the optimizer; the value's is `objective.value`.
      eos_ids: any of these tokens ends a response.
      partitioner: the devices, and how arrays are split over them.
      length_buckets: above 1 the learning steps compute real tokens alone, their number rounded up to so many parts.

    Returns:
      A Learner. Call its functions within `partitioner.scope()`.

    Raises:
      UserError: an optimizer that cannot be scheduled.
    """
    if objective.algorithm.has_value and objective.value is None:
        objective = dataclasses.replace(objective, value=tuning)
    batch, (base, axes) = partitioner.sharding('batch'), partitioning.abstract(network)
    policy_tx = tuning.tx('OPTIMIZER', objective.updates)
    value_tx = objective.value and objective.value.tx('VALUE_OPTIMIZER', objective.updates)
    init = functools.partial(initial, objective, tuning, network.config.emb_dim)
    shapes = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), base)
    # Donation needs pinned output shardings: unpinned, XLA lays the new state elsewhere and aliases nothing.
    shardings = shapes.replace(
        policy=partitioner.state(shapes.policy, axes, policy_tx),
        beta=partitioner.sharding(),
        value=shapes.value and value_tx and partitioner.state(shapes.value, axes, value_tx),
        anchor=shapes.anchor and partitioner.tree(partitioning.adapter_axes(shapes.anchor, axes)),
    )
    fixed, parts = {'network': network, 'objective': objective}, tuning.num_microbatches
    experience = functools.partial(steps.experience, **fixed, eos_ids=eos_ids)
    value_step = functools.partial(steps.value_step, **fixed, tx=value_tx, num_microbatches=parts)
    policy_step = functools.partial(steps.policy_step, **fixed, tx=policy_tx, num_microbatches=parts)
    follow = functools.partial(anchors.follow, rate=objective.anchor_ema)
    return Learner(
        objective=objective,
        shardings=shardings,
        init=jax.jit(init, out_shardings=shardings),
        sample=make_sampler(network, eos_ids, batch),
        fit=_make_fit(length_buckets, parts, partitioner),
        experience=jax.jit(experience, out_shardings=(batch, None)),
        values=jax.jit(functools.partial(steps.values, network), out_shardings=batch),
        value_step=jax.jit(value_step, donate_argnames='state', out_shardings=(shardings.value, batch, None)),
        policy_step=jax.jit(policy_step, donate_argnames='state', out_shardings=(shardings.policy, None)),
        follow=jax.jit(follow, donate_argnums=0, out_shardings=shardings.anchor),
    )


def initial(objective: Objective, tuning: Tuning, width: int, key: jax.Array, base: PyTree) -> PolicyState:
    """The state at step 0. Pure; `width` is D."""
    policy = train_state.create(key, base, tuning.only_spec, tuning.optimizer)
    value, anchor = None, None
    if objective.algorithm.has_value:
        assert objective.value is not None  # make_learner gives one
        spec, tx = objective.value.only_spec, objective.value.optimizer
        value = train_state.create(jax.random.fold_in(key, 1), base, spec, tx, (width, 0))
    if objective.anchor_ema:
        anchor = tuning.only_spec.init(jax.random.fold_in(key, 3), base)
    return PolicyState(policy, jnp.float32(objective.kl.beta), value, anchor)


def learn(
    learner: Learner, roles: Roles, state: PolicyState, experience: Experience, turns: np.ndarray, key: jax.Array
) -> tuple[PolicyState, Metrics]:
    """Learn from one judged rollout: each update is a step of the value, if there is one, and a step of the policy.

    Args:
      learner: of `make_learner`.
      roles: the frozen base of each role.
      state: the policy, the value and beta so far; its buffers are donated.
      experience: of `learner.experience`, [B, K, R]; judged by the anchor in `roles` and `state`.
      turns: int [U, b]: whose prompts each of U updates learns from; all of them at once are `np.arange(B)[None]`, and
        an algorithm with epochs and minibatches takes `rl.steps.turns`.
      key: a key of jax.random, for dropout; each update folds its step in.

    Returns:
      The next state, and the metrics of the last update: float32 [] by name.
    """
    anchor, values, metrics = (roles.anchor, state.anchor), None, {}
    if state.value is not None and steps.values_first(learner.objective, state.value.adapter.dropout):
        experience = experience.replace(values=learner.values(roles.value, state.value.adapter, experience))
    for batch in steps.updates(experience, turns):
        if state.value is not None:
            value, values, more = learner.value_step(base=roles.value, state=state.value, batch=batch, rng=key)
            state, metrics = state.replace(value=value), metrics | more
        policy, more = learner.policy_step(
            base=roles.policy, anchor=anchor, state=state.policy, batch=batch, values=values, beta=state.beta, rng=key
        )
        state, metrics = state.replace(policy=policy), metrics | more
    return state, metrics


def _make_fit(
    length_buckets: int, num_microbatches: int, partitioner: Partitioner
) -> Callable[[Rollout, np.ndarray], Rollout]:
    @functools.partial(jax.jit, out_shardings=partitioner.sharding())
    def count(rollout: Rollout, turns: jax.Array) -> tuple[jax.Array, jax.Array]:
        prompts, responses = rollout.inputs_mask, rollout.targets_mask.reshape(len(rollout.targets), -1)
        real, shape = (prompts.sum(-1), responses.sum(-1)), (prompts.shape[-1], responses.shape[-1])
        groups, parts = sharded.partitions('batch'), (real[0][turns.ravel()], real[1][turns.ravel()])
        whole = unpadding.needed(*real, *shape, groups, 1, length_buckets)  # as it is judged
        each = unpadding.needed(*parts, *shape, len(turns) * groups, num_microbatches, length_buckets)
        return jax.tree.map(jnp.maximum, whole, each)

    def fit(rollout: Rollout, turns: np.ndarray) -> Rollout:
        if length_buckets == 1:
            return rollout
        parts = max(map(int, jax.device_get(count(rollout, turns))))  # one for run and targets: fewer programs
        return unpadding.filled(rollout, (parts, parts), length_buckets)

    return fit
