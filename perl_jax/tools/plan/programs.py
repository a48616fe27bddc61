"""The programs of a run with what they are given, as shapes: nothing is read, no weight is made.

gin calls these with a run's own configuration. They lower the very functions that the run's loop calls.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from perl_jax.data import datasets
from perl_jax.data.datasets import DatasetConfig
from perl_jax.optim import train_state as states
from perl_jax.optim.tuning import Tuning
from perl_jax.parallel import partitioning, topology
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import ensembles, scoring
from perl_jax.rewards.sources import LearnedReward, TextReward
from perl_jax.rl import steps
from perl_jax.rl.learner import make_learner
from perl_jax.rl.objective import Objective
from perl_jax.runs.base import BaseConfig
from perl_jax.train import reward as train_reward
from perl_jax.train import sft as train_sft
from perl_jax.types import Experience, Prompts, Responses, Roles, Rollout, Thumbs

EOS = 1  # no program hangs on which token it is


@dataclasses.dataclass(frozen=True)
class Program:
    """One of the programs of a step.

    args, kwargs: what it is called with, as shapes.
    alive: all that lies on the devices while it runs, its arguments too: {'base', 'adapters', 'optimizer', 'data'}.
    turns: of a loop that ends when the data says so, at most.   times: how often a step runs it.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    alive: Mapping[str, PyTree]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    turns: int = 1
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a topology, or on this machine's devices where there is none."""

    phase: str
    partitioner: Partitioner
    batch_size: int
    programs: list[Program]


def sft(
    base: BaseConfig,
    dataset: DatasetConfig,
    tuning: Tuning,
    partitioner: Partitioner,
    topology: str | None = None,
    units: int | None = None,
) -> Plan:
    """SFT: one program a step.

    A batch of `units`, each the least that divides over mesh and microbatches, takes the place of the run's own.
    """
    on = _on(partitioner, topology)
    size = _batch_size(on, dataset, units, tuning.num_microbatches)
    params, axes = _base(base, on)
    tx = tuning.tx('OPTIMIZER')
    shapes = jax.eval_shape(functools.partial(states.create, spec=tuning.only_spec, tx=tx), _key(), params)
    shardings = on.state(shapes, axes, tx)
    state = _placed(shapes, shardings)
    batch = _responses(on, size, 1, dataset.task_feature_lengths)
    params = None if tuning.only_spec.tuning == 'full' else params
    alive = {'base': params, 'adapters': state.adapter, 'optimizer': state.opt_state, 'data': batch}
    step = train_sft.compiled(base.network, tx, tuning.num_microbatches, shardings)
    return Plan('sft', on, size, [Program('sft step', step, (params, state, batch, _key()), alive)])


def reward(
    base: BaseConfig,
    dataset: DatasetConfig,
    tuning: Tuning,
    partitioner: Partitioner,
    topology: str | None = None,
    units: int | None = None,
) -> Plan:
    """A reward, or an ensemble: one program a step."""
    on = _on(partitioner, topology)
    size = _batch_size(on, dataset, units, tuning.num_microbatches)
    params, axes = _base(base, on)
    tx, keys = tuning.tx('OPTIMIZER'), {f'reward_{i}': _key() for i in range(len(tuning.specs))}
    create = functools.partial(train_reward.initial, tuning, base.network.config.emb_dim, None)
    shapes = jax.eval_shape(create, keys, params)
    shardings = {role: on.state(state, axes, tx) for role, state in shapes.items()}
    state = _placed(shapes, shardings)
    kinds = {'pairs': (Responses, 2), 'thumbs': (Thumbs, 1)}
    batches = []
    for config in dataset.each():
        kind, K = kinds[datasets.reward_kind(config.task_name)]
        batch = _responses(on, size, K, dataset.task_feature_lengths)
        if kind is Thumbs:
            batch = Thumbs(**vars(batch), labels=_array(on, (size, K), jnp.float32))
        batches.append(batch)
    params = None if all(spec.tuning == 'full' for spec in tuning.specs) else params
    step = train_reward.compiled(base.network, tx, tuning.num_microbatches, shardings)
    alive = {
        'base': params,
        'adapters': [member.adapter for member in state.values()],
        'optimizer': [member.opt_state for member in state.values()],
        'data': batches,
    }
    args = params, state, dict.fromkeys(keys, batches), keys
    return Plan('reward', on, size, [Program('reward step', step, args, alive)])


def policy(
    base: BaseConfig,
    dataset: DatasetConfig,
    objective: Objective,
    tuning: Tuning,
    reward: Sequence[LearnedReward | TextReward],
    partitioner: Partitioner,
    topology: str | None = None,
    units: int | None = None,
) -> Plan:
    """The RL of a policy: each program of a step. A learned reward is taken to be tuned as the policy is."""
    on, algorithm, sampling = _on(partitioner, topology), objective.algorithm, objective.sampling
    split = algorithm.minibatches, 'BATCH_SIZE / minibatches'
    size = _batch_size(on, dataset, units, tuning.num_microbatches, *split)
    params, axes = _base(base, on)
    roles = Roles.sharing(params) if base.shared else Roles.copies(params, _copy)
    network, width = base.network, base.network.config.emb_dim
    learner = make_learner(network=network, objective=objective, tuning=tuning, eos_ids=EOS, partitioner=on)
    state = _placed(jax.eval_shape(learner.init, _key(), params), learner.shardings)
    learned = [source for source in reward if isinstance(source, LearnedReward)]
    members = []
    for _ in learned:
        create = functools.partial(states.create, spec=tuning.only_spec, tx=optax.sgd(1.0), head=(width, 1.0))
        cast = lambda key, base, create=create: scoring.frozen(create(key, base).adapter, base)  # noqa: E731
        member = jax.eval_shape(cast, _key(), params)
        members.append(_placed(member, on.tree(partitioning.adapter_axes(member, axes))))
    lengths = dict(dataset.task_feature_lengths) | {'targets': sampling.max_decode_length}
    responses, K = _responses(on, size, sampling.num_samples, lengths), sampling.num_samples
    prompts = Prompts(responses.inputs, responses.inputs_mask)
    token = lambda rows: _array(on, (rows, K, sampling.max_decode_length), jnp.float32)  # noqa: E731
    rollout = Rollout(**vars(responses), logprobs=token(size))
    values_first = state.value is not None and steps.values_first(objective, state.value.adapter.dropout)
    judged = Experience(
        **vars(rollout), rewards=token(size), anchor_logprobs=token(size), values=token(size) if values_first else None
    )
    rows = size // algorithm.minibatches
    minibatch = jax.tree.map(lambda x: _array(on, (rows, *x.shape[1:]), x.dtype), judged)
    scores = _array(on, (size, K), jnp.float32)
    beta = jax.ShapeDtypeStruct((), jnp.float32, sharding=on.sharding())
    anchor = roles.anchor, state.anchor
    trained = [role for role in (state.policy, state.value) if role is not None]
    alive = {
        # Full tuning's anchor and policy's base are one tree: the policy's own weights are its adapter.
        'base': vars(roles),
        'adapters': [[role.adapter for role in trained], state.anchor, members],
        'optimizer': [role.opt_state for role in trained],
    }
    beside = lambda *data: alive | {'data': data}  # noqa: E731
    args = roles.policy, state.policy.adapter, prompts, _key(), sampling
    programs = [Program('sample', learner.sample, args, beside(prompts), turns=sampling.max_decode_length - 1)]
    for source, member in zip(learned, members):
        judge = scoring.compiled(network, getattr(source, 'aggregate', ensembles.mean), on)
        programs.append(Program('score', judge, (roles.reward, [member], rollout), beside(rollout)))
    given = {'policy': (roles.policy, state.policy.adapter), 'anchor': anchor, 'rollout': rollout, 'scores': scores}
    given, data = given | {'beta': beta}, beside(rollout, scores)
    programs.append(Program('experience', learner.experience, (), data, given))
    if values_first and state.value is not None:
        args = roles.value, state.value.adapter, judged
        programs.append(Program('values', learner.values, args, beside(judged)))
    values, times = None, objective.updates
    if algorithm.has_value:
        values, given = token(rows), {'base': roles.value, 'state': state.value, 'batch': minibatch, 'rng': _key()}
        data = beside(judged, minibatch)
        programs.append(Program('value step', learner.value_step, (), data, given, times=times))
    given = {'base': roles.policy, 'anchor': anchor, 'state': state.policy, 'batch': minibatch, 'values': values}
    given, data = given | {'beta': beta, 'rng': _key()}, beside(judged, minibatch, values)
    programs.append(Program('policy step', learner.policy_step, (), data, given, times=times))
    return Plan('policy', on, size, programs)


def _on(partitioner: Partitioner, name: str | None) -> Partitioner:
    name = name or partitioner.topology
    return partitioner if name is None else dataclasses.replace(
        partitioner, topology=name, devices=topology.devices(name)
    )  # fmt: skip


def _batch_size(
    on: Partitioner,
    dataset: DatasetConfig,
    units: int | None,
    num_microbatches: int,
    minibatches: int = 1,
    name: str = 'BATCH_SIZE',
) -> int:
    if units is not None:
        return units * on.data_parallelism * num_microbatches * minibatches
    on.check_batch(name, dataset.batch_size // minibatches, num_microbatches)
    return dataset.batch_size


def _base(config: BaseConfig, on: Partitioner) -> tuple[PyTree, PyTree]:
    shapes, axes = partitioning.abstract(config.network)
    on.check_params(shapes, axes)
    typed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.dtype)), shapes)
    return _placed(typed, on.tree(axes)), axes


def _placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


def _copy(tree: PyTree) -> PyTree:
    """The same shapes as arrays of their own."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _array(on: Partitioner, shape: tuple[int, ...], dtype: Any) -> Any:
    """A jax.ShapeDtypeStruct, for the fields of batches whose annotation says arrays."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=on.sharding('batch'))


def _responses(on: Partitioner, B: int, K: int, lengths: Mapping[str, int]) -> Responses:
    P, R = lengths['inputs'], lengths['targets']
    return Responses(
        _array(on, (B, P), jnp.int32), _array(on, (B, P), jnp.bool_),
        _array(on, (B, K, R), jnp.int32), _array(on, (B, K, R), jnp.bool_),
    )  # fmt: skip


def _key() -> Any:
    """A key's shape; never a key: under a topology's mesh there is no device to make one."""
    return jax.eval_shape(lambda: jax.random.key(0))
