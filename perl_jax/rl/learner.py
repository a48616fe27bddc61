"""The RL of a policy as it is compiled: what each program is given and gives up, and where its results lie.

The loop (train/policy.py) runs these programs; the plan (plan/) compiles them for a TPU that is not there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import PyTree

from perl_jax import sharded
from perl_jax.models import lora, unpadding
from perl_jax.optim import train_state
from perl_jax.parallel import partitioning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rl import anchors, steps
from perl_jax.rl.algorithms import Algorithm
from perl_jax.rl.kl import KLConfig
from perl_jax.rl.sampling import SamplingConfig, sample
from perl_jax.types import Experience, Metrics, PolicyState, Rollout

ROLES = ('policy', 'value', 'anchor', 'reward')
Transformations = tuple[optax.GradientTransformation, optax.GradientTransformation]  # of policy and value
Spec = lora.LoraSpec | lora.FullSpec


def initial(
    spec: Spec,
    txs: Transformations,
    algorithm: Algorithm,
    kl: KLConfig,
    anchor_ema: float,
    width: int,
    key: jax.Array,
    base: PyTree,
) -> PolicyState:
    """The state at step 0. Pure; `width` is D."""
    policy, value, anchor = train_state.create(key, base, spec, txs[0]), None, None
    if algorithm.has_value:
        value = train_state.create(jax.random.fold_in(key, 1), base, spec, txs[1], (width, 0))
    if anchor_ema:
        anchor = spec.init(jax.random.fold_in(key, 3), base)
    return PolicyState(policy, jnp.float32(kl.beta), value, anchor)


def layout(state: PolicyState, txs: Transformations, axes: PyTree, partitioner: Partitioner) -> PolicyState:
    """The shardings of a state (arrays or shapes)."""
    return PolicyState(
        policy=partitioner.state(state.policy, axes, txs[0]),
        beta=partitioner.sharding(),
        value=state.value and partitioner.state(state.value, axes, txs[1]),
        anchor=state.anchor and partitioner.tree(partitioning.adapter_axes(state.anchor, axes)),
    )


@dataclasses.dataclass(frozen=True)
class Programs:
    """Jitted functions, but for `fit`; the names of what they take are those of rl/steps.py.

    sample: (base, adapter, prompts, rng, SamplingConfig) -> Rollout
    fit: (rollout, turns of steps.py) -> the rollout, saying its fill (unpadding.py) if there are buckets: the host
      waits
    experience: (policy role, anchor role, rollout, scores, beta) -> Experience, metrics
    values: (base, adapter, experience) -> [B, K, R]
    value_step: (base, state, experience, rng) -> state, values, metrics
    policy_step: (base, anchor role, state, experience, values, beta, rng) -> state, metrics
    follow: (anchor, policy adapter, mu) -> anchor
    """

    sample: Callable[..., Any]
    fit: Callable[[Rollout, np.ndarray], Rollout]
    experience: Callable[..., Any]
    values: Callable[..., Any]
    value_step: Callable[..., Any]
    policy_step: Callable[..., Any]
    follow: Callable[..., Any]


def compiled(
    network: nn.Module,
    txs: Transformations,
    sampling: SamplingConfig,
    algorithm: Algorithm,
    kl: KLConfig,
    shaping: Sequence[steps.Shaping],
    entropy_bonus: float,
    num_microbatches: int,
    eos_ids: int | Sequence[int],
    shardings: PolicyState,
    partitioner: Partitioner,
    length_buckets: int = 1,
) -> Programs:
    """The programs of a run. States are donated, rollouts are split over the data axes as their prompts are."""
    batch = partitioner.sharding('batch')
    value_step = functools.partial(steps.value_step, network, algorithm, txs[1], num_microbatches=num_microbatches)
    policy_step = functools.partial(
        steps.policy_step, network, algorithm, kl, entropy_bonus, sampling.temperature, txs[0],
        num_microbatches=num_microbatches,
    )  # fmt: skip

    @functools.partial(jax.jit, out_shardings=partitioner.sharding())
    def count(rollout: Rollout, turns: jax.Array) -> tuple[jax.Array, jax.Array]:
        prompts, responses = rollout.inputs_mask, rollout.targets_mask.reshape(len(rollout.targets), -1)
        real, shape = (prompts.sum(-1), responses.sum(-1)), (prompts.shape[-1], responses.shape[-1])
        groups, parts = sharded.partitions('batch'), (x[turns.ravel()] for x in real)
        whole = unpadding.needed(*real, *shape, groups, 1, length_buckets)  # as it is judged
        each = unpadding.needed(*parts, *shape, len(turns) * groups, num_microbatches, length_buckets)
        return jax.tree.map(jnp.maximum, whole, each)

    def fit(rollout: Rollout, turns: np.ndarray) -> Rollout:
        if length_buckets == 1:
            return rollout
        return unpadding.filled(rollout, jax.device_get(count(rollout, turns)), length_buckets)

    return Programs(
        sample=jax.jit(
            lambda base, adapter, prompts, rng, config: sample(
                network, lora.bind(base, adapter), prompts, rng, eos_ids, config
            ),
            static_argnums=4,
            out_shardings=batch,
        ),
        fit=fit,
        experience=jax.jit(
            functools.partial(steps.experience, network, kl, shaping, eos_ids, sampling), out_shardings=(batch, None)
        ),
        values=jax.jit(functools.partial(steps.values, network), out_shardings=batch),
        value_step=jax.jit(value_step, donate_argnums=1, out_shardings=(shardings.value, batch, None)),
        policy_step=jax.jit(policy_step, donate_argnums=2, out_shardings=(shardings.policy, None)),
        follow=jax.jit(anchors.follow, donate_argnums=0, out_shardings=shardings.anchor),
    )


def learn(
    programs: Programs,
    algorithm: Algorithm,
    of: Mapping[str, PyTree],
    state: PolicyState,
    anchor: steps.Role,
    experience: Experience,
    turns: np.ndarray,
    key: jax.Array,
) -> tuple[PolicyState, Metrics]:
    """All that is learned from one rollout, in these `turns` (rl/steps.py); `of` holds the base of each role.

    The metrics are of the last update.
    """
    values, metrics = None, {}
    if state.value is not None and steps.values_first(algorithm, state.value.adapter.dropout):
        experience = experience.replace(values=programs.values(of['value'], state.value.adapter, experience))
    for batch in steps.updates(experience, turns):
        if algorithm.has_value:
            value, values, more = programs.value_step(of['value'], state.value, batch, key)
            state, metrics = state.replace(value=value), metrics | more
        policy, more = programs.policy_step(of['policy'], anchor, state.policy, batch, values, state.beta, key)
        state, metrics = state.replace(policy=policy), metrics | more
    return state, metrics
