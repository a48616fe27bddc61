"""What a run shows while it trains and at its end, what run.json says of where it came from, help and near names."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from toy_runs import perl, ran, toy

from perl_jax.cli import catalog
from perl_jax.runs import progress, provenance


def test_the_bar_shows_the_loss_from_the_first_step_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '300')
    bar = progress.Bar('policy', first=0, total=10_000, is_shown=True)
    bar._bar.mininterval = 0
    bar.show_step({'reward/score': -123.456, 'kl/anchor': 1234.5678, 'loss/policy': 0.1})
    bar.advance()
    first = capsys.readouterr().err.split('\r')[-1]
    assert 'score -123, kl 1.23e+03' in first
    bar.show_evaluation({'length': 12.75, 'score': 1.291, 'truth': 0.5})
    bar.close()
    lines = capsys.readouterr().err.replace('\n', '\r').split('\r')
    assert any('score -123, kl 1.23e+03, eval 1.29' in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_a_narrow_terminal_gets_a_narrow_bar(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '50')
    bar = progress.Bar('sft', first=0, total=100, is_shown=True)
    bar.show_step({'loss/nll': 2.5})
    bar.close()
    assert max(map(len, capsys.readouterr().err.replace('\n', '\r').split('\r'))) <= 50


def test_a_run_ends_with_its_folder_its_figures_and_what_to_do_next(tmp_path):
    folder = tmp_path / "it's here"
    result = ran(*toy('sft', 'x'), f'--gin.MODEL_DIR={str(folder)!r}', '--gin.TRAIN_STEPS=2')
    line = result.err.strip().splitlines()[-1]
    evaluation = [json.loads(x) for x in (folder / 'metrics.jsonl').read_text().splitlines()][-1]
    figures = ', '.join(f'{name} {evaluation[f"eval/{name}"]:.4g}' for name in ('nll', 'length', 'truth'))
    assert line == f'perl_jax: sft: finished in {folder}: {figures}; next: perl_jax report {shlex.quote(str(folder))}'
    command = shlex.split(line.rpartition('next: ')[2])
    assert 'report.html' in ran(*command[1:]).out
    page = next(tmp_path.rglob('report.html')).read_text()
    info = json.loads((folder / 'run.json').read_text())
    assert 'perl_jax 0.' in info['versions'] and 'jax ' in info['versions']
    assert info['versions'] in page and '<th>command' in page.lower().replace('<th scope="col">', '<th>')


def test_the_command_line_is_recorded_as_a_shell_takes_it(monkeypatch):
    argv = ['sft', "--gin.MODEL_DIR='a b'", '--gin_file=x.gin']
    monkeypatch.setattr(sys, 'argv', ['/bin/perl_jax', *argv])
    assert shlex.split(provenance.describe()['command']) == ['perl_jax', *argv]


def test_the_commit_is_that_of_a_checkout_and_says_that_files_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance.perl_jax, '__file__', str(tmp_path / 'perl_jax/__init__.py'))
    assert 'commit' not in provenance.describe()  # no checkout

    def git(*words):
        return subprocess.run(['git', '-C', tmp_path, *words], check=True, capture_output=True, text=True).stdout

    git('init', '-q')
    (tmp_path / 'file').write_text('a')
    git('add', 'file')
    git('-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'x')
    commit = git('rev-parse', 'HEAD').strip()
    (tmp_path / 'own_notes').write_text('not of the checkout')
    assert provenance.describe()['commit'] == commit
    (tmp_path / 'file').write_text('b')
    assert provenance.describe()['commit'] == f'{commit}+'
    monkeypatch.setenv('PATH', str(tmp_path))  # no git
    assert 'commit' not in provenance.describe()


@pytest.mark.parametrize('phase', catalog.PHASES)
def test_help_of_a_phase_has_its_settings_with_meaning_and_default(phase):
    text = ran(phase, '--help').out
    for name, default in catalog.settings(phase).items():
        assert re.search(rf'^  {name} +{re.escape(default)}$', text, re.MULTILINE), name
    assert text.count('Required: MODEL_DIR') == 1 and 'Commonly overridden: ' in text and '--data=ROWS' in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(('argv', 'near'), [
    (['polcy'], 'policy'),
    (['sft', '--gin_fil=x'], '--gin_file'),
    (['reward', '--dat=x'], '--data'),
    (['inspect', '--taks=x', '--task=toy_sft'], '--task'),
    (['eval', '--model_dir=x', '--spilt=test'], '--split'),
    (['export', '--model_dir=x', '--format=hf', '--ouput=y', '--output=z'], '--output'),
    (['plan', '--topolgy=v5e:4x4'], '--topology'),
])  # fmt: skip
def test_a_wrong_command_or_flag_gets_the_nearest_name(argv, near):
    assert f'; nearest: {near}' in perl(*argv).line


def test_what_is_like_nothing_gets_no_name():
    assert 'nearest' not in perl('inspect', '--task=toy_sft', '--qqq').line
