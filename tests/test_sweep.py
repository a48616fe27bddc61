"""The grid, the queue and the tables of a sweep, on cells whose commands are quick; and one tiny sweep for real."""

import csv
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from toy_runs import ENVIRONMENT, SMALL, perl, ran

from perl_jax.errors import UserError
from perl_jax.tools.sweep import Stage, grid, plots, queue, results

ROOT = pathlib.Path(__file__).parents[1]
SEEDS = {'0': ['RANDOM_SEED = 0'], '1': ['RANDOM_SEED = 1']}
SFT = Stage('sft', 'sft', ['sft.gin'], {'seed': SEEDS}, split=None)
TUNINGS = {'r1': ['lora.LoraSpec.rank = 1'], 'full': ['tuning/full.gin']}
REWARD = Stage(
    'reward', 'reward', ['reward.gin'], {'tuning': TUNINGS, 'seed': SEEDS}, {'INITIAL_CHECKPOINT_PATH': 'sft'},
    metrics=['auc'], reference={'tuning': 'full'},
)  # fmt: skip
POLICY = dataclasses.replace(REWARD, name='policy', command='policy', needs={'A': 'sft', 'B': 'reward'})


# The grid.


def test_every_combination_with_what_it_needs():
    cells = grid.cells('out', [SFT, REWARD, POLICY])
    folders = [cell.folder for cell in cells]
    assert folders[:5] == [  # the first seed is gone through first
        'out/sft/seed=0', 'out/reward/tuning=r1,seed=0', 'out/reward/tuning=full,seed=0',
        'out/policy/tuning=r1,seed=0', 'out/policy/tuning=full,seed=0',
    ]  # fmt: skip
    assert len(cells) == 2 + 4 + 4
    for cell in cells:
        assert all(folders.index(parent.folder) < folders.index(cell.folder) for parent in cell.parents)
    policy = next(cell for cell in cells if cell.folder == 'out/policy/tuning=full,seed=1')
    assert [parent.folder for parent in policy.parents] == ['out/sft/seed=1', 'out/reward/tuning=full,seed=1']
    run, evaluation = policy.commands
    assert run[1:] == [
        '-m', 'perl_jax', 'policy', '--gin_file=reward.gin', '--gin_file=tuning/full.gin',
        '--gin_bindings=RANDOM_SEED = 1', "--gin_bindings=MODEL_DIR = 'out/policy/tuning=full,seed=1'",
        "--gin_bindings=A = 'out/sft/seed=1'", "--gin_bindings=B = 'out/reward/tuning=full,seed=1'",
    ]  # fmt: skip
    assert evaluation[3:] == ['eval', '--model_dir=out/policy/tuning=full,seed=1', '--split=validation']


@pytest.mark.parametrize(
    ('stages', 'said'),
    [
        ([REWARD], "needs 'sft', which is not an earlier stage"),
        ([SFT, SFT], "two stages are called 'sft'"),
        ([dataclasses.replace(SFT, axes={'seed': {'7': []}}), REWARD], 'there are 0'),
        ([dataclasses.replace(SFT, axes={'size': {'s': [], 'm': []}, 'seed': SEEDS}), REWARD], 'there are 2'),
        ([dataclasses.replace(SFT, axes={'seed': {'a/b': []}})], "'/' in 'seed=a/b'"),
    ],
)
def test_a_grid_that_makes_no_sense(stages, said):
    with pytest.raises(UserError, match=said):
        grid.cells('out', stages)


# The queue.

# A run that takes a moment: notes that it was started, and leaves what a run and its evaluation leave.
STUB = """
import json, os, sys, time
folder, seconds, value = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
os.makedirs(folder, exist_ok=True)
open(folder + '/started', 'a').write('x')
if value < 0: sys.exit('no good')
time.sleep(seconds)
json.dump({'auc': {'value': value, 'low': value - .1, 'high': value + .1}}, open(folder + '/eval_validation.json', 'w'))
speeds = [1.0, 2 * value, 4 * value, 3 * value]
open(folder + '/metrics.jsonl', 'w').writelines(
    json.dumps({'step': i, 'throughput/examples_per_second': x}) + '\\n' for i, x in enumerate(speeds))
about = {'phase': 'reward', 'finished': 'now', 'trainable_parameters': 7, 'seconds': 1.0, 'devices': 'cpu x 1'}
json.dump(about | {'memory': {'held': 1, 'peak': int(value * 2**20)}}, open(folder + '/run.json', 'w'))
"""


def stubs(folder, seconds=0.0, value=lambda cell: 0.5):
    """The cells of a grid, with commands that take no time."""
    made = {}
    for cell in grid.cells(str(folder), [SFT, REWARD]):
        command = [sys.executable, '-c', STUB, cell.folder, str(seconds), str(value(cell))]
        parents = tuple(made[parent.folder] for parent in cell.parents)
        made[cell.folder] = dataclasses.replace(cell, commands=(command,), parents=parents)
    return list(made.values())


def started(cells):
    """How often each cell was."""
    notes = {cell.folder: pathlib.Path(cell.folder) / 'started' for cell in cells}
    return {folder: len(note.read_text()) for folder, note in notes.items() if note.exists()}


@pytest.mark.parametrize('jobs', [1, 3])
def test_all_cells_run_once_and_a_second_sweep_does_nothing(tmp_path, jobs):
    cells, calls = stubs(tmp_path), []
    queue.check(cells)
    assert queue.run(cells, jobs, lambda: calls.append(1)) == []
    assert set(started(cells).values()) == {1} and len(calls) == len(cells) == 6
    assert queue.run(cells, jobs, lambda: calls.append(1)) == [] and len(calls) == 6
    assert set(started(cells).values()) == {1}


def test_a_cell_that_fails_takes_its_children_with_it_and_no_others(tmp_path):
    bad = lambda cell: -1.0 if cell.folder.endswith('sft/seed=1') else 0.5  # noqa: E731
    cells = stubs(tmp_path, value=bad)
    queue.check(cells)
    failed = queue.run(cells, 1, lambda: None)
    assert [cell.folder.removeprefix(f'{tmp_path}/') for cell in failed] == [
        'sft/seed=1', 'reward/tuning=r1,seed=1', 'reward/tuning=full,seed=1'
    ]  # fmt: skip
    assert 'no good' in pathlib.Path(failed[0].log_path).read_text()
    assert len(started(cells)) == 4
    cells = stubs(tmp_path)  # mended
    assert queue.run(cells, 1, lambda: None) == [] and sorted(started(cells).values()) == [1, 1, 1, 1, 1, 2]


def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    """Killed with its third cell, which would take a minute; nothing here depends on who is how fast."""
    program = (
        f'import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}\n'
        'import test_sweep as t; from perl_jax.tools.sweep import queue\n'
        f'cells = t.stubs({str(tmp_path)!r})[:2] + t.stubs({str(tmp_path)!r}, 60)[2:]\n'
        'queue.check(cells); queue.run(cells, 1, lambda: None)\n'
    )
    cells = stubs(tmp_path)
    process = subprocess.Popen([sys.executable, '-c', program], start_new_session=True, env=os.environ | ENVIRONMENT)
    try:
        while sum(started(cells).values()) < 3:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert [queue.is_done(cell) for cell in cells] == [True, True, False, False, False, False]
    assert queue.run(cells, 1, lambda: None) == []
    assert [started(cells)[cell.folder] for cell in cells] == [1, 1, 2, 1, 1, 1]


def test_other_settings_are_refused_of_cells_that_were_started(tmp_path):
    queue.check(stubs(tmp_path))
    assert not os.listdir(tmp_path)
    queue.run(stubs(tmp_path)[:1], 1, lambda: None)
    other = stubs(tmp_path, value=lambda cell: 0.25)
    with pytest.raises(UserError, match=r'sft/seed=0.*was started with other settings'):
        queue.check(other)
    queue.check(stubs(tmp_path))


@pytest.mark.parametrize('content', ['{"auc": ', '[]', '[' * 10**5, '{"auc": {"value": "x", "low": 0, "high": 1}}'])
def test_an_evaluation_that_is_damaged_is_named(content, tmp_path):
    cells = stubs(tmp_path)
    queue.run(cells, 1, lambda: None)
    path = pathlib.Path(cells[-1].evaluation)
    path.write_text(content)
    with pytest.raises(UserError, match=f'^{path}: '):
        results.write(str(tmp_path), [SFT, REWARD], cells)
    assert not (tmp_path / 'results.csv').exists()


def test_a_figure_without_an_interval_leaves_its_ends_empty(tmp_path):
    """Where all groups are equal, eval writes null."""
    cells = stubs(tmp_path)
    queue.run(cells, 1, lambda: None)
    pathlib.Path(cells[-1].evaluation).write_text('{"auc": {"value": 1.0, "low": null, "high": null}}')
    results.write(str(tmp_path), [SFT, REWARD], cells)
    row = list(csv.DictReader((tmp_path / 'results.csv').read_text().splitlines()))[-1]
    assert (row['auc'], row['auc_low'], row['auc_high']) == ('1.0', '', '')


@pytest.mark.parametrize('content', ['', '{}', '[' * 10**5])
def test_settings_of_a_cell_that_are_damaged_are_named(content, tmp_path):
    cells = stubs(tmp_path)
    queue.run(cells[:1], 1, lambda: None)
    path = pathlib.Path(f'{cells[0].folder}.json')
    path.write_text(content)
    with pytest.raises(UserError, match=f'^{path}: not .*; delete it and the folder'):
        queue.check(cells)


# The tables.


def test_tables_are_the_numbers_of_the_cells(tmp_path):
    values = dict(zip(['r1,seed=0', 'full,seed=0', 'r1,seed=1', 'full,seed=1'], [0.5, 0.9, 0.7, 1.0]))
    value = lambda cell: next((v for k, v in values.items() if cell.folder.endswith(k)), 0.1)  # noqa: E731
    cells = stubs(tmp_path, value=value)
    queue.check(cells)
    queue.run(cells, 1, lambda: None)
    results.write(str(tmp_path), [SFT, REWARD], cells)
    with open(tmp_path / 'results.csv') as file:
        rows = [row for row in csv.DictReader(file) if row['stage'] == 'reward']
    for row in rows:
        want = values[f'{row["tuning"]},seed={row["seed"]}']
        assert float(row['auc']) == want and float(row['auc_low']) == pytest.approx(want - 0.1)
        assert float(row['examples_per_second']) == pytest.approx(3 * want)  # the median without the first window
        assert int(row['memory_peak']) == int(want * 2**20)
    text = (tmp_path / 'results.md').read_text().split('## reward')[1]
    lines = {line.split('|')[1].strip(): [x.strip() for x in line.split('|')[2:-1]] for line in text.splitlines()[2:]}
    mean = np.median([0.5 / 0.9, 0.7 / 1.0])
    assert lines['tuning'] == [
        'seeds', 'auc', 'trained', 'memory, MiB', 'memory, % of full', 'speed, x full', 'examples/s',
    ]  # fmt: skip
    assert lines['r1'] == [
        '2', '0.600 (0.500 to 0.700)', '7', '0.6 (0.5 to 0.7)', f'{100 * mean:.0f}% (56% to 70%)',
        f'{mean:.2f}x (0.56x to 0.70x)', '1.8 (1.5 to 2.1)',
    ]  # fmt: skip
    assert lines['full'][4:6] == ['100%', '1.00x']
    plots.write(str(tmp_path), [SFT, REWARD], cells)
    assert (tmp_path / 'reward.png').read_bytes().startswith(b'\x89PNG') and not (tmp_path / 'sft.png').exists()


# For real.


def test_a_small_sweep(tmp_path):
    small = [flag.removeprefix('--gin.').replace('=', ' = ', 1) for flag in SMALL]
    (tmp_path / 'grid.gin').write_text(f"""
include 'sweeps/toy.gin'
SEEDS = {{'0': ['RANDOM_SEED = 0']}}
TUNINGS = {{'r2': ['lora.LoraSpec.rank = 2']}}
sweep.run.stages = [@sft/sweep.Stage(), @reward/sweep.Stage()]
sweep.Stage.bindings = {small!r}
""")
    argv = ['sweep', f'--gin_file={tmp_path}/grid.gin', f"--gin.SWEEP_DIR='{tmp_path / 'out'}'"]
    dry = ran(*argv, '--dry_run').out.splitlines()
    assert len(dry) == 4 and not (tmp_path / 'out').exists()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.chdir(ROOT)
        ran(*argv)
    with open(tmp_path / 'out' / 'results.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['stage'] for row in rows] == ['sft', 'reward']
    about = json.loads((tmp_path / 'out/reward/tuning=r2,seed=0/run.json').read_text())
    assert int(rows[1]['memory_peak']) == about['memory']['peak'] > about['memory']['held'] > 4 * 150_000
    assert 0 <= float(rows[1]['pairwise_accuracy']) <= 1 and float(rows[1]['examples_per_second']) > 0
    assert (tmp_path / 'out' / 'reward.png').exists()
    assert 'sweep: give a grid' in perl('sweep').line
