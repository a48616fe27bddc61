"""Killed at any time, a run that is started again is the run that nothing happened to, bit for bit."""

import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import forks
import numpy as np
import pytest
from toy_runs import contents, perl, quoted, ran, rows, state, steps, toy, toys  # noqa: F401

pytestmark = pytest.mark.slow

# ruff: noqa: F811 (a fixture is shared by importing it)

ROOT = pathlib.Path(__file__).parents[1]
PHASES = ('sft', 'reward', 'policy')
# Windows of the log that end between checkpoints as well as at them.
LONG = (
    '--gin.TRAIN_STEPS=30', '--gin.EVAL_PERIOD=3', '--gin.runs.RunConfig.log_period=2',
    '--gin.DECAY_STEPS=30',  # in the recipes the learning rate hangs on TRAIN_STEPS
)  # fmt: skip
each_phase = pytest.mark.parametrize('phase', PHASES)


def command(toys, phase, folder, *flags):
    sources = {'sft': (), 'reward': toys.sources[:1], 'policy': toys.sources}[phase]
    return toy(phase, folder, *sources, *LONG, *flags)


@pytest.fixture(scope='module')
def unbroken(toys, tmp_path_factory):
    """The folder of each phase's run, made when first asked for."""
    made = {}

    def get(phase):
        if phase not in made:
            made[phase] = tmp_path_factory.mktemp('unbroken') / phase
            ran(*command(toys, phase, made[phase]))
        return made[phase]

    return get


def kill(argv, ready, how=signal.SIGKILL):
    """Starts a command in a process of its own and sends it a signal as soon as `ready()`; what it said."""
    process = forks.Forked(argv)
    while process.poll() is None and not ready():
        time.sleep(0.001)
    process.send_signal(how)
    _, err = process.communicate()
    code = {signal.SIGKILL: -how, signal.SIGTERM: 75, signal.SIGINT: 130}[how]
    assert process.returncode == code, f'it ended before it was killed: {err}'
    return err


def logged(folder, count):
    """Whether that many lines are in metrics.jsonl, the last perhaps not whole."""
    path = folder / 'metrics.jsonl'
    return path.exists() and path.read_bytes().count(b'\n') >= count


def half_written(folder):
    """Whether a checkpoint is being written beside a whole one."""
    names = os.listdir(folder / 'checkpoints') if (folder / 'checkpoints').exists() else []
    return any(name.isdigit() for name in names) and any('tmp' in name for name in names)


def assert_same_run(folder, other):
    assert_same_logs(folder, other)
    assert steps(folder) == steps(other)
    for step in steps(other):
        assert_same_state(folder, other, step)


def assert_same_logs(folder, other):
    assert rows(folder) == rows(other)
    assert (folder / 'samples.jsonl').read_bytes() == (other / 'samples.jsonl').read_bytes()


def assert_same_state(folder, other, step):
    one, two = state(folder, step), state(other, step)
    assert one.keys() == two.keys()
    for path, x in one.items():
        np.testing.assert_array_equal(x.reshape(-1).view(np.uint8), two[path].reshape(-1).view(np.uint8), path)


MOMENTS = {
    'before its first checkpoint': lambda folder: (folder / 'run.json').exists(),
    'while it writes a checkpoint': half_written,
    'after many steps': lambda folder: logged(folder, 15),
}


@pytest.mark.parametrize(('phase', 'moments'), [
    ('sft', ['while it writes a checkpoint']), ('reward', ['after many steps']), ('policy', list(MOMENTS)),
], ids=PHASES)  # fmt: skip
def test_a_run_that_was_killed_is_the_unbroken_run(toys, unbroken, phase, moments, tmp_path):
    """The policy's is killed three times, one after the other; a process for each takes most of the time here."""
    folder = tmp_path / phase
    argv = command(toys, phase, folder)
    whole = unbroken(phase)  # first, so that the others need not compile
    for moment in moments:
        kill(argv, functools.partial(MOMENTS[moment], folder))
    assert 3 <= steps(folder)[-1] < 30
    ran(*argv)
    assert_same_run(folder, whole)


@pytest.mark.parametrize(('phase', 'number', 'word'), [
    ('sft', signal.SIGTERM, 'preempted'), ('reward', signal.SIGINT, 'interrupted'),
    ('policy', signal.SIGTERM, 'preempted'),
], ids=PHASES)  # fmt: skip
def test_a_run_that_is_stopped_saves_at_once_and_is_the_unbroken_run(toys, unbroken, phase, number, word, tmp_path):
    """In the middle of a window of the log too. SIGTERM is the notice that a machine will be taken away."""
    folder, whole = tmp_path / phase, unbroken(phase)
    argv = command(toys, phase, folder)
    err = kill(argv, functools.partial(logged, folder, 4), number)
    saved = re.search(rf'perl_jax: {word}; saved at step (\d+) of 30; the same command goes on', err)
    assert saved and steps(folder)[-1] == int(saved[1])
    assert json.loads((folder / 'run.json').read_text())['finished'] is None
    ran(*argv)
    assert_same_run(folder, whole)


def test_a_run_that_is_preempted_before_its_loop_can_start_again(toys, tmp_path):
    """Python and the libraries take seconds to load; exit code 75 is what a worker starts again after."""
    slow = f"import pathlib, time\npathlib.Path({str(tmp_path)!r}, 'there').touch()\ntime.sleep(60)\n"
    (tmp_path / 'slow.py').write_text(slow)
    argv = [*command(toys, 'sft', tmp_path / 'run'), '--gin_bindings=import slow']
    environment = os.environ | {'PYTHONPATH': f'{ROOT}:{tmp_path}'}
    process = subprocess.Popen(
        [sys.executable, '-m', 'perl_jax', *argv], env=environment, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / 'there').exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75 and 'preempted; no step was begun; the same command goes on' in err


@each_phase
def test_a_finished_run_says_so_and_changes_nothing(toys, unbroken, phase):
    folder = unbroken(phase)
    before = contents(folder)
    result = ran(*command(toys, phase, folder))
    assert f"{phase}: '{folder}' is finished (30 of 30 steps); for more raise TRAIN_STEPS" in result.err
    # Nor if it is asked for less, or for something else: config.gin says what was run.
    result = ran(*command(toys, phase, folder, '--gin.TRAIN_STEPS=12', '--gin.LEARNING_RATE=1.0'))
    assert '(30 of 12 steps)' in result.err
    assert contents(folder) == before


def test_a_finished_run_goes_on_with_more_steps(toys, unbroken, tmp_path):
    """And then it is the run that had them from the beginning."""
    folder = tmp_path / 'policy'
    ran(*command(toys, 'policy', folder, '--gin.TRAIN_STEPS=12'))
    assert rows(folder) == [row for row in rows(unbroken('policy')) if row['step'] <= 12]
    ran(*command(toys, 'policy', folder))
    assert_same_run(folder, unbroken('policy'))


def test_a_run_killed_while_it_starts_can_be_started(toys, unbroken, tmp_path):
    """Orbax makes its folder before anything is in it."""
    folder = tmp_path / 'sft'
    (folder / 'checkpoints').mkdir(parents=True)
    ran(*command(toys, 'sft', folder, '--gin.TRAIN_STEPS=3'))
    assert steps(folder) == [3]


def test_a_finished_run_that_was_moved_goes_on(toys, unbroken, tmp_path):
    """Base and run: a path says where something lies, a fingerprint what it is."""
    sft, folder = tmp_path / 'elsewhere', tmp_path / 'reward'
    shutil.copytree(toys.sft, sft)
    ran(*command(toys, 'reward', tmp_path / 'first', '--gin.TRAIN_STEPS=12'))
    shutil.move(tmp_path / 'first', folder)
    ran(*command(toys, 'reward', folder, quoted('INITIAL_CHECKPOINT_PATH', sft)))
    assert_same_run(folder, unbroken('reward'))


def test_a_checkpoint_that_was_deleted_is_made_again(toys, unbroken, tmp_path):
    """What the message about a truncated checkpoint tells one to do."""
    folder = tmp_path / 'sft'
    shutil.copytree(unbroken('sft'), folder)
    argv = command(toys, 'sft', folder)
    before, last = steps(folder)
    damaged = folder / 'checkpoints' / str(last)
    for path in (damaged / 'state').rglob('*'):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    assert f'or move it elsewhere, and step {before} is used' in perl(*argv).line
    shutil.rmtree(damaged)
    ran(*argv)
    assert_same_run(folder, unbroken('sft'))
