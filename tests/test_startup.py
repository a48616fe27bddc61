"""What a program tells Linux and XLA before it begins; it starts once more for that, at most once."""

import os
import subprocess
import sys

import pytest

from perl_jax.parallel import startup

PROGRAM = """
import os, pathlib, sys
from perl_jax.parallel import startup
startup.ENABLED = pathlib.Path(sys.argv[1])
startup.has_tpu = lambda: True
print('starts', flush=True)
startup.begin()
print(os.environ.get('GLIBC_TUNABLES'), os.environ.get('XLA_FLAGS'), sys.argv[2:])
"""
ARGS = ['--gin.A="b c"']


def run(command: list[str], **env: str) -> list[str]:
    ours = ('GLIBC_TUNABLES', 'XLA_FLAGS', 'JAX_PLATFORMS', 'TPU_SKIP_MDS_QUERY', 'JAX_FORCE_TPU_INIT')
    env = {k: v for k, v in os.environ.items() if k not in ours} | env
    command = [sys.executable, '-c', *command]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def madvise(tmp_path):
    path = tmp_path / 'enabled'
    path.write_text('always [madvise] never\n')
    return path


def test_starts_again_once_with_the_same_arguments(madvise):
    assert run([PROGRAM, madvise, *ARGS]) == ['starts', 'starts', f'glibc.malloc.hugetlb=1 None {ARGS}']


def test_level_of_a_cpu(madvise):
    flag = '--xla_backend_optimization_level=2'
    assert run([PROGRAM, madvise, *ARGS], JAX_PLATFORMS='cpu')[-1] == f'glibc.malloc.hugetlb=1 {flag} {ARGS}'
    more = run([PROGRAM, madvise, *ARGS], JAX_PLATFORMS='cpu', XLA_FLAGS='--xla_a=1')
    assert more[-1] == f'glibc.malloc.hugetlb=1 --xla_a=1 {flag} {ARGS}'


def test_a_user_has_the_last_word(madvise):
    mine = {'GLIBC_TUNABLES': '', 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_backend_optimization_level=3'}
    assert run([PROGRAM, madvise, *ARGS], **mine) == ['starts', f' --xla_backend_optimization_level=3 {ARGS}']


@pytest.mark.parametrize('setting', ['[always] madvise never', 'always madvise [never]', None])
def test_nothing_where_there_is_nothing_to_ask(tmp_path, setting):
    path = tmp_path / 'enabled'
    if setting:
        path.write_text(setting)
    assert run([PROGRAM, path, *ARGS]) == ['starts', f'None None {ARGS}']


WITHOUT = """
import os, pathlib, sys
from perl_jax.parallel import startup
startup.ENABLED, startup.PCI = pathlib.Path('/nowhere'), pathlib.Path(sys.argv[1])
startup.has_plugins = lambda: sys.argv[2] == 'plugins'
startup.begin()
print(os.environ.get('TPU_SKIP_MDS_QUERY'), os.environ.get('JAX_PLATFORMS'))
"""
DISK, NETWORK = ('0x1ae0', '0x010802'), ('0x1ae0', '0x020000')  # of a virtual machine in Google's cloud
CHIP, OTHER = ('0x1ae0', '0x120000'), ('0x8086', '0x120000')


def machine(path, *devices):
    for i, (vendor, kind) in enumerate(devices):
        (path / str(i)).mkdir()
        (path / str(i) / 'vendor').write_text(vendor + '\n')
        (path / str(i) / 'class').write_text(kind + '\n')
    return path


@pytest.mark.parametrize(('devices', 'plugins', 'env', 'said'), [
    ((), '', {}, '1 cpu'), ((DISK, NETWORK, OTHER), '', {}, '1 cpu'), ((DISK, CHIP), '', {}, 'None None'),
    ((DISK,), 'plugins', {}, '1 None'), ((), '', {'JAX_PLATFORMS': ''}, '1 '),
    ((), '', {'JAX_PLATFORMS': 'cuda', 'TPU_SKIP_MDS_QUERY': '0'}, '0 cuda'),
    ((), '', {'JAX_FORCE_TPU_INIT': '1'}, 'None None'),
], ids=['bare', 'cloud', 'tpu', 'gpu', 'any', 'user', 'forced'])  # fmt: skip
def test_a_missing_tpu_is_not_asked_for(tmp_path, devices, plugins, env, said):
    """With a chip nothing is set: JAX asks the metadata server who is who, unless TPU_SKIP_MDS_QUERY is there."""
    assert run([WITHOUT, machine(tmp_path, *devices), plugins], **env) == [said]


def test_no_word_of_libtpu_without_a_tpu():
    """libtpu, where it is installed, writes errors as soon as JAX loads it."""
    if startup.has_tpu() or startup.has_plugins():
        pytest.skip('this machine has a TPU, or a plugin')  # JAX is to load libtpu there, and may say what it likes
    program = 'from perl_jax.parallel import startup; startup.begin(); import jax; print(jax.devices()[0].platform)'
    names = ('TPU_SKIP_MDS_QUERY', 'JAX_PLATFORMS')
    env = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ('cpu\n', '')


@pytest.mark.skipif(
    not startup.ENABLED.exists() or '[madvise]' not in startup.ENABLED.read_text(),
    reason='this kernel does not give large pages to those who ask',
)
def test_memory_is_in_large_pages():
    program = (
        'from perl_jax.parallel import startup; startup.begin(); import numpy, re; x = numpy.ones(2**24);'
        "print(re.search(r'AnonHugePages: *([0-9]+)', open('/proc/self/smaps_rollup').read())[1])"
    )
    (printed,) = run([program], NUMPY_MADVISE_HUGEPAGE='0')  # of which NumPy would ask itself
    assert int(printed) > 64 * 1024  # kB, of 128 MiB


def test_xla_knows_the_level():
    """A flag that XLA does not know ends a program."""
    program = 'from perl_jax.parallel import startup; startup.begin(); import jax; print(jax.jit(lambda x: x + 1)(1.0))'
    assert run([program], JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1') == ['2.0']


@pytest.mark.parametrize('named', ['cuda', 'no_such'])
def test_devices_that_are_not_there_are_one_line(named):
    program = """
import sys
from perl_jax.cli import main
def compute(argv):
    import jax.numpy as jnp
    jnp.ones(2) + 1
main._COMMANDS['compute'] = compute
sys.exit(main.cli(['compute']))
"""
    env = os.environ | {'JAX_PLATFORMS': named}
    done = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith(f'perl_jax: JAX_PLATFORMS={named}: '), done.stderr
    assert done.stderr.count('\n') == 1


def test_devices_that_are_there_are_no_fault():
    assert startup.no_devices() is None
