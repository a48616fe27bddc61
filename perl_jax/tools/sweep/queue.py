"""Runs the cells of a grid, each command in a separate process; a killed sweep resumes where it stopped."""

from __future__ import annotations

import concurrent.futures
import fcntl
import json
import logging
import os
import pathlib
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence

from perl_jax import json_files, settings
from perl_jax.errors import UserError
from perl_jax.runs import logs, rundir
from perl_jax.tools.sweep.grid import Cell


def shell(command: Sequence[str]) -> str:
    """Quote a command for a shell; words with gin strings, which have single quotes, get double quotes."""
    needs_no_double_quotes = lambda word: "'" not in word or re.search(r'["$`\\!]', word)  # noqa: E731
    return ' '.join(shlex.quote(word) if needs_no_double_quotes(word) else f'"{word}"' for word in command)


def is_trained(cell: Cell) -> bool:
    """Tell whether the cell's training is finished."""
    return (rundir.read(cell.folder) or {}).get('finished') is not None


def is_done(cell: Cell) -> bool:
    """Tell whether the cell's training and evaluation are finished."""
    return is_trained(cell) and (cell.evaluation is None or os.path.exists(cell.evaluation))


def check(cells: Sequence[Cell]) -> None:
    """Check that no cell was started with other settings than it has now.

    Raises:
      UserError: a cell was; the message names the first.
    """
    for cell in cells:
        if os.path.exists(_settings_path(cell)):
            path, remedy = _settings_path(cell), 'delete it and the folder to start the cell over'
            started_settings = json_files.parse_list(pathlib.Path(path).read_bytes(), path, remedy)
            current_settings = _settings(cell)
            if started_settings != current_settings:
                differences = [
                    setting
                    for setting in started_settings + current_settings
                    if (setting in started_settings) != (setting in current_settings)
                ] or ['their order']
                raise UserError(
                    f"sweep: '{cell.folder}' was started with other settings ({differences[0]}); "
                    f'name another SWEEP_DIR, or delete {_settings_path(cell)} and the folder to start it over'
                )


@settings.checked
def run(cells: Sequence[Cell], jobs: settings.Count, after_each: Callable[[], None]) -> list[Cell]:
    """Run all unfinished cells, `jobs` at a time, each after its parents.

    Args:
      cells: the cells, parents first.
      jobs: the number of cells that run at a time.
      after_each: called after each cell that succeeds.

    Returns:
      The cells that failed. A cell whose parent failed is not started and counts as failed.
    """
    logger = logging.getLogger('perl_jax')
    done, failed, running = {cell.folder for cell in cells if is_done(cell)}, [], {}
    waiting = [cell for cell in cells if cell.folder not in done]
    logger.info(f'sweep: {len(waiting)} of {len(cells)} cells to do')
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            failed_folders = {cell.folder for cell in failed}
            for cell in list(waiting):
                if any(parent.folder in failed_folders for parent in cell.parents):
                    waiting.remove(cell)
                    failed.append(cell)
                    failed_folders.add(cell.folder)
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
                state = 'done' if cell.folder in done else f'failed, see {cell.log_path}'
                logger.info(f'sweep: {cell.folder} {state}; {len(waiting) + len(running)} to go')
    return failed


def _run(cell: Cell) -> bool:
    """Run a cell's commands in turn, with their output in its log; returns whether all succeeded."""
    os.makedirs(os.path.dirname(cell.folder), exist_ok=True)
    with open(cell.log_path, 'a') as log_file:
        # A killed sweep leaves its child processes running. They keep the lock, through the inherited log file, until
        # they end. So two processes never write to one folder, and a cell that they finish is not run again.
        fcntl.flock(log_file, fcntl.LOCK_EX)
        if is_done(cell):
            return True
        if not os.path.exists(_settings_path(cell)):
            logs.replace(_settings_path(cell), json.dumps(_settings(cell), indent=2) + '\n')
        for command in cell.commands[1:] if is_trained(cell) else cell.commands:
            log_file.write(f'$ {shell(command)}\n')
            log_file.flush()
            if code := subprocess.run(command, stdout=log_file, stderr=log_file, check=False).returncode:
                log_file.write(f'exit code {code}\n')  # the only trace of a killed process: -9
                return False
    return True


def _settings_path(cell: Cell) -> str:
    return cell.folder + '.json'


def _settings(cell: Cell) -> list[str]:
    return cell.commands[0][3:]  # without the interpreter
