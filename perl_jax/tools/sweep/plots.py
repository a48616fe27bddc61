"""The plots of a sweep, one PNG per stage: quality, memory and speed of each combination of labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from perl_jax.tools.sweep import results
from perl_jax.tools.sweep.grid import SEED, Cell, Stage

BLUE, GREY = '#2166c4', '#b4bbc3'


def write(sweep_dir: str, stages: Sequence[Stage], cells: Sequence[Cell]) -> None:
    """Write STAGE.png for every stage with a metric and a finished cell."""
    all_rows = results.rows(cells)
    for stage in stages:
        rows = [row for row in all_rows if row['stage'] == stage.name]
        if rows and stage.metrics:
            figure(stage, rows).savefig(os.path.join(sweep_dir, f'{stage.name}.png'), dpi=130)


def figure(stage: Stage, rows: Sequence[results.Row]) -> Any:
    """Draw a stage: a dot per seed and a dash for the median; grey lines and bars are the reference's."""
    from matplotlib.figure import Figure

    groups, axes = results.groups(stage, rows), [axis for axis in stage.axes if axis != SEED]
    names = [' '.join(labels) or stage.name for labels in groups]
    result = Figure(figsize=(4 + 2.6 * len(groups) ** 0.5, 3.2), layout='constrained')
    quality, memory, speed = result.subplots(1, 3)
    metric = stage.metrics[0]
    reference_groups = [
        results.reference(stage, dict(zip(axes, labels)), rows) if stage.reference else [] for labels in groups
    ]
    for position, (rows_of_group, reference_rows) in enumerate(zip(groups.values(), reference_groups)):
        if reference_values := [row[metric] for row in reference_rows if metric in row]:
            quality.plot(
                [position - 0.5, position + 0.5], [np.median(reference_values)] * 2, color=GREY, linewidth=1, zorder=0
            )
        values = [row[metric] for row in rows_of_group if metric in row]
        quality.plot([position] * len(values), values, 'o', color=BLUE, alpha=0.45, markersize=5, markeredgewidth=0)
        quality.plot([position - 0.28, position + 0.28], [np.median(values)] * 2, color=BLUE, linewidth=2)
    quality.set_title(f'{stage.name}: {metric.replace("_", " ")}', fontsize=10)
    for panel, name, title in (
        (memory, 'memory_peak', 'memory, % of ' if any(reference_groups) else 'memory, MiB'),
        (speed, 'examples_per_second', 'speed, x ' if any(reference_groups) else 'examples a second'),
    ):
        heights = []
        for rows_of_group, reference_rows in zip(groups.values(), reference_groups):
            if any(reference_groups):
                reference_values = results.ratio(rows_of_group, reference_rows, name)
                heights.append(np.median(reference_values or [np.nan]) * (100 if panel is memory else 1))
            else:
                heights.append(np.median([row[name] for row in rows_of_group]) / (2**20 if panel is memory else 1))
        colors = [
            GREY if rows_of_group == reference_rows else BLUE
            for rows_of_group, reference_rows in zip(groups.values(), reference_groups)
        ]
        bars = panel.bar(range(len(names)), heights, color=colors, width=0.6)
        panel.bar_label(bars, fmt='%.3g', fontsize=8, padding=2)
        panel.set_title(title + (' '.join(stage.reference.values()) if any(reference_groups) else ''), fontsize=10)
        panel.margins(y=0.15)
    for panel in (quality, memory, speed):
        panel.set_xticks(range(len(names)), names, fontsize=8, rotation=0 if max(map(len, names)) < 6 else 30)
        panel.tick_params(axis='y', labelsize=8)
        panel.set_xlim(-0.6, len(names) - 0.4)
        panel.spines[['top', 'right']].set_visible(False)
    return result
