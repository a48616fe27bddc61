"""Runs the cells of a grid, each command in a process of its own: a killed sweep goes on where it was."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence

from perl_jax import rundir
from perl_jax.errors import UserError
from perl_jax.sweep.grid import Cell


def shell(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(command)


def is_done(cell: Cell) -> bool:
    """Whether its run is finished and measured."""
    about = rundir.read(cell.folder)
    finished = about is not None and about.get('finished') is not None
    return finished and (cell.evaluation is None or os.path.exists(cell.evaluation))


def check(cells: Sequence[Cell]) -> None:
    """Refuse cells that were started with other settings; note the settings of those that are new.

    Raises:
      UserError: naming the first of them. Nothing is written then.
    """
    for cell in cells:
        if os.path.exists(_note(cell)):
            with open(_note(cell)) as file:
                before = json.load(file)
            if differs := sorted(set(before) ^ set(cell.commands[0][3:])):
                raise UserError(
                    f"sweep: '{cell.folder}' was started with other settings ({differs[0]}); "
                    f'name another SWEEP_DIR, or delete {_note(cell)} and the folder to start it over'
                )
    for cell in cells:
        os.makedirs(os.path.dirname(cell.folder), exist_ok=True)
        with open(_note(cell), 'w') as file:
            json.dump(cell.commands[0][3:], file, indent=2)  # but for the interpreter


def run(cells: Sequence[Cell], jobs: int, after_each: Callable[[], None]) -> list[Cell]:
    """Run what is not done, `jobs` at a time, each cell after those that it needs; returns the cells that failed.

    A cell whose parent failed is not started and counts as failed.
    """
    log = logging.getLogger('perl_jax')
    done, failed, running = {cell.folder for cell in cells if is_done(cell)}, [], {}
    waiting = [cell for cell in cells if cell.folder not in done]
    log.info(f'sweep: {len(waiting)} of {len(cells)} cells to do')
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            hopeless = {cell.folder for cell in failed}
            for cell in list(waiting):
                if any(parent.folder in hopeless for parent in cell.parents):
                    waiting.remove(cell)
                    failed.append(cell)
                    hopeless.add(cell.folder)
                elif len(running) < jobs and all(parent.folder in done for parent in cell.parents):
                    waiting.remove(cell)
                    running[pool.submit(_run, cell)] = cell
            for future in concurrent.futures.wait(running, return_when='FIRST_COMPLETED').done:
                cell = running.pop(future)
                if future.result():
                    done.add(cell.folder)
                    after_each()
                else:
                    failed.append(cell)
                state = 'done' if cell.folder in done else f'failed, see {cell.log}'
                log.info(f'sweep: {cell.folder} {state}; {len(waiting) + len(running)} to go')
    return failed


def _run(cell: Cell) -> bool:
    """Run a cell's commands in turn, their output to its log; whether all of them succeeded."""
    with open(cell.log, 'a') as log:
        for command in cell.commands:
            log.write(f'$ {shell(command)}\n')
            log.flush()
            if subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
                return False
    return True


def _note(cell: Cell) -> str:
    return cell.folder + '.json'
