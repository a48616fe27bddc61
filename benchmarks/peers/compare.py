"""Our steps and those of Tunix and TRL on the same shapes, alternately in processes of their own, on the CPU.

    python benchmarks/peers/compare.py --tunix=TUNIX/bin/python --trl=TRL/bin/python [--rounds=3] [--only='S rl']
        [--arrays=ARRAYS]    the folder that benchmarks/taskmaster/prepare.py has written, for rows of real lengths

Each peer has a virtual environment of its own (tunix_step.py and trl_step.py say how); one that is not given or fails
is left out. A case's figures are of one call, which should have the machine for itself; those of other cases stay.
Writes docs/results/peers.json (medians over rounds, and every round) and the tables of
docs/explanation/performance.md. Ratios are peer / ours.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
STORE = HERE.parents[1] / 'docs' / 'results' / 'peers.json'
PAGE = HERE.parents[1] / 'docs/explanation/performance.md'
SIZES = {  # of the peers; ours are gin/models/bench_s.gin and bench_m.gin
    'S': '--layers=4 --d_model=256 --d_ff=1024 --heads=4 --vocab=8192 --batch=8',
    'M': '--layers=6 --d_model=512 --d_ff=2048 --heads=8 --vocab=32128 --batch=8',
}
WORKS = {
    'reward 64+64': ('reward', '--prompt=64 --response=64'),
    'reward 192+32': ('reward', '--prompt=192 --response=32'),
    'rl 64+64': ('rl', '--prompt=64 --response=64 --responses=2'),
    'rl 64+64 ends': ('rl', '--prompt=64 --response=64 --responses=2 --ends'),
}
COFFEE = {  # with --arrays
    'reward coffee': ('reward', '--arrays={}/coffee_pairs_train.npz'),
    'rl coffee': ('rl', '--response=64 --responses=2 --ends --arrays={}/coffee_prompts_train.npz'),
}
WORKS |= COFFEE
CASES = {f'{size} {name}': (size, *WORKS[name]) for size in SIZES for name in WORKS}
OURS = {'reward': ['reward_step.py'], 'rl': ['policy_step.py', '--algorithm=grpo']}
OURS_COFFEE = ['data.py', '--algorithm=grpo']
GIN = HERE.parents[1] / 'gin'
SETTINGS = {  # whose LENGTH_BUCKETS ours are measured with: of files that are read in this order the last one counts
    'reward': ['runs/reward.gin', 'recipes/coffee_reward.gin'],
    'rl': ['runs/policy.gin', 'recipes/coffee_policy.gin'],
}
METRICS = {
    'seconds': ('s a step', 1),
    'command_seconds': ('s to the first step', 1),  # from the command to the end of that step
    'process_peak_bytes': ('GB', 1e9),  # at the peak of the process
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tunix', help='the Python that has Tunix')
    parser.add_argument('--trl', help='the Python that has TRL')
    parser.add_argument('--arrays', help='a folder of prepare.py')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=20, help='that are timed in each process')
    parser.add_argument('--only', default='', help=f'cases whose name has this in it: {", ".join(CASES)}')
    parser.add_argument('--output', type=pathlib.Path, default=STORE)
    args = parser.parse_args()
    pythons = {'ours': sys.executable, 'tunix': args.tunix, 'trl': args.trl}
    for library in [library for library, python in pythons.items() if not python]:
        print(f'{library}: left out, for --{library} was not given', file=sys.stderr)
        del pythons[library]
    measured = {}
    cases = [case for case in CASES if args.only in case and (args.arrays or '{}' not in CASES[case][2])]
    for case in cases:
        rounds, runs = {library: [] for library in pythons}, dict(pythons)
        for _ in range(args.rounds):
            for library, python in list(runs.items()):
                try:
                    rounds[library].append(ran(library, python, case, args))
                except (OSError, ValueError) as error:
                    print(f'{library}: left out of {case}: {error}', file=sys.stderr)
                    del runs[library]
        completed = {library: rounds[library] for library in runs}
        medians = {
            library: {key: statistics.median(line[key] for line in lines) for key in METRICS}
            for library, lines in completed.items()
        }
        measured[case] = {'medians': medians, 'rounds': completed}
        save(args.output, measured)
    cases, names = json.loads(args.output.read_text())['cases'], ['ours', 'tunix', 'trl']
    for name, with_buckets in (('peers', False), ('in buckets', True)):
        rows = table({case: result for case, result in cases.items() if in_buckets(result) == with_buckets}, names)
        print(rows)
        if args.output == STORE:
            place = re.compile(f'(<!-- {name} -->\n).*?(<!-- end -->)', re.DOTALL)
            PAGE.write_text(place.sub(lambda m, rows=rows: m[1] + rows + m[2], PAGE.read_text()))


def in_buckets(result: dict) -> bool:
    """Whether ours were measured with LENGTH_BUCKETS, in any round."""
    return any(line.get('buckets', 1) > 1 for line in result['rounds'].get('ours', []))


def shipped_buckets(work: str) -> int:
    """Return the LENGTH_BUCKETS of the recipe, so that what is measured is what ships."""
    text = '\n'.join((GIN / name).read_text() for name in SETTINGS[work])
    return int(re.findall(r'^LENGTH_BUCKETS = (\d+)', text, re.MULTILINE)[-1])


def ran(library: str, python: str, case: str, args: argparse.Namespace) -> dict:
    """The line of one process. ValueError: its last words."""
    size, work, shape = CASES[case]
    our_command = OURS_COFFEE if '{}' in shape else OURS[work]
    buckets = [f'--buckets={shipped_buckets(work)}'] if our_command[0] != 'reward_step.py' else []
    model = ['--batch=8', f'--gin_file=models/bench_{size.lower()}.gin']
    script, shape = [str(HERE.parent / our_command[0]), *our_command[1:], *buckets], shape.format(args.arrays)
    if library != 'ours':
        script, model = [str(HERE / f'{library}_step.py'), f'--work={work}'], SIZES[size].split()
    command = [python, *script, *model, *shape.split(), f'--steps={args.steps}']
    env = os.environ | {'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f'exit status {done.returncode}']
        raise ValueError(next((line for line in reversed(words) if 'Error' in line), words[-1]))
    line = json.loads(done.stdout.strip().splitlines()[-1])
    if line.get('arrays'):
        line['arrays'] = pathlib.Path(line['arrays']).name
    print(f'{case}, {library}: {line["seconds"]:.4g} s', file=sys.stderr)
    return line


def save(path: pathlib.Path, measured: dict) -> None:
    """Cases of earlier calls stay."""
    before = json.loads(path.read_text())['cases'] if path.exists() else {}
    cases = {case: (before | measured)[case] for case in CASES if case in before | measured}
    machine = {'machine': platform.machine(), 'cpus': os.cpu_count(), 'python': platform.python_version()}
    path.write_text(json.dumps(machine | {'cases': cases}, indent=1) + '\n')


def table(measured: dict, names: list[str]) -> str:
    """A row a case, and for each metric our figure and each peer's; in parentheses, how many times ours it is."""
    first, *others = names
    head = [cell for unit, _ in METRICS.values() for cell in (f'{unit}: {first}', *others)]
    rows = [['', *head], ['---'] * (len(head) + 1)]
    for case, result in measured.items():
        row = [case]
        for key, (_, scale) in METRICS.items():
            values = {library: line[key] / scale for library, line in result['medians'].items() if key in line}
            cells = {library: f'{value:.3g}' for library, value in values.items()}
            for library in set(cells) - {'ours'}:
                if values.get('ours', 0) > 0:
                    cells[library] += f' ({values[library] / values["ours"]:.2f}x)'
            row += [cells.get(library, '-') for library in names]
        rows.append(row)
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows) + '\n'


if __name__ == '__main__':
    main()
