"""Runs the cells of a grid, each command in a process of its own: a killed sweep goes on where it was."""

from __future__ import annotations

import concurrent.futures
import fcntl
import json
import logging
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence

from perl_jax.errors import UserError, check_count
from perl_jax.runs import rundir
from perl_jax.tools.sweep.grid import Cell


def shell(command: Sequence[str]) -> str:
    """A command as one would type it: gin's strings have single quotes, so double ones go around."""
    plain = lambda word: "'" not in word or re.search(r'["$`\\!]', word)  # noqa: E731
    return ' '.join(shlex.quote(word) if plain(word) else f'"{word}"' for word in command)


def is_trained(cell: Cell) -> bool:
    """Whether its run is finished."""
    return (rundir.read(cell.folder) or {}).get('finished') is not None


def is_done(cell: Cell) -> bool:
    """Whether its run is finished and measured."""
    return is_trained(cell) and (cell.evaluation is None or os.path.exists(cell.evaluation))


def check(cells: Sequence[Cell]) -> None:
    """Refuse cells that were started with other settings than they have now.

    Raises:
      UserError: naming the first of them.
    """
    for cell in cells:
        if os.path.exists(_note(cell)):
            with open(_note(cell)) as file:
                before = json.load(file)
            now = _settings(cell)
            if before != now:
                differs = [x for x in before + now if (x in before) != (x in now)] or ['their order']
                raise UserError(
                    f"sweep: '{cell.folder}' was started with other settings ({differs[0]}); "
                    f'name another SWEEP_DIR, or delete {_note(cell)} and the folder to start it over'
                )


def run(cells: Sequence[Cell], jobs: int, after_each: Callable[[], None]) -> list[Cell]:
    """Run what is not done, `jobs` at a time, each cell after those that it needs; returns the cells that failed.

    A cell whose parent failed is not started and counts as failed.

    Raises:
      UserError: `jobs` is no number of processes.
    """
    check_count('sweep: JOBS', jobs)
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
    os.makedirs(os.path.dirname(cell.folder), exist_ok=True)
    with open(cell.log, 'a') as log:
        # A killed sweep leaves its processes running. They hold the lock, by the log that they inherited, until they
        # end: two never write to one folder, and what they finish is not done again.
        fcntl.flock(log, fcntl.LOCK_EX)
        if is_done(cell):
            return True
        if not os.path.exists(_note(cell)):
            rundir.replace(_note(cell), json.dumps(_settings(cell), indent=2) + '\n')
        for command in cell.commands[1:] if is_trained(cell) else cell.commands:
            log.write(f'$ {shell(command)}\n')
            log.flush()
            if code := subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
                log.write(f'exit code {code}\n')  # all that a killed process leaves: -9
                return False
    return True


def _note(cell: Cell) -> str:
    return cell.folder + '.json'


def _settings(cell: Cell) -> list[str]:
    return cell.commands[0][3:]  # but for the interpreter
