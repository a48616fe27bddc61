"""Wrong files from outside end in one line that says which: a thousand by `make campaign`, a hundred among the tests.

A case is a reader and a seed. To see one again:

    CAMPAIGN_SEED=17 CAMPAIGN_CASES=1 pytest tests/campaign/test_bad_inputs.py -k weights
"""

import contextlib
import io
import os
import pathlib
import random
import shutil
import signal

import pytest
import readers
from mutations import mutate

from perl_jax.cli import exits

CASES = int(os.environ.get('CAMPAIGN_CASES', '120'))
SEED = int(os.environ.get('CAMPAIGN_SEED', '0'))
SECONDS = 10  # of CPU time, for one case
NAMES = [reader.name for reader in readers.readers(None)]

pytestmark = [pytest.mark.campaign, pytest.mark.filterwarnings('ignore')]


class TooLong(BaseException):
    """A case used up its time; no reader catches this."""


def count(reader, total):
    """How many of the cases are a reader's."""
    return max(1, round(CASES * reader.weight / total))


def case(reader, seed):
    """Returns the files of a case, the name of the file that is wrong, and what is wrong with it."""
    rng, files = random.Random(f'{reader.name} {seed}'), dict(reader.files())
    name = rng.choice(reader.mutable or sorted(files))
    files[name], how = mutate(files[name], pathlib.Path(name).suffix, rng)
    return files, name, how


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@contextlib.contextmanager
def limited():
    """Raises TooLong where a case takes more than its time."""

    def stop(*_):
        raise TooLong(f'not done after {SECONDS} s of CPU time')

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def outcome(read, folder, files):
    """Returns what is wrong with how a case ended; None if it was read, or refused as a command refuses it."""
    err = io.StringIO()
    try:
        with limited(), contextlib.redirect_stderr(err):
            code = exits.run(lambda _: read(folder), 'read', [], is_main_program=False)
    except (Exception, TooLong) as error:
        return f'{type(error).__name__}: {str(error)[:150]!r}'
    *warnings, line = err.getvalue().splitlines() or ['']
    if code not in (0, 2) or len(line) > exits.LONGEST + 20 or not line.isprintable():
        return f'exit code {code}, {line[:200]!r}'
    if code == 2 and not (line.startswith('perl_jax: ') and all(x.startswith('warning: ') for x in warnings)):
        return f'not one line: {err.getvalue()[:300]!r}'
    return None if contents(folder) == files else 'a file was changed'


@pytest.mark.parametrize('name', NAMES)
def test_a_wrong_file_ends_in_one_line(name, tmp_path, monkeypatch):
    every_reader = readers.readers(monkeypatch)
    reader = next(reader for reader in every_reader if reader.name == name)
    failures = []
    for seed in range(SEED, SEED + count(reader, sum(reader.weight for reader in every_reader))):
        files, wrong_file, how = case(reader, seed)
        folder = tmp_path / f'case{seed}' / 'files'
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        if problem := outcome(reader.read, folder, files):
            failures.append(f'{name} seed {seed}: {wrong_file}: {how}: {problem}')
        shutil.rmtree(folder.parent)
    assert not failures, '\n'.join(['', *failures])


@pytest.mark.parametrize('name', NAMES)
def test_the_right_files_are_read(name, tmp_path, monkeypatch):
    reader = next(reader for reader in readers.readers(monkeypatch) if reader.name == name)
    for file, content in reader.files().items():
        (tmp_path / 'files' / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'files' / file).write_bytes(content)
    reader.read(tmp_path / 'files')
