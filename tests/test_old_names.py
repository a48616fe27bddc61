"""What gin files of older versions say is said still: a config.gin that was written then, a block, a flag."""

import pathlib
import re

import pytest
from test_recipes import GOLDEN
from toy_runs import configured

from perl_jax.cli import configurables, configure, old_names
from perl_jax.runs import resume

OLD = pathlib.Path(__file__).parent / 'old'  # config.gin of the toy runs, as version 0.1 wrote them


def said(text):
    """The settings of a text, macros resolved."""
    settings = configure.settings(text)
    return {name: resume.resolve(settings, value) for name, value in settings.items() if '.' in name}


@pytest.mark.parametrize('phase', ['sft', 'reward', 'policy'])
def test_a_config_of_an_older_version_says_what_it_said(phase):
    text = (OLD / f'toy_{phase}_0_1.gin').read_text()
    assert re.search(rf'^train_{phase}.train.optimizer = ', text, re.MULTILINE)
    now, then = said((GOLDEN / f'toy_{phase}.gin').read_text()), said(text)
    assert {name: value for name, value in then.items() if now.get(name) != value} == {}
    added = {name: now[name] for name in now.keys() - then.keys() if not name.startswith('value/Tuning.')}
    assert {name: value for name, value in added.items() if value != configurables.default(name)} == {}


@pytest.mark.parametrize('phase', ['sft', 'reward', 'policy'])
def test_a_run_of_it_goes_on_under_the_recipe(phase):
    text = (OLD / f'toy_{phase}_0_1.gin').read_text()
    assert configure._check_resume(text, (GOLDEN / f'toy_{phase}.gin').read_text()) == {}


@pytest.mark.parametrize('phase', ['sft', 'reward', 'policy'])
def test_it_configures_a_run(phase):
    text = configured(phase, f'--gin_file={OLD}/toy_{phase}_0_1.gin', '--gin.TRAIN_STEPS=7')
    assert said(text)['RunConfig.total_steps'] == 7
    assert said(text)['Tuning.optimizer'] == '@optax.adafactor()'


def test_an_older_flag_is_understood():
    recipe = f'--gin_file={OLD}/toy_policy_0_1.gin'
    text = configured('policy', recipe, '--gin.train_policy.train.entropy_bonus=0.25')
    assert said(text)['Objective.entropy_bonus'] == 0.25


def test_a_block_is_understood_and_lines_stay_where_they_are():
    text = """include 'x.gin'
train_policy.train:
  run = @runs.RunConfig()
  shaping = [
      @shaping.whiten,
  ]
  entropy_bonus = 0.1

BETA = 0.1
"""
    lines = old_names.translate(text).splitlines()
    assert lines[2] == 'train_policy.train.run = @runs.RunConfig()'
    assert lines[3] == 'Objective.shaping = [' and lines[6] == 'Objective.entropy_bonus = 0.1'
    assert lines[8] == 'BETA = 0.1' and 'train_policy.train.objective = @objective.Objective()' in lines[9:]


@pytest.mark.parametrize('text', [
    'decoder.DecoderConfig.scan_layers = {}\nBETA = 0.1\n',
    'perl_jax.networks.decoder.DecoderConfig.scan_layers = {} # no loop\nBETA = 0.1\n',
    'decoder.DecoderConfig:\n  scan_layers = {}\nBETA = 0.1\n',
    'decoder.DecoderConfig:\n  scan_layers = {}\n  emb_dim = 64\nBETA = 0.1\n',
])  # fmt: skip
def test_layers_are_in_one_loop_whatever_an_older_file_says(text, caplog):
    """Of True nothing is said, of False one line; a binding of T5X's own config of that name stays."""
    old_names._log_ignored_setting.cache_clear()
    for value in 'True', 'False', 'False':
        kept = {'BETA': 0.1} | ({'decoder.DecoderConfig.emb_dim': 64} if 'emb_dim' in text else {})
        with caplog.at_level('INFO', 'perl_jax'):
            assert configure.settings(text.format(value)) == kept
        assert caplog.text.count('remove it') == (value == 'False')
    line = 'network.T5Config.scan_layers = True\n'
    assert old_names.translate(line) == line


def test_a_run_without_the_loop_goes_on_with_it():
    text = (OLD / 'toy_policy_0_1.gin').read_text()
    other = text.replace('scan_layers = True', 'scan_layers = False')
    assert text != other and configure._check_resume(other, text) == {}
    assert said(configured('policy', f'--gin_file={OLD}/toy_policy_0_1.gin')) == said(
        configured('policy', f'--gin_file={OLD}/toy_policy_0_1.gin', '--gin.decoder.DecoderConfig.scan_layers=False')
    )


def test_todays_text_stays_as_it_is():
    for path in GOLDEN.glob('*.gin'):
        assert old_names.translate(path.read_text()) == path.read_text()
