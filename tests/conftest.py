"""The environment of every test, set before anything imports JAX; subprocesses of tests inherit it."""

import os
import pathlib

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'  # [B] + [B, K] is a bug here, never a broadcast
os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # libtpu would ask for its metadata server
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

MULTIDEVICE = pathlib.Path(__file__).parent / 'multidevice'
FLAG = '--xla_force_host_platform_device_count=8'


def pytest_collection_modifyitems(items):
    """Skips the tests of meshes in a process that was not given 8 devices."""
    if FLAG in os.environ.get('XLA_FLAGS', ''):
        return
    for item in items:
        if MULTIDEVICE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f'needs XLA_FLAGS={FLAG} (make test sets it)'))
