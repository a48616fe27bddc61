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
from perl_jax.models import lora
from perl_jax.optim import train_state as states
from perl_jax.parallel import partitioning, topology
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import ensembles, scoring
from perl_jax.rewards.scoring import LearnedReward, TextReward
from perl_jax.rl import learner, steps
from perl_jax.rl.algorithms import Algorithm
from perl_jax.rl.kl import KLConfig
from perl_jax.rl.sampling import SamplingConfig
from perl_jax.runs.base import BaseConfig
from perl_jax.train import reward as train_reward
from perl_jax.train import sft as train_sft
from perl_jax.types import Experience, Prompts, Responses, Rollout, Thumbs, TrainState

Spec = lora.LoraSpec | lora.FullSpec
EOS = 1  # no program hangs on which token it is


@dataclasses.dataclass(frozen=True)
class Program:
    """One of the programs of a step.

    alive: all that lies on the devices while it runs, its arguments too: {'base', 'adapters', 'optimizer', 'data'}.
    turns: of a loop that ends when the data says so, at most.   times: how often a step runs it.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    alive: Mapping[str, PyTree]
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
    spec: Spec,
    optimizer: optax.GradientTransformation,
    num_microbatches: int,
    partitioner: Partitioner,
    topology: str | None = None,
    units: int | None = None,
) -> Plan:
    """SFT: one program a step.

    A batch of `units`, each the least that divides over mesh and microbatches, takes the place of the run's own.
    """
    on = _on(partitioner, topology)
    size = _batch_size(on, dataset, units, num_microbatches)
    params, axes = _base(base, on)
    state, shardings = _state(functools.partial(states.create, spec=spec, tx=optimizer), params, axes, optimizer, on)
    batch = _responses(on, size, 1, dataset.task_feature_lengths)
    params = None if spec.tuning == 'full' else params
    alive = {'base': params, 'adapters': state.adapter, 'optimizer': state.opt_state, 'data': batch}
    step = train_sft.compiled(base.network, optimizer, num_microbatches, shardings)
    return Plan('sft', on, size, [Program('sft step', step, (params, state, batch, _key()), alive)])


def reward(
    base: BaseConfig,
    dataset: DatasetConfig,
    spec: Spec | Sequence[Spec],
    optimizer: optax.GradientTransformation,
    num_microbatches: int,
    partitioner: Partitioner,
    topology: str | None = None,
    units: int | None = None,
) -> Plan:
    """A reward, or an ensemble: one program a step."""
    on = _on(partitioner, topology)
    size = _batch_size(on, dataset, units, num_microbatches)
    params, axes = _base(base, on)
    specs = list(spec) if isinstance(spec, Sequence) else [spec]
    keys = {f'reward_{i}': _key() for i in range(len(specs))}
    create = functools.partial(train_reward.initial, specs, optimizer, base.network.config.emb_dim, None)
    shapes = jax.eval_shape(create, keys, params)
    shardings = {role: on.state(state, axes, optimizer) for role, state in shapes.items()}
    state = _placed(shapes, shardings)
    kinds = {'pairs': (Responses, 2), 'thumbs': (Thumbs, 1)}
    batch = []
    for config in dataset.each():
        kind, K = kinds[datasets.reward_kind(config.mixture_or_task_name)]
        one = _responses(on, size, K, dataset.task_feature_lengths)
        batch.append(one if kind is Responses else Thumbs(**vars(one), labels=_array(on, (size, K), jnp.float32)))
    params = None if all(one.tuning == 'full' for one in specs) else params
    step = train_reward.compiled(base.network, optimizer, num_microbatches, shardings)
    alive = {
        'base': params,
        'adapters': [one.adapter for one in state.values()],
        'optimizer': [one.opt_state for one in state.values()],
        'data': batch,
    }
    args = params, state, dict.fromkeys(keys, batch), keys
    return Plan('reward', on, size, [Program('reward step', step, args, alive)])


def policy(
    base: BaseConfig,
    dataset: DatasetConfig,
    spec: Spec,
    optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
    reward: Sequence[LearnedReward | TextReward],
    sampling: SamplingConfig,
    algorithm: Algorithm,
    kl: KLConfig,
    shaping: Sequence[steps.Shaping],
    entropy_bonus: float,
    anchor_ema: float,
    shared_base: bool,
    num_microbatches: int,
    partitioner: Partitioner,
    topology: str | None = None,
    units: int | None = None,
) -> Plan:
    """The RL of a policy: each program of a step. A learned reward is taken to be tuned as the policy is."""
    on = _on(partitioner, topology)
    split = algorithm.minibatches, 'BATCH_SIZE / minibatches'
    size = _batch_size(on, dataset, units, num_microbatches, *split)
    params, axes = _base(base, on)
    of = {role: params if shared_base else _copy(params) for role in learner.ROLES}
    txs, network, width = (optimizer, value_optimizer), base.network, base.network.config.emb_dim
    create = functools.partial(learner.initial, spec, txs, algorithm, kl, anchor_ema, width)
    shapes = jax.eval_shape(create, _key(), params)
    shardings = learner.layout(shapes, txs, axes, on)
    state = _placed(shapes, shardings)
    learned = [source for source in reward if isinstance(source, LearnedReward)]
    members = []
    for _ in learned:
        create = functools.partial(states.create, spec=spec, tx=optax.sgd(1.0), head=(width, 1.0))
        cast = lambda key, base, create=create: scoring.frozen(create(key, base).adapter, base)  # noqa: E731
        member = jax.eval_shape(cast, _key(), params)
        members.append(_placed(member, on.tree(partitioning.adapter_axes(member, axes))))
    run = learner.compiled(
        network, txs, sampling, algorithm, kl, shaping, entropy_bonus, num_microbatches, EOS, shardings, on
    )
    lengths = dict(dataset.task_feature_lengths) | {'targets': sampling.max_decode_length}
    responses, K = _responses(on, size, sampling.num_samples, lengths), sampling.num_samples
    prompts = Prompts(responses.inputs, responses.inputs_mask)
    token = lambda rows: _array(on, (rows, K, sampling.max_decode_length), jnp.float32)  # noqa: E731
    rollout = Rollout(**vars(responses), logprobs=token(size))
    again = state.value is not None and steps.values_first(algorithm, state.value.adapter.dropout)
    judged = Experience(
        **vars(rollout), rewards=token(size), anchor_logprobs=token(size), values=token(size) if again else None
    )
    rows = size // algorithm.minibatches
    part = jax.tree.map(lambda x: _array(on, (rows, *x.shape[1:]), x.dtype), judged)
    scores = _array(on, (size, K), jnp.float32)
    beta = jax.ShapeDtypeStruct((), jnp.float32, sharding=on.sharding())
    roles = (of['policy'], state.policy.adapter), (of['anchor'], state.anchor)
    trained = [one for one in (state.policy, state.value) if one is not None]
    alive = {
        # Full tuning's anchor and policy's base are one tree: the policy's own weights are its adapter.
        'base': list(of.values()),
        'adapters': [[one.adapter for one in trained], state.anchor, members],
        'optimizer': [one.opt_state for one in trained],
    }
    here = lambda *held: alive | {'data': held}  # noqa: E731
    times = algorithm.epochs * algorithm.minibatches
    programs = [
        Program(
            'sample', run.sample, (of['policy'], state.policy.adapter, prompts, _key(), sampling), here(prompts),
            turns=sampling.max_decode_length - 1,
        )
    ]  # fmt: skip
    for source, member in zip(learned, members):
        judge = scoring.compiled(network, getattr(source, 'aggregate', ensembles.mean), on)
        programs.append(Program('score', judge, (of['reward'], [member], rollout), here(rollout)))
    programs.append(Program('experience', run.experience, (*roles, rollout, scores, beta), here(rollout, scores)))
    if again:
        programs.append(Program('values', run.values, (of['value'], state.value.adapter, judged), here(judged)))
    values = None
    if algorithm.has_value:
        values, args = token(rows), (of['value'], state.value, part, _key())
        programs.append(Program('value step', run.value_step, args, here(judged, part), times=times))
    args = of['policy'], roles[1], state.policy, part, values, beta, _key()
    programs.append(Program('policy step', run.policy_step, args, here(judged, part, values), times=times))
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


def _state(
    create: Callable[..., TrainState], params: PyTree, axes: PyTree, tx: optax.GradientTransformation, on: Partitioner
) -> tuple[TrainState, TrainState]:
    shapes = jax.eval_shape(create, _key(), params)
    shardings = on.state(shapes, axes, tx)
    return _placed(shapes, shardings), shardings


def _placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


def _copy(tree: PyTree) -> PyTree:
    """The same shapes as arrays of their own."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _array(on: Partitioner, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
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
