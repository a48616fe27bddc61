"""Times one RL step on random prompts: sampling, scoring, KL to the anchor, learning. Prints one JSON line.

    python benchmarks/policy_step.py                         size S, REINFORCE with a value baseline, 2 answers a prompt
    python benchmarks/policy_step.py --algorithm=grpo        the peers' algorithm
    python benchmarks/policy_step.py --gin_file=models/smollm2_135m.gin     another model, or a recipe
    python benchmarks/policy_step.py --tuning=full           separate copies for policy, value, anchor and reward
    python benchmarks/policy_step.py --ends                  answers end after a third of --response on average

The programs are those that a run compiles (rl/learner.py). Without --ends no answer ends early. With --buckets there
are ten more warm-up steps, to compile a program for each `fill`, and FLOPs are those of the padded step.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from perl_jax.parallel import startup
from perl_jax.rl.learner import Learner, learn, make_learner
from perl_jax.rl.objective import Objective
from perl_jax.types import Roles

if __name__ == '__main__':  # before JAX
    startup.begin()

import jax
import measure
from flax import linen as nn
from jaxtyping import PyTree
from measure import RecordFn

from perl_jax.models import lora
from perl_jax.parallel import memory
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import scoring
from perl_jax.rl import steps
from perl_jax.rl.algorithms.grpo import GRPO
from perl_jax.rl.algorithms.ppo import PPO
from perl_jax.rl.algorithms.reinforce import Reinforce
from perl_jax.rl.algorithms.rloo import RLOO
from perl_jax.rl.kl import KLConfig
from perl_jax.rl.sampling import SamplingConfig
from perl_jax.tools.plan import flops
from perl_jax.types import PolicyState, Prompts

ALGORITHMS = {'reinforce': Reinforce(), 'rloo': RLOO(), 'grpo': GRPO(), 'ppo': PPO()}
KL = dict.fromkeys(ALGORITHMS, KLConfig()) | {'grpo': KLConfig(estimator='k3', place='loss')}
EOS, KEY = 1, jax.random.key(0)


def make_objective(args: argparse.Namespace) -> Objective:
    """Return the objective that the flags specify."""
    sampling = SamplingConfig(num_samples=args.responses, max_decode_length=args.response)
    return Objective(ALGORITHMS[args.algorithm], KL[args.algorithm], sampling, value=measure.adamw_tuning(args))


def make_step_learner(args: argparse.Namespace, model: nn.Module, partitioner: Partitioner) -> Learner:
    """Return the jitted functions of a run."""
    eos_id = EOS if args.ends else model.config.vocab_size  # an id that is never sampled
    return make_learner(
        network=model, objective=make_objective(args), tuning=measure.adamw_tuning(args), eos_ids=eos_id,
        partitioner=partitioner, length_buckets=args.buckets,
    )  # fmt: skip


def make_step(
    args: argparse.Namespace, model: nn.Module, params: PyTree, reward_adapter: lora.Adapter, partitioner: Partitioner
):
    """Return step(state, prompts, rng, record) -> state, metrics, as in the loop of a run.

    The step calls `record(name, outputs)` after each of its three parts.
    """
    learner, roles = make_step_learner(args, model, partitioner), Roles.sharing(params)
    objective, score_fn = learner.objective, scoring.make_score_fn(model, lambda scores: scores[0], partitioner)

    def step(state: PolicyState, prompts: Prompts, rng: jax.Array, record: RecordFn = lambda name, outputs: None):
        policy, anchor = (roles.policy, state.policy.adapter), (roles.anchor, None)
        minibatch_indices = steps.minibatch_indices(objective, len(prompts.inputs), args.seed, 0)
        rollout = learner.with_fill(learner.sample(*policy, prompts, rng, objective.sampling), minibatch_indices)
        record('generation', rollout)
        scores, _ = score_fn(roles.reward, [reward_adapter], rollout)
        experience, metrics = learner.experience(
            policy=policy, anchor=anchor, rollout=rollout, scores=scores, beta=state.beta
        )
        record('scoring', experience)
        state, learn_metrics = learn(learner, roles, state, experience, minibatch_indices, KEY)
        record('learning', state)
        return state, metrics | learn_metrics

    return step


def parser(doc: str) -> argparse.ArgumentParser:
    """Return the parser with the common flags and those of a policy."""
    flags = measure.parser(doc)
    flags.add_argument('--algorithm', choices=ALGORITHMS, default='reinforce')
    flags.add_argument('--ends', action='store_true', help='sample an EOS every R / 3 tokens on average')
    flags.add_argument('--buckets', type=int, default=1, help='LENGTH_BUCKETS of a run')
    return flags


def initial(
    args: argparse.Namespace, model: nn.Module, params: PyTree, partitioner: Partitioner
) -> tuple[PolicyState, lora.Adapter]:
    """Return the state at step 0 and the adapter of the reward."""
    reward = lora.with_head(measure.spec(args).init(KEY, params), KEY, model.config.emb_dim, 1.0)
    return make_step_learner(args, model, partitioner).init(KEY, params), reward


def main() -> None:
    args = measure.parse_args(parser(__doc__))
    model, partitioner = measure.network(args), Partitioner()
    with partitioner.scope():
        params = measure.random_base(args, model)
        if args.ends:
            params = measure.with_eos_probability(params, EOS, 3 / args.response)
        state, reward_adapter = initial(args, model, params, partitioner)
        prompts = partitioner.batch(measure.prompts(args, model.config.vocab_size))
        step = make_step(args, model, params, reward_adapter, partitioner)
        metrics, programs_before = {}, memory.programs()

        def run_step(i: int, *record: RecordFn) -> Any:
            nonlocal state, metrics
            state, metrics = step(state, prompts, jax.random.fold_in(KEY, i), *record)
            return state, metrics

        seconds = measure.timed(
            run_step, args.steps, 2 if args.buckets == 1 else 12
        )  # warm-up for each value of `fill`
        shares = measure.time_shares(run_step, 5)
        padded = argparse.Namespace(**vars(args) | {'buckets': 1})
        padded_step = make_step(padded, measure.without_remat(model), params, reward_adapter, partitioner)
        step_flops = flops.count(jax.make_jaxpr(padded_step)(state, prompts, KEY).jaxpr, args.response - 1).total
    episodes, length = args.batch * args.responses, float(metrics['length/mean'])
    extra_figures = {
        'episodes_per_second': episodes / seconds['median'],
        'generated_per_second': episodes * length / seconds['median'],
        'mean_length': length,
        'grad_norm': float(metrics['grad_norm/policy']),
        'shares': shares,
    }
    tokens = round(args.batch * args.prompt + episodes * length)
    print(
        json.dumps(
            measure.result(args, model.config.dtype, seconds, tokens, step_flops, programs_before, **extra_figures)
        )
    )


if __name__ == '__main__':
    main()
