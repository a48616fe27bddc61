"""One RL step of a policy on random prompts, timed: sample, score, KL to the anchor, learn. One line of JSON.

    python benchmarks/policy_step.py                         size S, REINFORCE with a value baseline, 2 answers a prompt
    python benchmarks/policy_step.py --algorithm=grpo        as the peers' group baseline
    python benchmarks/policy_step.py --tuning=full           a copy each for policy, value, anchor and reward
    python benchmarks/policy_step.py --ends                  answers end after a third of --response on average

The programs are those that a run compiles (learner.compiled). Without --ends no answer ends early. With --buckets
ten more steps go before those that are timed, to compile for each fill, and FLOPs are of the padded step.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from perl_jax.parallel import startup

if __name__ == '__main__':  # before JAX
    startup.begin()

import jax
import measure
from jaxtyping import PyTree
from measure import Passed

from perl_jax.models import lora
from perl_jax.models.decoder import Decoder
from perl_jax.parallel import memory
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import scoring
from perl_jax.rl import learner, steps
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


def step_of(
    args: argparse.Namespace, model: Decoder, held: PyTree, judge: lora.Adapter, shardings: PolicyState, on: Partitioner
):
    """step(state, prompts, rng, passed) -> state, metrics, as the loop of a run dispatches it.

    `passed(part, arrays)` is called after each of its three parts.
    """
    algorithm, txs = ALGORITHMS[args.algorithm], (measure.optimizer(), measure.optimizer())
    sampling = SamplingConfig(num_samples=args.responses, max_decode_length=args.response)
    eos = EOS if args.ends else args.vocab  # which is no token
    programs = learner.compiled(
        model, txs, sampling, algorithm, KL[args.algorithm], (), 0.0, args.microbatches, eos, shardings, on,
        args.buckets,
    )  # fmt: skip
    score, of = scoring.compiled(model, lambda scores: scores[0], on), dict.fromkeys(learner.ROLES, held)

    def step(state: PolicyState, prompts: Prompts, rng: jax.Array, passed: Passed = lambda part, done: None):
        policy, anchor = (of['policy'], state.policy.adapter), (of['anchor'], None)
        turns = steps.turns(args.seed, 0, len(prompts.inputs), algorithm.epochs, algorithm.minibatches)
        rollout = programs.fit(programs.sample(*policy, prompts, rng, sampling), turns)
        passed('generation', rollout)
        scores, _ = score(of['reward'], [judge], rollout)
        experience, metrics = programs.experience(policy, anchor, rollout, scores, state.beta)
        passed('scoring', experience)
        state, more = learner.learn(programs, algorithm, of, state, anchor, experience, turns, KEY)
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


def initial(args: argparse.Namespace, params: PyTree) -> tuple[PolicyState, lora.Adapter]:
    """The state at step 0, and the reward."""
    algorithm, txs, spec = ALGORITHMS[args.algorithm], (measure.optimizer(), measure.optimizer()), measure.spec(args)
    state = learner.initial(spec, txs, algorithm, KL[args.algorithm], 0.0, args.d_model, KEY, params)
    return state, lora.with_head(spec.init(KEY, params), KEY, args.d_model, 1.0)


def main() -> None:
    args = parser(__doc__).parse_args()
    model, on = measure.network(args), Partitioner()
    with on.scope():
        params = measure.base(args, model)
        if args.ends:
            params = measure.ending(params, EOS, 3 / args.response)
        state, judge = initial(args, params)
        shardings, prompts = jax.tree.map(lambda x: x.sharding, state), on.batch(measure.prompts(args))
        step = step_of(args, model, params, judge, shardings, on)
        metrics, before = {}, memory.programs()

        def once(i: int, *passed: Passed) -> Any:
            nonlocal state, metrics
            state, metrics = step(state, prompts, jax.random.fold_in(KEY, i), *passed)
            return state, metrics

        seconds = measure.timed(once, args.steps, 2 if args.buckets == 1 else 12)  # a program for each fill
        shares = measure.shares(once, 5)
        padded = argparse.Namespace(**vars(args) | {'buckets': 1})
        plain = step_of(padded, measure.network(args, remat='none'), params, judge, shardings, on)
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
    print(json.dumps(measure.result(args, seconds, tokens, products, before, **more)))


if __name__ == '__main__':
    main()
