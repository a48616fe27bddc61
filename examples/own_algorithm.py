"""An algorithm of one's own: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) in one dataclass, on the offline toy task.

    python examples/own_algorithm.py

It is GRPO without its two biases: the advantage is not divided by the group's standard deviation, and the sum over a
response's tokens is not divided by the response's length. The class needs only what `perl_jax.Algorithm` lists.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

import perl_jax
from perl_jax import masked
from perl_jax.data import datasets
from perl_jax.rl import losses, steps
from perl_jax.tasks import toy  # noqa: F401 (registers the task)


@dataclasses.dataclass(frozen=True)
class DrGRPO:
    """A = G_k - mean_j G_j,   L = -1/(K R) sum_k sum_t min(w A, clip(w, 1 - eps, 1 + eps) A),   w = pi / pi_old."""

    clip: float = 0.2
    epochs: int = 1
    minibatches: int = 2

    has_value = False
    min_samples = 2
    whole_batch = False

    def advantages(self, rewards, values, mask):
        """[B, K, R]: the same at every token of a response."""
        totals = masked.total(rewards, mask)  # G [B, K]
        return jnp.broadcast_to((totals - totals.mean(-1, keepdims=True))[..., None], rewards.shape)

    def policy_loss(self, logprobs, old_logprobs, advantages):
        """[B, K, R]."""
        return losses.clipped(logprobs, old_logprobs, advantages, self.clip)

    def weights(self, mask):
        """[B, K, R]: a constant for each token, whatever the length of its response."""
        return mask / mask.size


def echo(prompt, response, example):
    """The share of the response's words that the order has too."""
    words = response.split()
    return sum(word in prompt.split() for word in words) / max(len(words), 1)


def main(num_steps=20):
    """Train the policy from random weights. Returns the mean reward of each step."""
    B = 16
    stream = datasets.stream(
        datasets.DatasetConfig('toy_prompts', {'inputs': 40}, batch_size=B, limit=512), 'prompts', seed=0
    )
    config = perl_jax.DecoderConfig(
        vocab_size=stream.vocabulary.vocab_size, num_layers=2, emb_dim=64, num_heads=4, num_kv_heads=4, head_dim=16,
        mlp_dim=128,
    )  # fmt: skip
    objective = perl_jax.Objective(
        algorithm=DrGRPO(),
        kl=perl_jax.KLConfig(beta=0.0),
        sampling=perl_jax.SamplingConfig(num_samples=8, max_decode_length=12),
    )
    tuning, partitioner = perl_jax.Tuning(perl_jax.FullSpec(), optax.adam(1e-2)), perl_jax.Partitioner()
    with partitioner.scope():
        network, base = perl_jax.load_base(None, perl_jax.Decoder(config))  # random weights
        score = perl_jax.TextReward(echo).scorer(network, base, partitioner, stream.vocabulary)
        learner = perl_jax.make_learner(
            network=network, objective=objective, tuning=tuning, eos_ids=stream.eos_ids, partitioner=partitioner
        )
        roles, key = perl_jax.Roles.sharing(base.params), jax.random.key(0)
        state, history = learner.init(key, base.params), []
        for step in range(num_steps):
            prompts, examples = stream(step)
            policy, anchor = (roles.policy, state.policy.adapter), (roles.anchor, None)
            draw = jax.random.fold_in(key, step)
            rollout = learner.sample(*policy, partitioner.batch(prompts), draw, objective.sampling)
            scores, _ = score(rollout, examples)
            experience, _ = learner.experience(
                policy=policy, anchor=anchor, rollout=rollout, scores=scores, beta=state.beta
            )
            indices = steps.minibatch_indices(objective, B, 0, step)  # the prompts of each minibatch
            state, metrics = perl_jax.learn(learner, roles, state, experience, indices, key)
            history.append(float(scores.mean()))
            print(f'step {step}: reward {history[-1]:.3f}, ratios clipped {float(metrics["ratio/clipped"]):.1%}')
    return history


if __name__ == '__main__':
    main()
