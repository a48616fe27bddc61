"""The results of a sweep: one row per finished cell (results.csv), and tables as in the paper (results.md).

Quality is as in the paper's Tables 2 and 3; memory as a percentage and speed as a multiple of full tuning's are as in
its Table 1. Seeds are aggregated into one row: the median, and the range if there are several.
"""

from __future__ import annotations

import csv
import io
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax import json_files
from perl_jax.runs import logs, rundir
from perl_jax.tools.sweep.grid import SEED, Cell, Stage
from perl_jax.tools.sweep.queue import is_done

Row = dict[str, Any]


def rows(cells: Sequence[Cell]) -> list[Row]:
    """Return a row per finished cell: labels, metrics with intervals, parameters, memory in bytes, examples/s."""
    return [_row(cell) for cell in cells if is_done(cell)]


def write(sweep_dir: str, stages: Sequence[Stage], cells: Sequence[Cell]) -> None:
    """Write results.csv and results.md, each atomically."""
    all_rows = rows(cells)
    columns = list(dict.fromkeys(name for row in all_rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(all_rows)
    logs.replace(os.path.join(sweep_dir, 'results.csv'), text.getvalue())
    tables = [table(stage, [row for row in all_rows if row['stage'] == stage.name]) for stage in stages]
    logs.replace(os.path.join(sweep_dir, 'results.md'), '\n\n'.join(tables) + '\n')


def table(stage: Stage, stage_rows: Sequence[Row]) -> str:
    """Format a stage as a Markdown table with a line for each combination of labels except seeds."""
    axes = [axis for axis in stage.axes if axis != SEED]
    name = ' '.join(stage.reference.values())
    comparison_columns = [f'memory, % of {name}', f'speed, x {name}'] if name else []
    header = [*axes, 'seeds', *stage.metrics, 'trained', 'memory, MiB', *comparison_columns, 'examples/s']
    lines = [f'## {stage.name}', '', '| ' + ' | '.join(header) + ' |', '|' + '---|' * len(header)]
    for labels, group in groups(stage, stage_rows).items():
        reference_rows = reference(stage, dict(zip(axes, labels)), stage_rows)
        memory, speed = ([row[name] for row in group] for name in ('memory_peak', 'examples_per_second'))
        ratios = [
            spread(ratio(group, reference_rows, 'memory_peak'), lambda x: f'{100 * x:.0f}%'),
            spread(ratio(group, reference_rows, 'examples_per_second'), lambda x: f'{x:.2f}x'),
        ]
        quality = [[row[metric] for row in group if metric in row] for metric in stage.metrics]
        line = [
            *labels,
            str(len(group)),
            *(spread(values, lambda x: f'{x:.3f}') for values in quality),
            f'{group[0]["trainable_parameters"]:,}',
            spread([x / 2**20 for x in memory], lambda x: f'{x:.1f}'),
            *(ratios if stage.reference else []),
            spread(speed, lambda x: f'{x:.3g}'),
        ]
        lines.append('| ' + ' | '.join(line) + ' |')
    return '\n'.join(lines)


def groups(stage: Stage, stage_rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Group rows by their labels except the seed: {labels: rows}, in the order of the axes."""
    axes, groups_by_label = [axis for axis in stage.axes if axis != SEED], {}
    for row in stage_rows:
        groups_by_label.setdefault(tuple(row[axis] for axis in axes), []).append(row)
    return groups_by_label


def reference(stage: Stage, labels: Mapping[str, str], stage_rows: Sequence[Row]) -> list[Row]:
    """Return the rows that those with `labels` are compared with: labels replaced by those of the stage's reference."""
    reference_labels = {**labels, **stage.reference}
    return [row for row in stage_rows if reference_labels.items() <= row.items()]


def ratio(group: Sequence[Row], reference_rows: Sequence[Row], name: str) -> list[float]:
    """Return each row's value divided by that of the reference row with the same seed."""
    reference_by_seed = {row.get(SEED): row[name] for row in reference_rows}
    return [row[name] / reference_by_seed[row.get(SEED)] for row in group if row.get(SEED) in reference_by_seed]


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Format the median, followed by '(minimum to maximum)' if these differ when formatted."""
    if not values:
        return ''
    low, high = show(min(values)), show(max(values))
    return show(float(np.median(values))) + (f' ({low} to {high})' if low != high else '')


def _row(cell: Cell) -> Row:
    about = rundir.require(cell.folder)
    row: Row = {'stage': cell.stage.name, **cell.labels}
    if cell.evaluation is not None:
        path, remedy = pathlib.Path(cell.evaluation), 'delete it, and the sweep evaluates this cell again'
        for name, measured in json_files.read(path, remedy=remedy).items():
            fields = {f'{name}.value': float, f'{name}.low': float | None, f'{name}.high': float | None}
            json_files.check({name: measured}, path, fields)
            row |= {name: measured['value'], f'{name}_low': measured['low'], f'{name}_high': measured['high']}
    row['trainable_parameters'] = about['trainable_parameters']
    row |= {f'memory_{name}': size for name, size in about['memory'].items()}
    logged = [entry for _, entry in logs.entries(os.path.join(cell.folder, 'metrics.jsonl'))]
    speeds = [x['throughput/examples_per_second'] for x in logged if 'throughput/examples_per_second' in x]
    row['examples_per_second'] = float(np.median(speeds[1:] or speeds))  # the first includes compilation
    row |= {name: about[name] for name in ('step_seconds', 'seconds') if name in about}
    return row | {'devices': about['devices'], 'model_dir': cell.folder}
