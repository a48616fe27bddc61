"""Silence for libraries that write to stderr whatever their log level."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Discard what is written to stderr inside, by C++ code too."""
    original_stderr = os.dup(2)
    with open(os.devnull, 'w') as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(original_stderr, 2)
        os.close(original_stderr)


def ignore_closed_loops() -> None:
    """Discard the tracebacks of threads that finish after their event loop was closed.

    After a read or write that failed, TensorStore's others have nobody to tell, and say so whenever they are done.
    """
    if not getattr(sys.unraisablehook, 'ignores_closed_loops', False):
        sys.unraisablehook = _without_closed_loops(sys.unraisablehook)


def _without_closed_loops(hook: Any) -> Any:
    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != 'Event loop is closed':
            hook(unraisable)

    report.ignores_closed_loops = True  # type: ignore[attr-defined]
    return report
