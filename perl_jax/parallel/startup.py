"""Settings of JAX, libtpu and loggers that have to be made before a program begins.

Without a TPU libtpu must not look for one: it would print errors, and wait for a metadata server that does not exist.
Settings that make a CPU faster are exported by launch/local.sh.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import signal
import sys
from typing import Any

from perl_jax.errors import Preempted

PCI = pathlib.Path('/sys/bus/pci/devices')
FALSE_VALUES = ('0', 'false', 'False', 'off')  # as JAX parses them
GOOGLE, OTHER_CLASSES = '0x1ae0', ('0x01', '0x02')  # vendor id; classes of its other devices: storage, network


def begin() -> None:
    """Set the environment for JAX, and handle SIGTERM; has to be called before JAX is imported.

    A user's own settings stay. A run that is terminated before its first step has nothing to save, and can start again.
    """

    def preempt(*_: Any) -> None:
        raise Preempted('no step was begun')

    signal.signal(signal.SIGTERM, preempt)  # the loop of a run replaces it (parallel/distributed.py)
    if not has_tpu():
        os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
        if not has_plugins():
            os.environ.setdefault('JAX_PLATFORMS', 'cpu')


def use_compilation_cache() -> None:
    """Let JAX cache compiled programs in the user's cache directory: up to 4 GiB, the oldest are removed first.

    JAX_ENABLE_COMPILATION_CACHE=0 turns it off; with the user's own JAX_COMPILATION_CACHE_DIR nothing is changed.

    JAX writes an entry once and in place, so an entry that a killed process left incomplete would fail at every start.
    So each process registers itself with a file; if a process is gone and its file is not, entries since its start are
    removed.
    """
    folder = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'perl_jax'
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ or os.environ.get('JAX_ENABLE_COMPILATION_CACHE', '1') in FALSE_VALUES:
        return
    try:
        running = folder / 'running'
        running.mkdir(parents=True, exist_ok=True)
        for process in running.iterdir():
            if not pathlib.Path('/proc', process.name).exists():
                start_time = process.stat().st_mtime
                for entry in folder.glob('*-cache'):
                    if entry.stat().st_mtime >= start_time:
                        entry.unlink(missing_ok=True)
                process.unlink(missing_ok=True)
        pid_file = running / str(os.getpid())
        pid_file.touch()
    except OSError:  # no space, or no permission: continue without a cache
        return
    atexit.register(pid_file.unlink, missing_ok=True)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
    os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(4 * 2**30))  # with a limit JAX also locks the folder


def has_tpu() -> bool:
    """Returns whether this machine has a device of Google's that may be a TPU, or the user claims one.

    JAX itself compares the ids of known chips; this test also accepts later chips.
    """
    if 'JAX_FORCE_TPU_INIT' in os.environ:
        return True
    for device in PCI.glob('*'):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ('vendor', 'class'))
        except OSError:
            continue
        if vendor == GOOGLE and not kind.startswith(OTHER_CLASSES):
            return True
    return False


def has_plugins() -> bool:
    """Returns whether a plugin for another platform, such as a GPU, is installed."""
    has_named = 'PJRT_NAMES_AND_LIBRARY_PATHS' in os.environ or importlib.util.find_spec('jax_plugins') is not None
    return has_named or bool(importlib.metadata.entry_points(group='jax_plugins'))


def missing_devices() -> str | None:
    """Returns a message if JAX has no devices of the platform in JAX_PLATFORMS, else None."""
    platforms, jax = os.environ.get('JAX_PLATFORMS'), sys.modules.get('jax')
    if not platforms or jax is None or jax.distributed.is_initialized():
        return None
    try:
        jax.devices()
    except Exception as error:  # JAX raises RuntimeError or AssertionError
        reason = str(error).partition('\n')[0] or 'JAX has no devices of that kind here'
        return f'JAX_PLATFORMS={platforms}: {reason}'
    return None


def configure_logging() -> None:
    """Print our own warnings on stderr, and silence other libraries."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    logging.basicConfig(level=logging.CRITICAL)
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    logger, handler = logging.getLogger('perl_jax'), logging.StreamHandler()
    handler.setFormatter(logging.Formatter('perl_jax: %(message)s'))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    sys.path.insert(0, os.getcwd())  # a user's own task modules, as under python -m
