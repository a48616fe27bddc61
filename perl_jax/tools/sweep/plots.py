"""The plots of a sweep, one PNG a stage: quality, memory and speed of each combination of labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from perl_jax.tools.sweep import results
from perl_jax.tools.sweep.grid import SEED, Cell, Stage

BLUE, GREY = '#2166c4', '#b4bbc3'


def write(sweep_dir: str, stages: Sequence[Stage], cells: Sequence[Cell]) -> None:
    """STAGE.png for every stage that names a metric and has a finished cell."""
    found = results.rows(cells)
    for stage in stages:
        rows = [row for row in found if row['stage'] == stage.name]
        if rows and stage.metrics:
            figure(stage, rows).savefig(os.path.join(sweep_dir, f'{stage.name}.png'), dpi=130)


def figure(stage: Stage, rows: Sequence[results.Row]) -> Any:
    """A dot a seed and a dash for the median; a grey line is the reference's median, which bars are compared to."""
    from matplotlib.figure import Figure

    groups, axes = results.groups(stage, rows), [axis for axis in stage.axes if axis != SEED]
    names = [' '.join(labels) or stage.name for labels in groups]
    made = Figure(figsize=(4 + 2.6 * len(groups) ** 0.5, 3.2), layout='constrained')
    quality, memory, speed = made.subplots(1, 3)
    metric = stage.metrics[0]
    bases = [results.reference(stage, dict(zip(axes, labels)), rows) if stage.reference else [] for labels in groups]
    for x, (group, base) in enumerate(zip(groups.values(), bases)):
        if of := [row[metric] for row in base if metric in row]:
            quality.plot([x - 0.5, x + 0.5], [np.median(of)] * 2, color=GREY, linewidth=1, zorder=0)
        values = [row[metric] for row in group if metric in row]
        quality.plot([x] * len(values), values, 'o', color=BLUE, alpha=0.45, markersize=5, markeredgewidth=0)
        quality.plot([x - 0.28, x + 0.28], [np.median(values)] * 2, color=BLUE, linewidth=2)
    quality.set_title(f'{stage.name}: {metric.replace("_", " ")}', fontsize=10)
    for panel, name, title in (
        (memory, 'memory_peak', 'memory, % of ' if any(bases) else 'memory, MiB'),
        (speed, 'examples_per_second', 'speed, x ' if any(bases) else 'examples a second'),
    ):
        heights = []
        for group, base in zip(groups.values(), bases):
            if any(bases):
                of = results.ratio(group, base, name)
                heights.append(np.median(of or [np.nan]) * (100 if panel is memory else 1))
            else:
                heights.append(np.median([row[name] for row in group]) / (2**20 if panel is memory else 1))
        colors = [GREY if group == base else BLUE for group, base in zip(groups.values(), bases)]
        bars = panel.bar(range(len(names)), heights, color=colors, width=0.6)
        panel.bar_label(bars, fmt='%.3g', fontsize=8, padding=2)
        panel.set_title(title + (' '.join(stage.reference.values()) if any(bases) else ''), fontsize=10)
        panel.margins(y=0.15)
    for panel in (quality, memory, speed):
        panel.set_xticks(range(len(names)), names, fontsize=8, rotation=0 if max(map(len, names)) < 6 else 30)
        panel.tick_params(axis='y', labelsize=8)
        panel.set_xlim(-0.6, len(names) - 0.4)
        panel.spines[['top', 'right']].set_visible(False)
    return made
