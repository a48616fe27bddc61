"""The cells of a sweep: every combination of a stage's axes, and the cells of earlier stages that each depends on."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Mapping, Sequence

from perl_jax import settings
from perl_jax.errors import UserError

SEED = 'seed'  # the axis that varies slowest in the queue, and that tables aggregate over
Axes = Mapping[str, Mapping[str, Sequence[str]]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command, run for every combination of labels of its axes.

    Attributes:
      name: the stage's name, also that of its folder.
      command: 'sft', 'reward' or 'policy'.
      gin_files: the recipe.
      axes: {axis: {label: [gin files (which end in .gin) and bindings, in order]}}.
      needs: {macro: stage}: the macro is set to the MODEL_DIR of that stage's cell with the same labels on shared axes.
      bindings: gin bindings of all cells.
      split: the split that `perl_jax eval` evaluates after training; None evaluates nothing.
      eval_bindings: gin bindings of that evaluation.
      metrics: the metrics of the evaluation that the tables show; the plot shows the first.
      reference: the labels of the cells that the others are compared with.
    """

    name: str
    command: str
    gin_files: Sequence[str]
    axes: Axes
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bindings: Sequence[str] = ()
    split: str | None = 'validation'
    eval_bindings: Sequence[str] = ()
    metrics: Sequence[str] = ()
    reference: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        settings.check(self)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
      stage: of the grid.
      labels: the run's label on each axis, {axis: label}.
      folder: its MODEL_DIR.
      parents: the cells that must finish before it.
      commands: to run in turn, each as a list of arguments.
    """

    stage: Stage
    labels: Mapping[str, str]
    folder: str
    parents: tuple[Cell, ...]
    commands: tuple[list[str], ...]

    @property
    def log_path(self) -> str:
        """Return the path of the cell's log."""
        return self.folder + '.log'

    @property
    def evaluation(self) -> str | None:
        """Return the path of the cell's evaluation; None if there is none."""
        return self.stage.split and os.path.join(self.folder, f'eval_{self.stage.split}.json')


def cells(
    sweep_dir: str, stages: Sequence[Stage], search_paths: Sequence[str] = (), data_flags: Sequence[str] = ()
) -> list[Cell]:
    """Return all cells, parents first and seed by seed, so that the tables of the first seed are complete early.

    Raises:
      UserError: a stage needs a stage that is not before it, or labels that the other's axes do not have.
    """
    cells_by_stage: dict[str, list[Cell]] = {}
    flags = [*([f'--gin_search_paths={",".join(search_paths)}'] if search_paths else []), *data_flags]
    for stage in stages:
        if stage.name in cells_by_stage:
            raise UserError(f"sweep: two stages are called '{stage.name}'; give one another name")
        if empty := [axis for axis, labels in stage.axes.items() if not labels]:
            raise UserError(
                f"sweep: axis '{empty[0]}' of stage '{stage.name}' has no labels; add one or remove the axis"
            )
        cells_by_stage[stage.name] = []
        for labels in itertools.product(*stage.axes.values()):
            cells_by_stage[stage.name].append(
                _cell(sweep_dir, stage, dict(zip(stage.axes, labels)), cells_by_stage, flags)
            )
    return sorted((cell for stage in cells_by_stage.values() for cell in stage), key=_seed_order)


def _seed_order(cell: Cell) -> int:
    """Return the index of the cell's seed in its stage, or of a later seed that its parents have."""
    seed_index = list(cell.stage.axes[SEED]).index(cell.labels[SEED]) if SEED in cell.labels else 0
    return max([seed_index, *map(_seed_order, cell.parents)])


def _cell(
    sweep_dir: str,
    stage: Stage,
    labels: dict[str, str],
    cells_by_stage: Mapping[str, list[Cell]],
    shared_flags: Sequence[str],
) -> Cell:
    name = ','.join(f'{axis}={label}' for axis, label in labels.items())
    if invalid := re.search(r'[^\w=,.+-]', name):
        raise UserError(f"sweep: '{invalid[0]}' in '{name}' cannot be in a folder's name; give that label another one")
    folder = os.path.join(sweep_dir, stage.name, *filter(None, [name]))  # a stage without axes is a single cell
    parents = {macro: _parent(stage, needed, labels, cells_by_stage) for macro, needed in stage.needs.items()}
    settings = [setting for axis, label in labels.items() for setting in stage.axes[axis][label]]
    files = [*stage.gin_files, *(x for x in settings if x.endswith('.gin'))]
    bindings = [*stage.bindings, *(x for x in settings if not x.endswith('.gin'))]
    bindings.append(f'MODEL_DIR = {folder!r}')
    bindings += [f'{macro} = {parent.folder!r}' for macro, parent in parents.items()]
    perl_jax_command = [sys.executable, '-m', 'perl_jax']
    flags = [*shared_flags, *(f'--gin_file={x}' for x in files), *(f'--gin_bindings={x}' for x in bindings)]
    commands = [[*perl_jax_command, stage.command, *flags]]
    if stage.split:
        flags = [*shared_flags, *(f'--gin_bindings={x}' for x in stage.eval_bindings)]
        commands.append([*perl_jax_command, 'eval', f'--model_dir={folder}', f'--split={stage.split}', *flags])
    return Cell(stage, labels, folder, tuple(parents.values()), tuple(commands))


def _parent(
    stage: Stage, parent_stage: str, labels: Mapping[str, str], cells_by_stage: Mapping[str, list[Cell]]
) -> Cell:
    if parent_stage not in cells_by_stage or parent_stage == stage.name:
        raise UserError(f"sweep: stage '{stage.name}' needs '{parent_stage}', which is not an earlier stage")
    shared_labels = {axis: label for axis, label in labels.items() if axis in cells_by_stage[parent_stage][0].labels}
    matching_cells = [cell for cell in cells_by_stage[parent_stage] if shared_labels.items() <= cell.labels.items()]
    if len(matching_cells) != 1:
        raise UserError(
            f"sweep: stage '{stage.name}' at {dict(labels)} needs one cell of '{parent_stage}' with {shared_labels}, "
            f'there are {len(matching_cells)}; make their axes and labels agree'
        )
    return matching_cells[0]
