"""The RL of a policy, whatever the algorithm: judging a rollout, and the two steps that learn from it.

Four roles, each a base and an adapter: policy, anchor, value and reward. They share one base: bind(base, policy),
bind(base, value), bind(base, reward) and bind(base, None), the anchor. That each step is given its own role's base is
for the comparators, which keep copies (the paper, section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree

from perl_jax import masked, sharded
from perl_jax.models import logprobs, lora, unpadding
from perl_jax.optim import accumulate, train_state
from perl_jax.rl import advantages, kl, losses
from perl_jax.rl.algorithms import ValueAlgorithm
from perl_jax.rl.objective import Objective
from perl_jax.types import Experience, Metrics, Responses, Rollout, TrainState

Role = tuple[PyTree, lora.Adapter | None]  # what lora.bind joins
SHUFFLE = 2**31 + 1  # no other draw has it beside the seed: streams.py


def experience(
    network: nn.Module,
    objective: Objective,
    *,
    policy: Role,
    anchor: Role,
    rollout: Rollout,
    scores: Float[Array, 'B K'],
    beta: Float[Array, ''],
    eos_ids: int | Sequence[int],
) -> tuple[Experience, Metrics]:
    """Judge a rollout: scores shaped, KL to the anchor, and the reward of every token. Pure.

    The policy is softmax(logits / temperature), and so is the anchor. The sampler's own log-probs are the policy's,
    unless top-k or top-p cut its distribution: then they are computed again.
    """
    sampling, mask = objective.sampling, rollout.targets_mask
    variables, anchor_variables, temperature = lora.bind(*policy), lora.bind(*anchor), sampling.temperature
    if sampling.truncates:
        whole = logprobs.response_logprobs(network, variables, rollout, temperature)
        rollout = rollout.replace(logprobs=jnp.where(mask, whole, 0))
    anchor_hidden = logprobs.response_hidden(network, anchor_variables, rollout)
    anchor_logprobs = logprobs.token_logprobs(network, anchor_variables, anchor_hidden, rollout, temperature)
    anchor_logprobs = jnp.where(mask, anchor_logprobs, 0)
    log_ratio = kl.k1(rollout.logprobs, anchor_logprobs)
    if objective.kl.in_loss:
        penalty = jnp.zeros_like(log_ratio)
    elif objective.kl.estimator == 'full':
        hidden = logprobs.response_hidden(network, variables, rollout)
        penalty = logprobs.token_kl(
            network, variables, hidden, anchor_variables, anchor_hidden, rollout, temperature=temperature
        )
    else:
        penalty = kl.ESTIMATORS[objective.kl.estimator](rollout.logprobs, anchor_logprobs)
    shaped = scores
    for shape in objective.shaping:
        shaped = shape(shaped, rollout, eos_ids)
    rewards = advantages.token_rewards(shaped, penalty, mask, beta)
    metrics = {
        'reward/score': scores.mean(),
        'reward/total': masked.total(rewards, mask).mean(),
        'kl/anchor': masked.total(log_ratio, mask).mean(),
        'entropy/sampled': -masked.mean(rollout.logprobs, mask),
        'reward/equal_groups': advantages.equal(scores).mean(),
        'length/mean': masked.lengths(mask).mean(),
        'tokens': mask.sum(),
    }
    if objective.shaping:
        metrics['reward/shaped'] = shaped.mean()
    return Experience(**vars(rollout), rewards=rewards, anchor_logprobs=anchor_logprobs), metrics


def values_first(objective: Objective, dropout: float) -> bool:
    """Whether `values` are computed before a rollout is learned from, rather than taken from the value's own step.

    A baseline that several updates share has to stay as it was; and one under dropout would be noise.
    """
    return objective.algorithm.has_value and (objective.updates > 1 or dropout > 0)


def values(network: nn.Module, base: PyTree, adapter: lora.Adapter, batch: Responses) -> Float[Array, 'B K R']:
    """V(X_t) before each token, without dropout; see `values_first`."""
    variables = lora.bind(base, adapter)
    return unpadding.pad(lora.readout(variables, logprobs.response_hidden(network, variables, batch)), batch)


def turns(objective: Objective, size: int, seed: int, step: int) -> np.ndarray:
    """Which prompts of a rollout of `size` each update learns from, int [epochs * minibatches, size / minibatches].

    Each epoch goes over all of them, shuffled anew by (seed, step, epoch); a batch that is not split stays in order.
    """
    epochs, minibatches = objective.algorithm.epochs, objective.algorithm.minibatches
    order = np.tile(np.arange(size, dtype=np.int32), (epochs, 1))
    if minibatches > 1:
        order = np.stack([np.random.default_rng([seed, SHUFFLE, step, e]).permutation(x) for e, x in enumerate(order)])
    return order.reshape(epochs * minibatches, size // minibatches)


def updates(batch: Experience, turns: np.ndarray) -> Iterator[Experience]:
    """What a rollout is learned from in turn: these of its prompts, all K responses of each."""
    for prompts in turns:
        yield batch if len(prompts) == len(batch.targets) else _part(batch, prompts)


@jax.jit
def _part(batch: Experience, prompts: Int[Array, ' b']) -> Experience:
    return jax.tree.map(lambda x: sharded.split(x[prompts], 'batch', *[None] * (x.ndim - 1)), batch)


def value_step(
    network: nn.Module,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    base: PyTree,
    state: TrainState,
    batch: Experience,
    rng: jax.Array,
    num_microbatches: int = 1,
) -> tuple[TrainState, Float[Array, 'B K R'], Metrics]:
    """One step of the value. Pure; also the values before the rollout was learned from, which are the baseline."""
    algorithm, mask, rng = objective.algorithm, batch.targets_mask, jax.random.fold_in(rng, state.step)
    assert isinstance(algorithm, ValueAlgorithm), f'{type(algorithm).__name__} learns no value'

    def loss(adapter: lora.Adapter, part: tuple[Experience, jax.Array], rng: jax.Array) -> tuple[jax.Array, Any]:
        batch, weights = part
        variables = lora.bind(base, adapter, train=True)
        hidden = logprobs.response_hidden(network, variables, batch, rngs={'dropout': rng})
        values = unpadding.pad(lora.readout(variables, hidden), batch)
        old_values = jax.lax.stop_gradient(values) if batch.values is None else batch.values
        returns = algorithm.returns(batch.rewards, old_values, batch.targets_mask)
        total = masked.weighted(algorithm.value_loss(values, old_values, returns), weights)
        return total, ({}, (old_values, returns))

    rows = batch, algorithm.weights(mask)
    total, grads, _, (old_values, returns) = accumulate.value_and_grad(loss, state.adapter, rows, num_microbatches, rng)
    metrics = {
        'loss/value': total,
        'value/explained': 1 - masked.mean((returns - old_values) ** 2, mask) / _variance(returns, mask),
        'grad_norm/value': optax.global_norm(grads),
    }
    return train_state.update(state, grads, tx), old_values, metrics


def policy_step(
    network: nn.Module,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    base: PyTree,
    anchor: Role,
    state: TrainState,
    batch: Experience,
    values: Float[Array, 'B K R'] | None,
    beta: Float[Array, ''],
    rng: jax.Array,
    num_microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
    """One step of the policy. Pure; the anchor is only asked where the whole KL is in the loss.

    `values` are those before the rollout was learned from, None where the algorithm learns none.
    """
    algorithm, kl_config, temperature = objective.algorithm, objective.kl, objective.sampling.temperature
    rng, anchor_variables = jax.random.fold_in(rng, state.step), lora.bind(*anchor)

    def loss(adapter: lora.Adapter, part: Any, rng: jax.Array) -> tuple[jax.Array, Any]:
        batch, advantage, weights, share = part
        variables, mask = lora.bind(base, adapter, train=True), batch.targets_mask
        hidden = logprobs.response_hidden(network, variables, batch, rngs={'dropout': rng})
        metrics = {}
        if objective.entropy_bonus:
            new, entropy = logprobs.token_logprobs_entropy(network, variables, hidden, batch, temperature)
            metrics['entropy/exact'] = masked.weighted(entropy, share)
        else:
            new = logprobs.token_logprobs(network, variables, hidden, batch, temperature)
        new = jnp.where(mask, new, 0)  # as the old ones: no ratio and no gradient at the padding
        tokens = algorithm.policy_loss(new, batch.logprobs, advantage)
        if kl_config.in_loss and kl_config.estimator == 'full':
            anchor_hidden = logprobs.response_hidden(network, anchor_variables, batch)
            tokens += beta * logprobs.token_kl(
                network, variables, hidden, anchor_variables, anchor_hidden, batch, temperature=temperature
            )
        elif kl_config.in_loss:
            tokens += beta * kl.ESTIMATORS[kl_config.estimator](new, batch.anchor_logprobs)
        metrics['kl/update'] = masked.weighted(batch.logprobs - new, share)
        if algorithm.clip is not None:
            outside = jnp.abs(losses.ratio(new - batch.logprobs) - 1) > algorithm.clip
            metrics['ratio/clipped'] = masked.weighted(outside, share)
        total = masked.weighted(tokens, weights)
        if objective.entropy_bonus:  # of each token, whatever the algorithm's own weights are
            total -= objective.entropy_bonus * metrics['entropy/exact']
        return total, (metrics, ())

    mask = batch.targets_mask
    rows = batch, algorithm.advantages(batch.rewards, values, mask), algorithm.weights(mask), masked.share(mask)
    total, grads, metrics, _ = accumulate.value_and_grad(loss, state.adapter, rows, num_microbatches, rng)
    metrics |= {'loss/policy': total, 'grad_norm/policy': optax.global_norm(grads)}
    return train_state.update(state, grads, tx), metrics


def _variance(x: jax.Array, mask: jax.Array) -> jax.Array:
    return masked.mean((x - masked.mean(x, mask)) ** 2, mask) + 1e-8
