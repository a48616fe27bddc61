"""A parent for one process among several: it says of the end what the process itself cannot say.

When another process of the job is gone, or does not come, JAX aborts this one from C++: no Python runs, and its exit
code is that of any abort. The parent has read the message, and gives such an end a code of its own, LOST: a scheduler
may start the job again without counting it, as it may not where a program is at fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence

LOST = 76  # beside 75, preempted; the next of sysexits.h, and no signal's
SIGN = b'JAX distributed service detected fatal errors'  # what JAX writes before it aborts


def is_one_of_several(argv: Sequence[str]) -> bool:
    """Do these arguments make a process one of several?"""
    return any(word.startswith(('--distributed', '--coordinator_address', '--process_')) for word in argv)


def begin(argv: Sequence[str]) -> None:
    """Go on in a child, if this is one of several; before JAX is imported.

    The parent passes signals and stderr on, and ends as the child does.
    """
    if not is_one_of_several(argv):
        return
    reads, writes = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child:
        os.close(writes)
        os._exit(watch(child, reads))
    if sys.platform == 'linux':  # killed with its parent
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)
    os.close(reads)
    os.dup2(writes, 2)
    os.close(writes)


def watch(child: int, stderr: int) -> int:
    """The exit code of a child, once it has ended: LOST where JAX aborted it for another process, 128 + N for signal N.

    Args:
      child: its process id.
      stderr: where what it writes there arrives.
    """
    for number in signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child as well
    seen = threading.Event()
    copying = threading.Thread(target=copy, args=(stderr, seen), daemon=True)
    copying.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    copying.join(5)  # a process of the child's may hold it open
    if code == -signal.SIGABRT and seen.is_set():
        said = 'another process was lost, or did not come; the same command goes on from the last checkpoint'
        print(f'perl_jax: stopped: {said}', file=sys.stderr, flush=True)
        return LOST
    return code if code >= 0 else 128 - code


def copy(stderr: int, seen: threading.Event) -> None:
    """Pass on what is written, to its end; `seen` is set when SIGN was in it."""
    last = b''
    while data := os.read(stderr, 2**16):
        with contextlib.suppress(OSError):
            os.write(2, data)
        if SIGN in last + data:
            seen.set()
        last = (last + data)[-len(SIGN) :]
