"""Jobs of several processes: each of them lost or stopped in turn, and checkpoints of N processes restored on M.

In `make campaign` alone (CAMPAIGN_RUNS above 1); tests/test_pod.py has one of each kind.
"""
# ruff: noqa: F811 (a fixture is shared by importing it)

import contextlib
import functools
import os
import pathlib
import shutil
import signal
import time

import pytest
from test_crash import RUNS
from test_pod import EVERY, alone, assert_close, find, finish, has_logged, pod, steps_there, wait_for  # noqa: F401
from toy_runs import steps, toys  # noqa: F401

from perl_jax.parallel import distributed, survivor

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.slow,
    pytest.mark.skipif(RUNS == 1, reason='starts some ninety processes, and waits for heartbeats: make campaign'),
    pytest.mark.skipif(not pathlib.Path('/proc').is_dir(), reason='finds processes in /proc'),
]
STATED = 60  # seconds after the loss of a process until the launcher has ended the job (docs/reference/pods.md)
LOST = [(count, index) for count in (2, 4) for index in range(count)]
# So long that a process is lost or stopped before its last step, however slow the machine is.
LONG = EVERY, '--gin.TRAIN_STEPS=40', '--gin.EVAL_PERIOD=10'
MARGIN = 60  # seconds, on a machine that has more to do


@pytest.fixture(scope='module')
def undisturbed(toys, tmp_path_factory):
    """(count) -> the folder of the long run of so many processes, whose sums are in one order."""

    @functools.cache
    def get(count):
        folder = tmp_path_factory.mktemp('undisturbed') / 'sft'
        code, err = finish(pod(count, folder, 'sft', toys, *LONG))
        assert code == 0, err
        return folder

    return get


@pytest.mark.parametrize(('count', 'index'), LOST)
def test_a_job_that_loses_a_process_names_it_and_goes_on_as_it_was(toys, undisturbed, count, index, tmp_path):
    folder = tmp_path / 'sft'
    process = pod(count, folder, 'sft', toys, *LONG)
    wait_for(lambda: steps_there(folder) and has_logged(folder, 2), process)
    os.kill(find(folder, index), signal.SIGKILL)
    start = time.monotonic()
    code, err = finish(process)
    assert time.monotonic() - start < STATED
    assert code == 137 and f'process {index} of {count} ended with exit code 137' in err
    code, err = finish(pod(count, folder, 'sft', toys, *LONG))
    assert code == 0, err
    assert_close(folder, undisturbed(count))


@pytest.mark.parametrize(('count', 'index'), [(2, 1), (2, 0), (4, 2)])
def test_a_process_that_is_stopped_counts_as_lost(toys, undisturbed, count, index, tmp_path):
    """The launcher does not see it, but heartbeats tell: the job ends with the code of a loss."""
    folder = tmp_path / 'sft'
    process = pod(count, folder, 'sft', toys, *LONG)
    wait_for(lambda: steps_there(folder) and has_logged(folder, 2), process)
    parent = find(folder, index)  # which watches over the process that trains (parallel/survivor.py)
    children = pathlib.Path(f'/proc/{parent}/task/{parent}/children').read_text().split()
    stopped = [parent, *map(int, children)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    try:
        code, err = finish(process)
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert time.monotonic() - start < distributed.HEARTBEAT + distributed.NOTICE + MARGIN
    logs = ''.join(path.read_text() for path in pathlib.Path(f'{folder}.logs').glob('*.log'))
    assert code == survivor.LOST and f'process {index} was lost' in err + logs, f'{code}: {err} {logs[-3000:]}'
    code, err = finish(pod(count, folder, 'sft', toys, *LONG))
    assert code == 0, err
    assert_close(folder, undisturbed(count))


@pytest.fixture(scope='module')
def halfway(toys, tmp_path_factory):
    """The run of so many processes up to its third step."""
    made = {}

    def get(count):
        if count not in made:
            made[count] = tmp_path_factory.mktemp('halfway') / 'sft'
            flags = EVERY, '--gin.TRAIN_STEPS=4'  # its learning rate is constant
            code, err = finish(pod(count, made[count], 'sft', toys, *flags))
            assert code == 0, err
        return made[count]

    return get


MOVES = [(before, after) for before in (1, 2, 4) for after in (1, 2, 4) if before != after]


@pytest.mark.parametrize(('before', 'after'), MOVES)
def test_a_checkpoint_of_some_processes_is_restored_on_others(toys, alone, halfway, before, after, tmp_path):
    folder = tmp_path / 'sft'
    shutil.copytree(halfway(before), folder)
    code, err = finish(pod(after, folder, 'sft', toys, EVERY))
    assert code == 0, err
    assert steps(folder)[-1] == 6
    assert_close(folder, alone('sft'))
