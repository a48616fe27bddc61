"""Runs that are killed at random times, again and again until they end, are the undisturbed runs bit for bit.

Each case has a seed, which its name prints: the phase, the signals and the moments follow from it. A moment is a random
share of what the undisturbed run took, so kills fall into imports, compilation, steps, evaluations, writing of
checkpoints and the end alike. CAMPAIGN_RUNS is the number of runs, CAMPAIGN_SEED the first seed.
"""
# ruff: noqa: F811 (a fixture is shared by importing it)

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from test_resume import PHASES, ROOT, assert_same_run, command, unbroken  # noqa: F401
from toy_runs import ENVIRONMENT, toys  # noqa: F401

pytestmark = [pytest.mark.campaign, pytest.mark.slow]
RUNS, SEED = int(os.environ.get('CAMPAIGN_RUNS', '1')), int(os.environ.get('CAMPAIGN_SEED', '0'))
MOST_KILLS = 3  # of one run
CODES = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {75, -signal.SIGTERM},  # before Python has set its handler, the signal's own
    signal.SIGINT: {130, -signal.SIGINT, 1},  # 1: within Python's own start
}


def start(argv):
    environment = os.environ | ENVIRONMENT
    program = [sys.executable, '-m', 'perl_jax', *argv]
    return subprocess.Popen(program, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope='module')
def seconds(toys, unbroken, tmp_path_factory):
    """Seconds of an undisturbed process of each phase, with everything compiled."""
    durations = {}

    def measure(phase):
        if phase not in durations:
            unbroken(phase)
            begin = time.monotonic()
            process = start(command(toys, phase, tmp_path_factory.mktemp('timed') / phase))
            _, err = process.communicate()
            assert process.returncode == 0, err
            durations[phase] = time.monotonic() - begin
        return durations[phase]

    return measure


@pytest.mark.parametrize('seed', range(SEED, SEED + RUNS))
def test_a_run_killed_at_random_is_the_undisturbed_run(toys, unbroken, seconds, seed, tmp_path):
    rng = random.Random(seed)
    phase = rng.choice(PHASES)
    folder = tmp_path / phase
    argv, duration, events = command(toys, phase, folder), seconds(phase), []
    for _ in range(rng.randint(1, MOST_KILLS)):
        number, delay, is_stopped = rng.choice(list(CODES)), rng.uniform(0, duration), rng.random() < 0.25
        process = start(argv)
        try:
            process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            if is_stopped:  # suspended for a while, as by a debugger or a paused machine
                process.send_signal(signal.SIGSTOP)
                time.sleep(0.3)
                process.send_signal(signal.SIGCONT)
            process.send_signal(number)
            try:
                _, err = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                pytest.fail(f'{events}: it has not ended a minute after {signal.Signals(number).name}')
            events.append(f'{signal.Signals(number).name} after {delay:.2f} s')
            assert process.returncode in CODES[number] | {0}, f'{events}: {process.returncode} {err}'
            continue
        events.append('it ended by itself')
        assert process.returncode == 0
    process = start(argv)
    _, err = process.communicate()
    assert process.returncode == 0, f'{events}: {err}'
    assert_same_run(folder, unbroken(phase))
