"""Formats plans as tables and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from perl_jax.parallel import topology
from perl_jax.tools.plan.compile import Report
from perl_jax.tools.plan.programs import Plan

GIB = 2**30
COLUMNS = ('base', 'adapters', 'optimizer', 'data', 'temporaries')


def summary(tuning: str, plan: Plan, reports: Sequence[Report]) -> dict[str, Any]:
    """Summarize a plan and the totals of its programs: {'peak', 'seconds', 'fits' ..., 'programs': [...]}."""
    name = plan.partitioner.topology
    chip = topology.parse(name).chip if name else None
    peaks = [report.peak for report in reports if report.peak is not None]
    seconds = [report.times * report.seconds for report in reports if report.seconds is not None]
    return {
        'phase': plan.phase,
        'tuning': tuning,
        'topology': name,
        'mesh': dict(plan.partitioner.mesh.shape),
        'batch_size': plan.batch_size,
        'hbm': chip and chip.hbm,
        'devices_a_chip': chip and chip.devices,
        'peak': max(peaks) if len(peaks) == len(reports) else None,
        'fits': None if chip is None else all(report.fits for report in reports),
        'seconds': sum(seconds) if len(seconds) == len(reports) else None,
        'programs': [dataclasses.asdict(report) for report in reports],
    }


def as_json(plans: Sequence[dict[str, Any]]) -> str:
    """Return a JSON array of the plans; bytes, seconds and FLOPs are per device: a chip, or half a chip (tpu7x)."""
    return json.dumps(plans, indent=2)


def text(plans: Sequence[dict[str, Any]]) -> str:
    """Return a table for each plan and, for several plans, a table that compares them with the last."""
    return '\n\n'.join([*map(_plan_table, plans), *([_comparison_table(plans)] if len(plans) > 1 else [])])


def _plan_table(plan: dict[str, Any]) -> str:
    mesh = ' x '.join(f'{axis} {size}' for axis, size in plan['mesh'].items())
    device_name = plan['topology'] or 'this machine'
    title = f'{plan["phase"]}, {plan["tuning"]}, on {device_name} ({mesh}), batch {plan["batch_size"]}'
    rows = [['', *COLUMNS, '(cache)', 'peak', 'fits', 'ms', 'MXU', 'compiled in']]
    for program in plan['programs']:
        rows.append([
            program['name'] + (f' x {program["times"]}' if program['times'] > 1 else ''),
            *(_gib(program[column]) for column in COLUMNS),
            _gib(program['cache']) if program['cache'] else '',
            _gib(program['peak']) if program['peak'] is not None else f'needs {program["needs"]}',
            '' if program['fits'] is None else 'yes' if program['fits'] else 'NO',
            _number(program['seconds'] and 1e3 * program['seconds'], '.1f'),
            _number(program['utilisation'], '.0%'),
            f'{program["compile_seconds"]:.0f} s',
        ])  # fmt: skip
    lines = [title, _aligned(rows)]
    for program in plan['programs']:
        if program['collectives']:
            received = ', '.join(f'{name} {_gib(size)}' for name, size in program['collectives'].items())
            lines.append(f'  {program["name"]} receives, in GiB: {received}')
    hbm = f' of {_gib(plan["hbm"])}' if plan['hbm'] else ''
    step_time = f'; computes {plan["seconds"]:.3f} s a step' if plan['seconds'] else ''
    unit = 'a device, half a chip' if plan['devices_a_chip'] == 2 else 'a chip'
    peak = f'{_gib(plan["peak"])}{hbm} GiB {unit}' if plan['peak'] is not None else f'does not fit{hbm}'
    note = f"GiB {unit}; ms are the compiler's cycles, without waiting for the network"
    return '\n'.join([*lines, f'  peak {peak}{step_time} ({note})'])


def _comparison_table(plans: Sequence[dict[str, Any]]) -> str:
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
