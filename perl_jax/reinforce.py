"""REINFORCE for language models with a value baseline: judging a rollout, and the step that learns from it.

    Z_t = sum_{s >= t} r_s,   r_s = -beta (log pi - log pi_anchor) at every token, + (1 - beta) R at the last
    L_policy = -sum_t log pi(A_t | X_t) stop_grad(Z_t - V(X_t)),   L_value = sum_t (Z_t - V(X_t))^2

The paper, section 2.2 and eq. 1; RLAIF (arXiv 2309.00267), appendix F. Four roles, one base:
bind(base, policy), bind(base, value), bind(base, reward) and bind(base, None), the anchor.
"""

from __future__ import annotations

import jax
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from perl_jax import advantages, lora, losses, masked, train_state
from perl_jax.logprobs import response_logprobs
from perl_jax.sampling import SamplingConfig
from perl_jax.types import Experience, Metrics, PolicyState, Rollout


def experience(
    network: nn.Module,
    base: PyTree,
    policy: lora.Adapter,
    rollout: Rollout,
    scores: Float[Array, 'B K'],
    beta: float,
    sampling: SamplingConfig,
) -> tuple[Experience, Metrics]:
    """Judge a rollout: KL to the anchor, which is `bind(base, None)`, and the return of every token. Pure.

    The policy is softmax(logits / temperature), and so is the anchor. The sampler's own log-probs are the policy's,
    unless top-k or top-p cut its distribution: then they are computed again.
    """
    temperature, mask = sampling.temperature, rollout.targets_mask
    logprobs = rollout.logprobs
    if sampling.truncates:
        logprobs = response_logprobs(network, lora.bind(base, policy), rollout, temperature)
    anchor = response_logprobs(network, lora.bind(base, None), rollout, temperature)
    rewards = advantages.token_rewards(scores, logprobs, anchor, mask, beta)
    metrics = {
        'reward/score': scores.mean(),
        'reward/total': masked.total(rewards, mask).mean(),
        'kl/anchor': masked.total(logprobs - anchor, mask).mean(),
        'entropy/sampled': -masked.mean(logprobs, mask),
        'length/mean': masked.lengths(mask).mean(),
        'tokens': mask.sum(),
    }
    fields = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
    return Experience(**fields, returns=advantages.returns(rewards)), metrics


def policy_step(
    network: nn.Module,
    txs: tuple[optax.GradientTransformation, optax.GradientTransformation],
    temperature: float,
    base: PyTree,
    state: PolicyState,
    batch: Experience,
    rng: jax.Array,
) -> tuple[PolicyState, Metrics]:
    """One step of REINFORCE and of its baseline. Pure; the baseline is the value before this step's update."""
    mask, rngs = batch.targets_mask, {'dropout': jax.random.fold_in(rng, state.policy.step)}

    def value_loss(adapter: lora.Adapter) -> tuple[jax.Array, jax.Array]:
        variables = lora.bind(base, adapter, train=True)
        hidden = network.apply(variables, batch.inputs, batch.inputs_mask, batch.targets, rngs=rngs)
        values = lora.readout(variables, hidden[..., :-1, :])
        return losses.value(values, batch.returns, mask), values

    (value, values), value_grads = jax.value_and_grad(value_loss, has_aux=True)(state.value.adapter)

    def policy_loss(adapter: lora.Adapter) -> jax.Array:
        logprobs = response_logprobs(network, lora.bind(base, adapter, train=True), batch, temperature, rngs=rngs)
        return losses.reinforce(logprobs, batch.returns - values, mask)

    policy, policy_grads = jax.value_and_grad(policy_loss)(state.policy.adapter)
    metrics = {
        'loss/policy': policy,
        'loss/value': value,
        'value/explained': 1 - masked.mean((batch.returns - values) ** 2, mask) / _variance(batch.returns, mask),
        'grad_norm/policy': optax.global_norm(policy_grads),
        'grad_norm/value': optax.global_norm(value_grads),
    }
    state = PolicyState(
        policy=train_state.update(state.policy, policy_grads, txs[0]),
        value=train_state.update(state.value, value_grads, txs[1]),
    )
    return state, metrics


def _variance(x: jax.Array, mask: jax.Array) -> jax.Array:
    return masked.mean((x - masked.mean(x, mask)) ** 2, mask) + 1e-8
