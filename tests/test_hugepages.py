"""A process that starts again, once, with memory in huge pages."""

import os
import pathlib
import subprocess
import sys

import pytest

from perl_jax import hugepages

PROGRAM = """
import os, pathlib, sys
from perl_jax import hugepages
hugepages.ENABLED = pathlib.Path(sys.argv[1])
print('starts', flush=True)
hugepages.restart()
print(os.environ.get('GLIBC_TUNABLES'), sys.argv[2:])
"""


def run(enabled: pathlib.Path, **env: str) -> list[str]:
    env = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'} | env
    command = [sys.executable, '-c', PROGRAM, enabled, '--gin.A="b c"']
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def madvise(tmp_path):
    path = tmp_path / 'enabled'
    path.write_text('always [madvise] never\n')
    return path


def test_starts_again_once_with_the_same_arguments(madvise):
    assert run(madvise) == ['starts', 'starts', 'glibc.malloc.hugetlb=1 [\'--gin.A="b c"\']']


def test_a_user_has_the_last_word(madvise):
    assert run(madvise, GLIBC_TUNABLES='') == ['starts', ' [\'--gin.A="b c"\']']


@pytest.mark.parametrize('setting', ['[always] madvise never', 'always madvise [never]', None])
def test_nothing_where_the_kernel_does_not_ask(tmp_path, setting):
    path = tmp_path / 'enabled'
    if setting:
        path.write_text(setting)
    assert run(path) == ['starts', 'None [\'--gin.A="b c"\']']


@pytest.mark.skipif(
    not hugepages.ENABLED.exists() or '[madvise]' not in hugepages.ENABLED.read_text(),
    reason='this kernel does not give huge pages to those who ask',
)
def test_memory_is_in_huge_pages():
    program = (
        'from perl_jax import hugepages; hugepages.restart(); import numpy, re; x = numpy.ones(2**24);'
        "print(re.search(r'AnonHugePages: *([0-9]+)', open('/proc/self/smaps_rollup').read())[1])"
    )
    env = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'} | {'NUMPY_MADVISE_HUGEPAGE': '0'}
    command = [sys.executable, '-c', program]
    printed = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert int(printed) > 64 * 1024  # kB, of 128 MiB
