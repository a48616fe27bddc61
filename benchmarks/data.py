"""Times training steps on rows of real lengths: the cost of padding, the gain of LENGTH_BUCKETS. Prints one JSON line.

    TASKMASTER_DIR=... python benchmarks/taskmaster/prepare.py --vocabulary=... --output=arrays
    python benchmarks/data.py --arrays=arrays/coffee_pairs_train.npz --buckets=4
    python benchmarks/data.py --arrays=arrays/coffee_prompts_train.npz --buckets=4 --ends

Pairs or thumbs train a reward, prompts train a policy; token ids are mapped into the model's vocabulary. The same
batches are repeated until all programs are compiled, one for each shape; the last pass is timed. Model and flags are
those of reward_step.py; P comes from the file.
"""

from __future__ import annotations

import dataclasses
import functools
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

from perl_jax.data.batches import streams
from perl_jax.data.batches.dataset import Dataset
from perl_jax.optim import train_state
from perl_jax.parallel import memory
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.train import reward as train_reward


def main() -> None:
    flags = policy_step.parser(__doc__)
    flags.add_argument('--arrays', required=True, help='a file of prepare.py')
    args, partitioner = measure.parse_args(flags), Partitioner()
    model, tuning, command_seconds = measure.network(args), measure.adamw_tuning(args), []
    arrays = {name: x for name, x in np.load(args.arrays).items() if name != 'group'}
    rows = np.random.default_rng(args.seed).permutation(len(arrays['inputs']))[: args.batch * (args.steps + 2)]
    arrays = {name: x[rows] for name, x in arrays.items()}  # the same as the peers'
    for name in {'inputs', 'targets'} & arrays.keys():
        arrays[name] = 2 + arrays[name] % (model.config.vocab_size - 2)
    dataset = Dataset(arrays, [{}] * len(arrays['inputs']), None, policy_step.EOS)
    row_indices = np.arange(args.batch)
    stream = streams.Stream(
        [dataset], [1.0], args.batch, args.seed, row_indices, args.buckets, partitioner.data_parallel_size
    )
    batches = [stream(step)[0] for step in range(args.steps + 2)]
    with partitioner.scope():
        params = measure.random_base(args, model)
        if 'targets' not in arrays:
            if args.ends:
                params = measure.with_eos_probability(params, policy_step.EOS, 3 / args.response)
            state, reward_adapter = policy_step.initial(args, model, params, partitioner)
            step = policy_step.make_step(args, model, params, reward_adapter, partitioner)
        else:
            keys = {'reward': policy_step.KEY}
            state = train_reward.initial(tuning, model.config.emb_dim, None, keys, params)
            frozen_params = params if args.tuning == 'lora' else None
            tx, shardings = tuning.tx('OPTIMIZER'), jax.tree.map(lambda x: x.sharding, state)
            reward_step = functools.partial(train_reward.ensemble_step, model, tx)
            reward_step = train_state.compile_step(reward_step, shardings)
            step = lambda state, batch, rng: reward_step(frozen_params, state, {'reward': [batch]}, keys)  # noqa: E731
        del params

        def run_epoch() -> tuple[float, dict[str, Any]]:
            nonlocal state
            start = time.perf_counter()
            for i, batch in enumerate(batches):
                state, metrics = step(state, partitioner.batch(batch), jax.random.fold_in(policy_step.KEY, i))
                if not command_seconds:
                    jax.block_until_ready(state)
                    command_seconds.append(measure.since_start())
            jax.block_until_ready(state)
            return time.perf_counter() - start, metrics

        (first_seconds, _), programs = run_epoch(), None
        while programs != (programs := memory.programs()):  # sampled lengths vary, which may need a new program
            seconds, metrics = run_epoch()
    num_positions = sum(mask.size for batch in batches for mask in masks(batch))
    num_real = sum(int(mask.sum()) for batch in batches for mask in masks(batch))
    figures = {
        'seconds': seconds / len(batches),
        'compile_seconds': first_seconds - seconds,
        'command_seconds': command_seconds[0],
        'rows_per_second': args.batch * len(batches) / seconds,
        'process_peak_bytes': measure.process_peak(),
        'shapes': len({tuple(x.shape for x in jax.tree.leaves(batch)) for batch in batches}),
        'real_tokens': num_real / num_positions,
        'grad_norm': float(metrics.get('grad_norm', metrics.get('grad_norm/policy', float('nan')))),
    }
    rounded = {key: float(f'{x:.5g}') if isinstance(x, float) else x for key, x in figures.items()}
    print(json.dumps(rounded | vars(args)))


def masks(batch: Any) -> list[np.ndarray]:
    return [getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name.endswith('_mask')]


if __name__ == '__main__':
    main()
