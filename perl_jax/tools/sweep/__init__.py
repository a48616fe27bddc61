"""A grid of runs as a queue that can be killed anywhere, and the tables and plots of what came out.

    sft     seed=0   seed=1   seed=2
              |
    reward  tuning=r1,seed=0   tuning=r4,seed=0   ...   tuning=full,seed=0   ...
              |
    policy  tuning=r1,seed=0   ...

Each cell is a MODEL_DIR, made by the commands that one would type, in a process of its own; `grid` says which cells
there are and what each needs, `queue` runs them, `results` and `plots` read what they left.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from perl_jax.errors import UserError
from perl_jax.tools.sweep import grid, plots, queue, results
from perl_jax.tools.sweep.grid import Stage


def run(
    sweep_dir: str,
    stages: Sequence[Stage],
    jobs: int = 1,
    dry_run: bool = False,
    search_paths: Sequence[str] = (),
    data_flags: Sequence[str] = (),
) -> None:
    """Run what is not finished, `jobs` cells at a time; tables are written anew after each, plots at the end.

    Args:
      sweep_dir: a folder for STAGE/AXIS=LABEL,.../ (MODEL_DIRs with their .log and .json), results.csv, results.md and
        STAGE.png.
      dry_run: print the commands, in order, and do nothing.
      search_paths: where the cells look for gin files before the package's own.
      data_flags: what the cells are told of where data lies, as they read it on a command line.

    Raises:
      UserError: a cell was started with other settings; or, at the end, some cells failed.
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
            f'sweep: {len(failed)} of {len(cells)} cells failed, the first: see {failed[0].log}; the others are done, '
            'and the same command tries these again'
        )
