"""What setup.py makes works from any folder: a wheel, and a wheel by way of an sdist, in a clean venv. Offline."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BUILD_SDIST = 'import setuptools.build_meta as backend; backend.build_sdist("dist")'


def run(*command, cwd):
    """Runs the command without this process's PYTHONPATH and returns its standard output and error."""
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    result = subprocess.run([str(x) for x in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f'{command}\n{result.stdout}\n{result.stderr}'
    return result.stdout + result.stderr


def build(source, out):
    """Builds a wheel of a folder or an sdist with this environment's setuptools and returns its path."""
    flags = ('--no-deps', '--no-index', '--no-build-isolation', '--disable-pip-version-check')
    run(sys.executable, '-m', 'pip', 'wheel', *flags, '--wheel-dir', out, source, cwd=out.parent)
    return next(out.glob('*.whl'))


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    """A copy of the checkout: building writes build/ and *.egg-info beside setup.py."""
    copy = tmp_path_factory.mktemp('tree') / 'perl_jax'
    ignored = shutil.ignore_patterns('.*', 'runs', 'build', 'dist', '*.egg-info', '__pycache__')
    return shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)


@pytest.fixture(scope='module')
def wheel(tree):
    return build(tree, tree / 'dist')


@pytest.fixture(scope='module')
def venv(wheel, tmp_path_factory):
    """A venv with the wheel in it; the dependencies are this environment's, behind it on the path."""
    venv = tmp_path_factory.mktemp('venv')
    run(sys.executable, '-m', 'venv', '--without-pip', venv, cwd=venv)
    python = venv / 'bin/python'
    flags = ('--no-deps', '--no-index', '--quiet', '--disable-pip-version-check')
    run(sys.executable, '-m', 'pip', '--python', python, 'install', *flags, wheel, cwd=venv)
    # A folder that a .pth names is not searched for further .pth files, so an editable perl_jax there stays unseen.
    site = pathlib.Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=venv).strip())
    here = dict.fromkeys([sysconfig.get_path('purelib'), sysconfig.get_path('platlib')])
    (site / 'dependencies.pth').write_text('\n'.join(here) + '\n')
    return venv


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if '.dist-info/' not in name}


def test_wheel_holds_the_library_tasks_and_gin_and_nothing_else(tree, wheel):
    expected = {str(path.relative_to(tree)) for path in tree.glob('perl_jax/**/*.py')}
    expected |= {f'perl_jax/{path.relative_to(tree)}' for path in tree.glob('tasks/*.py')}
    expected |= {f'perl_jax/{path.relative_to(tree)}' for path in tree.glob('gin/**/*.gin')}
    assert names(wheel) == expected


def test_sdist_makes_the_same_wheel(tree, wheel, tmp_path):
    run(sys.executable, '-c', BUILD_SDIST, cwd=tree)
    again = build(next((tree / 'dist').glob('*.tar.gz')), tmp_path / 'dist')
    assert names(again) == names(wheel)


def test_wheel_runs_from_another_folder(venv, tmp_path):
    where = run(venv / 'bin/python', '-c', 'import perl_jax; print(perl_jax.__file__)', cwd=tmp_path)
    assert venv in pathlib.Path(where.strip()).parents
    assert 'policy' in run(venv / 'bin/perl_jax', '--help', cwd=tmp_path)
    assert 'toy_pairs' in run(venv / 'bin/python', '-m', 'perl_jax', 'inspect', '--task=toy_pairs', cwd=tmp_path)
    assert not list(tmp_path.iterdir()), 'a look at the data must write nothing'
