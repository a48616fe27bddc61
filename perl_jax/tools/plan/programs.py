"""The programs of a run with the shapes of their arguments; no file is read and no array is allocated.

gin calls these functions with a run's configuration. The programs are the functions that the training loop calls.
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

EOS = 1  # any id: programs of all ids have the same cost


@dataclasses.dataclass(frozen=True)
class Program:
    """One of the programs of a training step.

    Attributes:
      name: the program's name, for the table.
      fn: the jitted function.
      args: the shapes of its arguments.
      resident: the shapes of all arrays on the devices while it runs, including its arguments, by kind: 'base',
        'adapters', 'optimizer', 'data'.
      kwargs: the shapes of its keyword arguments.
      max_iterations: the maximum iterations of a loop whose length depends on the data.
      times: how often a step runs it.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    resident: Mapping[str, PyTree]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_iterations: int = 1
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The programs of a run on a topology, or on this machine's devices if there is none.

    Attributes:
      phase: 'sft', 'reward' or 'policy'.
      partitioner: the devices and the sharding.
      batch_size: prompts a step, over all devices.
      programs: those of a step.
    """

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
    """Plan SFT, which has one program a step.

    `units` replaces the run's batch size; one unit is the smallest batch that divides over mesh and microbatches.
    """
    partitioner = _partitioner_for(partitioner, topology)
    batch_size = _batch_size(partitioner, dataset, units, tuning.num_microbatches)
    params, axes = _base(base, partitioner)
    tx = tuning.tx('OPTIMIZER')
    shapes = jax.eval_shape(functools.partial(states.create, spec=tuning.only_spec, tx=tx), _key(), params)
    shardings = partitioner.state(shapes, axes, tx)
    state = _with_shardings(shapes, shardings)
    batch = _responses(partitioner, batch_size, 1, dataset.task_feature_lengths)
    params = None if tuning.only_spec.tuning == 'full' else params
    resident = {'base': params, 'adapters': state.adapter, 'optimizer': state.opt_state, 'data': batch}
    step = functools.partial(train_sft.sft_step, base.network, tx, num_microbatches=tuning.num_microbatches)
    program = Program('sft step', states.compile_step(step, shardings), (params, state, batch, _key()), resident)
    return Plan('sft', partitioner, batch_size, [program])


def reward(
    base: BaseConfig,
    dataset: DatasetConfig,
    tuning: Tuning,
    partitioner: Partitioner,
    topology: str | None = None,
    units: int | None = None,
) -> Plan:
    """Plan the training of a reward or an ensemble, which has one program a step; `units` as in `sft`."""
    partitioner = _partitioner_for(partitioner, topology)
    batch_size = _batch_size(partitioner, dataset, units, tuning.num_microbatches)
    params, axes = _base(base, partitioner)
    tx, keys = tuning.tx('OPTIMIZER'), {f'reward_{i}': _key() for i in range(len(tuning.specs))}
    create = functools.partial(train_reward.initial, tuning, base.network.config.emb_dim, None)
    shapes = jax.eval_shape(create, keys, params)
    shardings = {role: partitioner.state(state, axes, tx) for role, state in shapes.items()}
    state = _with_shardings(shapes, shardings)
    batch_types = {'pairs': (Responses, 2), 'thumbs': (Thumbs, 1)}
    batches = []
    for config in dataset.each():
        batch_type, K = batch_types[datasets.reward_kind(config.task_name)]
        batch = _responses(partitioner, batch_size, K, dataset.task_feature_lengths)
        if batch_type is Thumbs:
            batch = Thumbs(**vars(batch), labels=_array(partitioner, (batch_size, K), jnp.float32))
        batches.append(batch)
    params = None if all(spec.tuning == 'full' for spec in tuning.specs) else params
    step = functools.partial(train_reward.ensemble_step, base.network, tx, num_microbatches=tuning.num_microbatches)
    resident = {
        'base': params,
        'adapters': [member.adapter for member in state.values()],
        'optimizer': [member.opt_state for member in state.values()],
        'data': batches,
    }
    args = params, state, dict.fromkeys(keys, batches), keys
    program = Program('reward step', states.compile_step(step, shardings), args, resident)
    return Plan('reward', partitioner, batch_size, [program])


def policy(
    base: BaseConfig,
    dataset: DatasetConfig,
    objective: Objective,
    tuning: Tuning,
    *,
    reward: Sequence[LearnedReward | TextReward],
    partitioner: Partitioner,
    topology: str | None = None,
    units: int | None = None,
) -> Plan:
    """Plan the RL of a policy; `units` as in `sft`. A learned reward is assumed to have the policy's tuning."""
    partitioner, algorithm, sampling = _partitioner_for(partitioner, topology), objective.algorithm, objective.sampling
    batch_divisor = algorithm.minibatches, 'BATCH_SIZE / minibatches'
    batch_size = _batch_size(partitioner, dataset, units, tuning.num_microbatches, *batch_divisor)
    params, axes = _base(base, partitioner)
    roles = Roles.sharing(params) if base.shared else Roles.copies(params, _copy)
    network, width = base.network, base.network.config.emb_dim
    learner = make_learner(network=network, objective=objective, tuning=tuning, eos_ids=EOS, partitioner=partitioner)
    state = _with_shardings(jax.eval_shape(learner.init, _key(), params), learner.shardings)
    learned_rewards = [source for source in reward if isinstance(source, LearnedReward)]
    members = []
    for _ in learned_rewards:
        create = functools.partial(states.create, spec=tuning.only_spec, tx=optax.sgd(1.0), head=(width, 1.0))
        create_reward = lambda key, base, create=create: scoring.cast_to_base_dtype(create(key, base).adapter, base)  # noqa: E731
        member = jax.eval_shape(create_reward, _key(), params)
        members.append(_with_shardings(member, partitioner.tree(partitioning.adapter_axes(member, axes))))
    feature_lengths = dict(dataset.task_feature_lengths) | {'targets': sampling.max_decode_length}
    responses, K = _responses(partitioner, batch_size, sampling.num_samples, feature_lengths), sampling.num_samples
    prompts = Prompts(responses.inputs, responses.inputs_mask)
    token_array = lambda rows: _array(partitioner, (rows, K, sampling.max_decode_length), jnp.float32)  # noqa: E731
    rollout = Rollout(**vars(responses), logprobs=token_array(batch_size))
    values_first = state.value is not None and steps.precomputes_values(objective, state.value.adapter.dropout)
    experience = Experience(
        **vars(rollout),
        rewards=token_array(batch_size),
        anchor_logprobs=token_array(batch_size),
        values=token_array(batch_size) if values_first else None,
    )
    minibatch_size = batch_size // algorithm.minibatches
    minibatch = jax.tree.map(lambda x: _array(partitioner, (minibatch_size, *x.shape[1:]), x.dtype), experience)
    scores = _array(partitioner, (batch_size, K), jnp.float32)
    beta = jax.ShapeDtypeStruct((), jnp.float32, sharding=partitioner.sharding())
    anchor = roles.anchor, state.anchor
    trained_roles = [role for role in (state.policy, state.value) if role is not None]
    resident = {
        # Under full tuning too, anchor and policy share one base: the policy's trained weights are its adapter.
        'base': vars(roles),
        'adapters': [[role.adapter for role in trained_roles], state.anchor, members],
        'optimizer': [role.opt_state for role in trained_roles],
    }
    with_data = lambda *data: resident | {'data': data}  # noqa: E731
    args = roles.policy, state.policy.adapter, prompts, _key(), sampling
    programs = [
        Program('sample', learner.sample, args, with_data(prompts), max_iterations=sampling.max_decode_length - 1)
    ]
    for source, member in zip(learned_rewards, members):
        score_fn = scoring.make_score_fn(network, getattr(source, 'aggregate', ensembles.mean), partitioner)
        programs.append(Program('score', score_fn, (roles.reward, [member], rollout), with_data(rollout)))
    kwargs = {'policy': (roles.policy, state.policy.adapter), 'anchor': anchor, 'rollout': rollout, 'scores': scores}
    kwargs, data = kwargs | {'beta': beta}, with_data(rollout, scores)
    programs.append(Program('experience', learner.experience, (), data, kwargs))
    if values_first and state.value is not None:
        args = roles.value, state.value.adapter, experience
        programs.append(Program('values', learner.values, args, with_data(experience)))
    values, times = None, objective.updates
    if algorithm.has_value:
        values = token_array(minibatch_size)
        kwargs = {'base': roles.value, 'state': state.value, 'batch': minibatch, 'rng': _key()}
        data = with_data(experience, minibatch)
        programs.append(Program('value step', learner.value_step, (), data, kwargs, times=times))
    kwargs = {'base': roles.policy, 'anchor': anchor, 'state': state.policy, 'batch': minibatch, 'values': values}
    kwargs, data = kwargs | {'beta': beta, 'rng': _key()}, with_data(experience, minibatch, values)
    programs.append(Program('policy step', learner.policy_step, (), data, kwargs, times=times))
    return Plan('policy', partitioner, batch_size, programs)


def _partitioner_for(partitioner: Partitioner, name: str | None) -> Partitioner:
    name = name or partitioner.topology
    return partitioner if name is None else dataclasses.replace(
        partitioner, topology=name, devices=topology.devices(name)
    )  # fmt: skip


def _batch_size(
    partitioner: Partitioner,
    dataset: DatasetConfig,
    units: int | None,
    num_microbatches: int,
    minibatches: int = 1,
    name: str = 'BATCH_SIZE',
) -> int:
    if units is not None:
        return units * partitioner.data_parallel_size * num_microbatches * minibatches
    partitioner.check_batch(name, dataset.batch_size // minibatches, num_microbatches)
    return dataset.batch_size


def _base(config: BaseConfig, partitioner: Partitioner) -> tuple[PyTree, PyTree]:
    shapes, axes = partitioning.abstract_params(config.network)
    partitioner.check_params(shapes, axes)
    typed_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.dtype)), shapes)
    return _with_shardings(typed_shapes, partitioner.tree(axes)), axes


def _with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )


def _copy(tree: PyTree) -> PyTree:
    """Return distinct arrays of the same shapes, which count separately in the memory."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _array(partitioner: Partitioner, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a ShapeDtypeStruct, typed Any since the fields of batches are annotated as arrays."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=partitioner.sharding('batch'))


def _responses(partitioner: Partitioner, B: int, K: int, lengths: Mapping[str, int]) -> Responses:
    P, R = lengths['inputs'], lengths['targets']
    return Responses(
        _array(partitioner, (B, P), jnp.int32), _array(partitioner, (B, P), jnp.bool_),
        _array(partitioner, (B, K, R), jnp.int32), _array(partitioner, (B, K, R), jnp.bool_),
    )  # fmt: skip


def _key() -> Any:
    """Return the shape of a PRNG key; a real key cannot be made under a topology's mesh, which has no devices."""
    return jax.eval_shape(lambda: jax.random.key(0))
