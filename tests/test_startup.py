"""What a program tells JAX and libtpu before it begins, and launch/local.sh glibc and XLA before that."""

import os
import pathlib
import subprocess
import sys

import pytest

from perl_jax.parallel import startup

ROOT = pathlib.Path(__file__).parents[1]


def clean(env: dict[str, str]) -> dict[str, str]:
    """The environment without what these tests are about, but for `env`."""
    ours = ('GLIBC_TUNABLES', 'XLA_FLAGS', 'DEVICES', 'JAX_PLATFORMS', 'TPU_SKIP_MDS_QUERY', 'JAX_FORCE_TPU_INIT')
    return {k: v for k, v in os.environ.items() if k not in ours} | env


def run(command: list[str], **env: str) -> list[str]:
    command = [sys.executable, '-c', *command]
    return subprocess.run(command, env=clean(env), capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def local(tmp_path):
    """Runs launch/local.sh of a checkout whose perl_jax prints what it was told."""
    for place, text in {
        'launch/local.sh': (ROOT / 'launch/local.sh').read_text(),
        '.venv/bin/perl_jax': '#!/bin/sh\necho "$GLIBC_TUNABLES,$JAX_PLATFORMS,$XLA_FLAGS,$*"\n',
    }.items():
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)

    def printed(**env):
        command = [tmp_path / 'launch/local.sh', 'sft', 'A = 1']
        done = subprocess.run(command, env=clean(env), capture_output=True, text=True, check=True)
        return done.stdout.split(',')

    return printed


PAGES = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
LEVEL = '--xla_backend_optimization_level'


def test_a_cpu_gets_large_pages_and_the_quicker_compiler(local):
    pages, platforms, flags, words = local()
    assert (pages, platforms, flags.strip(), words) == ('glibc.malloc.hugetlb=1', 'cpu', f'{LEVEL}=2', 'sft A = 1\n')
    devices = '--xla_force_host_platform_device_count=8'
    assert local(DEVICES='8', XLA_FLAGS='--xla_a=1')[2].split() == ['--xla_a=1', devices, f'{LEVEL}=2']


def test_a_user_has_the_last_word(local):
    assert local(GLIBC_TUNABLES='', XLA_FLAGS=f'{LEVEL}=3', JAX_PLATFORMS='cuda')[:3] == ['', 'cuda', f'{LEVEL}=3']


WITHOUT = """
import os, pathlib, sys
from perl_jax.parallel import startup
startup.PCI = pathlib.Path(sys.argv[1])
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
    not PAGES.exists() or '[madvise]' not in PAGES.read_text(),
    reason='this kernel does not give large pages to those who ask',
)
def test_memory_is_in_large_pages(local):
    program = (
        'import numpy, re; x = numpy.ones(2**24);'
        "print(re.search(r'AnonHugePages: *([0-9]+)', open('/proc/self/smaps_rollup').read())[1])"
    )
    (printed,) = run([program], NUMPY_MADVISE_HUGEPAGE='0', GLIBC_TUNABLES=local()[0])  # NumPy would ask itself
    assert int(printed) > 64 * 1024  # kB, of 128 MiB


def test_xla_knows_the_level(local):
    """A flag that XLA does not know ends a program."""
    program = 'import jax; print(jax.jit(lambda x: x + 1)(1.0))'
    assert run([program], JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', XLA_FLAGS=local()[2]) == ['2.0']


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
    assert startup.missing_devices() is None


KEPT = """
import os, sys
from perl_jax.parallel import startup
startup.use_compilation_cache()
print(os.environ.get('JAX_COMPILATION_CACHE_DIR'), len(list(startup.pathlib.Path(sys.argv[1]).glob('running/*'))))
if sys.argv[2] == 'killed':
    (startup.pathlib.Path(sys.argv[1]) / 'cut-cache').write_text('half')
    os._exit(1)
"""


def kept(folder, how='', **env):
    command = [sys.executable, '-c', KEPT, folder / 'perl_jax', how]
    env = {k: v for k, v in os.environ.items() if not k.startswith('JAX_')} | {'XDG_CACHE_HOME': str(folder)} | env
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False).stdout.split()


def test_what_is_compiled_is_kept_in_the_users_cache(tmp_path):
    assert kept(tmp_path) == [str(tmp_path / 'perl_jax'), '1']
    assert not list((tmp_path / 'perl_jax/running').iterdir()), 'it has signed out'
    assert kept(tmp_path, JAX_ENABLE_COMPILATION_CACHE='0')[0] == 'None'
    assert kept(tmp_path, JAX_COMPILATION_CACHE_DIR='/mine')[0] == '/mine'


def test_what_a_killed_process_wrote_is_not_read(tmp_path):
    (tmp_path / 'perl_jax').mkdir()
    old, cut = tmp_path / 'perl_jax/old-cache', tmp_path / 'perl_jax/cut-cache'
    old.write_text('whole')
    os.utime(old, (1e9, 1e9))
    kept(tmp_path, 'killed')
    assert cut.exists()
    kept(tmp_path)
    assert old.exists() and not cut.exists()
    (tmp_path / 'no').write_text('')
    assert kept(tmp_path / 'no') == ['None', '0'], 'no folder can be made there'
