"""What a run would take on a TPU, before one is paid for: `perl_jax plan`.

Each program of a step is lowered from the run's own functions and compiled for the topology by libtpu, on a machine
that has none of it. What does not fit is an answer too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from perl_jax.errors import UserError
from perl_jax.tools.plan import table
from perl_jax.tools.plan.compile import Report, report
from perl_jax.tools.plan.programs import Plan

Make = Callable[..., Plan]  # programs.sft, .reward or .policy, configured: (topology, units) -> Plan


def run(
    makes: Iterable[tuple[str, Make]],
    topologies: Sequence[str | None],
    fit: str | None = None,
    as_json: bool = False,
) -> list[dict[str, Any]]:
    """Plan each tuning on each topology, and print a table, or JSON.

    Args:
      makes: (name of the tuning, its run); each is made and planned before the next is asked for.
      topologies: names; None is the run's own, or this machine.
      fit: 'batch' searches the largest batch size that fits.
    """
    plans = []
    for tuning, make in makes:
        for name in topologies:
            plan, reports = largest(make, name) if fit == 'batch' else compiled(make, name)
            plans.append(table.summary(tuning, plan, reports))
    print(table.as_json(plans) if as_json else table.text(plans))
    return plans


def compiled(make: Make, name: str | None, units: int | None = None) -> tuple[Plan, list[Report]]:
    """Every program of a run, compiled."""
    from tqdm import tqdm

    plan, reports = make(topology=name, units=units), []
    with tqdm(plan.programs, unit='program', dynamic_ncols=True) as bar:
        for program in bar:
            bar.set_description(f'{plan.phase} on {plan.partitioner.topology or "this machine"}: {program.name}')
            reports.append(report(program, plan.partitioner))
    return plan, reports


def largest(make: Make, name: str | None) -> tuple[Plan, list[Report]]:
    """The largest batch of which every program fits, in units (programs.py): doubled until one fails, then halved."""
    fits, low, high, units = None, 0, None, 1
    while high is None or high - low > 1:
        plan, reports = compiled(make, name, units)
        if all(one.fits for one in reports):
            fits, low = (plan, reports), units
        else:
            high = units
        units = 2 * low if high is None else (low + high) // 2
    if fits is None:
        raise UserError(
            f'plan: not even BATCH_SIZE = {plan.batch_size} fits on {name}; more chips, or num_partitions, or remat'
        )
    return fits
