"""The pure functions of an RL step, for every algorithm: rewards of a rollout, a value step and a policy step.

Four roles, each a base and an adapter: policy, anchor, value and reward. They share one base: bind(base, policy),
bind(base, value), bind(base, reward) and bind(base, None), the anchor. Each function takes the base of its own role,
because the paper's comparators keep a copy of the base for each (section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree

from perl_jax import masked, sharded
from perl_jax.models import logprobs, lora, unpadding
from perl_jax.optim import accumulate, train_state
from perl_jax.optim.accumulate import Aux
from perl_jax.rl import advantages, kl, losses
from perl_jax.rl.algorithms import ValueAlgorithm
from perl_jax.rl.objective import Objective
from perl_jax.types import Experience, Metrics, Responses, Rollout, TrainState

Role = tuple[PyTree, lora.Adapter | None]  # base and adapter, the arguments of lora.bind
SHUFFLE = 2**31 + 1  # distinguishes this draw from all others of the same seed (data/batches/order.py)


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
    """Turn a rollout and its scores into token rewards: shape the scores, and subtract the KL to the anchor. Pure.

    Policy and anchor are softmax(logits / temperature). The sampler's log-probs are the policy's, unless top-k or top-p
    truncated the distribution; then they are recomputed.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      objective: sampling, KL and shaping.
      policy: base and adapter that the rollout was sampled from.
      anchor: base and adapter of the KL's reference; None as adapter is the base itself.
      rollout: prompts and sampled responses.
      scores: float32 [B, K], not yet shaped.
      beta: float32 [], the weight of the KL.
      eos_ids: any of these tokens ends a response.

    Returns:
      The Experience, without `values`; and metrics, scalars by name: 'kl/anchor' in nats a response,
      'entropy/sampled' in nats a token, 'length/mean' in tokens a response.
    """
    sampling, mask = objective.sampling, rollout.targets_mask
    variables, anchor_variables, temperature = lora.bind(*policy), lora.bind(*anchor), sampling.temperature
    if sampling.truncates:
        full_logprobs = logprobs.response_logprobs(network, variables, rollout, temperature)
        rollout = rollout.replace(logprobs=jnp.where(mask, full_logprobs, 0))
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


def precomputes_values(objective: Objective, dropout: float) -> bool:
    """Whether the baseline is computed before the first update, rather than taken from the value's own step.

    Several updates of one rollout need the same baseline; and values computed under dropout would be noisy.

    Args:
      objective: has the algorithm.
      dropout: the dropout rate of the value's adapter.

    Returns:
      True if `values` has to be called.
    """
    return objective.algorithm.has_value and (objective.updates > 1 or dropout > 0)


def values(network: nn.Module, base: PyTree, adapter: lora.Adapter, batch: Responses) -> Float[Array, 'B K R']:
    """V(X_t) before each token, without dropout; see `precomputes_values`.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      base: the value's frozen parameters.
      adapter: the value's adapter, with a head.
      batch: prompts and responses.

    Returns:
      float32 [B, K, R], in units of the reward; any value at the padding.
    """
    variables = lora.bind(base, adapter)
    return unpadding.pad(lora.readout(variables, logprobs.response_hidden(network, variables, batch)), batch)


def minibatch_indices(objective: Objective, size: int, seed: int, step: int) -> np.ndarray:
    """The prompts of each minibatch, as indices into a rollout.

    Each epoch covers all prompts, shuffled by (seed, step, epoch). With one minibatch they stay in order.

    Args:
      objective: its algorithm has the numbers of epochs and minibatches.
      size: B, the prompts of a rollout; a multiple of the number of minibatches.
      seed: of the run.
      step: of the loop.

    Returns:
      int32 [epochs * minibatches, B / minibatches].
    """
    epochs, minibatches = objective.algorithm.epochs, objective.algorithm.minibatches
    order = np.tile(np.arange(size, dtype=np.int32), (epochs, 1))
    if minibatches > 1:
        order = np.stack([np.random.default_rng([seed, SHUFFLE, step, e]).permutation(x) for e, x in enumerate(order)])
    return order.reshape(epochs * minibatches, size // minibatches)


def minibatches(batch: Experience, indices: Int[np.ndarray, 'U n']) -> Iterator[Experience]:
    """Yield one minibatch for each row of `indices`: those prompts with all K of their responses.

    Args:
      batch: B prompts.
      indices: int [U, n], the n prompts of each of U updates. If n = B, the minibatch is `batch`, in its own order.

    Yields:
      An Experience of n prompts.
    """
    for prompts in indices:
        yield batch if len(prompts) == len(batch.targets) else _take_prompts(batch, prompts)


@jax.jit
def _take_prompts(batch: Experience, prompts: Int[Array, ' n']) -> Experience:
    # Rows taken by index could end up anywhere: each device gets an equal number of them, as of the whole batch.
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
    """One optimizer step of the value. Pure.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      objective: its algorithm is a ValueAlgorithm.
      tx: the value's optimizer.
      base: the value's frozen parameters.
      state: the value's.
      batch: experience. If it has `values`, they are the old values; else those of this step are.
      rng: a key of jax.random for dropout, the same at every step: the step is folded in.
      num_microbatches: microbatches whose gradients are accumulated, a divisor of B.

    Returns:
      The next state; the old values, float32 [B, K, R], which are the policy's baseline; metrics, float32 [] by name.
    """
    algorithm, mask, rng = objective.algorithm, batch.targets_mask, jax.random.fold_in(rng, state.step)
    assert isinstance(algorithm, ValueAlgorithm), f'{type(algorithm).__name__} learns no value'

    def loss(adapter: lora.Adapter, arrays: tuple[Experience, jax.Array], rng: jax.Array) -> tuple[jax.Array, Aux]:
        batch, weights = arrays
        variables = lora.bind(base, adapter, train=True)
        hidden = logprobs.response_hidden(network, variables, batch, rngs={'dropout': rng})
        values = unpadding.pad(lora.readout(variables, hidden), batch)
        old_values = jax.lax.stop_gradient(values) if batch.values is None else batch.values
        returns = algorithm.returns(batch.rewards, old_values, batch.targets_mask)
        total = masked.weighted(algorithm.value_loss(values, old_values, returns), weights)
        return total, Aux(sums={}, rows=(old_values, returns))

    arrays = batch, algorithm.weights(mask)
    total, grads, _, (old_values, returns) = accumulate.value_and_grad(
        loss, state.adapter, arrays, num_microbatches, rng
    )
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
    """One optimizer step of the policy. Pure. The anchor's network runs only where the full KL is in the loss.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      objective: algorithm, KL, temperature and entropy bonus.
      tx: the policy's optimizer.
      base: the policy's frozen parameters.
      anchor: base and adapter of the KL's reference; None as adapter is the base itself.
      state: the policy's.
      batch: experience.
      values: float32 [B, K, R], the baseline: the values before the first update of this rollout. None where the
        algorithm has none.
      beta: float32 [], the weight of a KL in the loss; one in the reward has its weight already.
      rng: a key of jax.random for dropout, the same at every step: the step is folded in.
      num_microbatches: microbatches whose gradients are accumulated, a divisor of B.

    Returns:
      The next state; metrics, float32 [] by name: 'kl/update' and 'entropy/exact' in nats a token, 'ratio/clipped' as a
      fraction of the tokens.
    """
    algorithm, kl_config, temperature = objective.algorithm, objective.kl, objective.sampling.temperature
    rng, anchor_variables, mask = jax.random.fold_in(rng, state.step), lora.bind(*anchor), batch.targets_mask
    # The weights are those of the whole batch, so that the losses of its microbatches add up to the batch's.
    arrays = batch, algorithm.advantages(batch.rewards, values, mask), algorithm.weights(mask), masked.share(mask)

    def loss(
        adapter: lora.Adapter, arrays: tuple[Experience, jax.Array, jax.Array, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, Aux]:
        batch, advantage, weights, share = arrays
        variables, mask = lora.bind(base, adapter, train=True), batch.targets_mask
        hidden = logprobs.response_hidden(network, variables, batch, rngs={'dropout': rng})
        metrics = {}
        if objective.entropy_bonus:
            new_logprobs, entropy = logprobs.token_logprobs_entropy(network, variables, hidden, batch, temperature)
            metrics['entropy/exact'] = masked.weighted(entropy, share)
        else:
            new_logprobs = logprobs.token_logprobs(network, variables, hidden, batch, temperature)
        # 0 as batch.logprobs: the ratio is 1 and the gradient 0 at the padding.
        new_logprobs = jnp.where(mask, new_logprobs, 0)
        tokens = algorithm.policy_loss(new_logprobs, batch.logprobs, advantage)
        if kl_config.in_loss and kl_config.estimator == 'full':
            anchor_hidden = logprobs.response_hidden(network, anchor_variables, batch)
            tokens += beta * logprobs.token_kl(
                network, variables, hidden, anchor_variables, anchor_hidden, batch, temperature=temperature
            )
        elif kl_config.in_loss:
            tokens += beta * kl.ESTIMATORS[kl_config.estimator](new_logprobs, batch.anchor_logprobs)
        metrics['kl/update'] = masked.weighted(batch.logprobs - new_logprobs, share)
        if algorithm.clip is not None:
            outside = jnp.abs(losses.ratio(new_logprobs - batch.logprobs) - 1) > algorithm.clip
            metrics['ratio/clipped'] = masked.weighted(outside.astype(share.dtype), share)
        total = masked.weighted(tokens, weights)
        if objective.entropy_bonus:  # a mean over tokens, whatever the algorithm's own weights are
            total -= objective.entropy_bonus * metrics['entropy/exact']
        return total, Aux(sums=metrics, rows=())

    total, grads, metrics, _ = accumulate.value_and_grad(loss, state.adapter, arrays, num_microbatches, rng)
    metrics |= {'loss/policy': total, 'grad_norm/policy': optax.global_norm(grads)}
    return train_state.update(state, grads, tx), metrics


def _variance(x: jax.Array, mask: jax.Array) -> jax.Array:
    return masked.mean((x - masked.mean(x, mask)) ** 2, mask) + 1e-8
