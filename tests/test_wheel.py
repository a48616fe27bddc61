"""What setup.py makes works from any folder: a wheel, and a wheel by way of an sdist, in a clean venv. Offline."""

import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement

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
    hidden = shutil.ignore_patterns('.*', '*.egg-info', '__pycache__')

    def ignored(folder, names):
        at_root = {'runs', 'build', 'dist'} if folder == str(ROOT) else set()  # perl_jax/runs is the library's
        return hidden(folder, names) | at_root

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


@pytest.fixture(scope='module')
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        return email.message_from_bytes(archive.read(file))


def test_wheel_holds_the_library_tasks_and_gin_and_nothing_else(tree, wheel):
    expected = {str(path.relative_to(tree)) for path in tree.glob('perl_jax/**/*.py')}
    expected |= {f'perl_jax/{path.relative_to(tree)}' for path in tree.glob('tasks/**/*.py')}
    expected |= {f'perl_jax/{path.relative_to(tree)}' for path in tree.glob('gin/**/*.gin')}
    expected |= {'perl_jax/py.typed'}
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


def test_the_wheels_inspect_reads_rows_in_any_folder(venv, tmp_path):
    rows = ''.join(f'What is {i} + {i}?,{2 * i}\n' for i in range(8))
    (tmp_path / 'rows.csv').write_text(f'question,answer\n{rows}')
    said = run(venv / 'bin/perl_jax', 'inspect', '--data=rows.csv', '--split=train', cwd=tmp_path)
    assert 'recognised: demonstrations (prompt = question, answer) in 8 rows; they serve sft, policy' in said
    assert '--short' in run(venv / 'bin/perl_jax', 'demo', '--help', cwd=tmp_path)


def test_an_index_takes_the_metadata(metadata):
    """PyPI refuses a distribution whose requirements have a URL, at the upload and not before."""
    needed = [Requirement(line) for line in metadata.get_all('Requires-Dist')]
    assert needed and not [str(each) for each in needed if each.url]
    assert 't5x' in (ROOT / 'requirements-t5x.txt').read_text() and 't5x' not in {each.name for each in needed}
    assert {'cuda', 'tpu', 'hf', 'datasets', 'docs', 'plan', 'test'} == set(metadata.get_all('Provides-Extra'))


def test_the_workflow_runs_the_pythons_that_the_metadata_names(metadata):
    jobs = yaml.safe_load((ROOT / '.github/workflows/tests.yml').read_text())['jobs']
    tested = {job['python'] for job in jobs['tests']['strategy']['matrix']['include']}
    named = re.findall(r'Python :: (3\.\d+)', ' '.join(metadata.get_all('Classifier')))
    assert {named[0], named[-1]} == tested
    assert metadata['Requires-Python'] == f'>={named[0]}'


def test_constraints_allow_what_is_required(metadata):
    """A bound that was raised since `make constraints.txt`, or a new requirement, would leave a release untested."""
    lines = [line.partition('#')[0] for line in (ROOT / 'constraints.txt').read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line.strip()]
    pins = {pin.name: pin.specifier for pin in pins if pin.marker is None or pin.marker.evaluate()}
    for needed in map(Requirement, metadata.get_all('Requires-Dist')):
        if needed.marker is None or needed.marker.evaluate({'extra': 'test'}):
            pin = pins[needed.name.lower().replace('_', '-')]
            assert needed.specifier.contains(str(pin).removeprefix('==')), f'{needed}: {pin}'


def test_a_citation_is_of_this_version(metadata):
    assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == metadata['Version']
