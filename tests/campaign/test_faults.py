"""Faults of the machine and of what lies on it: each ends in one line with exit code 2, or the run goes on right.

CAMPAIGN_SEED chooses the first of the places, CAMPAIGN_RUNS is how many are tried.
"""
# ruff: noqa: F811 (a fixture is shared by importing it)

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time

import forks
import pytest
from test_crash import RUNS, SEED
from test_resume import assert_same_run
from test_tools import COMMANDS, result
from toy_runs import contents, perl, quoted, ran, steps, toy, toys  # noqa: F401

from perl_jax.runs import rundir

pytestmark = [pytest.mark.campaign, pytest.mark.slow]
ERRORS = ('ENOSPC', 'EROFS', 'EACCES', 'EDQUOT', 'EIO')


def assert_one_line(code, err, *words):
    """That a command ended as its user can act on it, under a run's first lines and its bar."""
    *others, line = err.strip().splitlines()
    assert code == 2 and line.startswith('perl_jax: '), f'{code}: {err[-2000:]}'
    assert 'Traceback' not in err and all(word in line for word in words), err[-2000:]
    allowed = 'it/s', 'step', 'intervals over', 'warning: '
    assert all(any(text in other for text in allowed) for other in others if other.strip()), err[-2000:]


@pytest.mark.parametrize('seed', range(SEED, SEED + RUNS))
def test_a_run_whose_writes_fail_goes_on_when_they_do_not(toys, seed, tmp_path):
    rng, folder = random.Random(seed), tmp_path / 'run'
    harm = {'before': ['write', str(folder), rng.randint(1, 60)], 'by': rng.choice(ERRORS)}
    code, err = forks.run(toy('sft', folder), harm)
    print(f'seed {seed}: {harm}: {code}')
    if code:
        assert_one_line(code, err)
    code, err = forks.run(toy('sft', folder))
    assert code == 0, f'{harm}: {err}'
    assert_same_run(folder, toys.sft)


@pytest.mark.parametrize('name', COMMANDS)
def test_a_command_whose_writes_fail_leaves_nothing(toys, name, tmp_path):
    rng = random.Random(f'{name} {SEED}')
    for case in range(max(1, RUNS // 5)):
        out = tmp_path / str(case) / 'out'
        out.parent.mkdir()
        harm = {'before': ['write', str(out.parent), rng.randint(1, 6)], 'by': rng.choice(ERRORS)}
        code, err = forks.run(COMMANDS[name](toys, out), harm)
        print(f'{name}: {harm}: {code}')
        if code:
            assert_one_line(code, err)
            assert not os.listdir(out.parent) or 'draft' in os.listdir(out.parent)[0], os.listdir(out.parent)
        code, err = forks.run(COMMANDS[name](toys, out))
        assert code in (0, 2), err  # 2: the result is there
        assert result(out)


@contextlib.contextmanager
def disk(folder, size):
    """A disk of that size at the folder; skips where none may be mounted."""
    folder.mkdir()
    if shutil.which('mount') is None or subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'perl_jax_test', folder], capture_output=True, check=False
    ).returncode:
        pytest.skip('no file system may be mounted here')
    try:
        yield lambda how: subprocess.run(['mount', '-o', f'remount,{how}', folder], check=True)
    finally:
        subprocess.run(['umount', '-l', folder], check=True)


@pytest.mark.parametrize('size', [f'{size}k' for size in (300, 60, 1000, 150, 600)[: max(1, RUNS)]])
def test_a_disk_that_is_full_and_one_that_is_read_only(toys, size, tmp_path):
    with disk(tmp_path / 'disk', size) as remount:
        folder = tmp_path / 'disk/run'
        code, err = forks.run(toy('sft', folder))
        if code:
            assert_one_line(code, err, 'No space left on device')
        remount('size=200m,ro')
        code, err = forks.run(toy('sft', folder, '--gin.TRAIN_STEPS=7'))
        assert_one_line(code, err, 'ead-only file system')
        remount('rw')
        code, err = forks.run(toy('sft', folder))
        assert code == 0, err
        assert_same_run(folder, toys.sft)


NAMES = (
    'it\'s "here"', 'ø日本 \U0001f600', '-rf', 'a\nb', ' ', '%s{}$HOME', '*', '%MACRO @f', 'x' * 200, '\x1b[2J', '..a',
)  # fmt: skip


@pytest.mark.parametrize('name', NAMES if RUNS > 1 else NAMES[:1])
def test_a_folder_of_an_odd_name(toys, name, tmp_path):
    folder = tmp_path / name
    for count in 2, 6:  # a start and a resume
        argv = toy('sft', tmp_path, f'--gin.MODEL_DIR={str(folder)!r}', f'--gin.TRAIN_STEPS={count}')
        code, err = forks.run(argv)
        if code:
            assert_one_line(code, err)
            assert not folder.exists()
            return
    assert_same_run(folder, toys.sft)
    code, err = forks.run(['report', folder])
    assert code == 0 and (folder / 'report.html').exists(), err
    code, err = forks.run(['export', f'--model_dir={folder}', '--format=hf', f'--output={folder}/out'])
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.fixture(scope='module')
def on_a_base(toys, tmp_path_factory):
    """(run, its base): a reward run of two steps on a copy of a base."""
    folder = tmp_path_factory.mktemp('based')
    shutil.copytree(toys.sft, folder / 'base')
    source = quoted('INITIAL_CHECKPOINT_PATH', folder / 'base')
    ran(*toy('reward', folder / 'run', source, '--gin.TRAIN_STEPS=2'))
    return folder / 'run', folder / 'base'


def test_a_base_that_vanished_or_is_another(on_a_base, toys, tmp_path):
    run, base = on_a_base
    argv, before = toy('reward', run, quoted('INITIAL_CHECKPOINT_PATH', base)), contents(run)
    shutil.move(base, tmp_path / 'away')
    assert str(base) in perl(*argv).line and contents(run) == before
    shutil.copytree(toys.sft_lora, base)
    assert 'another base' in perl(*argv).line and contents(run) == before
    (base / 'run.json').write_text('')
    assert str(base) in perl(*argv).line and contents(run) == before
    shutil.rmtree(base)
    base.write_text('a file')
    assert str(base) in perl(*argv).line and contents(run) == before
    base.unlink()
    shutil.move(tmp_path / 'away', base)
    ran(*argv)
    assert steps(run)[-1] == 6


@pytest.mark.parametrize('seed', range(SEED, SEED + max(4, RUNS)))
def test_a_truncated_file_is_named_or_made_good(toys, seed, tmp_path):
    """And what commands that only read make of it."""
    rng, folder = random.Random(seed), tmp_path / 'run'
    shutil.copytree(toys.sft, folder)
    path = folder / ['run.json', 'metrics.jsonl', 'config.gin', 'samples.jsonl'][seed % 4]
    os.truncate(path, rng.randint(0, path.stat().st_size - 1) if rng.random() < 0.8 else 0)
    before = contents(folder)
    for argv in ['report', folder, f'--output={tmp_path}/page.html'], toy('sft', folder):
        answer = perl(*argv)
        assert answer.code == 0 or str(path) in answer.line or path.name == 'config.gin' and answer.line, answer
        assert contents(folder) == before, argv
    answer = perl(*toy('sft', folder, '--gin.TRAIN_STEPS=7')) if seed < 4 or RUNS > 1 else None
    if answer is not None and answer.code == 0:
        assert steps(folder)[-1] == 7 and json.loads((folder / 'run.json').read_text())['finished']
    elif answer is not None:
        assert str(path) in answer.line and contents(folder) == before


def test_a_clock_that_goes_back_between_two_starts(toys, tmp_path, monkeypatch):
    folder = tmp_path / 'run'
    ran(*toy('sft', folder, '--gin.TRAIN_STEPS=4'))  # an end is evaluated, as is every second step
    now, clock = rundir._timestamp(), time.time
    monkeypatch.setattr(time, 'time', lambda: clock() - 1e6)
    monkeypatch.setattr(rundir, '_timestamp', lambda: '2001' + now[4:])
    ran(*toy('sft', folder))
    assert_same_run(folder, toys.sft)
    about = json.loads((folder / 'run.json').read_text())
    assert about['seconds'] >= 0 and about['finished'].startswith('2001')
    ran('report', folder)


def test_two_runs_in_one_folder(toys, tmp_path):
    """The first is stopped as it writes an evaluation; the second changes nothing."""
    folder = tmp_path / 'run'
    place = ['call', 'perl_jax.runs.rundir:RunDir.evaluated', 2]
    first = forks.Forked(toy('sft', folder), {'before': place, 'by': 'SIGSTOP'})
    try:
        while not first.is_stopped():
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
        time.sleep(1)  # its threads too have come to rest
        before = contents(folder)
        code, err = forks.run(toy('sft', folder))
        assert_one_line(code, err, 'another process is writing there')
        assert contents(folder) == before
        first.send_signal(signal.SIGCONT)
        _, err = first.communicate()
        assert first.returncode == 0, err
    finally:
        first.kill()
        first.communicate()
    assert_same_run(folder, toys.sft)


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='reads the size of the process in /proc')
def test_a_run_that_has_too_little_memory(toys, tmp_path):
    folder = tmp_path / 'run'
    big = '--gin.BATCH_SIZE=32', "--gin.TASK_FEATURE_LENGTHS={'inputs': 4096, 'targets': 4096}"
    harm = {'before': ['call', 'perl_jax.runs.rundir:RunDir.steps', 1], 'by': 'memory'}
    code, err = forks.run(toy('sft', folder, *big), harm)
    assert_one_line(code, err, 'lower BATCH_SIZE')
    code, err = forks.run(toy('sft', folder))
    assert code == 0, err
