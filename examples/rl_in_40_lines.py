"""RL with LoRA on a frozen base: a Hugging Face folder and a Python function in, an adapter for peft out.

    python examples/rl_in_40_lines.py hf://HuggingFaceTB/SmolLM2-135M-Instruct out

The reward wants capitals. `make_learner` and `learn` are what `perl_jax policy` runs too; a run of that command adds
tasks, evaluation, checkpoints and a log.
"""

import sys

import jax
import numpy as np
import optax

import perl_jax

PROMPTS = [f'Write a line about {x}.\n' for x in ('rain', 'tea', 'trains', 'the sea', 'bread', 'snow', 'a cat', 'jazz')]


def capitals(prompt, response, example):
    """The share of the response's characters that are capital letters."""
    return sum(c.isupper() for c in response) / max(len(response), 1)


def main(weights, output, steps=50):
    """Train, and write the adapter to the folder `output`. Returns the mean reward of each step."""
    # Everything that differs between experiments is in these three values.
    objective = perl_jax.Objective(
        algorithm=perl_jax.GRPO(),
        kl=perl_jax.KLConfig(beta=0.02, estimator='k3', place='loss'),
        sampling=perl_jax.SamplingConfig(num_samples=8, max_decode_length=24),
    )
    tuning = perl_jax.Tuning(perl_jax.LoraSpec(rank=8, alpha=16.0), optax.adam(1e-3))
    reward = perl_jax.TextReward(capitals)

    partitioner = perl_jax.Partitioner()  # all devices
    with partitioner.scope():
        # The frozen base, its tokenizer, and the prompts in tokens.
        network, base = perl_jax.load_base(weights, partitioner=partitioner)
        data = perl_jax.text_dataset(perl_jax.load_tokenizer(weights), PROMPTS, length=32)
        score = reward.scorer(network, base, partitioner, data.vocabulary)

        # One base under all roles. The learner is the compiled functions, the state all that changes.
        learner = perl_jax.make_learner(
            network=network, objective=objective, tuning=tuning, eos_ids=data.eos_ids, partitioner=partitioner
        )
        roles, key = perl_jax.Roles.sharing(base.params), jax.random.key(0)
        state, history = learner.init(key, base.params), []
        for step in range(steps):
            rows = np.random.default_rng(step).permutation(len(data))
            prompts, examples = data.rows(rows)  # [B, P]
            policy, anchor = (roles.policy, state.policy.adapter), (roles.anchor, None)
            sample_key = jax.random.fold_in(key, step)
            rollout = learner.sample(*policy, partitioner.batch(prompts), sample_key, objective.sampling)  # [B, K, R]
            scores, _ = score(rollout, examples)  # [B, K]
            experience, experience_metrics = learner.experience(
                policy=policy, anchor=anchor, rollout=rollout, scores=scores, beta=state.beta
            )
            state, _ = perl_jax.learn(learner, roles, state, experience, np.arange(len(rows))[None], key)
            history.append(float(scores.mean()))
            print(f'step {step}: reward {history[-1]:.3f}, KL {experience_metrics["kl/anchor"]:.2f} nats a response')

    perl_jax.save_peft(output, network, state.policy.adapter, weights)
    return history


if __name__ == '__main__':
    main(*sys.argv[1:3])
