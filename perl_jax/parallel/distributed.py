"""Several processes that train as one: how they find each other, and what happens when the job is told to go.

Every process runs the same command. Each reads its own rows of every batch (Partitioner.rows); all of them write a
checkpoint; the first alone writes metrics and samples. If one dies, the others stop within `HEARTBEAT` seconds: the
step that they wait in could never end. They end with a code of their own (survivor.py), and the same command on as many
processes, or more or fewer, goes on.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from perl_jax.errors import Lost, UserError
from perl_jax.parallel import survivor

HEARTBEAT = 60  # seconds of silence after which a process is taken for dead
JOIN = 300  # seconds that the processes wait for each other at the start

# How JAX's errors speak of a process that is no longer there (some come by way of Gloo, from the sockets).
GONE = re.compile(
    'coordination service|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|Connection (reset|closed|refused)|Broken pipe'
)

# T5X's flags. On a TPU pod, under Slurm or on GKE --distributed alone: JAX asks the machine who is who.
FLAGS: dict[str, dict[str, Any]] = {
    '--distributed': {'action': 'store_true', 'help': 'one process of several; the machine says which'},
    '--coordinator_address': {'metavar': 'HOST:PORT', 'help': 'of process 0, where the machine does not say it'},
    '--process_count': {'type': int, 'help': 'how many there are'},
    '--process_index': {'type': int, 'help': 'which this is, from 0'},
}


def join(
    distributed: bool = False,
    coordinator_address: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
) -> None:
    """Make this process one of a job, before anything else asks JAX for its devices. Without arguments: do nothing.

    Raises:
      UserError: only some of the three that belong together are given, or nothing says who is who.
      Lost: the others did not come in time.
    """
    given = [x is not None for x in (coordinator_address, process_count, process_index)]
    if any(given) != all(given):
        raise UserError('--coordinator_address, --process_count and --process_index: give all three or none')
    if not (distributed or any(given)):
        return
    try:
        jax.distributed.initialize(
            coordinator_address, process_count, process_index,
            initialization_timeout=JOIN, heartbeat_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except RuntimeError as error:
        raise Lost(f'--distributed: {" ".join(str(error).split())[:200]}') from error
    except ValueError as error:
        said = ' '.join(str(error).split())
        raise UserError(
            f'--distributed: {said}; where the machine does not say who is who, give --coordinator_address, '
            '--process_count and --process_index'
        ) from error
    names = roll_call()
    if jax.process_index() == 0:
        listed = ', '.join(f'{i} {name}' for i, name in enumerate(names))
        logging.getLogger('perl_jax').info(f'{len(names)} processes: {listed}')


def lost(error: BaseException | None) -> bool:
    """Does an error, or what it came from, say that another process is gone? One of JAX's, or of a library over it."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and GONE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def verdict(error: Exception) -> tuple[int, str]:
    """The exit code of one process among several, and why, after an error that it did not expect."""
    if lost(error):
        why = ' '.join(str(error).split())[:200]
        return survivor.LOST, f'another process was lost ({why}); the same command goes on from the last checkpoint'
    traceback.print_exception(error)
    return 1, 'stopped by the error above; the same command goes on from the last checkpoint'


def roll_call() -> list[str]:
    """The host name of every process: messages speak of 'task 3', and someone has to find that machine."""
    mine = np.frombuffer(socket.gethostname().encode()[:64].ljust(64), np.uint8)
    names = multihost_utils.process_allgather(mine).reshape(-1, 64)
    return [name.tobytes().decode().strip() for name in names]


def whoami() -> str:
    """What messages of one process among several begin with."""
    return f'process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}'


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """A function of the step that says whether to save and stop there: this job was sent SIGTERM.

    Where there are several processes one notice is enough: all of them hear of it, and agree on the step. Each has to
    ask after every step.
    """
    noticed = threading.Event()
    if jax.process_count() > 1 and jax.distributed.is_initialized():
        yield multihost_utils.reached_preemption_sync_point  # JAX took SIGTERM over when the processes joined
        return
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noticed.set())
    try:
        yield lambda step: noticed.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
