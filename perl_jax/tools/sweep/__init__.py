"""`perl_jax sweep`: a resumable queue of the runs of a grid, with tables and plots of their results.

    sft     seed=0   seed=1   seed=2
              |
    reward  tuning=r1,seed=0   tuning=r4,seed=0   ...   tuning=full,seed=0   ...
              |
    policy  tuning=r1,seed=0   ...

Each cell is a MODEL_DIR, made by ordinary perl_jax commands in separate processes. `grid` defines the cells and their
dependencies, `queue` runs them, `results` and `plots` read their results.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from perl_jax import settings
from perl_jax.errors import UserError
from perl_jax.tools.sweep import grid, plots, queue, results
from perl_jax.tools.sweep.grid import Stage


def run(
    sweep_dir: str,
    stages: Sequence[Stage],
    jobs: settings.Count = 1,
    dry_run: bool = False,
    search_paths: Sequence[str] = (),
    data_flags: Sequence[str] = (),
) -> None:
    """Run all unfinished cells, `jobs` at a time; tables are rewritten after each cell, plots at the end.

    Args:
      sweep_dir: a folder for STAGE/AXIS=LABEL,.../ (MODEL_DIRs with their .log and .json), results.csv, results.md and
        STAGE.png.
      stages: the grid.
      jobs: the number of cells that run at a time.
      dry_run: whether to print the commands, in order, instead of running them.
      search_paths: folders in which the cells look for gin files before the package's.
      data_flags: the flags about data locations that are passed on to the cells.

    Raises:
      UserError: a cell was started with other settings, or (at the end) some cells failed.
    """
    cells = grid.cells(sweep_dir, stages, search_paths, data_flags)
    if dry_run:
        for cell in cells:
            print('\n'.join(queue.shell(command) for command in cell.commands))
        return
    queue.check(cells)
    failed = queue.run(cells, jobs, lambda: results.write(sweep_dir, stages, cells))
    results.write(sweep_dir, stages, cells)
    plots.write(sweep_dir, stages, cells)
    logging.getLogger('perl_jax').info(f'sweep: {sweep_dir}/results.md')
    if failed:
        raise UserError(
            f'sweep: {len(failed)} of {len(cells)} cells failed, for the first see {failed[0].log_path}; the others '
            'are done, and the same command retries the failed ones'
        )
