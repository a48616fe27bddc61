"""`perl_jax list`, `show` and `copy`: what the package brings, as a user finds it."""

import re

import gin
import pytest
from toy_runs import configured, perl, quoted, ran, toy

from perl_jax.cli import catalog, configure


@pytest.mark.parametrize('kind', catalog.FOLDERS)
def test_every_gin_file_is_listed_with_what_it_is(kind):
    lines = ran('list', kind).out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == sorted(f'{kind}/{path.name}' for path in (catalog.GIN / kind).glob('*.gin')) and names
    for line in lines:
        assert re.fullmatch(r'\S+ +\S.+', line), line  # a file without a comment would be a bare name


def test_tasks_are_listed_with_their_features():
    assert re.search(r'^toy_pairs +chosen, inputs, rejected$', ran('list', 'tasks').out, re.MULTILINE)


@pytest.mark.parametrize('phase', catalog.PHASES)
def test_settings_are_listed_with_the_defaults_that_a_run_has(phase):
    """Compared with what gin reads."""
    with configure.restored_state():
        gin.clear_config()
        configure._read([f'runs/{phase}.gin'], [])
        text = gin.config_str()
    read = dict(re.findall(r'^([A-Z]\w+) = \\?\n?(.+)', text, re.MULTILINE))
    listed = catalog.settings(phase)
    assert listed.keys() == read.keys() and listed['TRAIN_STEPS'] == 'required'
    numbers = {name: value for name, value in listed.items() if re.fullmatch(r'[\d.e-]+|None|True|False', value)}
    assert len(numbers) > 10
    for name, value in numbers.items():
        assert eval(value) == eval(read[name]), name
    assert re.search(rf'^{phase} +BATCH_SIZE +{listed["BATCH_SIZE"]}$', ran('list', 'settings').out, re.MULTILINE)


@pytest.mark.parametrize('name', ['recipes/toy_reward.gin', 'toy_reward', 'recipes/toy_reward'])
def test_a_file_that_is_shown_configures_what_its_recipe_does(name, tmp_path):
    (tmp_path / 'shown.gin').write_text(ran('show', name).out)
    assert not re.search('^include', (tmp_path / 'shown.gin').read_text(), re.MULTILINE)
    argv = toy('reward', 'x', quoted('INITIAL_CHECKPOINT_PATH', 'random:0'))
    same = [argv[0], f'--gin_file={tmp_path}/shown.gin', *argv[2:]]
    assert configured(*same) == configured(*argv)


def test_a_copy_is_a_recipe_and_writes_over_nothing(tmp_path):
    mine = tmp_path / 'mine.gin'
    assert ran('copy', 'toy_sft', mine).out == f'{mine}\n'
    assert configured('sft', f'--gin_file={mine}', *toy('sft', 'x')[2:]) == configured(*toy('sft', 'x'))
    mine.write_text('of the user')
    assert perl('copy', 'toy_sft', mine).line == f"perl_jax: copy: '{mine}' exists already; name another file"
    assert mine.read_text() == 'of the user'
    assert 'No such file or directory' in perl('copy', 'toy_sft', tmp_path / 'none' / 'mine.gin').line


def test_a_wrong_name_has_the_nearest_ones():
    assert "'toy_stf' is no gin file of the package; nearest: recipes/toy_sft.gin" in perl('show', 'toy_stf').line
    assert "'toy' is several files; nearest: models/toy.gin, sweeps/toy.gin" in perl('show', 'toy').line
    assert 'nearest: none' in perl('copy', '../../setup.py', 'x').line
    assert 'invalid choice' in perl('list', 'recipe').line
