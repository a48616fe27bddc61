"""One RL step of a policy on random prompts, timed: sample, score, KL to the anchor, learn. One line of JSON.

    python benchmarks/policy_step.py                         size S, REINFORCE with a value baseline, 2 answers a prompt
    python benchmarks/policy_step.py --algorithm=grpo        as the peers' group baseline
    python benchmarks/policy_step.py --gin_file=models/smollm2_135m.gin     of a model, or a recipe
    python benchmarks/policy_step.py --tuning=full           a copy each for policy, value, anchor and reward
    python benchmarks/policy_step.py --ends                  answers end after a third of --response on average

The programs are those that a run compiles (rl/learner.py). Without --ends no answer ends early. With --buckets
ten more steps go before those that are timed, to compile for each fill, and FLOPs are of the padded step.
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
from measure import Passed

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


def objective_of(args: argparse.Namespace) -> Objective:
    """What the flags say that the policy learns by."""
    sampling = SamplingConfig(num_samples=args.responses, max_decode_length=args.response)
    return Objective(ALGORITHMS[args.algorithm], KL[args.algorithm], sampling, value=measure.tuning(args))


def learner_of(args: argparse.Namespace, model: nn.Module, on: Partitioner) -> Learner:
    """The programs of a run."""
    eos = EOS if args.ends else model.config.vocab_size  # which is no token
    return make_learner(
        network=model, objective=objective_of(args), tuning=measure.tuning(args), eos_ids=eos, partitioner=on,
        length_buckets=args.buckets,
    )  # fmt: skip


def step_of(args: argparse.Namespace, model: nn.Module, params: PyTree, judge: lora.Adapter, on: Partitioner):
    """step(state, prompts, rng, passed) -> state, metrics, as the loop of a run dispatches it.

    `passed(part, arrays)` is called after each of its three parts.
    """
    learner, roles = learner_of(args, model, on), Roles.sharing(params)
    objective, score = learner.objective, scoring.compiled(model, lambda scores: scores[0], on)

    def step(state: PolicyState, prompts: Prompts, rng: jax.Array, passed: Passed = lambda part, done: None):
        policy, anchor = (roles.policy, state.policy.adapter), (roles.anchor, None)
        turns = steps.turns(objective, len(prompts.inputs), args.seed, 0)
        rollout = learner.fit(learner.sample(*policy, prompts, rng, objective.sampling), turns)
        passed('generation', rollout)
        scores, _ = score(roles.reward, [judge], rollout)
        experience, metrics = learner.experience(
            policy=policy, anchor=anchor, rollout=rollout, scores=scores, beta=state.beta
        )
        passed('scoring', experience)
        state, more = learn(learner, roles, state, experience, turns, KEY)
        passed('learning', state)
        return state, metrics | more

    return step


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags of both benchmarks, and those of a policy."""
    flags = measure.parser(doc)
    flags.add_argument('--algorithm', choices=ALGORITHMS, default='reinforce')
    flags.add_argument('--ends', action='store_true', help='an EOS is drawn once in R / 3 tokens')
    flags.add_argument('--buckets', type=int, default=1, help='LENGTH_BUCKETS of a run')
    return flags


def initial(
    args: argparse.Namespace, model: nn.Module, params: PyTree, on: Partitioner
) -> tuple[PolicyState, lora.Adapter]:
    """The state at step 0, and the reward."""
    reward = lora.with_head(measure.spec(args).init(KEY, params), KEY, model.config.emb_dim, 1.0)
    return learner_of(args, model, on).init(KEY, params), reward


def main() -> None:
    args = measure.parsed(parser(__doc__))
    model, on = measure.network(args), Partitioner()
    with on.scope():
        params = measure.base(args, model)
        if args.ends:
            params = measure.ending(params, EOS, 3 / args.response)
        state, judge = initial(args, model, params, on)
        prompts = on.batch(measure.prompts(args, model.config.vocab_size))
        step = step_of(args, model, params, judge, on)
        metrics, before = {}, memory.programs()

        def once(i: int, *passed: Passed) -> Any:
            nonlocal state, metrics
            state, metrics = step(state, prompts, jax.random.fold_in(KEY, i), *passed)
            return state, metrics

        seconds = measure.timed(once, args.steps, 2 if args.buckets == 1 else 12)  # a program for each fill
        shares = measure.shares(once, 5)
        padded = argparse.Namespace(**vars(args) | {'buckets': 1})
        plain = step_of(padded, measure.without_remat(model), params, judge, on)
        products = flops.count(jax.make_jaxpr(plain)(state, prompts, KEY).jaxpr, args.response - 1).total
    episodes, length = args.batch * args.responses, float(metrics['length/mean'])
    more = {
        'episodes_per_second': episodes / seconds['median'],
        'generated_per_second': episodes * length / seconds['median'],
        'mean_length': length,
        'grad_norm': float(metrics['grad_norm/policy']),
        'shares': shares,
    }
    tokens = round(args.batch * args.prompt + episodes * length)
    print(json.dumps(measure.result(args, model.config.dtype, seconds, tokens, products, before, **more)))


if __name__ == '__main__':
    main()
