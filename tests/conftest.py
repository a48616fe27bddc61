"""The environment of every test, set before anything imports JAX; subprocesses of tests inherit it."""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

import checked
import jaxtyping
import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'  # [B] + [B, K] is a bug here, never a broadcast
os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # libtpu would ask for its metadata server
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ['OMP_NUM_THREADS'] = '1'  # PyTorch's threads wait busily for each other, on cores that others test on

# XLA's older way to compile for a CPU takes half the time, and most of the tests' time is compilation. Commands that
# tests start inherit it: programs of both are then the same, bit for bit. Later versions have no such flag.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_use_fusion_emitters=false'

# What commands in processes of their own keep of what they compile lies here and not in the user's cache.
if 'PERL_JAX_TESTS' not in os.environ:  # the workers of xdist, and these processes, share one
    os.environ['PERL_JAX_TESTS'] = os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp(prefix='perl_jax_tests_')
    atexit.register(shutil.rmtree, os.environ['PERL_JAX_TESTS'], ignore_errors=True)

# Annotations are checked wherever a test calls or traces a function of these modules.
jaxtyping.install_import_hook([f'perl_jax.{name}' for name in checked.MODULES], 'checked.functions')

MULTIDEVICE = pathlib.Path(__file__).parent / 'multidevice'
FLAG = '--xla_force_host_platform_device_count=8'


MAPS = pathlib.Path('/proc/self/maps')  # Linux allows a process 65,530 of them, and each compiled program takes several
MANY_MAPS = 20_000


def pytest_runtest_teardown(item, nextitem):
    """After a file, programs are given back if they are many: past the limit XLA aborts the process as it compiles."""
    is_last = nextitem is None or nextitem.path != item.path
    if is_last and MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MANY_MAPS:
        import jax
        import traced

        traced.forget()
        jax.clear_caches()
        gc.collect()


def pytest_collection_finish():
    """Python's collector need not look at a million objects of libraries again and again: 0.6 s each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Slow files first, so that no worker is left alone with one; no tests of meshes in a process without 8 devices."""
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)
    if FLAG in os.environ.get('XLA_FLAGS', ''):
        return
    for item in items:
        if MULTIDEVICE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f'needs XLA_FLAGS={FLAG} (make test sets it)'))
