"""What the step benchmarks share: random weights of a model's gin file, the clock, the memory. No data set."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from perl_jax import types
from perl_jax.cli import configure
from perl_jax.models import lora
from perl_jax.optim.tuning import Tuning
from perl_jax.parallel import memory, partitioning, topology

# bf16 FLOPs a second (vendors' data sheets, dense); a CPU has no such figure.
PEAKS = {chip.device_kind: chip.peak_flops for chip in topology.CHIPS.values()}
PEAKS |= {'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA H200': 989e12, 'NVIDIA A100-SXM4-80GB': 312e12}


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags of both benchmarks, but for the model's (`parsed`)."""
    flags = argparse.ArgumentParser(description=doc.splitlines()[0])
    sizes = {'batch': 8, 'prompt': 64, 'response': 64, 'responses': 2, 'rank': 8, 'steps': 20, 'microbatches': 1}
    texts = {
        'prompt': 'P', 'response': 'R', 'responses': 'K a prompt',
        'microbatches': 'parts that a batch is learned from in turn',
        'steps': 'that are timed, after those that compile',
    }  # fmt: skip
    for name, default in (sizes | {'seed': 0}).items():
        flags.add_argument(f'--{name}', type=int, default=default, help=texts.get(name, ' '))
    flags.add_argument('--tuning', choices=['lora', 'full'], default='lora')
    return flags


def parsed(flags: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line. `--gin_file` is a model or a recipe, `--gin.decoder.DecoderConfig.num_layers=2` changes it."""
    files, bindings, paths, rest = configure.flags('benchmark', sys.argv[1:])
    model = {'gin_file': files or ['models/bench_s.gin'], 'gin_bindings': bindings, 'gin_search_paths': paths}
    return argparse.Namespace(**vars(flags.parse_args(rest)) | model)


def network(args: argparse.Namespace) -> nn.Module:
    """The NETWORK of the gin file."""
    bindings = [*args.gin_bindings, 'base.BaseConfig.network = %NETWORK']
    make = configure.configured('base.BaseConfig', args.gin_file, bindings, args.gin_search_paths)
    return make(path=None, dtype='float32').network  # of a recipe only the network


def without_remat(model: nn.Module) -> nn.Module:
    """The same, which computes nothing twice: its products are those that a step needs."""
    return model.clone(config=dataclasses.replace(model.config, remat='none'))


def base(args: argparse.Namespace, model: nn.Module) -> Any:
    """Random parameters; under LoRA in the network's dtype, under full tuning in float32, as trained parameters are."""
    dtype = model.config.dtype if args.tuning == 'lora' else 'float32'
    one = jnp.zeros((1, 1), jnp.int32)

    def create(key: jax.Array) -> Any:
        params = partitioning.unbox(model.init(key, one, one == 0, one[:, None])['params'])
        return jax.tree.map(lambda x: x.astype(dtype), params)

    return jax.jit(create)(jax.random.key(args.seed))


def ending(params: Any, eos: int, chance: float) -> Any:
    """The base changed so that its next token is `eos` with about this chance, whatever it has read.

    One number of every embedding outweighs the rest, so that the last norm finds sqrt(D) there; one weight of the
    output layer makes the logit out of it that has this chance beside V - 1 logits near 0.
    """
    if 'logits_dense' not in params['decoder']:
        raise SystemExit('benchmark: --ends needs a model with an output layer of its own, such as models/bench_s.gin')
    table, kernel = params['token_embedder']['embedding'], params['decoder']['logits_dense']['kernel']
    D, V = kernel.shape
    logit = np.log(chance / (1 - chance) * (V - 1))
    kernel = kernel.at[0].set(0).at[0, eos].set(logit / D**0.5)
    decoder = params['decoder'] | {'logits_dense': {'kernel': kernel}}
    return params | {'token_embedder': {'embedding': table.at[:, 0].set(1000.0)}, 'decoder': decoder}


def spec(args: argparse.Namespace) -> lora.LoraSpec | lora.FullSpec:
    """LoRA on q, k, v and o, or all."""
    return lora.LoraSpec(rank=args.rank, alpha=float(args.rank)) if args.tuning == 'lora' else lora.FullSpec()


def tuning(args: argparse.Namespace) -> Tuning:
    """What is trained, by AdamW."""
    return Tuning(spec(args), optimizer(), num_microbatches=args.microbatches)


def optimizer() -> optax.GradientTransformation:
    """AdamW, which the peers have too."""
    return optax.adamw(1e-4, weight_decay=0.0)


def prompts(args: argparse.Namespace, vocab_size: int) -> types.Prompts:
    """Tokens of full length; 0 and 1 (EOS) are not among them."""
    rng = np.random.default_rng(args.seed)
    inputs = rng.integers(2, vocab_size, (args.batch, args.prompt), dtype=np.int32)
    return types.Prompts(inputs, np.ones_like(inputs, bool))


def responses(args: argparse.Namespace, vocab_size: int) -> types.Responses:
    """Prompts with K responses of full length."""
    rng, asked = np.random.default_rng(args.seed + 1), prompts(args, vocab_size)
    targets = rng.integers(2, vocab_size, (args.batch, args.responses, args.response), dtype=np.int32)
    return types.Responses(asked.inputs, asked.inputs_mask, targets, np.ones_like(targets, bool))


def timed(step: Callable[[int], Any], steps: int, warm: int = 2) -> dict[str, float]:
    """Seconds of a step until its results are there: 'first' (compiles), and after the `warm` ones 'median', 'minimum'.

    'command' are those from the process's start to the first step's end.
    """
    seconds, command = [], 0.0
    for i in range(warm + steps):
        start = time.perf_counter()
        jax.block_until_ready(step(i))
        seconds.append(time.perf_counter() - start)
        command = command or since_start()
    first, rest = seconds[0], seconds[warm:]
    return {'command': command, 'first': first, 'median': statistics.median(rest), 'minimum': min(rest)}


def since_start() -> float:
    """Seconds since this process started, imports included (Linux)."""
    ticks = int(pathlib.Path('/proc/self/stat').read_text().rsplit(')', 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')


Passed = Callable[[str, Any], None]


def shares(step: Callable[[int, Passed], Any], steps: int) -> dict[str, float]:
    """Of a step's seconds, what each of its parts takes; it is held up after each."""
    spent, start = {}, 0.0

    def passed(part: str, done: Any) -> None:
        nonlocal start
        jax.block_until_ready(done)
        spent.setdefault(part, []).append(time.perf_counter() - start)
        start = time.perf_counter()

    for i in range(steps):
        start = time.perf_counter()
        step(i, passed)
    median = {part: statistics.median(seconds) for part, seconds in spent.items()}  # some steps compile
    return {part: round(seconds / sum(median.values()), 3) for part, seconds in median.items()}


def process_peak() -> int:
    """Bytes that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def result(
    args: argparse.Namespace,
    dtype: str,
    seconds: dict[str, float],
    tokens: int,
    flops: float,
    before: set[Any],
    **more: Any,
) -> dict:
    """One line of JSON. `dtype` is the network's, `flops` of a step without recomputation; memory in bytes.

    `before` are the programs that were there before the step's (memory.programs): what the largest of those adds to the
    arrays that lie there between programs is 'step_bytes'.
    """
    device = jax.devices()[0]
    median, peak = seconds['median'], PEAKS.get(device.device_kind)
    stats, held = device.memory_stats() or {}, memory.measure(before, memory.held())
    found = {
        'seconds': median,
        'seconds_min': seconds['minimum'],
        'compile_seconds': seconds['first'] - median,
        'command_seconds': seconds['command'],
        'tokens_per_second': tokens / median,
        'flops': flops,
        'utilisation': flops / median / peak if peak and dtype == 'bfloat16' else None,
        'device_peak_bytes': stats.get('peak_bytes_in_use'),
        'process_peak_bytes': process_peak(),
        'step_bytes': held['peak'] - held['held'],
    }
    rounded = {key: float(f'{x:.5g}') if isinstance(x, float) else x for key, x in (found | more).items()}
    return rounded | {'device': device.device_kind, 'jax': jax.__version__} | vars(args)
