"""One training step of a reward model on random pairs, timed: one line of JSON.

    python benchmarks/reward_step.py                                    size S: 4 layers, width 256, 8 pairs of 64 + 64
    python benchmarks/reward_step.py --gin_file=models/bench_m.gin     size M; or any model, or recipe
    python benchmarks/reward_step.py --tuning=full

The step is the one that a run compiles (train_reward.compiled): loss, gradients, AdamW, metrics.
"""

from __future__ import annotations

import functools
import json

from perl_jax.parallel import startup

if __name__ == '__main__':  # before JAX
    startup.begin()

import jax
import measure

from perl_jax.parallel import memory
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.tools.plan import flops
from perl_jax.train import reward as train_reward


def main() -> None:
    args = measure.parsed(measure.parser(__doc__))
    if args.responses != 2:
        raise SystemExit('reward_step: a pair has two responses; leave --responses at 2')
    model, tuning, on = measure.network(args), measure.tuning(args), Partitioner()
    tx = tuning.tx('OPTIMIZER')
    batch = jax.tree.map(jax.numpy.asarray, measure.responses(args, model.config.vocab_size))
    batches, keys = {'reward': [batch]}, {'reward': jax.random.key(0)}
    with on.scope():
        params = measure.base(args, model)
        states = train_reward.initial(tuning, model.config.emb_dim, None, keys, params)
        held = params if args.tuning == 'lora' else None
        del params
        step = train_reward.compiled(model, tx, tuning.num_microbatches, jax.tree.map(lambda x: x.sharding, states))
        metrics, before = {}, memory.programs()

        def once(i: int) -> object:
            nonlocal states, metrics
            states, metrics = step(held, states, batches, keys)
            return states, metrics

        seconds = measure.timed(once, args.steps)
        plain = functools.partial(train_reward.ensemble_step, measure.without_remat(model), tx)
        products = flops.count(jax.make_jaxpr(plain)(held, states, batches, keys).jaxpr, 1).total
    tokens = args.batch * (args.prompt + 2 * args.response)
    more = {'pairs_per_second': args.batch / seconds['median'], 'grad_norm': float(metrics['grad_norm'])}
    print(json.dumps(measure.result(args, model.config.dtype, seconds, tokens, products, before, **more)))


if __name__ == '__main__':
    main()
