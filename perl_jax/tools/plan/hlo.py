"""What the TPU's compiler says of its own program: the cycles it expects, and what crosses the network.

Read from the optimized HLO text. What is in a loop counts as often as the loop turns: its condition compares with a
constant. Where only the data knows (the sampler stops when all have ended) the caller says how often at most.
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
    """Of one run of a program, on one chip. `collectives`: bytes that arrive, by (operation, mesh axes)."""

    cycles: float
    collectives: Counter[tuple[str, tuple[str, ...]]]


def cost(text: str, mesh_shape: MeshShape, trips: int = 1) -> Cost:
    """Add up a program: `text` is `compiled.as_text()`, `trips` the turns of a loop that no constant ends."""
    computations, entry = _split(text)
    totals: dict[str, Cost] = {}

    def total(name: str) -> Cost:
        if name not in totals:
            lines = computations.get(name, [])
            cycles = sum(int(found[1]) for line in lines if (found := _CYCLES.search(line)))
            collectives = Counter()
            for operation, size, over in _collectives(lines, computations, mesh_shape):
                collectives[operation, over] += size
            for line in lines:
                times, called = 1, []
                if found := _WHILE.search(line):
                    times, called = _turns(computations[found[1]], trips), [found[2]]
                elif _CALL.search(line):
                    called = _CALLED.findall(line) + re.findall(r'[\w.\-]+', ''.join(_BRANCHES.findall(line)))
                for inner in map(total, called):
                    cycles += times * inner.cycles
                    for key, size in inner.collectives.items():
                        collectives[key] += times * size
            totals[name] = Cost(cycles, collectives)
        return totals[name]

    return total(entry)


def _turns(condition: Sequence[str], unknown: int) -> int:
    """How often a loop turns that counts from 0 up to a constant."""
    constants = re.findall(r' [su]32\[\]\S* constant\((\d+)\)', '\n'.join(condition))
    counts = any(' compare(' in line and 'ROOT' in line and 'direction=LT' in line for line in condition)
    return int(constants[0]) if counts and len(constants) == 1 else unknown


def _split(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first to run."""
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
    """Of each collective in some lines: the operation, the bytes that arrive on a chip, the mesh axes it goes over.

    One that overlaps with computation stands in each of the fusions that it is spread over, under one channel.
    """
    fused = [computations.get(found[1], []) for line in lines if (found := _FUSION.search(line))]
    by_channel = {}
    for line in (*lines, *(line for some in fused for line in some)):
        match = _INSTRUCTION.match(line)
        if match and (operation := match[3].removesuffix('-start')) in COLLECTIVES:
            channel = re.search(r'channel_id=(\d+)', line)
            by_channel.setdefault(channel[1] if channel else match[1], (operation, match, line))
    found = []
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
        found.append((operation, sum(arrays) * arriving, _axes(group, mesh_shape)))
    return found


def _bytes(kind: str, shape: str) -> int:
    return math.prod(map(int, filter(None, shape.split(',')))) * (_WIDTHS.get(kind) or int(kind[1:]) // 8 or 1)


def _group(line: str, devices: int) -> list[int]:
    """The partitions of the first group of a collective."""
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
    """The mesh axes along which the partitions of a group differ."""
    places = np.stack(np.unravel_index(np.array(group), [size for _, size in mesh_shape]))
    return tuple(name for (name, _), where in zip(mesh_shape, places) if len(set(where.tolist())) > 1)
