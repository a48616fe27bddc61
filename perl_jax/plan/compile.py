"""A program compiled for the devices of its plan, and what can be read from it."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params
from jaxtyping import PyTree

from perl_jax import memory, topology
from perl_jax.errors import UserError
from perl_jax.partitioning import Partitioner
from perl_jax.plan import hlo
from perl_jax.plan.programs import Program


@dataclasses.dataclass(frozen=True)
class Report:
    """What one program takes on one chip. Bytes, seconds; None where it could not be compiled for want of memory.

    base, adapters, optimizer, data: what lies there anyway, arguments or not.   temporaries: what the program adds.
    cache: of the temporaries, the sampler's keys and values.   peak: all of it.   needs: what a failed compile said.
    seconds: the compiler's own cycles at the chip's clock, without waiting for the network.
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
        traced = program.fn.trace(*program.args)
        flops = count_flops(traced.jaxpr.jaxpr, program.turns) / on.mesh.size
        cache = _cache(traced.jaxpr.jaxpr) // on.mesh.size
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise UserError(f'plan: {program.name}: {" ".join(str(error).split())[:300]}') from error
            compiled, said = None, re.search(r'\((\d[\d.]*[KMGT])\) exceeds available HBM \((.*?)\)', str(error))
    common = {'name': program.name, 'times': program.times, **held, 'flops': flops, 'cache': cache}
    if compiled is None:
        return Report(
            **common, temporaries=None, peak=None, needs=f'{said[1]}iB' if said else 'more', fits=False, cycles=None,
            seconds=None, utilisation=None, collectives={}, compile_seconds=time.perf_counter() - start,
        )  # fmt: skip
    temporaries = memory.added(compiled.memory_analysis())
    peak = sum(held.values()) + temporaries
    cost = hlo.cost(compiled.as_text(), list(on.mesh.shape.items()), program.turns)
    seconds = cost.cycles / chip.clock if chip else None
    return Report(
        **common,
        temporaries=temporaries,
        peak=peak,
        needs=None,
        fits=peak <= chip.hbm if chip else None,
        cycles=cost.cycles if chip else None,
        seconds=seconds,
        utilisation=flops / (seconds * chip.peak_flops) if seconds else None,
        collectives={f'{op} {"+".join(over)}': n for (op, over), n in cost.collectives.most_common() if n},
        compile_seconds=time.perf_counter() - start,
    )


def size(tree: PyTree) -> int:
    """Bytes on one chip of all arrays in a tree, each once."""
    leaves = {id(x): x for x in jax.tree.leaves(tree)}
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves.values())


def count_flops(jaxpr: Any, turns: int) -> float:
    """Two for each multiply-add of the matrix products, those in loops as often as they turn."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'dot_general':
            (contract, _), _ = eqn.params['dimension_numbers']
            left = eqn.invars[0].aval.shape
            total += 2.0 * np.prod(eqn.outvars[0].aval.shape) * np.prod([left[i] for i in contract])
        times = {'scan': eqn.params.get('length', 1), 'while': turns}.get(eqn.primitive.name, 1)
        total += times * sum(count_flops(inner, turns) for inner in jaxprs_in_params(eqn.params))
    return total


def _cache(jaxpr: Any) -> int:
    """Bytes over all chips of the arrays of five or more dimensions that a `while` carries: the sampler's cache."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'while':
            total += sum(
                int(np.prod(v.aval.shape)) * v.aval.dtype.itemsize for v in eqn.invars if len(v.aval.shape) >= 5
            )
        elif eqn.primitive.name in ('jit', 'pjit'):
            total += sum(map(_cache, jaxprs_in_params(eqn.params)))
    return total
