"""A sweep's grid, queue and tables, with commands that stand in for runs; and a small real one."""

import csv
import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from toy_runs import ENVIRONMENT, SMALL, perl, ran

from perl_jax.errors import UserError
from perl_jax.sweep import grid, plots, queue, results
from perl_jax.sweep.grid import Stage

ROOT = pathlib.Path(__file__).parents[1]
SEEDS = {str(seed): [f'RANDOM_SEED = {seed}'] for seed in (0, 1)}
TUNINGS = {'r1': ['lora.LoraSpec.rank = 1'], 'full': ['tuning/full.gin']}
SFT = Stage('sft', 'sft', ['sft.gin'], {'seed': SEEDS}, split=None)
REWARD = Stage(
    'reward', 'reward', ['reward.gin'], {'tuning': TUNINGS, 'seed': SEEDS}, {'INITIAL_CHECKPOINT_PATH': 'sft'},
    split='test', metrics=['auc'], reference={'tuning': 'full'},
)  # fmt: skip

# Stands in for a run: notes when it was there, takes a while, leaves what a run leaves. argv: folder, seconds, code.
RUN = """
import json, os, sys, time
folder, seconds, code = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
os.makedirs(folder, exist_ok=True)
note = lambda word: open(folder + '.notes', 'a').write(f'{word} {time.time()}\\n')
note('start')
time.sleep(seconds)
if code:
    sys.exit(code)
json.dump({'phase': 'sft', 'finished': 'now'}, open(folder + '/draft', 'w'))
os.replace(folder + '/draft', folder + '/run.json')
note('end')
"""


def stub(cell, seconds=0.0, code=0):
    """The cell with a command that stands in for its run, and one that stands in for its evaluation."""
    here = [sys.executable, '-c']
    commands = [[*here, RUN, cell.folder, str(seconds), str(code)]]
    if cell.evaluation:
        commands.append([*here, f'open({cell.evaluation!r}, "w").write("{{}}")'])
    return dataclasses.replace(cell, commands=tuple(commands))


def notes(cell):
    """[(word, time)] of all runs of a cell."""
    path = pathlib.Path(cell.folder + '.notes')
    return [(word, float(at)) for word, at in map(str.split, path.read_text().splitlines())] if path.exists() else []


def find(cells, stage, **labels):
    (cell,) = [cell for cell in cells if cell.stage.name == stage and cell.labels == labels]
    return cell


# The grid.


def test_cells_are_the_product_of_the_axes_and_find_their_own_parents():
    cells = grid.cells('S', [SFT, REWARD])
    assert {(c.stage.name, *c.labels.values()) for c in cells} == {
        ('sft', '0'), ('sft', '1'),
        ('reward', 'r1', '0'), ('reward', 'r1', '1'), ('reward', 'full', '0'), ('reward', 'full', '1'),
    }  # fmt: skip
    assert len(cells) == 6
    for cell in cells:
        assert [parent.folder for parent in cell.parents] == (
            [] if cell.stage is SFT else [f'S/sft/seed={cell.labels["seed"]}']
        )
        assert all(cells.index(parent) < cells.index(cell) for parent in cell.parents)


def test_seed_after_seed_but_no_cell_before_its_parents():
    seeds = dataclasses.replace(REWARD, axes={'tuning': TUNINGS, 'seed': {'1': []}}, needs={'A': 'sft', 'B': 'other'})
    other = dataclasses.replace(SFT, name='other', axes={'seed': {'1': [], '0': []}}, needs={'A': 'sft'})
    cells = grid.cells('S', [SFT, other, seeds])
    assert [(cell.stage.name, cell.labels['seed']) for cell in cells] == [
        ('sft', '0'), ('sft', '1'), ('other', '1'), ('other', '0'), ('reward', '1'), ('reward', '1'),
    ]  # fmt: skip
    folders = [cell.folder for cell in grid.cells('S', [SFT, REWARD])]
    assert folders == [
        f'S/{name}seed={s}' for s in '01' for name in ('sft/', 'reward/tuning=r1,', 'reward/tuning=full,')
    ]


def test_commands_say_all_and_files_come_before_bindings():
    cells = grid.cells('S', [SFT, REWARD], ['mine', 'theirs'])
    run, measure = find(cells, 'reward', tuning='full', seed='1').commands
    assert run == [
        sys.executable, '-m', 'perl_jax', 'reward', '--gin_search_paths=mine,theirs',
        '--gin_file=reward.gin', '--gin_file=tuning/full.gin', '--gin_bindings=RANDOM_SEED = 1',
        "--gin_bindings=MODEL_DIR = 'S/reward/tuning=full,seed=1'",
        "--gin_bindings=INITIAL_CHECKPOINT_PATH = 'S/sft/seed=1'",
    ]  # fmt: skip
    folder = '--model_dir=S/reward/tuning=full,seed=1'
    assert measure[3:] == ['eval', folder, '--split=test', '--gin_search_paths=mine,theirs']
    assert len(find(cells, 'sft', seed='0').commands) == 1  # split=None measures nothing


@pytest.mark.parametrize('word', ["A = 'x'", 'plain', 'two words', "A = '$HOME'", """A = "x" + 'y'""", "'`a`\\!'"])
def test_printed_commands_can_be_pasted(word):
    assert shlex.split(queue.shell(['a', word])) == ['a', word]
    assert subprocess.check_output(['bash', '-c', queue.shell(['printf', '%s', word])], text=True) == word


def test_a_parent_without_the_axis_serves_all_and_a_stage_may_have_no_axes():
    one = dataclasses.replace(SFT, axes={})
    cells = grid.cells('S', [one, REWARD])
    assert cells[0].folder == 'S/sft' and cells[0].log == 'S/sft.log'
    assert all(cell.parents == (cells[0],) for cell in cells[1:])


@pytest.mark.parametrize(
    'stages, words',
    [
        ([REWARD], "'reward' needs 'sft'"),
        ([REWARD, SFT], "'reward' needs 'sft'"),
        ([SFT, SFT], "two stages are called 'sft'"),
        ([dataclasses.replace(SFT, axes={'seed': {'7': []}}), REWARD], 'there are 0'),
        ([SFT, dataclasses.replace(REWARD, axes={'tuning': TUNINGS})], 'there are 2'),
        ([dataclasses.replace(SFT, axes={'seed': {'a/b': []}})], "'/'"),
        ([dataclasses.replace(SFT, axes={'seed': {}}), REWARD], "axis 'seed' of stage 'sft' has no labels"),
    ],
)
def test_a_grid_that_cannot_be(stages, words):
    with pytest.raises(UserError, match=words):
        grid.cells('S', stages)


# The queue.


@pytest.mark.parametrize('jobs', [1, 3])
def test_parents_end_before_their_children_start_and_no_more_than_jobs_run(jobs, tmp_path):
    cells = [stub(cell, 0.1) for cell in grid.cells(str(tmp_path), [SFT, REWARD])]
    written = []
    assert queue.run(cells, jobs, lambda: written.append(1)) == []
    assert len(written) == 6 and all(queue.is_done(cell) for cell in cells)
    for cell in cells:
        (start, began), (end, ended) = notes(cell)
        for parent in cell.parents:
            assert notes(parent)[1][1] <= began
        running = sum(a <= began < b for (_, a), (_, b) in map(notes, cells))
        assert (start, end) == ('start', 'end') and running <= jobs
    assert queue.run(cells, jobs, lambda: written.append(1)) == [] and len(written) == 6  # nothing is done twice


def test_a_finished_run_is_only_measured(tmp_path):
    (cell,) = grid.cells(str(tmp_path), [dataclasses.replace(SFT, axes={}, split='test')])
    cell = stub(cell)
    queue.run([cell], 1, lambda: None)
    os.remove(cell.evaluation)
    assert queue.run([cell], 1, lambda: None) == []
    assert queue.is_done(cell) and len(notes(cell)) == 2


def test_a_failed_cell_takes_its_children_with_it_and_no_others(tmp_path, caplog):
    cells = grid.cells(str(tmp_path), [SFT, REWARD])
    bad = find(cells, 'sft', seed='0')
    stubs = [stub(cell, code=3 if cell is bad else 0) for cell in cells]
    with caplog.at_level('INFO', 'perl_jax'):
        failed = queue.run(stubs, 2, lambda: None)
    assert {cell.folder for cell in failed} == {cell.folder for cell in cells if cell.labels['seed'] == '0'}
    assert all(queue.is_done(cell) == (cell.labels['seed'] == '1') for cell in cells)
    (line,) = [line for line in caplog.messages if ' failed' in line]  # those that were not started have no log to read
    assert line.startswith(f'sweep: {bad.folder} failed, see {bad.log}; ')
    assert not any(notes(cell) for cell in failed if cell.folder != bad.folder)
    assert len(notes(bad)) == 1
    again = [stub(cell) for cell in cells]  # mended
    assert queue.run(again, 2, lambda: None) == [] and len(notes(find(cells, 'sft', seed='1'))) == 2


def test_a_sweep_that_is_killed_and_started_again_does_each_cell_once(tmp_path):
    """kill -9 leaves the cell's process running; the next sweep waits for it and takes over what it finished."""
    program = (
        'import sys; sys.path[:0] = ["tests"]; import test_sweep as t\n'
        f'cells = [t.stub(c, 1.5) for c in t.grid.cells({str(tmp_path)!r}, [t.SFT])]\n'
        't.queue.run(cells, 1, lambda: None)'
    )
    cells = [stub(cell, 1.5) for cell in grid.cells(str(tmp_path), [SFT])]
    process = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not notes(cells[0]) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, f'it ended before it was killed: {err}'
    assert not queue.is_done(cells[0])
    assert queue.run(cells, 1, lambda: None) == []
    assert [[word for word, _ in notes(cell)] for cell in cells] == [['start', 'end']] * 2


def test_a_cell_that_was_killed_itself_is_run_again(tmp_path):
    (cell, *_) = grid.cells(str(tmp_path), [SFT])
    dying = dataclasses.replace(cell, commands=([sys.executable, '-c', 'import os; os.kill(os.getpid(), 9)'],))
    assert queue.run([dying], 1, lambda: None) == [dying]
    assert queue.run([stub(cell)], 1, lambda: None) == [] and queue.is_done(cell)


def test_other_settings_of_a_started_cell_are_refused_and_new_cells_are_not(tmp_path):
    def cells(rank, seeds):
        tunings = {'r': [f'lora.LoraSpec.rank = {rank}']}
        return grid.cells(str(tmp_path), [Stage('a', 'sft', [], {'tuning': tunings, 'seed': seeds}, split=None)])

    before = cells(1, {'0': []})
    noted = dataclasses.replace(before[0], commands=([*before[0].commands[0]],))
    true = [sys.executable, '-c', RUN, noted.folder, '0', '0']
    queue.check(before)
    assert not os.listdir(tmp_path)  # nothing is started, so nothing is held to its settings
    queue.run([dataclasses.replace(noted, commands=(true,))], 1, lambda: None)
    pathlib.Path(noted.folder + '.json').write_text(json.dumps(noted.commands[0][3:]))  # as if it had been the run
    queue.check(cells(1, {'0': [], '1': []}))
    with pytest.raises(UserError, match=r"tuning=r,seed=0' was started with other settings .*rank = 1"):
        queue.check(cells(2, {'0': [], '1': []}))


@pytest.mark.parametrize('jobs', [0, -1, 1.5, 'two'])
def test_jobs_is_a_number_of_processes(jobs):
    with pytest.raises(UserError, match='JOBS'):
        queue.run([], jobs, lambda: None)


# The tables.


def finished(cell, auc, peak, speeds, trained=10):
    """What a finished run of the cell has left."""
    folder = pathlib.Path(cell.folder)
    folder.mkdir(parents=True)
    about = {
        'phase': 'reward', 'finished': 'now', 'seconds': 9.0, 'step_seconds': 0.5, 'devices': 'cpu x 1',
        'trainable_parameters': trained, 'memory': {'held': peak // 2, 'peak': peak},
    }  # fmt: skip
    (folder / 'run.json').write_text(json.dumps(about))
    lines = [{'step': i, 'throughput/examples_per_second': speed} for i, speed in enumerate(speeds)]
    (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, [{'step': 0, 'eval/x': 1.0}, *lines])))
    measured = {'auc': {'value': auc, 'low': auc - 0.1, 'high': auc + 0.1}}
    pathlib.Path(cell.evaluation).write_text(json.dumps(measured))


@pytest.fixture
def measured(tmp_path):
    """Two tunings by three seeds, the last of full tuning not finished; and the numbers of each."""
    stage = dataclasses.replace(REWARD, axes={'tuning': TUNINGS, 'seed': {s: [] for s in '012'}}, needs={})
    cells = grid.cells(str(tmp_path), [stage])
    numbers = {}
    for cell in cells:
        full, seed = cell.labels['tuning'] == 'full', int(cell.labels['seed'])
        if full and seed == 2:
            continue
        auc, peak = (0.9 if full else 0.8) + 0.01 * seed**2, (4 if full else 1) * 2**20 * (seed + 2)
        speeds = [1.0, *(10.0 * (seed + 1) * (1 if full else 1.5 + seed) * x for x in (1, 3, 1))]
        finished(cell, auc, peak, speeds, 100 if full else 10)
        numbers[cell.labels['tuning'], seed] = auc, peak, np.median(speeds[1:])  # the first saw the compiler
    return stage, cells, numbers


def test_results_csv_has_a_row_a_cell_with_all_that_was_measured(measured, tmp_path):
    stage, cells, numbers = measured
    results.write(str(tmp_path), [stage], cells)
    rows = list(csv.DictReader((tmp_path / 'results.csv').read_text().splitlines()))
    assert len(rows) == 5 and not list(tmp_path.glob('*.tmp'))
    for row in rows:
        auc, peak, speed = numbers[row['tuning'], int(row['seed'])]
        assert (row['stage'], row['step_seconds'], row['devices']) == ('reward', '0.5', 'cpu x 1')
        np.testing.assert_allclose(
            [float(row[name]) for name in ('auc', 'auc_low', 'auc_high', 'memory_peak', 'memory_held')],
            [auc, auc - 0.1, auc + 0.1, peak, peak // 2],
        )
        np.testing.assert_allclose(float(row['examples_per_second']), speed)


def test_tables_are_medians_over_seeds_and_ratios_seed_by_seed(measured, tmp_path):
    stage, cells, numbers = measured
    results.write(str(tmp_path), [stage], cells)
    lines = (tmp_path / 'results.md').read_text().splitlines()
    heads, _, *lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line[:1] == '|']
    table = {line[0]: dict(zip(heads, line)) for line in lines}
    aucs = sorted(numbers['r1', seed][0] for seed in range(3))
    assert table['r1']['auc'] == f'{aucs[1]:.3f} ({aucs[0]:.3f} to {aucs[2]:.3f})'
    assert (table['r1']['seeds'], table['full']['seeds']) == ('3', '2')
    assert (table['r1']['trained'], table['full']['trained']) == ('10', '100')
    assert table['r1']['memory, MiB'] == '3.0 (2.0 to 4.0)'
    # Against full tuning of the same seed, so that seed 2, of which there is none, does not count.
    memory = [100 * numbers['r1', s][1] / numbers['full', s][1] for s in (0, 1)]
    assert memory == [25, 25] and table['r1']['memory, % of full'] == '25%'
    speed = [numbers['r1', s][2] / numbers['full', s][2] for s in (0, 1)]
    assert table['r1']['speed, x full'] == f'{np.mean(speed):.2f}x ({min(speed):.2f}x to {max(speed):.2f}x)'
    assert table['full']['speed, x full'] == '1.00x'


def test_a_size_is_compared_to_full_tuning_of_its_own_size():
    stage = dataclasses.replace(REWARD, axes={'size': {'s': [], 'xs': []}, 'tuning': TUNINGS, 'seed': SEEDS})
    rows = [
        {'size': size, 'tuning': tuning, 'seed': seed, 'trainable_parameters': 1, 'auc': 0.5,
         'memory_peak': (8 if size == 's' else 2) * (2 if tuning == 'full' else 1), 'examples_per_second': 1.0}
        for size in ('s', 'xs') for tuning in TUNINGS for seed in SEEDS
    ]  # fmt: skip
    ratios = {
        labels: results.ratio(
            group, results.reference(stage, dict(zip(('size', 'tuning'), labels)), rows), 'memory_peak'
        )
        for labels, group in results.groups(stage, rows).items()
    }
    assert ratios == {
        ('s', 'r1'): [0.5, 0.5], ('s', 'full'): [1, 1], ('xs', 'r1'): [0.5, 0.5], ('xs', 'full'): [1, 1],
    }  # fmt: skip
    quality, memory, speed = plots.figure(stage, rows).axes
    assert [bar.get_height() for bar in memory.patches] == [50, 100, 50, 100]
    assert [bar.get_height() for bar in speed.patches] == [1, 1, 1, 1]


def test_plots_of_a_sweep_that_is_not_whole(measured, tmp_path):
    stage, cells, _ = measured
    plots.write(str(tmp_path), [stage, dataclasses.replace(stage, name='none')], cells)
    assert (tmp_path / 'reward.png').read_bytes()[:4] == b'\x89PNG' and not (tmp_path / 'none.png').exists()


# All of it.

GRID = """
SWEEP_DIR = %gin.REQUIRED
sweep.run:
  sweep_dir = %SWEEP_DIR
  stages = [@sft/sweep.Stage(), @reward/sweep.Stage()]
sft/sweep.Stage:
  name = 'sft'
  command = 'sft'
  gin_files = ['recipes/toy_sft.gin']
  bindings = [SMALL, 'PROMPTS_DATASET = None']
  axes = {}
  split = None
reward/sweep.Stage:
  name = 'reward'
  command = 'reward'
  gin_files = ['recipes/toy_reward.gin']
  bindings = [SMALL]
  axes = {'tuning': {'r1': ['lora.LoraSpec.rank = 1'], 'bad': ['lora.LoraSpec.rank = 0']}}
  needs = {'INITIAL_CHECKPOINT_PATH': 'sft'}
  eval_bindings = ['BATCH_SIZE = 128']
  metrics = ['auc']
"""


def test_a_small_sweep_from_end_to_end(tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    small = [*(flag.removeprefix('--gin.').replace('=', ' = ') for flag in SMALL), 'TRAIN_STEPS = 2']
    (tmp_path / 'grid.gin').write_text(GRID.replace('SMALL', ', '.join(map(repr, small))))
    folder = tmp_path / 'runs'
    command = ['sweep', f'--gin_file={tmp_path}/grid.gin', f"--gin.SWEEP_DIR='{folder}'", '--jobs=2']
    result = perl(*command)
    assert result.code == 2 and f'1 of 3 cells failed, the first: see {folder}/reward/tuning=bad.log' in result.err
    assert 'Traceback' not in result.err
    sft, row = csv.DictReader((folder / 'results.csv').read_text().splitlines())
    about = json.loads((folder / 'reward/tuning=r1/run.json').read_text())
    measured = json.loads((folder / 'reward/tuning=r1/eval_validation.json').read_text())
    assert float(row['auc']) == measured['auc']['value'] and int(row['memory_peak']) == about['memory']['peak']
    assert (sft['auc'], row['trainable_parameters']) == ('', str(about['trainable_parameters']))
    assert (folder / 'reward.png').exists() and '| r1 | 1 |' in (folder / 'results.md').read_text()
    before = (folder / 'reward/tuning=r1.log').read_text()
    ran(*command, "--gin.reward/sweep.Stage.axes={'tuning': {'r1': ['lora.LoraSpec.rank = 1']}}")
    assert (folder / 'reward/tuning=r1.log').read_text() == before
    changed = perl(*command, "--gin.sft/sweep.Stage.bindings=['TRAIN_STEPS = 3']")
    assert changed.code == 2 and "sft' was started with other settings" in changed.err


def test_shipped_grids_can_be_read(tmp_path):
    for path in sorted((ROOT / 'gin' / 'sweeps').glob('*.gin')):
        out = ran('sweep', f'--gin_file=sweeps/{path.name}', f"--gin.SWEEP_DIR='{tmp_path}'", '--dry_run').out
        commands = [shlex.split(line) for line in out.splitlines()]
        assert commands and all(command[1:3] == ['-m', 'perl_jax'] for command in commands)
        named = [word.partition('=')[2] for command in commands for word in command if word.startswith('--gin_file')]
        assert all((ROOT / 'gin' / name).exists() for name in named)
    assert not os.listdir(tmp_path)
