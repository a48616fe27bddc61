"""Training steps on rows of real lengths, timed: what padding costs, what LENGTH_BUCKETS gives back. A line of JSON.

    TASKMASTER_DIR=... python benchmarks/taskmaster/prepare.py --vocabulary=... --output=arrays
    python benchmarks/data.py --arrays=arrays/coffee_pairs_train.npz --buckets=4
    python benchmarks/data.py --arrays=arrays/coffee_prompts_train.npz --buckets=4 --ends

Pairs or thumbs train a reward, prompts a policy; tokens are folded into the model's vocabulary. The same batches are
read again until all programs are there, one for each shape; the last time is for the clock. Model and flags are as
reward_step.py takes them; P comes from the file.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

from perl_jax.parallel import startup

if __name__ == '__main__':  # before JAX
    startup.begin()

import jax
import measure
import numpy as np
import policy_step

from perl_jax.data import streams
from perl_jax.parallel import memory
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.train import reward as train_reward


def main() -> None:
    flags = policy_step.parser(__doc__)
    flags.add_argument('--arrays', required=True, help='a file of prepare.py')
    args, on = measure.parsed(flags), Partitioner()
    model, tuning, started = measure.network(args), measure.tuning(args), []
    arrays = {name: x for name, x in np.load(args.arrays).items() if name != 'group'}
    rows = np.random.default_rng(args.seed).permutation(len(arrays['inputs']))[: args.batch * (args.steps + 2)]
    arrays = {name: x[rows] for name, x in arrays.items()}  # the same as the peers'
    for name in {'inputs', 'targets'} & arrays.keys():
        arrays[name] = 2 + arrays[name] % (model.config.vocab_size - 2)
    dataset = streams.Dataset(arrays, [{}] * len(arrays['inputs']), None, policy_step.EOS)
    everyone = np.arange(args.batch)
    stream = streams.Stream([dataset], [1.0], args.batch, args.seed, everyone, args.buckets, on.data_parallelism)
    batches = [stream(step)[0] for step in range(args.steps + 2)]
    with on.scope():
        params = measure.base(args, model)
        if 'targets' not in arrays:
            if args.ends:
                params = measure.ending(params, policy_step.EOS, 3 / args.response)
            state, judge = policy_step.initial(args, model, params, on)
            run = policy_step.step_of(args, model, params, judge, on)
        else:
            keys = {'reward': policy_step.KEY}
            state = train_reward.initial(tuning, model.config.emb_dim, None, keys, params)
            held = params if args.tuning == 'lora' else None
            tx, shardings = tuning.tx('OPTIMIZER'), jax.tree.map(lambda x: x.sharding, state)
            compiled = train_reward.compiled(model, tx, 1, shardings)
            run = lambda state, batch, rng: compiled(held, state, {'reward': [batch]}, keys)  # noqa: E731
        del params

        def once() -> tuple[float, dict[str, Any]]:
            nonlocal state
            start = time.perf_counter()
            for i, batch in enumerate(batches):
                state, metrics = run(state, on.batch(batch), jax.random.fold_in(policy_step.KEY, i))
                if not started:
                    jax.block_until_ready(state)
                    started.append(measure.since_start())
            jax.block_until_ready(state)
            return time.perf_counter() - start, metrics

        (compiling, _), programs = once(), None
        while programs != (programs := memory.programs()):  # a policy's answers may fill a batch otherwise than before
            seconds, metrics = once()
    places = sum(mask.size for batch in batches for mask in masks(batch))
    real = sum(int(mask.sum()) for batch in batches for mask in masks(batch))
    found = {
        'seconds': seconds / len(batches),
        'compile_seconds': compiling - seconds,
        'command_seconds': started[0],
        'rows_per_second': args.batch * len(batches) / seconds,
        'process_peak_bytes': measure.process_peak(),
        'shapes': len({tuple(x.shape for x in jax.tree.leaves(batch)) for batch in batches}),
        'real_tokens': real / places,
        'grad_norm': float(metrics.get('grad_norm', metrics.get('grad_norm/policy', float('nan')))),
    }
    rounded = {key: float(f'{x:.5g}') if isinstance(x, float) else x for key, x in found.items()}
    print(json.dumps(rounded | vars(args)))


def masks(batch: Any) -> list[np.ndarray]:
    return [getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name.endswith('_mask')]


if __name__ == '__main__':
    main()
