"""The queue of a sweep under kills, several at a time, and what it takes for done; with quick commands for runs."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from toy_runs import perl

from perl_jax.errors import UserError
from perl_jax.tools.sweep import grid, queue
from perl_jax.tools.sweep.grid import Stage

ROOT = pathlib.Path(__file__).parents[1]
TRUE = '/bin/true'
SEEDS = {str(seed): [f'RANDOM_SEED = {seed}'] for seed in (0, 1)}
TUNINGS = {'r1': ['lora.LoraSpec.rank = 1'], 'full': ['tuning/full.gin']}
SFT = Stage('sft', 'sft', ['sft.gin'], {'seed': SEEDS}, split=None)
REWARD = Stage(
    'reward', 'reward', ['reward.gin'], {'tuning': TUNINGS, 'seed': SEEDS}, {'INITIAL_CHECKPOINT_PATH': 'sft'},
    split='test', metrics=['auc'], reference={'tuning': 'full'},
)  # fmt: skip

# Stands in for a run: notes when it was there, takes a while, leaves what a run leaves. argv: folder, seconds, code,
# and a file that it waits for.
RUN = """
import json, os, sys, time
folder, seconds, code, gate = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
os.makedirs(folder, exist_ok=True)
note = lambda word: open(folder + '.notes', 'a').write(f'{word} {time.time()}\\n')
note('start')
time.sleep(seconds)
while gate and not os.path.exists(gate):
    time.sleep(0.01)
if code:
    sys.exit(code)
json.dump({'phase': 'sft', 'finished': 'now'}, open(folder + '/draft', 'w'))
os.replace(folder + '/draft', folder + '/run.json')
note('end')
"""


def stub(cell, seconds=0.0, code=0, gate=''):
    """The cell with a command that stands in for its run, and one that stands in for its evaluation."""
    here = [sys.executable, '-c']
    commands = [[*here, RUN, cell.folder, str(seconds), str(code), gate]]
    if cell.evaluation:
        commands.append([*here, f'open({cell.evaluation!r}, "w").write("{{}}")'])
    return dataclasses.replace(cell, commands=tuple(commands))


def notes(cell):
    """[(word, time)] of all runs of a cell."""
    path = pathlib.Path(cell.folder + '.notes')
    return [(word, float(at)) for word, at in map(str.split, path.read_text().splitlines())] if path.exists() else []


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


def test_a_failure_is_one_line_with_its_log_and_children_have_none(tmp_path, caplog):
    bad = f'{tmp_path}/sft/seed=0'
    cells = [stub(cell, code=3 * (cell.folder == bad)) for cell in grid.cells(str(tmp_path), [SFT, REWARD])]
    with caplog.at_level('INFO', 'perl_jax'):
        first, *children = queue.run(cells, 2, lambda: None)
    (line,) = [line for line in caplog.messages if ' failed' in line]
    assert first.folder == bad and line.startswith(f'sweep: {bad} failed, see {bad}.log; ')
    assert len(children) == 2 and not any(os.path.exists(cell.log_path) for cell in children)


def test_a_sweep_that_is_killed_and_started_again_does_each_cell_once(tmp_path):
    """kill -9 leaves the cell's process running; the next sweep waits for it and takes over what it finished."""
    gate = tmp_path / 'gate'
    program = (
        'import sys; sys.path[:0] = ["tests"]; import test_sweep_queue as t\n'
        f'cells = [t.stub(c, gate={str(gate)!r}) for c in t.grid.cells({str(tmp_path)!r}, [t.SFT])]\n'
        't.queue.run(cells, 1, lambda: None)'
    )
    cells = [stub(cell) for cell in grid.cells(str(tmp_path), [SFT])]
    process = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not notes(cells[0]) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, f'it ended before it was killed: {err}'
    assert not queue.is_done(cells[0])
    threading.Timer(1, gate.touch).start()  # while the second sweep waits
    assert queue.run(cells, 1, lambda: None) == []
    assert [[word for word, _ in notes(cell)] for cell in cells] == [['start', 'end']] * 2


def test_a_cell_that_was_killed_itself_is_run_again(tmp_path):
    (cell, *_) = grid.cells(str(tmp_path), [SFT])
    dying = dataclasses.replace(cell, commands=([sys.executable, '-c', 'import os; os.kill(os.getpid(), 9)'],))
    assert queue.run([dying], 1, lambda: None) == [dying]
    assert pathlib.Path(cell.log_path).read_text().endswith('exit code -9\n')
    assert queue.run([stub(cell)], 1, lambda: None) == [] and queue.is_done(cell)


def test_cells_may_be_added_to_a_sweep_and_their_files_and_order_count(tmp_path):
    def cells(*settings, seeds=('0',)):
        axes = {'tuning': {'r': settings}, 'seed': {seed: [] for seed in seeds}}
        made = grid.cells(str(tmp_path), [Stage('a', 'sft', [], axes, split=None)])
        # An interpreter that takes the true command for arguments.
        return [dataclasses.replace(c, commands=([TRUE, *c.commands[0][1:]],)) for c in made]

    queue.run(cells('A = 1', 'A = 2'), 1, lambda: None)
    queue.check(cells('A = 1', 'A = 2', seeds='01'))
    for other in (('A = 2', 'A = 1'), ('A = 1',), ('A = 1', 'A = 2', 'tuning/full.gin')):
        with pytest.raises(UserError, match="tuning=r,seed=0' was started with other settings"):
            queue.check(cells(*other, seeds='01'))


@pytest.mark.parametrize('jobs', [0, -1, 1.5, 'two'])
def test_jobs_is_a_number_of_processes(jobs):
    with pytest.raises(UserError, match='run.jobs = '):
        queue.run([], jobs, lambda: None)


def test_a_sweep_with_a_failed_cell_exits_with_2_and_names_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / 'grid.gin').write_text(f"""
sweep.run.sweep_dir = '{tmp_path}/out'
sweep.run.stages = [@sweep.Stage()]
sweep.Stage:
  name = 'a'
  command = 'nonsense'
  gin_files = []
  axes = {{}}
""")
    result = perl('sweep', f'--gin_file={tmp_path}/grid.gin', '--jobs=2')
    assert result.code == 2 and f'1 of 1 cells failed, for the first see {tmp_path}/out/a.log' in result.err
    assert "no command is called 'nonsense'" in (tmp_path / 'out' / 'a.log').read_text()
    line = perl('sweep', f'--gin_file={tmp_path}/grid.gin', '--jobs=0').line
    assert line.startswith('perl_jax: sweep: argument --jobs: 0: give')
