"""What the step benchmarks share: a random Llama of a given size, the clock, the memory. NumPy batches, no data set."""

from __future__ import annotations

import argparse
import os
import pathlib
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from perl_jax import types
from perl_jax.models import lora
from perl_jax.models.decoder import Decoder, DecoderConfig
from perl_jax.optim.tuning import Tuning
from perl_jax.parallel import memory, partitioning, topology

# bf16 FLOPs a second (vendors' data sheets, dense); a CPU has no such figure.
PEAKS = {chip.device_kind: chip.peak_flops for chip in topology.CHIPS.values()}
PEAKS |= {'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA H200': 989e12, 'NVIDIA A100-SXM4-80GB': 312e12}


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags of both benchmarks. The defaults are size S of docs/performance.md."""
    flags = argparse.ArgumentParser(description=doc.splitlines()[0])
    sizes = {'layers': 4, 'd_model': 256, 'd_ff': 1024, 'heads': 4, 'kv_heads': 0, 'vocab': 8192, 'batch': 8}
    sizes |= {'prompt': 64, 'response': 64, 'responses': 2, 'rank': 8, 'steps': 20, 'microbatches': 1, 'seed': 0}
    texts = {
        'kv_heads': 'by default as many as heads', 'prompt': 'P', 'response': 'R', 'responses': 'K a prompt',
        'microbatches': 'parts that a batch is learned from in turn',
        'steps': 'that are timed, after those that compile',
    }  # fmt: skip
    for name, default in sizes.items():
        flags.add_argument(f'--{name}', type=int, default=default, help=texts.get(name, ' '))
    flags.add_argument('--tuning', choices=['lora', 'full'], default='lora')
    flags.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32')
    flags.add_argument('--remat', choices=['none', 'minimal', 'full'], default='none')
    return flags


def network(args: argparse.Namespace, remat: str | None = None) -> Decoder:
    """A Llama with an output layer of its own; `remat` instead of the flag's."""
    return Decoder(
        DecoderConfig(
            vocab_size=args.vocab, num_layers=args.layers, emb_dim=args.d_model, num_heads=args.heads,
            num_kv_heads=args.kv_heads or args.heads, head_dim=args.d_model // args.heads, mlp_dim=args.d_ff,
            logits_via_embedding=False, dtype=args.dtype, remat=remat or args.remat,
        )
    )  # fmt: skip


def base(args: argparse.Namespace, model: Decoder) -> Any:
    """Random parameters; under LoRA in `dtype`, under full tuning in float32, as trained parameters are."""
    dtype = args.dtype if args.tuning == 'lora' else 'float32'
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


def prompts(args: argparse.Namespace) -> types.Prompts:
    """Tokens of full length; 0 and 1 (EOS) are not among them."""
    rng = np.random.default_rng(args.seed)
    inputs = rng.integers(2, args.vocab, (args.batch, args.prompt), dtype=np.int32)
    return types.Prompts(inputs, np.ones_like(inputs, bool))


def responses(args: argparse.Namespace) -> types.Responses:
    """Prompts with K responses of full length."""
    rng, asked = np.random.default_rng(args.seed + 1), prompts(args)
    targets = rng.integers(2, args.vocab, (args.batch, args.responses, args.response), dtype=np.int32)
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
    args: argparse.Namespace, seconds: dict[str, float], tokens: int, flops: float, before: set[Any], **more: Any
) -> dict:
    """One line of JSON. `flops` of a step without recomputation; memory in bytes.

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
        'utilisation': flops / median / peak if peak and args.dtype == 'bfloat16' else None,
        'device_peak_bytes': stats.get('peak_bytes_in_use'),
        'process_peak_bytes': process_peak(),
        'step_bytes': held['peak'] - held['held'],
    }
    rounded = {key: float(f'{x:.5g}') if isinstance(x, float) else x for key, x in (found | more).items()}
    return rounded | {'device': device.device_kind, 'jax': jax.__version__} | vars(args)
