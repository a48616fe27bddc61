"""Runs that are killed again and again until they end are the undisturbed runs bit for bit.

Each case has a seed, which its name prints: the kind of run, the signals and the places follow from it. A place is a
moment at random, as a share of what the undisturbed run takes, or a named one: before the n-th change of a file, or
the n-th call of a function. CAMPAIGN_RUNS is the number of runs, CAMPAIGN_SEED the first seed.
"""
# ruff: noqa: F811 (a fixture is shared by importing it)

import functools
import json
import os
import random
import signal
import subprocess
import time

import forks
import pytest
from test_ensemble_runs import MEMBERS
from test_resume import assert_same_logs, assert_same_state
from toy_runs import ran, steps, toy, toys  # noqa: F401

pytestmark = [pytest.mark.campaign, pytest.mark.slow]
RUNS, SEED = int(os.environ.get('CAMPAIGN_RUNS', '1')), int(os.environ.get('CAMPAIGN_SEED', '0'))
MOST_KILLS = 4  # of one run
KINDS = ('sft', 'reward', 'ensemble', 'policy')
STEPS, PERIOD = 12, 3
# Windows of the log that end between checkpoints as well as at them.
LENGTH = (
    f'--gin.TRAIN_STEPS={STEPS}', f'--gin.EVAL_PERIOD={PERIOD}', '--gin.runs.RunConfig.log_period=2',
    f'--gin.DECAY_STEPS={STEPS}',
)  # fmt: skip
CODES = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {75, -signal.SIGTERM},  # before the command has set its handler, the signal's own
    signal.SIGINT: {130, -signal.SIGINT, 1},
}
PLACES = {  # and how often an undisturbed run comes there
    'a change of a file': ('write', '{}', 100),
    'a change of a checkpoint': ('write', '{}/checkpoints', 80),
    'saving': ('call', 'perl_jax.runs.checkpoints:Checkpoints.save', 4),
    'restoring': ('call', 'perl_jax.runs.checkpoints:Checkpoints.restore', 1),
    'an evaluation is written': ('call', 'perl_jax.runs.rundir:RunDir.evaluated', 4),
    'a program is compiled': ('call', 'jax._src.compiler:compile_or_get_cached', 90),
}
OTHERS = ('started', 'finished', 'seconds', 'step_seconds', 'memory', 'command', 'commit')  # fields of run.json


def command(toys, kind, folder):
    sources = {'sft': (), 'policy': toys.sources}.get(kind, toys.sources[:1])
    phase, flags = ('reward', MEMBERS) if kind == 'ensemble' else (kind, ())
    return toy(phase, folder, *sources, *LENGTH, *flags)


@pytest.fixture(scope='module')
def undisturbed(toys, tmp_path_factory):
    """(kind) -> the folder of its run, and the seconds of a forked one with everything compiled."""

    @functools.cache
    def get(kind):
        folder = tmp_path_factory.mktemp('undisturbed')
        ran(*command(toys, kind, folder / 'first'))
        start = time.monotonic()
        code, err = forks.run(command(toys, kind, folder / 'forked'))
        assert code == 0, err
        assert_same(folder / 'forked', folder / 'first')
        return folder / 'first', time.monotonic() - start

    return get


def assert_same(folder, other):
    """The same run, apart from its clock, and nothing else in its folder.

    A checkpoint of a stop may stand where one of an evaluation would: the two latest are kept.
    """
    assert_same_logs(folder, other)
    mine, others = set(steps(folder)), set(steps(other))
    assert max(mine) == max(others) and len(others - mine) <= len([step for step in mine if step % PERIOD])
    for step in mine & others:
        assert_same_state(folder, other, step)
    names, infos, configs = [], [], []
    for path in folder, other:
        names.append({file.name for file in path.iterdir() if not file.name.startswith('events.')})
        info = json.loads((path / 'run.json').read_text())
        assert info['finished']
        infos.append({key: value for key, value in info.items() if key not in OTHERS})
        config = (path / 'config.gin').read_text().replace(str(path), '')
        configs.append(config.replace('\\', '').split())  # gin breaks a line where a path is long
    assert names[0] == names[1] and infos[0] == infos[1] and configs[0] == configs[1]


def kill(argv, folder, rng, duration):
    """Start a command and kill it, perhaps while it is suspended; what was done, and the exit code."""
    done = max([0, *steps(folder)]) if (folder / 'checkpoints').is_dir() else 0
    name = rng.choice(['', *(name for name in PLACES if done or name != 'restoring')])
    number, is_suspended, delay = rng.choice(list(CODES)), rng.random() < 0.25, rng.uniform(0, duration)
    event, harm = f'{number.name}{" when suspended" if is_suspended else ""}', None
    if name:
        kind, place, most = PLACES[name]
        count, delay = rng.randint(1, max(1, most * (STEPS - done) // STEPS)), 600
        harm = {'before': [kind, place.format(folder), count], 'by': 'SIGSTOP' if is_suspended else number.name}
    event += f' before {name} ({count})' if name else f' after {delay:.2f} s'
    process = forks.Forked(argv, harm)
    end = time.monotonic() + delay
    while time.monotonic() < end and process.poll() is None and not process.is_stopped():
        time.sleep(0.01)
    if is_suspended:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
    if is_suspended or not name:
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail(f'{event}: it has not ended in a minute')
    assert process.returncode in CODES[number] | {0}, f'{event}: {process.returncode} {err}'
    return event, process.returncode


@pytest.mark.parametrize('seed', range(SEED, SEED + RUNS))
def test_a_run_that_is_killed_is_the_undisturbed_run(toys, undisturbed, seed, tmp_path):
    rng = random.Random(seed)
    kind = rng.choice(KINDS)
    whole, duration = undisturbed(kind)
    argv = command(toys, kind, tmp_path / kind)
    for _ in range(rng.randint(1, MOST_KILLS)):
        event, code = kill(argv, tmp_path / kind, rng, duration)
        print(f'seed {seed}: {kind}: {event}: {code}')
        if code == 0:
            break
    code, err = forks.run(argv)
    assert code == 0, err
    assert_same(tmp_path / kind, whole)
