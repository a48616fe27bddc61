"""What the finished cells of a sweep measured: one row a cell (results.csv), and the paper's tables (results.md).

Quality as in the paper's Tables 2 and 3, memory as a percentage of full tuning's and speed as a multiple of it as in
its Table 1. Seeds are one row: the median, and the range where there are several.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.runs import rundir
from perl_jax.tools.sweep.grid import SEED, Cell, Stage
from perl_jax.tools.sweep.queue import is_done

Row = dict[str, Any]


def rows(cells: Sequence[Cell]) -> list[Row]:
    """One row a finished cell: labels, evaluation with intervals, parameters, memory in bytes, examples a second."""
    return [_row(cell) for cell in cells if is_done(cell)]


def write(sweep_dir: str, stages: Sequence[Stage], cells: Sequence[Cell]) -> None:
    """results.csv and results.md, each replaced as a whole."""
    found = rows(cells)
    columns = list(dict.fromkeys(name for row in found for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(found)
    rundir.replace(os.path.join(sweep_dir, 'results.csv'), text.getvalue())
    parts = [table(stage, [row for row in found if row['stage'] == stage.name]) for stage in stages]
    rundir.replace(os.path.join(sweep_dir, 'results.md'), '\n\n'.join(parts) + '\n')


def table(stage: Stage, found: Sequence[Row]) -> str:
    """A stage's Markdown table: a line for each combination of labels but seeds."""
    axes = [axis for axis in stage.axes if axis != SEED]
    name = ' '.join(stage.reference.values())
    compared = [f'memory, % of {name}', f'speed, x {name}'] if name else []
    head = [*axes, 'seeds', *stage.metrics, 'trained', 'memory, MiB', *compared, 'examples/s']
    lines = [f'## {stage.name}', '', '| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    for labels, group in groups(stage, found).items():
        base = reference(stage, dict(zip(axes, labels)), found)
        memory, speed = ([row[name] for row in group] for name in ('memory_peak', 'examples_per_second'))
        ratios = [
            spread(ratio(group, base, 'memory_peak'), lambda x: f'{100 * x:.0f}%'),
            spread(ratio(group, base, 'examples_per_second'), lambda x: f'{x:.2f}x'),
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


def groups(stage: Stage, found: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """{labels but the seed: their rows}, in the order of the axes."""
    axes, made = [axis for axis in stage.axes if axis != SEED], {}
    for row in found:
        made.setdefault(tuple(row[axis] for axis in axes), []).append(row)
    return made


def reference(stage: Stage, labels: Mapping[str, str], found: Sequence[Row]) -> list[Row]:
    """The rows that those of `labels` are compared to: the same, but for the stage's reference."""
    want = {**labels, **stage.reference}
    return [row for row in found if want.items() <= row.items()]


def ratio(group: Sequence[Row], base: Sequence[Row], name: str) -> list[float]:
    """Each row's value against the reference's of the same seed."""
    of_seed = {row.get(SEED): row[name] for row in base}
    return [row[name] / of_seed[row.get(SEED)] for row in group if row.get(SEED) in of_seed]


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The median; in brackets the least and the greatest, where these differ as shown."""
    if not values:
        return ''
    low, high = show(min(values)), show(max(values))
    return show(float(np.median(values))) + (f' ({low} to {high})' if low != high else '')


def _row(cell: Cell) -> Row:
    about = rundir.about(cell.folder)
    row: Row = {'stage': cell.stage.name, **cell.labels}
    if cell.evaluation is not None:
        with open(cell.evaluation) as file:
            for name, measured in json.load(file).items():
                row |= {name: measured['value'], f'{name}_low': measured['low'], f'{name}_high': measured['high']}
    row['trainable_parameters'] = about['trainable_parameters']
    row |= {f'memory_{name}': size for name, size in about['memory'].items()}
    with open(os.path.join(cell.folder, 'metrics.jsonl')) as file:
        logged = [json.loads(line) for line in file]
    speeds = [x['throughput/examples_per_second'] for x in logged if 'throughput/examples_per_second' in x]
    row['examples_per_second'] = float(np.median(speeds[1:] or speeds))  # the first waited for the compiler
    row |= {name: about[name] for name in ('step_seconds', 'seconds') if name in about}
    return row | {'devices': about['devices'], 'model_dir': cell.folder}
