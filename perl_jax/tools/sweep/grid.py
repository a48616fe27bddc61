"""Which cells a sweep has: every combination of its stages' axes, and what each cell needs of the stages before it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Mapping, Sequence

from perl_jax.errors import UserError

SEED = 'seed'  # the axis that is gone through last, and that tables sum up
Axes = Mapping[str, Mapping[str, Sequence[str]]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command over the product of its axes.

    name: its folder and what other stages call it.   command: sft, reward or policy.   gin_files: the recipe.
    axes: {axis: {label: [gin files (they end in .gin) and bindings, in order]}}.
    needs: {macro: stage}: the macro is the MODEL_DIR of that stage's cell with the same labels on the axes they share.
    bindings: of all its cells.
    split: measured by `perl_jax eval` when a run is finished, under eval_bindings; None does not.
    metrics: of that, what the tables show; the plot shows the first.   reference: labels that others are compared to.
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


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: its place in the grid, its folder, its commands, and the cells that have to be there before it."""

    stage: Stage
    labels: Mapping[str, str]
    folder: str
    parents: tuple[Cell, ...]
    commands: tuple[list[str], ...]

    @property
    def log(self) -> str:
        """Where its output goes."""
        return self.folder + '.log'

    @property
    def evaluation(self) -> str | None:
        """The file that its evaluation writes."""
        return self.stage.split and os.path.join(self.folder, f'eval_{self.stage.split}.json')


def cells(
    sweep_dir: str, stages: Sequence[Stage], search_paths: Sequence[str] = (), data_flags: Sequence[str] = ()
) -> list[Cell]:
    """All cells, those that others need first, and seed after seed: the first seed's tables are whole soonest.

    Raises:
      UserError: a stage needs one that does not come before it, or a cell that the other's axes do not have.
    """
    made: dict[str, list[Cell]] = {}
    flags = [*([f'--gin_search_paths={",".join(search_paths)}'] if search_paths else []), *data_flags]
    for stage in stages:
        if stage.name in made:
            raise UserError(f"sweep: two stages are called '{stage.name}'; give one another name")
        if empty := [axis for axis, labels in stage.axes.items() if not labels]:
            raise UserError(f"sweep: axis '{empty[0]}' of stage '{stage.name}' has no labels; give it one or strike it")
        made[stage.name] = []
        for labels in itertools.product(*stage.axes.values()):
            made[stage.name].append(_cell(sweep_dir, stage, dict(zip(stage.axes, labels)), made, flags))
    return sorted((cell for stage in made.values() for cell in stage), key=_turn)


def _turn(cell: Cell) -> int:
    """Which of its stage's seeds it has, but not before those that it needs."""
    own = list(cell.stage.axes[SEED]).index(cell.labels[SEED]) if SEED in cell.labels else 0
    return max([own, *map(_turn, cell.parents)])


def _cell(
    sweep_dir: str,
    stage: Stage,
    labels: dict[str, str],
    made: Mapping[str, list[Cell]],
    shared_flags: Sequence[str],
) -> Cell:
    name = ','.join(f'{axis}={label}' for axis, label in labels.items())
    if bad := re.search(r'[^\w=,.+-]', name):
        raise UserError(f"sweep: '{bad[0]}' in '{name}' cannot be in a folder's name; give that label another one")
    folder = os.path.join(sweep_dir, stage.name, *filter(None, [name]))  # without axes the stage is its one cell
    parents = {macro: _parent(stage, needed, labels, made) for macro, needed in stage.needs.items()}
    settings = [setting for axis, label in labels.items() for setting in stage.axes[axis][label]]
    files = [*stage.gin_files, *(x for x in settings if x.endswith('.gin'))]
    bindings = [*stage.bindings, *(x for x in settings if not x.endswith('.gin'))]
    bindings.append(f'MODEL_DIR = {folder!r}')
    bindings += [f'{macro} = {parent.folder!r}' for macro, parent in parents.items()]
    here = [sys.executable, '-m', 'perl_jax']
    flags = [*shared_flags, *(f'--gin_file={x}' for x in files), *(f'--gin_bindings={x}' for x in bindings)]
    commands = [[*here, stage.command, *flags]]
    if stage.split:
        flags = [*shared_flags, *(f'--gin_bindings={x}' for x in stage.eval_bindings)]
        commands.append([*here, 'eval', f'--model_dir={folder}', f'--split={stage.split}', *flags])
    return Cell(stage, labels, folder, tuple(parents.values()), tuple(commands))


def _parent(stage: Stage, needed: str, labels: Mapping[str, str], made: Mapping[str, list[Cell]]) -> Cell:
    if needed not in made or needed == stage.name:
        raise UserError(f"sweep: stage '{stage.name}' needs '{needed}', which is no stage before it")
    shared = {axis: label for axis, label in labels.items() if axis in made[needed][0].labels}
    found = [cell for cell in made[needed] if shared.items() <= cell.labels.items()]
    if len(found) != 1:
        raise UserError(
            f"sweep: stage '{stage.name}' at {dict(labels)} needs one cell of '{needed}' with {shared}, "
            f'there are {len(found)}; make their axes and labels agree'
        )
    return found[0]
