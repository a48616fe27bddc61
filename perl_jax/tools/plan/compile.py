"""A program compiled for the devices of its plan, and what can be read from it."""

from __future__ import annotations

import dataclasses
import re
import time

import jax
import numpy as np
from jaxtyping import PyTree

from perl_jax.errors import UserError
from perl_jax.parallel import memory, topology
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.tools.plan import flops, hlo
from perl_jax.tools.plan.programs import Program

KERNELS = 0.5  # of the MXU's peak in fused kernels, of which the compiler says nothing (docs/tpu.md)


@dataclasses.dataclass(frozen=True)
class Report:
    """What one program takes on one chip. Bytes, seconds; None where it could not be compiled for want of memory.

    base, adapters, optimizer, data: what lies there anyway, arguments or not.   temporaries: what the program adds.
    cache: of the temporaries, the sampler's keys and values.   peak: all of it.   needs: what a failed compile said.
    cycles: the compiler's own, and those of fused kernels at a share of the chip's peak.
    seconds: the cycles at the chip's clock, without waiting for the network.
    flops: of the matrix products, recomputed ones too.   utilisation: flops a second of the chip's peak.
    collectives: {'all-gather data': bytes that arrive}.
    """

    name: str
    times: int
    base: int
    adapters: int
    optimizer: int
    data: int
    temporaries: int | None
    cache: int
    peak: int | None
    needs: str | None
    fits: bool | None
    cycles: float | None
    seconds: float | None
    flops: float
    utilisation: float | None
    collectives: dict[str, float]
    compile_seconds: float


def report(program: Program, on: Partitioner) -> Report:
    """Compile a program and read it.

    Raises:
      UserError: the compiler gave up for another reason than memory.
    """
    start, chip = time.perf_counter(), None
    if on.topology is not None:
        chip = topology.parse(on.topology).chip
    held = {name: size(tree) for name, tree in program.alive.items()}
    with on.scope():
        traced = program.fn.trace(*program.args, **program.kwargs)
        products = flops.count(traced.jaxpr.jaxpr, program.turns)
        cache = flops.cache(traced.jaxpr.jaxpr) // on.mesh.size
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise UserError(f'plan: {program.name}: {" ".join(str(error).split())[:300]}') from error
            compiled, said = None, re.search(r'\((\d[\d.]*[KMGT])\) exceeds available HBM \((.*?)\)', str(error))
    total, kernels = (n / on.mesh.size for n in products)
    common = {'name': program.name, 'times': program.times, **held, 'flops': total, 'cache': cache}
    if compiled is None:
        return Report(
            **common, temporaries=None, peak=None, needs=f'{said[1]}iB' if said else 'more', fits=False, cycles=None,
            seconds=None, utilisation=None, collectives={}, compile_seconds=time.perf_counter() - start,
        )  # fmt: skip
    temporaries = memory.added(compiled.memory_analysis())
    peak = sum(held.values()) + temporaries
    cost = hlo.cost(compiled.as_text(), list(on.mesh.shape.items()), program.turns)
    cycles = seconds = utilisation = None
    if chip:
        cycles = cost.cycles + kernels / (KERNELS * chip.peak_flops) * chip.clock
        seconds = cycles / chip.clock
        utilisation = total / (seconds * chip.peak_flops) if seconds else None
    return Report(
        **common,
        temporaries=temporaries,
        peak=peak,
        needs=None,
        fits=peak <= chip.hbm if chip else None,
        cycles=cycles,
        seconds=seconds,
        utilisation=utilisation,
        collectives={f'{op} {"+".join(over)}': n for (op, over), n in cost.collectives.most_common() if n},
        compile_seconds=time.perf_counter() - start,
    )


def size(tree: PyTree) -> int:
    """Bytes on one chip of all arrays in a tree, each once."""
    leaves = {id(x): x for x in jax.tree.leaves(tree)}
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves.values())
