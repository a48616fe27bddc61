"""`perl_jax demo` gives the commands of the three phases and the report, in order; .ci/run runs them."""

import shlex
import subprocess
import sys

import pytest
from toy_runs import perl, ran

from perl_jax.cli import main


@pytest.fixture
def commands(monkeypatch):
    """What the demo starts, each with the exit code `codes` has for it."""
    started, codes = [], {}

    def run(argv, check):
        assert argv[:3] == [sys.executable, '-m', 'perl_jax']
        started.append(argv[3:])
        return subprocess.CompletedProcess(argv, codes.get(argv[3], 0))

    monkeypatch.setattr(subprocess, 'run', run)
    return started, codes


def test_each_phase_starts_from_the_one_before(commands):
    started, _ = commands
    out = ran('demo', "--output=it's", '--short').out
    assert [argv[0] for argv in started] == ['sft', 'reward', 'policy', 'report']
    assert started[3][1:] == ["it's/sft", "it's/reward", "it's/policy"]
    for argv in started[:3]:
        assert argv[1] == f'--gin_file=recipes/toy_{argv[0]}.gin' and '--gin.TRAIN_STEPS=4' in argv
        assert f'''--gin.MODEL_DIR="it's/{argv[0]}"''' in argv
        assert ('''--gin.INITIAL_CHECKPOINT_PATH="it's/sft"''' in argv) == (argv[0] != 'sft')
    assert '''--gin.REWARD_MODEL_DIR="it's/reward"''' in started[2]
    printed = [shlex.split(line.partition('     ')[0]) for line in out.partition('Next:\n')[2].splitlines()]
    assert ['perl_jax', 'sample', "--model_dir=it's/policy"] in printed and ['rm', '-r', "it's"] in printed
    assert all(argv[1] in main._COMMANDS or argv[1] == '--help' for argv in printed if argv[0] == 'perl_jax')


def test_the_whole_demo_lies_elsewhere(commands):
    started, _ = commands
    ran('demo')
    assert "--gin.MODEL_DIR='runs/demo/sft'" in started[0] and '--gin.TRAIN_STEPS=4' not in started[0]


def test_it_ends_where_a_command_fails(commands):
    started, codes = commands
    codes['reward'] = 75
    result = perl('demo')
    assert result.code == 2 and 'perl_jax: demo: perl_jax reward ended with exit code 75' in result.err
    assert [argv[0] for argv in started] == ['sft', 'reward']
