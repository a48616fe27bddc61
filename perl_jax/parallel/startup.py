"""What JAX, libtpu and the libraries' loggers have to be told before a program begins.

Without a TPU libtpu is not asked for one: it would write errors, and wait for a metadata server that is not there.
What makes a CPU faster is exported by launch/local.sh.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import sys

PCI = pathlib.Path('/sys/bus/pci/devices')
OFF = ('0', 'false', 'False', 'off')  # as JAX reads them
GOOGLE, OTHERS = '0x1ae0', ('0x01', '0x02')  # a vendor; classes of its devices that are no TPUs: storage, network


def begin() -> None:
    """To be called first by a program, before it imports JAX. What a user has set stays."""
    if not has_tpu():
        os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
        if not has_plugins():
            os.environ.setdefault('JAX_PLATFORMS', 'cpu')


def keep_compiled() -> None:
    """Have JAX keep what a command compiles in the user's cache directory, up to 4 GiB, the oldest going first.

    JAX_ENABLE_COMPILATION_CACHE=0 turns it off; a JAX_COMPILATION_CACHE_DIR of the user's own is JAX's alone. JAX
    writes an entry in place and never again, so one that is cut short with its process would be tried and refused for
    ever. A process therefore signs in: what was written since one began that has gone without signing out is removed.
    """
    folder = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'perl_jax'
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ or os.environ.get('JAX_ENABLE_COMPILATION_CACHE', '1') in OFF:
        return
    try:
        running = folder / 'running'
        running.mkdir(parents=True, exist_ok=True)
        for process in running.iterdir():
            if not pathlib.Path('/proc', process.name).exists():
                since = process.stat().st_mtime
                for entry in folder.glob('*-cache'):
                    if entry.stat().st_mtime >= since:
                        entry.unlink(missing_ok=True)
                process.unlink(missing_ok=True)
        own = running / str(os.getpid())
        own.touch()
    except OSError:  # no room, a folder that is not ours: then without
        return
    atexit.register(own.unlink, missing_ok=True)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
    os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(4 * 2**30))  # JAX then locks it, too


def has_tpu() -> bool:
    """Is a device of Google's on this machine that may be a TPU, or does the user say that there is one?

    JAX itself looks for the numbers of the chips that it knows; this one shall not mistake a later chip for none.
    """
    if 'JAX_FORCE_TPU_INIT' in os.environ:
        return True
    for device in PCI.glob('*'):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ('vendor', 'class'))
        except OSError:
            continue
        if vendor == GOOGLE and not kind.startswith(OTHERS):
            return True
    return False


def has_plugins() -> bool:
    """Can JAX run on something else, for which a plugin is installed, such as a GPU?"""
    named = 'PJRT_NAMES_AND_LIBRARY_PATHS' in os.environ or importlib.util.find_spec('jax_plugins') is not None
    return named or bool(importlib.metadata.entry_points(group='jax_plugins'))


def no_devices() -> str | None:
    """What to say after an error that says little, if JAX has no devices of the kind that JAX_PLATFORMS names."""
    named, jax = os.environ.get('JAX_PLATFORMS'), sys.modules.get('jax')
    if not named or jax is None or jax.distributed.is_initialized():
        return None
    try:
        jax.devices()
    except Exception as error:  # JAX's own differ: RuntimeError, AssertionError
        why = str(error).partition('\n')[0] or 'JAX has no devices of that kind here'
        return f'JAX_PLATFORMS={named}: {why}'
    return None


def quiet() -> None:
    """Our own warnings on stderr, the libraries' chatter not."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    logging.basicConfig(level=logging.CRITICAL)
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    ours, handler = logging.getLogger('perl_jax'), logging.StreamHandler()
    handler.setFormatter(logging.Formatter('perl_jax: %(message)s'))
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
    sys.path.insert(0, os.getcwd())  # a user's own task modules, as under python -m
