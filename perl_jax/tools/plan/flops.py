"""What a traced program multiplies, and what its sampler keeps: read from the jaxpr, before any compiler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import jaxprs_in_params


class Flops(NamedTuple):
    """Two for each multiply-add of the matrix products, over all chips. `kernels`: those within fused kernels, too."""

    total: float
    kernels: float


def count(jaxpr: Any, turns: int) -> Flops:
    """The products of a program, those in loops as often as they turn; `turns` is of a loop that only the data ends.

    A kernel counts for every block of its grid, although it skips those in which a mask hides everything.
    """
    total = kernels = 0.0
    for eqn, times, in_kernel in _walk(jaxpr, turns, 1, False):
        if eqn.primitive.name == 'dot_general':
            (contract, _), _ = eqn.params['dimension_numbers']
            left = eqn.invars[0].aval.shape
            flops = 2.0 * times * np.prod(eqn.outvars[0].aval.shape) * np.prod([left[i] for i in contract])
            total, kernels = total + flops, kernels + in_kernel * flops
    return Flops(total, kernels)


def cache(jaxpr: Any) -> int:
    """Bytes over all chips of the arrays of five or more dimensions that a `while` carries: the sampler's cache."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'while':
            total += sum(
                int(np.prod(v.aval.shape)) * v.aval.dtype.itemsize for v in eqn.invars if len(v.aval.shape) >= 5
            )
        elif eqn.primitive.name in ('jit', 'pjit'):
            total += sum(map(cache, jaxprs_in_params(eqn.params)))
    return total


def _walk(jaxpr: Any, turns: int, times: int, in_kernel: bool) -> Iterator[tuple[Any, int, bool]]:
    """Every equation, how often it runs over all chips, and whether within a kernel."""
    for eqn in jaxpr.eqns:
        yield eqn, times, in_kernel
        name, inner, fused = eqn.primitive.name, times, in_kernel
        if name == 'scan':
            inner *= eqn.params['length']
        elif name == 'while':
            inner *= turns
        elif name == 'shard_map':  # inside, shapes are those of one chip
            inner *= eqn.params['mesh'].size
        elif name == 'pallas_call':
            inner, fused = inner * math.prod(eqn.params['grid_mapping'].grid), True
        for below in jaxprs_in_params(eqn.params):
            yield from _walk(below, turns, inner, fused)
