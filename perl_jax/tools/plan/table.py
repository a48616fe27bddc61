"""A plan as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from perl_jax.parallel import topology
from perl_jax.tools.plan.compile import Report
from perl_jax.tools.plan.programs import Plan

GIB = 2**30
PARTS = ('base', 'adapters', 'optimizer', 'data', 'temporaries')


def summary(tuning: str, plan: Plan, reports: Sequence[Report]) -> dict[str, Any]:
    """A plan and what all of its programs come to: {'peak', 'seconds', 'fits' ..., 'programs': [...]}."""
    name = plan.partitioner.topology
    chip = topology.parse(name).chip if name else None
    peaks = [one.peak for one in reports if one.peak is not None]
    seconds = [one.times * one.seconds for one in reports if one.seconds is not None]
    return {
        'phase': plan.phase,
        'tuning': tuning,
        'topology': name,
        'mesh': dict(plan.partitioner.mesh.shape),
        'batch_size': plan.batch_size,
        'hbm': chip and chip.hbm,
        'devices_a_chip': chip and chip.devices,
        'peak': max(peaks) if len(peaks) == len(reports) else None,
        'fits': None if chip is None else all(one.fits for one in reports),
        'seconds': sum(seconds) if len(seconds) == len(reports) else None,
        'programs': [dataclasses.asdict(one) for one in reports],
    }


def as_json(plans: Sequence[dict[str, Any]]) -> str:
    """One object for each plan. Bytes, seconds and FLOPs are of one device, a chip or (tpu7x) half of one."""
    return json.dumps(plans, indent=2)


def text(plans: Sequence[dict[str, Any]]) -> str:
    """A table for each plan, and where there are several a line that compares them with the last."""
    return '\n\n'.join([*map(_one, plans), *([_compared(plans)] if len(plans) > 1 else [])])


def _one(plan: dict[str, Any]) -> str:
    mesh = ' x '.join(f'{axis} {size}' for axis, size in plan['mesh'].items())
    where = plan['topology'] or 'this machine'
    head = f'{plan["phase"]}, {plan["tuning"]}, on {where} ({mesh}), batch {plan["batch_size"]}'
    rows = [['', *PARTS, '(cache)', 'peak', 'fits', 'ms', 'MXU', 'compiled in']]
    for one in plan['programs']:
        rows.append([
            one['name'] + (f' x {one["times"]}' if one['times'] > 1 else ''),
            *(_gib(one[part]) for part in PARTS),
            _gib(one['cache']) if one['cache'] else '',
            _gib(one['peak']) if one['peak'] is not None else f'needs {one["needs"]}',
            '' if one['fits'] is None else 'yes' if one['fits'] else 'NO',
            _number(one['seconds'] and 1e3 * one['seconds'], '.1f'),
            _number(one['utilisation'], '.0%'),
            f'{one["compile_seconds"]:.0f} s',
        ])  # fmt: skip
    lines = [head, _aligned(rows)]
    for one in plan['programs']:
        if one['collectives']:
            over = ', '.join(f'{name} {_gib(size)}' for name, size in one['collectives'].items())
            lines.append(f'  {one["name"]} receives, in GiB: {over}')
    hbm = f' of {_gib(plan["hbm"])}' if plan['hbm'] else ''
    took = f'; computes {plan["seconds"]:.3f} s a step' if plan['seconds'] else ''
    each = 'a device, half a chip' if plan['devices_a_chip'] == 2 else 'a chip'
    peak = f'{_gib(plan["peak"])}{hbm} GiB {each}' if plan['peak'] is not None else f'does not fit{hbm}'
    note = f"GiB {each}; ms are the compiler's cycles, without waiting for the network"
    return '\n'.join([*lines, f'  peak {peak}{took} ({note})'])


def _compared(plans: Sequence[dict[str, Any]]) -> str:
    reference = plans[-1]
    rows = [['', 'topology', 'batch', 'peak, GiB', f'% of {reference["tuning"]}', 's a step', 'speed']]
    for plan in plans:
        memory = plan['peak'] / reference['peak'] if plan['peak'] and reference['peak'] else None
        speed = None
        if plan['seconds'] and reference['seconds']:
            speed = plan['batch_size'] / plan['seconds'] / (reference['batch_size'] / reference['seconds'])
        rows.append([
            plan['tuning'], plan['topology'] or 'here', str(plan['batch_size']),
            _gib(plan['peak']) if plan['peak'] is not None else 'does not fit', _number(memory, '.0%'),
            _number(plan['seconds'], '.3f'), _number(speed and round(speed, 2), '.2f') + ('x' if speed else ''),
        ])  # fmt: skip
    return _aligned(rows)


def _gib(size: float | None) -> str:
    return '' if size is None else f'{size / GIB:{".2f" if size > GIB / 10 else ".1g"}}'


def _number(value: float | None, form: str) -> str:
    return '' if value is None else format(value, form)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = [[row[0].ljust(widths[0]), *(x.rjust(n) for x, n in zip(row[1:], widths[1:]))] for row in rows]
    return '\n'.join('  ' + '  '.join(row).rstrip() for row in cells)
