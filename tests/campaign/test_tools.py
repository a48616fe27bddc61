"""Commands that write a result, killed: the same command again gives what it gives undisturbed, and nothing is lost.

Each is killed before one of its changes of files, or calls of a function, at CAMPAIGN_RUNS / 3 of them.
"""
# ruff: noqa: F811 (a fixture is shared by importing it)

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import forks
import numpy as np
import pytest
import test_sweep
from test_crash import RUNS, SEED
from test_endpoint import said, serve  # noqa: F401
from toy_runs import ENVIRONMENT, contents, state, steps, toys  # noqa: F401

from perl_jax.tools.sweep import queue, results

pytestmark = [pytest.mark.campaign, pytest.mark.slow]
PLACES = max(1, RUNS // 3)
CONCURRENCY = 8  # requests of a judge, which a kill loses
FINISHED = ('started', 'finished', 'seconds', 'command', 'commit')  # fields of run.json that differ
COMMANDS = {
    'export': lambda toys, out: ['export', f'--model_dir={toys.sft}', '--format=hf', f'--output={out}'],
    'average': lambda toys, out: ['average', f'--model_dirs={toys.reward},{toys.reward}', f'--model_dir={out}'],
    'report': lambda toys, out: ['report', toys.sft, toys.reward, f'--output={out}.html'],
}


def result(path):
    """What a command left, as it has to be the same each time."""
    if path.with_suffix('.html').exists():
        return path.with_suffix('.html').read_bytes()
    files = {str(file.relative_to(path)): text for file, text in contents(path).items()}
    if not (path / 'run.json').exists():
        return files
    about = {key: value for key, value in json.loads(files['run.json']).items() if key not in FINISHED}
    arrays = {name: (x.dtype, x.shape, x.tobytes()) for name, x in state(path).items()}
    return about, steps(path), arrays, files['config.gin']


@pytest.mark.parametrize('name', COMMANDS)
def test_a_result_is_whole_or_absent_wherever_the_command_is_killed(toys, name, tmp_path):
    """Beside it lie the user's own files, of names like those of drafts."""
    places, first = range(2 + SEED, 2 + SEED + PLACES), tmp_path / 'first' / 'out'
    first.parent.mkdir()
    code, err = forks.run(COMMANDS[name](toys, first))
    assert code == 0, err
    for place in places:
        out = tmp_path / str(place) / 'out'
        out.parent.mkdir()
        for other in 'out.tmp', 'out.draft', 'out.html.tmp':
            (out.parent / other).mkdir()
            (out.parent / other / 'mine').write_text('mine')
        before = contents(out.parent)
        argv, number = COMMANDS[name](toys, out), random.Random(place).choice(['SIGKILL', 'SIGTERM', 'SIGINT'])
        code, err = forks.run(argv, {'before': ['write', str(out.parent), place], 'by': number})
        if code == 0:
            break
        expected = {'SIGKILL': -9, 'SIGTERM': 75, 'SIGINT': 130}[number]
        assert code == expected, f'{number} before change {place}: {code} {err}'
        assert not (out.exists() or out.with_suffix('.html').exists()) or result(out) == result(first), place
        code, err = forks.run(argv)
        assert code == 0, f'{number} before change {place}: {err}'
        assert result(out) == result(first), place
        left = {path.name for path in out.parent.iterdir()}
        assert left == {'out.tmp', 'out.draft', 'out.html.tmp', 'out.html' if name == 'report' else 'out'}, place
        assert before.items() <= contents(out.parent).items()
        print(f'{name}: {number} before change {place}: the same again')


def judgement(folder):
    """The files of `judge`, and the replies that it keeps."""
    files = {path.name: path.read_bytes() for path in folder.glob('judge_*.json*')}
    (cache,) = folder.glob('*.sqlite')
    with sqlite3.connect(cache) as database:
        (table,) = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        replies = sorted(database.execute(f'select * from {table}'))
    database.close()
    return files, replies


def test_a_judge_that_is_killed_asks_for_the_rest(toys, serve, tmp_path):
    server = serve(lambda prompt, attempt: said('12'[len(prompt) % 2]))

    def argv(folder):
        shutil.copytree(toys.policy, folder, dirs_exist_ok=True)
        flags = f'--judge={server.url}', '--judge_model=tiny', '--rubric=helpful', '--against=reference'
        return ['judge', f'--model_dir={folder}', '--split=test', '--num=8', *flags]

    code, err = forks.run(argv(tmp_path / 'first'))
    assert code == 0, err
    first, count = judgement(tmp_path / 'first'), len(server.requests)
    rng = random.Random(SEED)
    calls = [('call', rng.randint(2, count)) for _ in range((PLACES + 1) // 2)]
    for place in calls + [('write', n) for n in range(1, 1 + PLACES // 2)]:
        folder = tmp_path / f'{place[0]}{place[1]}'
        kind, number = place
        where = 'perl_jax.evals.judging.endpoint:Endpoint._post' if kind == 'call' else str(folder)
        before = len(server.requests)
        code, err = forks.run(argv(folder), {'before': [kind, where, number], 'by': 'SIGKILL'})
        assert code in (-9, 0), err
        code, err = forks.run(argv(folder))
        assert code == 0, f'{place}: {err}'
        assert judgement(folder) == first, place
        assert len(server.requests) - before <= count + CONCURRENCY, 'what was answered is not asked again'
        print(f'judge: SIGKILL before {kind} {number}: the same again')


@pytest.mark.parametrize('seed', range(SEED, SEED + max(1, RUNS // 6)))
def test_a_sweep_that_is_killed_ends_with_the_same_tables(seed, tmp_path):
    """With its cells, at random moments, until it ends."""
    rng, stages = random.Random(seed), [test_sweep.SFT, test_sweep.REWARD]
    program = (
        f'import sys; sys.path[:0] = {[str(forks.ROOT), str(forks.ROOT / "tests")]}\n'
        'import test_sweep as t; from perl_jax.tools.sweep import queue, results\n'
        f'cells = t.stubs({str(tmp_path / "killed")!r}, 0.1)\n'
        f'write = lambda: results.write({str(tmp_path / "killed")!r}, [t.SFT, t.REWARD], cells)\n'
        'queue.check(cells); queue.run(cells, 2, write); write()\n'
    )
    environment = os.environ | ENVIRONMENT
    cells, moments = test_sweep.stubs(tmp_path / 'killed'), sorted(rng.sample(range(1, 7), min(2, RUNS)))
    for moment in moments:
        process = subprocess.Popen([sys.executable, '-c', program], start_new_session=True, env=environment)
        while process.poll() is None and len(test_sweep.started(cells)) < moment:
            time.sleep(0.01)
        time.sleep(rng.random() / 5)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, '-c', program], check=True, env=environment)
    assert all(queue.is_done(cell) for cell in cells)
    whole = test_sweep.stubs(tmp_path / 'whole')
    queue.run(whole, 2, lambda: None)
    results.write(str(tmp_path / 'whole'), stages, whole)
    tables = [(tmp_path / name / 'results.md').read_text() for name in ('killed', 'whole')]
    assert tables[0] == tables[1] and np.all([n <= 3 for n in test_sweep.started(cells).values()])
