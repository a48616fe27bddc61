"""Common parts of the step benchmarks: random weights for a model's gin file, timing, memory. No dataset is needed."""

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
    """Return the parser of the step benchmarks' flags, except the model's (`parse_args`)."""
    flags = argparse.ArgumentParser(description=doc.splitlines()[0])
    sizes = {'batch': 8, 'prompt': 64, 'response': 64, 'responses': 2, 'rank': 8, 'steps': 20, 'microbatches': 1}
    texts = {
        'prompt': 'P', 'response': 'R', 'responses': 'K a prompt',
        'microbatches': 'number of microbatches',
        'steps': 'number of timed steps, after the warm-up',
    }  # fmt: skip
    for name, default in (sizes | {'seed': 0}).items():
        flags.add_argument(f'--{name}', type=int, default=default, help=texts.get(name, ' '))
    flags.add_argument('--tuning', choices=['lora', 'full'], default='lora')
    return flags


def parse_args(flags: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; `--gin_file` is a model or recipe, `--gin.NAME=VALUE` changes it."""
    files, bindings, paths, remaining = configure.parse_flags('benchmark', sys.argv[1:])
    gin_settings = {'gin_file': files or ['models/bench_s.gin'], 'gin_bindings': bindings, 'gin_search_paths': paths}
    return argparse.Namespace(**vars(flags.parse_args(remaining)) | gin_settings)


def network(args: argparse.Namespace) -> nn.Module:
    """Return the NETWORK of the gin file."""
    bindings = [*args.gin_bindings, 'base.BaseConfig.network = %NETWORK']
    make = configure.configured('base.BaseConfig', args.gin_file, bindings, args.gin_search_paths)
    return make(path=None, dtype='float32').network  # ignores the other settings of a recipe


def without_remat(model: nn.Module) -> nn.Module:
    """Return the model without remat, to count the FLOPs of a step without recomputation."""
    return model.clone(config=dataclasses.replace(model.config, remat='none'))


def random_base(args: argparse.Namespace, model: nn.Module) -> Any:
    """Return random parameters, in the network's dtype under LoRA and in float32 (trainable) under full tuning."""
    dtype = model.config.dtype if args.tuning == 'lora' else 'float32'
    dummy_tokens = jnp.zeros((1, 1), jnp.int32)

    def create(key: jax.Array) -> Any:
        params = partitioning.unbox(model.init(key, dummy_tokens, dummy_tokens == 0, dummy_tokens[:, None])['params'])
        return jax.tree.map(lambda x: x.astype(dtype), params)

    return jax.jit(create)(jax.random.key(args.seed))


def with_eos_probability(params: Any, eos: int, probability: float) -> Any:
    """Change the parameters so that every next token is `eos` with about this probability.

    One feature of every embedding dominates, so that it is sqrt(D) after the last norm. One weight of the output layer
    turns it into the logit that has this probability against V - 1 logits near 0.
    """
    if 'logits_dense' not in params['decoder']:
        raise SystemExit('benchmark: --ends needs a model with an untied output layer, such as models/bench_s.gin')
    table, kernel = params['token_embedder']['embedding'], params['decoder']['logits_dense']['kernel']
    D, V = kernel.shape
    logit = np.log(probability / (1 - probability) * (V - 1))
    kernel = kernel.at[0].set(0).at[0, eos].set(logit / D**0.5)
    decoder = params['decoder'] | {'logits_dense': {'kernel': kernel}}
    return params | {'token_embedder': {'embedding': table.at[:, 0].set(1000.0)}, 'decoder': decoder}


def spec(args: argparse.Namespace) -> lora.LoraSpec | lora.FullSpec:
    """Return LoRA on q, k, v and o, or full tuning."""
    return lora.LoraSpec(rank=args.rank, alpha=float(args.rank)) if args.tuning == 'lora' else lora.FullSpec()


def adamw_tuning(args: argparse.Namespace) -> Tuning:
    """Return the tuning with AdamW."""
    return Tuning(spec(args), optimizer(), num_microbatches=args.microbatches)


def optimizer() -> optax.GradientTransformation:
    """Return AdamW, which the peers use too."""
    return optax.adamw(1e-4, weight_decay=0.0)


def prompts(args: argparse.Namespace, vocab_size: int) -> types.Prompts:
    """Return random prompts of full length, without the tokens 0 and 1 (EOS)."""
    rng = np.random.default_rng(args.seed)
    inputs = rng.integers(2, vocab_size, (args.batch, args.prompt), dtype=np.int32)
    return types.Prompts(inputs, np.ones_like(inputs, bool))


def responses(args: argparse.Namespace, vocab_size: int) -> types.Responses:
    """Return random prompts with K responses of full length."""
    rng, batch_prompts = np.random.default_rng(args.seed + 1), prompts(args, vocab_size)
    targets = rng.integers(2, vocab_size, (args.batch, args.responses, args.response), dtype=np.int32)
    return types.Responses(batch_prompts.inputs, batch_prompts.inputs_mask, targets, np.ones_like(targets, bool))


def timed(step: Callable[[int], Any], steps: int, num_warmup: int = 2) -> dict[str, float]:
    """Time steps until their results are ready.

    Returns:
      Seconds: of the 'first' step, which compiles; 'median' and 'minimum' of the steps after the warm-up; 'command',
      from the start of the process to the end of the first step.
    """
    seconds, command_seconds = [], 0.0
    for i in range(num_warmup + steps):
        start = time.perf_counter()
        jax.block_until_ready(step(i))
        seconds.append(time.perf_counter() - start)
        command_seconds = command_seconds or since_start()
    first_seconds, timed_seconds = seconds[0], seconds[num_warmup:]
    return {
        'command': command_seconds,
        'first': first_seconds,
        'median': statistics.median(timed_seconds),
        'minimum': min(timed_seconds),
    }


def since_start() -> float:
    """Return the seconds since this process started, including imports (Linux)."""
    ticks = int(pathlib.Path('/proc/self/stat').read_text().rsplit(')', 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')


RecordFn = Callable[[str, Any], None]


def time_shares(step: Callable[[int, RecordFn], Any], steps: int) -> dict[str, float]:
    """Measure the share of each part in a step's time, by waiting for the results of each part."""
    seconds_by_part, start = {}, 0.0

    def record(name: str, outputs: Any) -> None:
        nonlocal start
        jax.block_until_ready(outputs)
        seconds_by_part.setdefault(name, []).append(time.perf_counter() - start)
        start = time.perf_counter()

    for i in range(steps):
        start = time.perf_counter()
        step(i, record)
    medians = {
        name: statistics.median(seconds) for name, seconds in seconds_by_part.items()
    }  # robust to steps that compile
    return {name: round(seconds / sum(medians.values()), 3) for name, seconds in medians.items()}


def process_peak() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def result(
    args: argparse.Namespace,
    dtype: str,
    seconds: dict[str, float],
    tokens: int,
    flops: float,
    programs_before: set[Any],
    **extra_figures: Any,
) -> dict:
    """Return the figures to print as JSON; memory is in bytes.

    Args:
      args: the command line.
      dtype: the network's dtype.
      seconds: the result of `timed`.
      tokens: the number of tokens of a step.
      flops: the FLOPs of a step without recomputation.
      programs_before: the programs compiled before the step's (memory.programs). 'step_bytes' is what the largest of
        the step's programs allocates on top of the arrays that are resident between programs.
      **extra_figures: further figures.
    """
    device = jax.devices()[0]
    median, peak = seconds['median'], PEAKS.get(device.device_kind)
    stats, memory_figures = device.memory_stats() or {}, memory.measure(programs_before, memory.live_bytes())
    figures = {
        'seconds': median,
        'seconds_min': seconds['minimum'],
        'compile_seconds': seconds['first'] - median,
        'command_seconds': seconds['command'],
        'tokens_per_second': tokens / median,
        'flops': flops,
        'utilisation': flops / median / peak if peak and dtype == 'bfloat16' else None,
        'device_peak_bytes': stats.get('peak_bytes_in_use'),
        'process_peak_bytes': process_peak(),
        'step_bytes': memory_figures['peak'] - memory_figures['held'],
    }
    rounded = {key: float(f'{x:.5g}') if isinstance(x, float) else x for key, x in (figures | extra_figures).items()}
    return rounded | {'device': device.device_kind, 'jax': jax.__version__} | vars(args)
