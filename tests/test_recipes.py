"""The gin files as they are: what they configure, what a run of them trains, and what it leaves in MODEL_DIR.

`python tests/test_recipes.py --write` writes the golden files again; look at their difference before you commit it.
"""
# ruff: noqa: F811 (a fixture is shared by importing it)

import dataclasses
import json
import pathlib
import re
import sys

import gin
import jax
import numpy as np
import pytest
from toy_runs import configured, perl, quoted, ran, rows, state, steps, toy, toys  # noqa: F401

from perl_jax.cli import configure
from perl_jax.evals import infer
from perl_jax.runs import checkpoints
from perl_jax.runs.fingerprints import fingerprint
from perl_jax.tasks import toy as toy_task

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / 'tests/golden'
RECIPES = sorted(path.stem for path in (ROOT / 'gin/recipes').glob('*.gin'))
PATHS = ('MODEL_DIR', 'INITIAL_CHECKPOINT_PATH', 'REWARD_MODEL_DIR')
FULL = '--gin_file=tuning/full.gin'
PHASES = ('sft', 'reward', 'policy')


# What they configure.


def phase_of(recipe):
    """The command that a recipe is for, by the file of runs/ that it includes."""
    return re.search(r"include 'runs/(\w+)\.gin'", (ROOT / f'gin/recipes/{recipe}.gin').read_text())[1]


def line(recipe, *flags):
    """A command line for a recipe, with dummies for the paths that it needs."""
    phase = phase_of(recipe)
    given = [quoted(name, 'x') for name in PATHS[: 3 if phase == 'policy' else 2]]
    return [phase, f'--gin_file=recipes/{recipe}.gin', *given, *flags]


def operative(recipe, *flags):
    return configured(*line(recipe, *flags))


def golden(recipe):
    return GOLDEN / f'{recipe}.gin'


def is_toy(recipe):
    return recipe.startswith('toy_')


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_is_short(recipe):
    assert len((ROOT / f'gin/recipes/{recipe}.gin').read_text().splitlines()) <= 25


@pytest.mark.parametrize('recipe', [r for r in RECIPES if not is_toy(r)])
def test_a_recipe_parses(recipe):
    """Others need weights, or data, that are not here; whether their vocabulary can be read is not asked."""
    phase, *flags = line(recipe)
    files, bindings, paths, _ = configure.parse_flags(phase, flags)
    configure.configured(f'train_{phase}.train', files, bindings, paths)
    assert gin.query_parameter(f'train_{phase}.train.run')


@pytest.mark.parametrize('phase', ['sft', 'reward', 'policy'])
def test_what_a_run_requires_is_what_its_gin_file_says(phase):
    text = (ROOT / f'gin/runs/{phase}.gin').read_text()
    required = re.findall('[A-Z_]{4,}', re.search(r'# Required: (.*?)\n# \w', text, re.DOTALL)[1])
    assert 'MODEL_DIR' in required
    lengths = {'inputs': 8, 'targets': 8}
    some = {'TRAIN_STEPS': 1, 'MIXTURE_OR_TASK_NAME': "'toy_pairs'", 'TASK_FEATURE_LENGTHS': lengths}
    given = {name: some.get(name, "'x'") for name in required}
    files = '--gin_file=models/toy.gin', f'--gin_file=runs/{phase}.gin', '--gin_bindings=import perl_jax.tasks.toy'
    configured(phase, *files, *(f'--gin.{name}={value}' for name, value in given.items()))


@pytest.mark.parametrize('recipe', [r for r in RECIPES if is_toy(r)])
def test_a_recipe_configures_what_it_did(recipe):
    assert operative(recipe) == golden(recipe).read_text(), 'intended? then: python tests/test_recipes.py --write'


def test_no_golden_file_is_stale():
    assert sorted(path.stem for path in GOLDEN.glob('toy_*.gin')) == [r for r in RECIPES if is_toy(r)]


def test_one_file_makes_any_recipe_full_tuning():
    for phase, flag in ('reward', FULL), ('policy', FULL), ('sft', '--gin_file=tuning/lora.gin'):
        before, after = (set(operative(f'toy_{phase}', *flags).splitlines()) for flags in ([], [flag]))
        # The adapter, its learning rate, and nothing else.
        assert before ^ after
        assert all(re.search('TUNING|LoraSpec|FullSpec|LEARNING_RATE|^# None', line) for line in before ^ after)


# What a run of them trains.

RUNS = {
    'sft': ('full', ['policy']),
    'sft_lora': ('lora', ['policy']),
    'reward': ('lora', ['reward']),
    'reward_full': ('full', ['reward']),
    'policy': ('lora', ['policy', 'value']),
    'policy_full': ('full', ['policy', 'value']),
}
every_run = pytest.mark.parametrize('name', RUNS)


@every_run
def test_the_base_stays_as_it_is_bit_for_bit(toys, name):
    seen = toys.seen[getattr(toys, name)]
    assert seen.bases
    for base, before in seen.bases:
        after = jax.device_get(base.params)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8)), before, after)
        assert fingerprint(base.params) == base.fingerprint


@every_run
def test_every_leaf_of_every_adapter_moves_in_every_layer(toys, name):
    folder = getattr(toys, name)
    now, tuning, roles = state(folder), *RUNS[name]
    before = {
        f"['{role}']['adapter']['{kind}']{jax.tree_util.keystr(path)}": x
        for role, old in toys.seen[folder].states.items()
        if role != 'beta'
        for kind in ('lora', 'params', 'head')
        for path, x in jax.tree_util.tree_leaves_with_path(getattr(old.adapter, kind))
    }
    assert sorted(set(toys.seen[folder].states) - {'beta'}) == sorted(roles)
    assert before.keys() == {path for path in now if "['adapter']" in path}
    for path, old in before.items():
        assert ("['lora']" in path) == (tuning == 'lora') or "['head']" in path
        moved = old != now[path]
        if "['layers']" in path:  # stacked on axis 0
            assert moved.reshape(len(old), -1).any(axis=1).all(), path
        assert moved.any(), path


@every_run
def test_a_checkpoint_holds_the_adapters_and_names_the_base(toys, name):
    folder = getattr(toys, name)
    about = json.loads((folder / 'run.json').read_text())
    saved, (tuning, roles) = state(folder), RUNS[name]
    assert (saved.pop("['beta']", None) is not None) == ('policy' in name)
    assert about['tuning'] == tuning
    assert {re.match(r"\['(\w+)'\]\['(\w+)'\]", path).groups() for path in saved} == {
        (role, part) for role in roles for part in ('step', 'adapter', 'opt_state')
    }
    learned = sum(x.size for path, x in saved.items() if "['adapter']" in path)
    assert learned == about['trainable_parameters']
    assert all(saved[f"['{role}']['step']"] == 6 for role in roles)
    manager = checkpoints.Checkpoints(folder, read_only=True)
    note = manager.about(6)
    manager.close()
    base, _ = toys.seen[folder].bases[0]
    assert note['phase'] == about['phase'] and note['base'] == about['base'] == base.name
    assert set(note['adapters']) == set(roles)


def test_the_setting_decides_how_much_is_trained(toys):
    sizes = {name: json.loads((getattr(toys, name) / 'run.json').read_text()) for name in RUNS}
    width = 64
    for name, about in sizes.items():
        whole = about['base_parameters']
        roles, heads = len(RUNS[name][1]), width * (not name.startswith('sft'))
        if about['tuning'] == 'full':
            assert about['trainable_parameters'] == roles * whole + heads
        else:
            assert about['trainable_parameters'] < roles * whole / 3 + heads
    assert sizes['policy']['trainable_parameters'] > 2 * (sizes['reward']['trainable_parameters'] - width)


def test_all_roles_of_a_policys_run_stand_on_one_base(toys):
    """The reward was trained on it, so it is not read a second time."""
    for folder in toys.policy, toys.policy_full:
        assert len(toys.seen[folder].bases) == 1
    abouts = [json.loads((folder / 'run.json').read_text()) for folder in (toys.reward, toys.policy)]
    assert abouts[0]['base'] == abouts[1]['base']


# What it leaves behind.

LOGGED = {
    'sft': {'loss/nll', 'grad_norm', 'schedule'},
    'reward': {'loss/reward', 'accuracy/pairwise', 'accuracy/pointwise', 'grad_norm', 'schedule'},
    'policy': {
        'loss/policy', 'loss/value', 'reward/score', 'reward/total', 'kl/anchor', 'entropy/sampled', 'length/mean',
        'value/explained', 'grad_norm/policy', 'grad_norm/value', 'kl/update', 'reward/equal_groups', 'schedule/policy',
        'schedule/value',
    },
}  # fmt: skip
EVALUATED = {
    'sft': {'eval/nll', 'eval/truth', 'eval/length'},
    'reward': {
        'eval/pairwise_accuracy', 'eval/context_accuracy', 'eval/margin',
        'eval/accuracy', 'eval/balanced_accuracy', 'eval/auc',
    },
    'policy': {'eval/score', 'eval/truth', 'eval/length'},
}  # fmt: skip
THROUGHPUT = {'throughput/examples_per_second', 'throughput/tokens_per_second'}
ALWAYS = {'step', 'phase'}
each_phase = pytest.mark.parametrize('phase', PHASES)


@each_phase
def test_a_run_leaves_what_the_documents_say(toys, phase):
    folder = getattr(toys, phase)
    names = {path.name for path in folder.iterdir()}
    events = {name for name in names if name.startswith('events.out.tfevents.')}
    assert len(events) == 1
    left = {'run.json', 'config.gin', 'configs', 'metrics.jsonl', 'samples.jsonl', 'checkpoints'}
    assert {name for name in names if not name.startswith(('eval_', 'calibration_', 'judge'))} == events | left
    assert (folder / 'configs/0.gin').read_text() == (folder / 'config.gin').read_text()
    about = json.loads((folder / 'run.json').read_text())
    assert about.keys() - {'commit'} == {  # the commit is that of a checkout
        'phase', 'tuning', 'trainable_parameters', 'base_parameters', 'base', 'vocabulary', 'vocabulary_fingerprint',
        'devices', 'started',
        'finished', 'seconds', 'step_seconds', 'memory', 'command', 'versions', 'data_fingerprint',
    } | ({'rewards'} if phase == 'policy' else set())  # fmt: skip
    assert about['phase'] == phase and about['finished'] >= about['started'] and about['seconds'] > 0
    assert set(about['base']) >= {'path', 'fingerprint'}
    assert about['devices'] == f'cpu x {jax.device_count()}'
    assert 0 < about['step_seconds'] < about['seconds']
    assert 0 < about['memory']['held'] < about['memory']['peak']


@each_phase
def test_metrics_are_one_object_a_logged_step(toys, phase):
    lines = rows(getattr(toys, phase), timeless=False)
    training = [row for row in lines if 'throughput/examples_per_second' in row]
    evaluations = [row for row in lines if row not in training]
    assert [row['step'] for row in training] == [2, 4, 6]  # a window ends at each checkpoint
    assert [row['step'] for row in evaluations] == [*([0] if phase == 'policy' else []), 2, 4, 6]
    assert all(set(row) == ALWAYS | LOGGED[phase] | THROUGHPUT for row in training)
    for row in evaluations:
        # With one class alone among the few examples, AUC and balanced accuracy are not defined.
        assert EVALUATED[phase] - {'eval/auc', 'eval/balanced_accuracy'} <= set(row) - ALWAYS <= EVALUATED[phase]
    assert all(row['phase'] == phase for row in lines)
    assert all(np.isfinite(value) for row in lines for key, value in row.items() if key != 'phase')


@each_phase
def test_samples_are_one_object_an_answer(toys, phase):
    samples = rows(getattr(toys, phase), 'samples.jsonl')
    if phase == 'reward':
        assert not samples
        return
    assert [row['step'] for row in samples] == [step for step in (2, 4, 6) for _ in range(8)]
    expected = {'step', 'phase', 'prompt', 'response', 'tokens', 'truth', 'reference'}
    if phase == 'policy':
        expected |= {'score', 'sft_response', 'sft_tokens', 'sft_score', 'sft_truth'}
    for row in samples:
        assert set(row) == expected and row['phase'] == phase
        assert row['prompt'].startswith('user: ') and row['reference'].startswith('call: ')
        assert row['truth'] in (0, 1) and 1 <= row['tokens'] <= 24


def test_evaluations_are_the_means_of_their_samples(toys):
    for row in rows(toys.policy):
        answers = [sample for sample in rows(toys.policy, 'samples.jsonl') if sample['step'] == row['step']]
        if 'eval/score' in row and answers:
            assert row['eval/score'] == pytest.approx(np.mean([answer['score'] for answer in answers]))
            assert row['eval/length'] == pytest.approx(np.mean([answer['tokens'] for answer in answers]))


@each_phase
def test_tensorboard_reads_the_same_metrics(toys, phase):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    folder = getattr(toys, phase)
    events = EventAccumulator(str(folder)).Reload()
    wanted = [(key, row['step'], value) for row in rows(folder) for key, value in row.items() if key not in ALWAYS]
    read = lambda tag: {event.step: float(make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)}  # noqa: E731
    have = {tag: read(tag) for tag in events.Tags()['tensors']}
    assert wanted
    for key, step, value in wanted:
        assert have[key][step] == pytest.approx(value, rel=1e-6)


def test_the_latest_checkpoints_are_kept_and_of_a_reward_the_best(toys):
    assert steps(toys.sft) == steps(toys.policy) == [4, 6]
    for folder in toys.reward, toys.reward_full:
        accuracy = {row['step']: row['eval/pairwise_accuracy'] for row in rows(folder) if 'eval/margin' in row}
        best = best_step(folder)
        assert steps(folder) == sorted({best, 4, 6})
        assert accuracy[best] == max(accuracy.values())


def best_step(folder):
    manager = checkpoints.Checkpoints(folder, read_only=True)
    step = manager.best()
    manager.close()
    return step


@each_phase
def test_config_gin_makes_the_same_run_again(toys, phase, tmp_path):
    """It holds every setting, so it needs no recipe."""
    first = getattr(toys, phase)
    ran(phase, f'--gin_file={first}/config.gin', quoted('MODEL_DIR', tmp_path / 'again'))
    assert rows(tmp_path / 'again') == rows(first)
    assert rows(tmp_path / 'again', 'samples.jsonl') == rows(first, 'samples.jsonl')
    texts = [(folder / 'config.gin').read_text() for folder in (first, tmp_path / 'again')]
    assert len({re.sub(r"MODEL_DIR = [^']*'.*'", '', text) for text in texts}) == 1


# What `eval` and `sample` make of it.

MEASURED = {
    'sft': {'length', 'truth'},
    'reward': {
        'pairwise_accuracy', 'context_accuracy', 'margin', 'accuracy', 'balanced_accuracy', 'auc', 'pairwise_ece',
        'ece',
    },
    'policy': {'length', 'truth'},
    'sft_lora': {'length', 'truth'},
    'policy_full': {'length', 'truth'},
}


@pytest.mark.parametrize('name', ['sft', 'reward', 'policy'])
def test_eval_measures_a_whole_split_with_intervals(toys, name, tmp_path):
    folder = getattr(toys, name)
    out = ran('eval', f'--model_dir={folder}', '--split=test').out
    result = json.loads((folder / 'eval_test.json').read_text())
    assert set(result) == MEASURED[name]
    for key, value in result.items():
        no_interval = value['low'] is None and value['high'] is None  # where all groups are equal
        assert no_interval or value['low'] <= value['value'] <= value['high']
        assert value['rows'] > 0 and not (no_interval and name == 'reward')
        assert f'test  {key:20s} {value["value"]:8.4f}' in out
    assert str(folder / 'eval_test.json') in out


def test_eval_of_the_validation_split_says_what_the_run_did(toys, monkeypatch):
    """The same examples, the same checkpoint: the reward's metrics to the last digit."""
    folder, found = toys.reward_full, []
    monkeypatch.setattr(infer.datasets, 'load', limited(infer.datasets.load))
    monkeypatch.setattr(infer, '_report', lambda model_dir, split, result: found.append(result))
    ran('eval', f'--model_dir={folder}')
    (best,) = (row for row in rows(folder) if 'eval/margin' in row and row['step'] == best_step(folder))
    for key, (value, *_) in found[0].items():
        if key in ('ece', 'pairwise_ece'):  # measured by eval alone
            continue
        assert value == pytest.approx(best[f'eval/{key}'], rel=1e-5), key


def limited(load):
    """data.load of the few examples that the small runs are evaluated on."""
    return lambda config, kind: load(dataclasses.replace(config, limit=8), kind)


@pytest.mark.parametrize('name', ['sft', 'sft_lora', 'policy', 'policy_full'])
def test_sample_answers_the_tasks_prompts(toys, name):
    folder = getattr(toys, name)
    out = ran('sample', f'--model_dir={folder}', '--num=2').out
    prompts = {example['inputs'] for example in toy_task.prompts('validation')}
    asked = re.findall(r'^user: .*\n', out, re.MULTILINE)
    assert out.count('"truth"') == len(set(asked)) == 2 and set(asked) <= prompts


@pytest.mark.parametrize('name', ['sft', 'policy'])
def test_sample_answers_a_prompt_that_is_typed_in(toys, name):
    out = ran('sample', f'--model_dir={getattr(toys, name)}', '--prompt=user: a latte please\\n').out
    assert out.startswith('user: a latte please\n') and '"tokens"' in out and '"truth"' not in out


def test_sampling_can_be_set(toys):
    """Cold, the answer is the likeliest one and always the same."""
    cold = [f'--model_dir={toys.policy}', '--num=2', '--gin.TEMPERATURE=0.0', '--gin.MAX_DECODE_LENGTH=5']
    first, again = (ran('sample', *cold).out for _ in range(2))
    assert first == again
    assert all(json.loads(line)['tokens'] <= 5 for line in first.splitlines() if line.startswith('  {'))


def test_sample_of_a_run_without_prompts_says_what_to_add(toys, tmp_path):
    folder = tmp_path / 'sft'
    ran(*toy('sft', folder, '--gin.PROMPTS_DATASET=None', '--gin.METRIC_FNS=None', '--gin.TRAIN_STEPS=1'))
    assert not (folder / 'samples.jsonl').read_text()
    result = perl('sample', f'--model_dir={folder}', '--num=1')
    added = '--gin.PROMPTS_DATASET=@eval/data.DatasetConfig()'
    assert added in result.line
    assert 'user: ' in ran('sample', f'--model_dir={folder}', '--num=1', added).out


def write():
    GOLDEN.mkdir(exist_ok=True)
    for recipe in filter(is_toy, RECIPES):
        golden(recipe).write_text(operative(recipe))


if __name__ == '__main__':
    if sys.argv[1:] != ['--write']:
        sys.exit(__doc__)
    write()
