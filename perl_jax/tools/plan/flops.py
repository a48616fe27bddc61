"""FLOPs and KV cache size of a traced program, read from its jaxpr before compilation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import jaxprs_in_params


class Flops(NamedTuple):
    """FLOPs of the matrix products over all chips, two per multiply-add.

    Attributes:
      total: of the whole program.
      kernels: those of them in Pallas kernels.
    """

    total: float
    kernels: float


def count(jaxpr: Any, max_iterations: int) -> Flops:
    """Count the FLOPs of a program; loop bodies count once per iteration.

    A Pallas kernel counts every block of its grid, although it skips fully masked blocks.

    Args:
      jaxpr: the program.
      max_iterations: the assumed iterations of a `while` loop, whose length depends on the data.
    """
    total = kernels = 0.0
    for eqn, times, in_kernel in _walk(jaxpr, max_iterations, 1, False):
        if eqn.primitive.name == 'dot_general':
            (contract, _), _ = eqn.params['dimension_numbers']
            left = eqn.invars[0].aval.shape
            flops = 2.0 * times * np.prod(eqn.outvars[0].aval.shape) * np.prod([left[i] for i in contract])
            total, kernels = total + flops, kernels + in_kernel * flops
    return Flops(total, kernels)


def cache(jaxpr: Any) -> int:
    """Count the bytes of the sampler's KV cache over all chips: the arrays of rank >= 5 that a `while` loop carries."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'while':
            total += sum(
                int(np.prod(v.aval.shape)) * v.aval.dtype.itemsize for v in eqn.invars if len(v.aval.shape) >= 5
            )
        elif eqn.primitive.name in ('jit', 'pjit'):
            total += sum(map(cache, jaxprs_in_params(eqn.params)))
    return total


def _walk(jaxpr: Any, max_iterations: int, times: int, in_kernel: bool) -> Iterator[tuple[Any, int, bool]]:
    """Yield every equation, how often it runs over all chips, and whether it is inside a Pallas kernel."""
    for eqn in jaxpr.eqns:
        yield eqn, times, in_kernel
        name, sub_times, sub_in_kernel = eqn.primitive.name, times, in_kernel
        if name == 'scan':
            sub_times *= eqn.params['length']
        elif name == 'while':
            sub_times *= max_iterations
        elif name == 'shard_map':  # inside, shapes are those of one chip
            sub_times *= eqn.params['mesh'].size
        elif name == 'pallas_call':
            sub_times, sub_in_kernel = sub_times * math.prod(eqn.params['grid_mapping'].grid), True
        for sub_jaxpr in jaxprs_in_params(eqn.params):
            yield from _walk(sub_jaxpr, max_iterations, sub_times, sub_in_kernel)
