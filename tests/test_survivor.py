"""The codes with which processes of a job end, of which others are gone: by their parent, and by the error."""

import os
import signal
import socket
import subprocess
import sys

import jax
import pytest

from perl_jax.cli import main
from perl_jax.parallel import distributed, survivor

JOIN = """
import sys
from perl_jax.parallel import survivor
survivor.begin(['--distributed'])
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=int(sys.argv[3]),
                           heartbeat_timeout_seconds=10)
print('joined', flush=True)
sys.stdin.read()
"""


def start(program, *argv):
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, '-c', program, *argv], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def address():
    with socket.socket() as server:
        server.bind(('localhost', 0))
        return f'localhost:{server.getsockname()[1]}'


def test_who_waits_for_one_that_does_not_come(address):
    process = start(JOIN, address, '0', '2')
    _, err = process.communicate(timeout=120)
    assert process.returncode == survivor.LOST
    assert survivor.SIGN.decode() in err and 'was lost, or did not come; the same command goes on' in err


@pytest.mark.parametrize('victim', [0, 1])
def test_who_outlives_another(address, victim):
    """The first keeps the job's books: without it the others know at once, without another after its heartbeats."""
    processes = [start(JOIN, address, str(i), '120') for i in range(2)]
    for process in processes:
        assert process.stdout.readline() == 'joined\n', process.stderr.read()
    processes[victim].kill()
    assert processes[victim].wait(60) == -signal.SIGKILL
    assert processes[1 - victim].wait(60) == survivor.LOST
    _, err = processes[1 - victim].communicate()
    assert f'perl_jax: stopped: process {victim} was lost, or did not come' in err, err
    processes[victim].communicate()


@pytest.mark.parametrize(('then', 'code'), [
    ('sys.exit(0)', 0), ('sys.exit(2)', 2), ('os._exit(75)', 75), ('os.abort()', 134),
    ('os.kill(os.getpid(), 9)', 137), ('1 / 0', 1),
])  # fmt: skip
def test_any_other_end_is_passed_on(then, code):
    """An abort too: it is a fault of the program unless JAX said that another one's was."""
    program = f"""
import os, sys
from perl_jax.parallel import survivor
survivor.begin(['--process_index=0'])
print('out', flush=True)
print('err', file=sys.stderr, flush=True)
{then}
"""
    process = start(program)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err[:4]) == (code, 'out\n', 'err\n')


def test_sigterm_reaches_the_child():
    program = """
import os, signal, sys
from perl_jax.parallel import survivor
survivor.begin(['--distributed'])
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
print(os.getpid(), flush=True)
signal.pause()
"""
    process = start(program)
    child = int(process.stdout.readline())
    assert child != process.pid
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_a_process_alone_has_no_parent(monkeypatch):
    monkeypatch.setattr(os, 'fork', None)
    survivor.begin(['sft', '--gin_file=recipes/toy_sft.gin'])


@pytest.mark.parametrize(('error', 'code'), [
    (RuntimeError('Failed to recognize coordinator address me-workers-0-0.me'), survivor.LOST),
    (ValueError('coordinator_address should be defined.'), 2),
    (ConnectionResetError(104, 'Connection reset by peer'), 1), (PermissionError(13, 'Permission denied'), 2),
])  # fmt: skip
def test_who_cannot_join(monkeypatch, capsys, error, code):
    """What may pass is started again on a pod; code 2 never is."""

    def initialize(*args, **kwargs):
        raise error

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    assert main.cli(['sft', '--gin_file=recipes/toy_sft.gin', '--distributed']) == code
    err = capsys.readouterr().err
    assert err.startswith('perl_jax: ') and err.count('\n') == 1


ERRORS = {
    'UNKNOWN: Gloo all-reduce failed: Read error [127.0.0.1]:132: Connection reset by peer': True,
    'UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):': True,
    'DEADLINE_EXCEEDED: Barrier timed out. Id: save': True,
    'RESOURCE_EXHAUSTED: Out of memory': False,
    'INVALID_ARGUMENT: Shapes differ': False,
}


@pytest.mark.parametrize('said', ERRORS)
def test_an_error_says_whether_another_process_is_gone(said, capsys, monkeypatch):
    """And waits for JAX to name it, where it is gone."""
    waits = []
    monkeypatch.setattr(distributed.time, 'sleep', waits.append)
    error = jax.errors.JaxRuntimeError(said)
    wrapped = ValueError('cannot save')
    wrapped.__cause__ = error
    want = survivor.LOST if ERRORS[said] else 1
    assert [distributed.exit_status(e)[0] for e in (error, wrapped)] == [want, want]
    assert waits == [70, 70] * ERRORS[said]
    assert ('JaxRuntimeError' in capsys.readouterr().err) != ERRORS[said]
    assert distributed.exit_status(ValueError(said))[0] == 1
