"""Several processes that train as one: how they connect, and how they react to preemption and to a lost process.

Every process runs the same command. Each reads its own rows of every batch (Partitioner.rows); all of them write
checkpoints; only the first writes metrics and samples. If one dies, the others stop within `HEARTBEAT + NOTICE`
seconds, since the step that they wait in cannot complete. They exit with a special code (survivor.py), and the same
command resumes on the same or another number of processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from perl_jax import settings
from perl_jax.errors import Lost, UserError
from perl_jax.parallel import survivor

HEARTBEAT = 60  # seconds without a heartbeat after which a process counts as dead
NOTICE = 10  # seconds after HEARTBEAT until every process knows it
JOIN = 300  # seconds that processes wait for each other at the start

# Words of JAX's errors about a process that is gone (some are Gloo's, about sockets).
GONE = re.compile(
    'coordination service|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|Connection (reset|closed|refused)|Broken pipe'
)

# T5X's flags. On a TPU pod, under Slurm or on GKE --distributed is enough: JAX detects the job.
FLAGS: dict[str, dict[str, Any]] = {
    '--distributed': {'action': 'store_true', 'help': 'one process of several, which the environment describes'},
    '--coordinator_address': {
        'metavar': 'HOST:PORT',
        'help': 'of process 0, if the environment does not describe the job',
    },
    '--process_count': {'type': settings.flag(settings.Count), 'help': 'the number of processes'},
    '--process_index': {'type': settings.flag(settings.Natural), 'help': 'the index of this process, from 0'},
}


def join(
    distributed: bool = False,
    coordinator_address: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
) -> None:
    """Make this process part of a job, before JAX's devices are used. Does nothing without arguments.

    Args:
      distributed: whether the cluster's environment describes the job (TPU pods, Slurm, GKE).
      coordinator_address: HOST:PORT of process 0, where it does not.
      process_count: the number of processes.
      process_index: the index of this one.

    Raises:
      UserError: only some of the last three are given, or nothing describes the job.
      Lost: the other processes did not come in time.
    """
    is_given = [x is not None for x in (coordinator_address, process_count, process_index)]
    if any(is_given) != all(is_given):
        raise UserError('--coordinator_address, --process_count and --process_index: give all three or none')
    if not (distributed or any(is_given)):
        return
    if coordinator_address is not None and not re.fullmatch(r'\S+:\d+', coordinator_address):
        raise UserError(f"--coordinator_address: '{coordinator_address}' is not HOST:PORT")
    if process_count is not None and process_index is not None and process_index >= process_count:
        raise UserError(f'--process_index: {process_index} of {process_count} processes; they are counted from 0')
    try:
        jax.distributed.initialize(
            coordinator_address, process_count, process_index,
            initialization_timeout=JOIN, heartbeat_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except RuntimeError as error:
        raise Lost(f'--distributed: {" ".join(str(error).split())[:200]}') from error
    except ValueError as error:
        reason = ' '.join(str(error).split())
        raise UserError(
            f'--distributed: {reason}; if the environment does not describe the job, give --coordinator_address, '
            '--process_count and --process_index'
        ) from error
    names = host_names()
    if jax.process_index() == 0:
        process_list = ', '.join(f'{i} {name}' for i, name in enumerate(names))
        logging.getLogger('perl_jax').info(f'{len(names)} processes: {process_list}')


def is_lost_process(error: BaseException | None) -> bool:
    """Returns whether an error, or one of its causes, reports that another process of the job is gone."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and GONE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def exit_status(error: Exception) -> tuple[int, str]:
    """Returns the exit code of one process of several after an unexpected error, and the reason.

    Where another process was lost, this one waits until it is counted as dead: JAX then aborts this one with a message
    that names it (survivor.py), which an error of a broken connection does not.
    """
    if is_lost_process(error):
        time.sleep(HEARTBEAT + NOTICE)
        reason = ' '.join(str(error).split())[:200]
        return survivor.LOST, f'another process was lost ({reason}); the same command goes on from the last checkpoint'
    traceback.print_exception(error)
    return 1, 'stopped by the error above; the same command goes on from the last checkpoint'


def host_names() -> list[str]:
    """Returns the host name of every process, since JAX's messages only name the index ('task 3')."""
    encoded_name = np.frombuffer(socket.gethostname().encode()[:64].ljust(64), np.uint8)
    names = multihost_utils.process_allgather(encoded_name).reshape(-1, 64)
    return [name.tobytes().decode().strip() for name in names]


def process_name() -> str:
    """Returns the prefix of messages of one process of several."""
    return f'process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}'


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], int]]:
    """Yields a function of the step that returns the signal after which to save and stop there; 0 is none.

    The signals are SIGTERM and SIGINT (Ctrl-C), of which a second one ends the process at once. With several processes,
    a SIGTERM to one of them is enough: all agree on the step. Each has to call the function after every step.
    """
    if jax.process_count() > 1 and jax.distributed.is_initialized():
        # JAX handles SIGTERM since jax.distributed.initialize.
        yield lambda step: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals only to the main thread
        yield lambda step: 0
        return
    received: list[int] = []

    def receive(number: int, _: Any) -> None:
        if signal.SIGINT in received and number == signal.SIGINT:
            os._exit(128 + number)  # an exception would leave checkpoint threads that the process waits for
        if number == signal.SIGINT:
            print('\nstopping after this step, with a checkpoint; Ctrl-C again stops at once', file=sys.stderr)
        received.append(number)

    old_handlers = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: received[0] if received else 0
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
