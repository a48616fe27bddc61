"""`perl_jax plan`: memory and time of a run on a TPU, without the TPU.

Each program of a step is lowered from the same functions as in training and compiled by libtpu for the topology, on any
machine. Programs that do not fit in memory are reported as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from perl_jax.errors import UserError
from perl_jax.tools.plan import table
from perl_jax.tools.plan.compile import Report, report
from perl_jax.tools.plan.programs import Plan

Planner = Callable[..., Plan]  # programs.sft, .reward or .policy, configured by gin: (topology, units) -> Plan


def run(
    planners: Iterable[tuple[str, Planner]],
    topologies: Sequence[str | None],
    fit: str | None = None,
    as_json: bool = False,
) -> list[dict[str, Any]]:
    """Plan each tuning on each topology and print a table or JSON.

    Args:
      planners: (name of the tuning, its planner) pairs; an iterator is advanced only after a tuning has been planned.
      topologies: names; None is the run's topology, or this machine.
      fit: 'batch' searches for the largest batch size that fits.
      as_json: whether to print JSON.

    Returns:
      The plans, as table.summary makes them.
    """
    plans = []
    for tuning, planner in planners:
        for topology in topologies:
            plan, reports = largest_batch(planner, topology) if fit == 'batch' else compile_plan(planner, topology)
            plans.append(table.summary(tuning, plan, reports))
    print(table.as_json(plans) if as_json else table.text(plans))
    return plans


def compile_plan(planner: Planner, topology: str | None, units: int | None = None) -> tuple[Plan, list[Report]]:
    """Compile and analyse every program of a run."""
    from tqdm import tqdm

    plan, reports = planner(topology=topology, units=units), []
    with tqdm(plan.programs, unit='program', dynamic_ncols=True) as bar:
        for program in bar:
            bar.set_description(f'{plan.phase} on {plan.partitioner.topology or "this machine"}: {program.name}')
            reports.append(report(program, plan.partitioner))
    return plan, reports


def largest_batch(planner: Planner, topology: str | None) -> tuple[Plan, list[Report]]:
    """Find the largest batch for which every program fits, in units (programs.py), by doubling and bisection."""
    fits, low, high, units = None, 0, None, 1
    while high is None or high - low > 1:
        plan, reports = compile_plan(planner, topology, units)
        if all(report.fits for report in reports):
            fits, low = (plan, reports), units
        else:
            high = units
        units = 2 * low if high is None else (low + high) // 2
    if fits is None:
        raise UserError(
            f'plan: not even BATCH_SIZE = {plan.batch_size} fits on {topology}; use more chips, num_partitions or remat'
        )
    return fits
