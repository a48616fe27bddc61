"""A sweep's cells, their commands, and tables and plots of grids that have sizes or holes."""

import csv
import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
from toy_runs import ran

from perl_jax.errors import UserError
from perl_jax.tools.sweep import grid, plots, queue, results
from perl_jax.tools.sweep.grid import Stage

ROOT = pathlib.Path(__file__).parents[1]
SEEDS = {str(seed): [f'RANDOM_SEED = {seed}'] for seed in (0, 1)}
TUNINGS = {'r1': ['lora.LoraSpec.rank = 1'], 'full': ['tuning/full.gin']}
SFT = Stage('sft', 'sft', ['sft.gin'], {'seed': SEEDS}, split=None)
REWARD = Stage(
    'reward', 'reward', ['reward.gin'], {'tuning': TUNINGS, 'seed': SEEDS}, {'INITIAL_CHECKPOINT_PATH': 'sft'},
    split='test', metrics=['auc'], reference={'tuning': 'full'},
)  # fmt: skip


def find(cells, stage, **labels):
    (cell,) = [cell for cell in cells if cell.stage.name == stage and cell.labels == labels]
    return cell


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
    assert cells[0].folder == 'S/sft' and cells[0].log_path == 'S/sft.log'
    assert all(cell.parents == (cells[0],) for cell in cells[1:])


def test_an_axis_without_labels():
    with pytest.raises(UserError, match="axis 'seed' of stage 'sft' has no labels"):
        grid.cells('S', [dataclasses.replace(SFT, axes={'seed': {}}), REWARD])


def test_shipped_grids_can_be_read(tmp_path):
    for path in sorted((ROOT / 'gin' / 'sweeps').glob('*.gin')):
        out = ran('sweep', f'--gin_file=sweeps/{path.name}', f"--gin.SWEEP_DIR='{tmp_path}'", '--dry_run').out
        commands = [shlex.split(line) for line in out.splitlines()]
        assert commands and all(command[1:3] == ['-m', 'perl_jax'] for command in commands)
        named = [word.partition('=')[2] for command in commands for word in command if word.startswith('--gin_file')]
        assert all((ROOT / 'gin' / name).exists() for name in named)
    assert not os.listdir(tmp_path)


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
    lines = [{'step': 0, 'eval/x': 1.0}, *lines]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
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
