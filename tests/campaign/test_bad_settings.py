"""Wrong settings and flags end in one line, before anything is computed. To see a case again:

CAMPAIGN_SEED=17 CAMPAIGN_CASES=1 pytest tests/campaign/test_bad_settings.py
"""

import random
import re

import pytest
import readers
from test_bad_inputs import CASES, SEED, limited
from test_recipes import GOLDEN
from toy_runs import perl, toy

from perl_jax.cli import configure, exits
from perl_jax.parallel.partitioning import Partitioner

pytestmark = [pytest.mark.campaign, pytest.mark.filterwarnings('ignore')]

SETTINGS = {
    phase: sorted(configure.settings((GOLDEN / f'toy_{phase}.gin').read_text()))
    for phase in ('sft', 'reward', 'policy')
}
VALUES = [
    'None', "'1'", "'abc'", "''", '0', '-1', '1', '2.5', '1e30', '-1e999', '1e999', 'True', '[]', '()', '{}', '[None]',
    "{'inputs': 0}", "{'x': 'y'}", '@unknown', '@unknown()', '%UNKNOWN', '@optax.adafactor',
    '@sampling.SamplingConfig()',
    '9' * 30, "'" + 'x' * 5000 + "'", "'\\x00'", "'\\x1b[2J'", '[', '1 +', "'../..'", '((((((1))))))', '@', '%',
    "'a\\nb'", 'lambda: 1', '1j', "b'x'", '[' * 300 + ']' * 300,
]  # fmt: skip
RUN = '--model_dir=RUN'
COMMANDS = {  # what a command needs, and its flags
    'inspect': (['--task=x'], ['--task', '--split', '--num', '--vocabulary', '--module']),
    'sample': ([RUN], ['--num', '--prompt', '--chat', '--model_dir']),
    'eval': ([RUN], ['--split', '--group', '--by', '--model_dir', '--gin_file', '--gin_bindings']),
    'export': ([RUN, '--format=hf', '--output=RUN/out'], ['--format', '--output', '--dtype', '--base', '--rank']),
    'import': (['--format=hf', '--input=RUN', '--model_dir=RUN/new'], ['--format', '--input', '--model_dir']),
    'judge': ([RUN, '--against=sft', '--judge=RUN'], ['--against', '--judge', '--split', '--limit', '--num']),
    'average': (['--model_dirs=RUN,RUN', '--model_dir=RUN/new'], ['--model_dirs', '--model_dir', '--rank']),
    'report': (['RUN'], ['--output', '--x']),
    'sweep': (['--gin_file=sweeps/toy.gin', '--dry_run'], ['--jobs', '--gin_file', '--gin.SWEEP_DIR']),
    'plan': (['--gin_file=recipes/toy_sft.gin'], ['--topology', '--topologies', '--compare', '--fit', '--gin_file']),
    'sft': (['--gin_file=recipes/toy_sft.gin'], ['--gin_file', '--gin_bindings', '--gin_search_paths']),
}  # fmt: skip
WORDS = [
    '', '-5', '0', '1e30', 'nan', 'x', 'x' * 5000, '../..', '/', '-', '--', '=', ',', '\x1b[2J', '%s', "'", '{}', '~',
    'hf://', 'gs://x', 'package:', 'package:x/y', 'a\nb',
]  # fmt: skip


class Configured(Exception):
    """Every setting was taken."""


def setting_case(rng, folder):
    phase = rng.choice(list(SETTINGS))
    binding = f'{rng.choice(SETTINGS[phase])}={rng.choice(VALUES)}'
    flags = [] if phase == 'sft' else ["--gin.INITIAL_CHECKPOINT_PATH='random:0'"]
    flags += ["--gin.REWARD_MODEL_DIR='random:1'"] if phase == 'policy' else []
    return [*toy(phase, folder / 'new', *flags), f'--gin.{binding}']


def flag_case(rng, folder):
    command = rng.choice(list(COMMANDS))
    words, flags = COMMANDS[command]
    flag = f'{rng.choice(flags)}={rng.choice(WORDS)}'
    words = [word for word in words if word.partition('=')[0] != flag.partition('=')[0]]
    return [command, *(re.sub('RUN', str(folder / 'run'), word) for word in words), flag]


def problem_of(argv):
    """Returns what is wrong with how a command line ended, or None."""
    try:
        with limited():
            result = perl(*argv)
    except Configured:
        return None
    except BaseException as error:
        return f'{type(error).__name__}: {str(error)[:200]!r}'
    lines = result.err.splitlines()
    if result.code == 0:
        return None
    right_codes = (1, 2) if argv[-1].endswith('gs://x') else (2,)  # 1: no network
    is_line = bool(lines) and len(lines[-1]) <= exits.LONGEST + 20 and lines[-1].isprintable()
    if result.code not in right_codes or not is_line:
        return f'exit code {result.code}, {result.err[-300:]!r}'
    others = [line for line in lines[:-1] if not line.startswith('usage: ') and line.strip()]
    return f'not one line: {result.err[:400]!r}' if others else None


@pytest.mark.parametrize(('make_case', 'share'), [(setting_case, 0.2), (flag_case, 0.1)])
def test_wrong_settings_and_flags_end_in_one_line(make_case, share, tmp_path, monkeypatch):
    def stop(*_):
        raise Configured

    monkeypatch.setattr(Partitioner, 'scope', stop)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'run').mkdir()
    readers._write_run(tmp_path / 'run')
    before, failures = sorted(tmp_path.rglob('*')), []
    for seed in range(SEED, SEED + max(1, round(CASES * share))):
        argv = make_case(random.Random(f'{make_case.__name__} {seed}'), tmp_path)
        if problem := problem_of(argv):
            failures.append(f'{make_case.__name__} seed {seed}: {" ".join(argv[:2])} .. {argv[-1][:200]}: {problem}')
        if added := set(tmp_path.rglob('*')) - set(before):
            before += added
            failures += [f'seed {seed}: {argv[-1]}: made {sorted(added)[0]}'] if argv[0] not in ('report',) else []
    assert not failures, '\n'.join(['', *failures])
