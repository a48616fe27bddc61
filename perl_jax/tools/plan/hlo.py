"""The TPU compiler's estimates for a program: cycles, and bytes over the network, read from the optimized HLO text.

A loop body counts once per iteration. The number of iterations is the constant in the loop's condition; for loops that
depend on the data (the sampler stops when all responses have ended) the caller gives the maximum.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(')
_WHILE = re.compile(r' while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)')
_CALL = re.compile(r' (?:call|conditional|async-start)\(')
_CALLED = re.compile(r'(?:to_apply|calls|\w+_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{(.*?)\}')
_FUSION = re.compile(r' fusion\(.*calls=%?([\w.\-]+)')
_ARRAY = re.compile(r'(pred|[suf]\d+|bf16)\[([\d,]*)\]')
_WIDTHS = {'pred': 1, 'bf16': 2}
MeshShape = Sequence[tuple[str, int]]  # (axis, size) in the order of the mesh


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one execution of a program on one chip.

    Attributes:
      cycles: of the chip's clock.
      collectives: received bytes by (operation, mesh axes).
    """

    cycles: float
    collectives: Counter[tuple[str, tuple[str, ...]]]


def cost(text: str, mesh_shape: MeshShape, max_iterations: int = 1) -> Cost:
    """Sum up the cost of a program.

    Args:
      text: `compiled.as_text()`.
      mesh_shape: the mesh that the program was compiled for.
      max_iterations: the assumed iterations of a loop whose condition has no constant.
    """
    computations, entry = _split(text)
    totals: dict[str, Cost] = {}

    def total(name: str) -> Cost:
        if name not in totals:
            lines = computations.get(name, [])
            cycles = sum(int(match[1]) for line in lines if (match := _CYCLES.search(line)))
            collectives = Counter()
            for operation, size, mesh_axes in _collectives(lines, computations, mesh_shape):
                collectives[operation, mesh_axes] += size
            for line in lines:
                times, called_names = 1, []
                if match := _WHILE.search(line):
                    times, called_names = _iterations(computations[match[1]], max_iterations), [match[2]]
                elif _CALL.search(line):
                    called_names = _CALLED.findall(line) + re.findall(r'[\w.\-]+', ''.join(_BRANCHES.findall(line)))
                for called_cost in map(total, called_names):
                    cycles += times * called_cost.cycles
                    for key, size in called_cost.collectives.items():
                        collectives[key] += times * size
            totals[name] = Cost(cycles, collectives)
        return totals[name]

    return total(entry)


def _iterations(condition: Sequence[str], default: int) -> int:
    """Return the iterations of a loop that counts from 0 to a constant; `default` for other loops."""
    constants = re.findall(r' [su]32\[\]\S* constant\((\d+)\)', '\n'.join(condition))
    counts_up = any(' compare(' in line and 'ROOT' in line and 'direction=LT' in line for line in condition)
    return int(constants[0]) if counts_up and len(constants) == 1 else default


def _split(text: str) -> tuple[dict[str, list[str]], str]:
    """Split the text into {computation: lines} and return it with the name of the entry computation."""
    computations, entry, lines = {}, '', []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        elif line.startswith('  '):
            lines.append(line)
    return computations, entry


def _collectives(
    lines: Sequence[str], computations: dict[str, list[str]], mesh_shape: MeshShape
) -> list[tuple[str, Any, tuple[str, ...]]]:
    """Return (operation, bytes received per chip, mesh axes) for each collective in the lines.

    A collective that overlaps with computation appears in several fusions with the same channel_id, and counts once.
    """
    fused_lines = [computations.get(collectives[1], []) for line in lines if (collectives := _FUSION.search(line))]
    by_channel = {}
    for line in (*lines, *(line for fusion_lines in fused_lines for line in fusion_lines)):
        match = _INSTRUCTION.match(line)
        if match and (operation := match[3].removesuffix('-start')) in COLLECTIVES:
            channel = re.search(r'channel_id=(\d+)', line)
            by_channel.setdefault(channel[1] if channel else match[1], (operation, match, line))
    collectives = []
    for operation, match, line in by_channel.values():
        arrays = [_bytes(*array) for array in _ARRAY.findall(match[2])]
        group = _group(line, math.prod(size for _, size in mesh_shape))
        if match[3].endswith('-start') and operation != 'all-reduce':  # (operand, result, contexts)
            arrays = arrays[1:2]
        n = len(group)
        arriving = {
            'all-gather': (n - 1) / n, 'all-reduce': 2 * (n - 1) / n, 'reduce-scatter': n - 1,
            'all-to-all': (n - 1) / n, 'collective-permute': 1,
        }[operation]  # fmt: skip
        collectives.append((operation, sum(arrays) * arriving, _axes(group, mesh_shape)))
    return collectives


def _bytes(kind: str, shape: str) -> int:
    return math.prod(map(int, filter(None, shape.split(',')))) * (_WIDTHS.get(kind) or int(kind[1:]) // 8 or 1)


def _group(line: str, devices: int) -> list[int]:
    """Return the partitions in the first replica group of a collective."""
    if pairs := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', line):
        return [int(pairs[1]), int(pairs[2])]
    if mesh := re.search(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}', line):
        sizes = [(name, int(size)) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", mesh[1])]
        along = re.findall(r"'([\w.]+)'", mesh[2])
        ids = np.arange(devices).reshape([size for _, size in sizes])
        return ids[tuple(slice(None) if name in along else 0 for name, _ in sizes)].ravel().tolist()
    if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line):
        ids = np.arange(devices).reshape([int(n) for n in iota[3].split(',')])
        ids = ids.transpose([int(n) for n in iota[4].split(',')]) if iota[4] else ids
        return ids.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)
    return [int(n) for n in listed[1].split(',')] if listed else list(range(devices))


def _axes(group: Sequence[int], mesh_shape: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """Return the mesh axes along which the partitions of a group differ."""
    coordinates = np.stack(np.unravel_index(np.array(group), [size for _, size in mesh_shape]))
    return tuple(
        name for (name, _), axis_coordinates in zip(mesh_shape, coordinates) if len(set(axis_coordinates.tolist())) > 1
    )
