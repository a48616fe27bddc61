"""A parent for each process of several, which gives the right exit code where the process itself cannot.

When another process of the job is gone, or does not come, JAX aborts this one from C++: no Python runs, and the exit
code is that of any abort. The parent reads the message on stderr and exits with a special code, LOST. A scheduler may
then restart the job without counting it as a failure of the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence

LOST = 76  # the code after 75 (preempted); no signal has it
SIGN = b'JAX distributed service detected fatal errors'  # what JAX writes before it aborts


def is_one_of_several(argv: Sequence[str]) -> bool:
    """Returns whether these arguments make a process one of several."""
    return any(argument.startswith(('--distributed', '--coordinator_address', '--process_')) for argument in argv)


def begin(argv: Sequence[str]) -> None:
    """Continue in a child process, if this is one of several; has to be called before JAX is imported.

    The parent forwards signals and stderr, and exits as the child does.
    """
    if not is_one_of_several(argv):
        return
    read_end, write_end = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child:
        os.close(write_end)
        os._exit(watch(child, read_end))
    if sys.platform == 'linux':  # killed with its parent
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)
    os.close(read_end)
    os.dup2(write_end, 2)
    os.close(write_end)


def watch(child: int, stderr: int) -> int:
    """Wait for a child and return its exit code: LOST if JAX aborted it for another process, 128 + N for signal N.

    Args:
      child: its process id.
      stderr: a pipe with its stderr.
    """
    for signal_number in signal.SIGTERM, signal.SIGHUP:
        signal.signal(signal_number, lambda signal_number, _: os.kill(child, signal_number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child as well
    abort_message = bytearray()
    forwarding = threading.Thread(target=forward_stderr, args=(stderr, abort_message), daemon=True)
    forwarding.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    forwarding.join(5)  # a child of the child may keep it open
    if code == -signal.SIGABRT and abort_message:
        message = 'was lost, or did not come; the same command goes on from the last checkpoint'
        print(f'perl_jax: stopped: {lost_process(bytes(abort_message))} {message}', file=sys.stderr, flush=True)
        return LOST
    return code if code >= 0 else 128 - code


def lost_process(message: bytes) -> str:
    """Returns the name of the process that JAX's message says is lost, if it says so.

    The first process runs the coordination service: where that is unreachable, it is the one.
    """
    if match := re.search(rb'tasks are unhealthy[^:]*:\s+((?:\d+\s+)+)', message):
        return f'process {", ".join(match[1].decode().split())}'
    return 'process 0' if b'remote target coordination_service' in message else 'another process'


def forward_stderr(stderr: int, abort_message: bytearray) -> None:
    """Forward stderr until it ends; from SIGN on, add it to `abort_message` as well, a few kilobytes at most."""
    tail = b''
    while data := os.read(stderr, 2**16):
        with contextlib.suppress(OSError):
            os.write(2, data)
        text = tail + data
        if abort_message:
            abort_message += data[: max(0, 2**13 - len(abort_message))]
        elif SIGN in text:
            abort_message += text[text.index(SIGN) :][: 2**13]
        tail = text[-len(SIGN) :]
