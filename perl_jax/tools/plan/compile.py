"""Compiles a program for the devices of its plan and reports its memory, FLOPs and time."""

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

KERNELS = 0.5  # assumed share of the MXU's peak in Pallas kernels, not estimated by the compiler (docs/howto/plan.md)


@dataclasses.dataclass(frozen=True)
class Report:
    """Costs of one program on one chip, in bytes and seconds; None if compiling failed for lack of memory.

    Attributes:
      name: the program's name.
      times: how often a step runs it.
      base: bytes of the frozen parameters that are resident while it runs, arguments of the program or not.
      adapters: bytes of the resident adapters.
      optimizer: bytes of the resident optimizer states.
      data: bytes of the resident batches.
      temporaries: bytes that the program allocates in addition.
      cache: the part of the temporaries that is the sampler's KV cache.
      peak: resident bytes + temporaries.
      needs: the memory that a failed compilation asked for, as libtpu printed it.
      fits: whether the peak fits in the chip's memory.
      cycles: the compiler's estimate, plus kernels at the share KERNELS of the chip's peak.
      seconds: the cycles at the chip's clock; excludes waiting for the network.
      flops: FLOPs of the matrix products, including recomputed ones.
      utilisation: FLOPs per second as a share of the chip's peak.
      collectives: {'all-gather data': received bytes}.
      compile_seconds: the time that compiling took.
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


def report(program: Program, partitioner: Partitioner) -> Report:
    """Compile a program and report its costs.

    Raises:
      UserError: compiling failed for another reason than memory.
    """
    start, chip = time.perf_counter(), None
    if partitioner.topology is not None:
        chip = topology.parse(partitioner.topology).chip
    resident_bytes = {name: size(tree) for name, tree in program.resident.items()}
    with partitioner.scope():
        traced = program.fn.trace(*program.args, **program.kwargs)
        product_flops = flops.count(traced.jaxpr.jaxpr, program.max_iterations)
        cache = flops.cache(traced.jaxpr.jaxpr) // partitioner.mesh.size
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise UserError(f'plan: {program.name}: {" ".join(str(error).split())[:300]}') from error
            compiled, memory_error = (
                None,
                re.search(r'\((\d[\d.]*[KMGT])\) exceeds available HBM \((.*?)\)', str(error)),
            )
    total, kernels = (flops_count / partitioner.mesh.size for flops_count in product_flops)
    common = {'name': program.name, 'times': program.times, **resident_bytes, 'flops': total, 'cache': cache}
    if compiled is None:
        return Report(
            **common, temporaries=None, peak=None, needs=f'{memory_error[1]}iB' if memory_error else 'more',
            fits=False, cycles=None, seconds=None, utilisation=None, collectives={},
            compile_seconds=time.perf_counter() - start,
        )  # fmt: skip
    temporaries = memory.program_bytes(compiled.memory_analysis())
    peak = sum(resident_bytes.values()) + temporaries
    cost = hlo.cost(compiled.as_text(), list(partitioner.mesh.shape.items()), program.max_iterations)
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
        collectives={
            f'{op} {"+".join(over)}': flops_count
            for (op, over), flops_count in cost.collectives.most_common()
            if flops_count
        },
        compile_seconds=time.perf_counter() - start,
    )


def size(tree: PyTree) -> int:
    """Count the bytes on one chip of all distinct arrays in a tree (roles may share some)."""
    leaves = {id(x): x for x in jax.tree.leaves(tree)}
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves.values())
