"""Times one training step of a reward model on random pairs. Prints one JSON line.

    python benchmarks/reward_step.py                                    size S: 4 layers, width 256, 8 pairs of 64 + 64
    python benchmarks/reward_step.py --gin_file=models/bench_m.gin     size M; or any model, or recipe
    python benchmarks/reward_step.py --tuning=full

The step is the one that a run compiles (train_reward.ensemble_step): loss, gradients, AdamW, metrics.
"""

from __future__ import annotations

import functools
import json

from perl_jax.parallel import startup

if __name__ == '__main__':  # before JAX
    startup.begin()

import jax
import measure

from perl_jax.optim import train_state
from perl_jax.parallel import memory
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.tools.plan import flops
from perl_jax.train import reward as train_reward


def main() -> None:
    args = measure.parse_args(measure.parser(__doc__))
    if args.responses != 2:
        raise SystemExit('reward_step: a pair has two responses; remove --responses')
    model, tuning, partitioner = measure.network(args), measure.adamw_tuning(args), Partitioner()
    tx = tuning.tx('OPTIMIZER')
    batch = jax.tree.map(jax.numpy.asarray, measure.responses(args, model.config.vocab_size))
    batches, keys = {'reward': [batch]}, {'reward': jax.random.key(0)}
    with partitioner.scope():
        params = measure.random_base(args, model)
        states = train_reward.initial(tuning, model.config.emb_dim, None, keys, params)
        frozen_params = params if args.tuning == 'lora' else None
        del params
        step = functools.partial(train_reward.ensemble_step, model, tx, num_microbatches=tuning.num_microbatches)
        step = train_state.compile_step(step, jax.tree.map(lambda x: x.sharding, states))
        metrics, programs_before = {}, memory.programs()

        def run_step(i: int) -> object:
            nonlocal states, metrics
            states, metrics = step(frozen_params, states, batches, keys)
            return states, metrics

        seconds = measure.timed(run_step, args.steps)
        plain_step = functools.partial(train_reward.ensemble_step, measure.without_remat(model), tx)
        step_flops = flops.count(jax.make_jaxpr(plain_step)(frozen_params, states, batches, keys).jaxpr, 1).total
    tokens = args.batch * (args.prompt + 2 * args.response)
    extra_figures = {'pairs_per_second': args.batch / seconds['median'], 'grad_norm': float(metrics['grad_norm'])}
    print(
        json.dumps(
            measure.result(args, model.config.dtype, seconds, tokens, step_flops, programs_before, **extra_figures)
        )
    )


if __name__ == '__main__':
    main()
