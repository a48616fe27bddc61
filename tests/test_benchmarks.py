"""Every script of benchmarks/ runs, at the smallest sizes: no other test would see that one has come to fail."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import argparse
import csv
import importlib.util
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import test_taskmaster
import tiny_gguf
from test_taskmaster import agent, folder, rated, user, utterance  # noqa: F401
from toy_runs import settings, toys  # noqa: F401

pytestmark = pytest.mark.slow

BENCHMARKS = pathlib.Path(__file__).parents[1] / 'benchmarks'
WIDTHS = {'num_layers': 1, 'emb_dim': 16, 'mlp_dim': 16, 'head_dim': 4, 'vocab_size': 32}  # of models/bench_s.gin
MODEL = [f'--gin.decoder.DecoderConfig.{name}={width}' for name, width in WIDTHS.items()]
SIZES = [*MODEL, '--batch=2', '--prompt=6', '--response=4', '--steps=1']


def script(name):
    """A script as a module; what lies beside it can be imported."""
    path = BENCHMARKS / name
    spec = importlib.util.spec_from_file_location(f'benchmarks_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch, capsys):
    """run(module, *flags) -> what its `main` printed."""

    def main(module, *flags):
        monkeypatch.setattr(sys, 'argv', [module.__file__, *map(str, flags)])
        capsys.readouterr()
        with settings():
            module.main()
        return capsys.readouterr().out

    return main


def test_every_script_has_a_case():
    scripts = {path.relative_to(BENCHMARKS).as_posix() for path in BENCHMARKS.rglob('*.py')}
    cases = set(re.findall(r"script\('([\w/.]+)'\)", pathlib.Path(__file__).read_text()))
    assert {name for name in scripts if not name.startswith('peers/')} == cases | {'measure.py'}  # which has no main


def test_reward_step(run):
    found = json.loads(run(script('reward_step.py'), *SIZES))
    assert found['seconds'] > 0 and found['flops'] > 0 and found['step_bytes'] > 0 and found['grad_norm'] > 0


@pytest.mark.parametrize(
    'flags', [['--algorithm=reinforce'], ['--algorithm=grpo', '--buckets=2', '--ends']], ids=['a value', 'buckets']
)
def test_policy_step(run, flags):
    found = json.loads(run(script('policy_step.py'), *SIZES, *flags))
    assert (
        found['seconds'] > 0 and found['flops'] > 0 and found['shares'].keys() == {'generation', 'scoring', 'learning'}
    )
    assert found['mean_length'] == 4 or '--ends' in flags


def arrays(path, K=0, rows=8, width=6):
    """Rows as taskmaster/prepare.py writes them, prompts or (with K = 2) pairs."""
    rng, shapes = np.random.default_rng(0), {'inputs': (rows, width)} | ({'targets': (rows, K, width)} if K else {})
    tokens = {name: rng.integers(2, 99, shape, dtype=np.int32) for name, shape in shapes.items()}
    masks = {f'{name}_mask': np.arange(width) < rng.integers(1, width + 1, shape[:-1])[..., None]
             for name, shape in shapes.items()}  # fmt: skip
    np.savez(path, group=np.arange(rows).astype(str), **tokens, **masks)
    return path


@pytest.mark.parametrize(('K', 'flags'), [(2, []), (0, ['--algorithm=grpo'])], ids=['pairs', 'prompts'])
def test_data(run, tmp_path, K, flags):
    found = json.loads(
        run(script('data.py'), f'--arrays={arrays(tmp_path / "x.npz", K)}', '--buckets=2', *SIZES, *flags)
    )
    assert found['seconds'] > 0 and found['grad_norm'] > 0 and 0 < found['real_tokens'] < 1


def test_growth(run, tmp_path, monkeypatch):
    growth = script('growth.py')
    monkeypatch.setattr(growth, 'STORE', tmp_path / 'growth.json')
    monkeypatch.setattr(growth, 'PLOT', tmp_path / 'growth.png')
    monkeypatch.setattr(growth, 'SCRIPTS', {'reward': ['reward_step.py', *SIZES]})
    monkeypatch.setattr(growth, 'AXES', {'rank': (('reward',), [2])})
    run(growth, '--steps=1')
    (found,) = json.loads(growth.STORE.read_text()).values()
    assert found['seconds'] > 0 and found['bytes'] > 0 and growth.PLOT.exists()


def test_table1(run, tmp_path, monkeypatch):
    pytest.importorskip('libtpu', reason='needs libtpu, the extra plan')
    table1 = script('table1/table1.py')
    small = ["TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 8}", 'BATCH_SIZE = 8', 'NUM_MICROBATCHES = 1']
    small.append(table1.TOPOLOGY.format('v5e:2x2'))
    monkeypatch.setattr(table1, 'MODELS', {'8B': ('models/toy.gin', small)})
    for name, file in ('STORE', 'table1.json'), ('PLOT', 'table1.png'), ('PAGE', 'memory.md'):
        monkeypatch.setattr(table1, name, tmp_path / file)
    table1.PAGE.write_text('<!-- table1 -->\nold\n<!-- end -->\n')
    for plans in '8B, reward, LoRA', '8B, policy, LoRA':
        run(table1, f'--only={plans}')
    found = json.loads(table1.STORE.read_text())
    assert [len(plan['programs']) for plan in found.values()] == [1, 5] and all(plan['fits'] for plan in found.values())
    assert '| as it is |' in (page := table1.PAGE.read_text()) and 'old' not in page
    assert table1.PLOT.exists()


@pytest.fixture
def taskmaster(folder):
    """A folder of little dialogs and ratings, a few in each split."""
    openings = [test_taskmaster.TRAIN] * 10 + [test_taskmaster.VALIDATION] * 4
    dialogs = [
        {'conversation_id': f'dlg-{i}', 'utterances': [utterance('user', text), utterance('assistant', f'Yes {i}.')]}
        for i, text in enumerate(openings)
    ]
    test_taskmaster.write_dialogs(folder, dialogs)
    ratings = [
        rated([agent(f'Hello {i}.'), user(text)], agent(answer), reward, f'dlg-{i}')
        for i, text in enumerate(openings)
        for answer, reward in (('Yes.', 1.0), ('No.', 0.0))
    ]
    test_taskmaster.write_rated(folder, ratings)
    return folder


def test_taskmaster_scripts(run, tmp_path, monkeypatch, taskmaster):
    prepare, train, summarize = (
        script('taskmaster/prepare.py'), script('taskmaster/train.py'), script('taskmaster/summarize.py')
    )  # fmt: skip
    model, out = tiny_gguf.write(tmp_path / 'tiny.gguf'), tmp_path / 'out'
    monkeypatch.setattr(prepare, 'LENGTHS', {kind: dict.fromkeys(x, 64) for kind, x in prepare.LENGTHS.items()})
    monkeypatch.setattr(prepare, 'DOMAINS', ['coffee'])
    run(prepare, f'--vocabulary={model}', f'--output={tmp_path}/arrays')
    run(train, f'--model={model}', f'--arrays={tmp_path}/arrays', f'--output={out}', '--smoke', '--domains=coffee')
    table = tmp_path / 'table.csv'
    run(summarize, f'--vocabulary={model}', f'--arrays={tmp_path}/arrays', f'--output={table}', out)
    reward, policy = csv.DictReader(table.read_text().splitlines())
    assert reward['pairwise_accuracy'] and reward['auc'] and policy['score_after'] and policy['well_formed_before']


def test_a_call_of_known_arguments_is_valid_without_its_context(monkeypatch, tmp_path, taskmaster):
    """The column counts APIs and arguments; the arrays have no whole context in which values could be found."""
    call = {'role': 'agent', 'api': {'get_menu_items': {'query': 'latte'}}}
    test_taskmaster.write_rated(taskmaster, [rated([user(test_taskmaster.TRAIN)], call, 1.0)])
    texts = [
        'call: get_menu_items(query=latte)', 'call: get_menu_items(flavour=latte)', 'call: get_menu(query=latte)',
        'agent: Yes.', 'none',
    ]  # fmt: skip
    vocabulary = argparse.Namespace(decode=lambda ids: texts[ids[0]])
    summarize = script('taskmaster/summarize.py')
    monkeypatch.setattr(summarize.vocabularies, 'vocabulary', lambda name: vocabulary)
    monkeypatch.setattr(summarize.taskmaster, 'known_calls', summarize.taskmaster.known_calls.__wrapped__)  # no cache
    np.savez(tmp_path / 'coffee_prompts_validation.npz', group=np.array(list('abcde')))
    columns = ('what', 'tuning', 'rate', 'steps', 'seconds_a_step', 'held', 'peak', 'kl/anchor', 'length/mean')
    ids = np.arange(5).reshape(5, 1, 1)
    scores = {'x-targets': ids, 'x-targets_mask': ids >= 0, 'x-score': np.ones((5, 1))}
    row = summarize.policy(
        dict.fromkeys(columns, 0) | {'cell': 'x'}, scores, argparse.Namespace(vocabulary='', arrays=tmp_path)
    )
    assert row['well_formed_after'] == 0.8 and row['valid_after'] == 0.4


def test_answers_that_do_not_fit_end_the_preparation_in_one_line(monkeypatch, tmp_path, taskmaster):
    prepare = script('taskmaster/prepare.py')
    monkeypatch.setattr(prepare, 'LENGTHS', {'thumbs': {'inputs': 64, 'targets': 2}})
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--vocabulary=byt5', f'--output={tmp_path}/arrays'])
    with pytest.raises(SystemExit, match=r'^prepare.py: taskmaster_coffee_thumbs .* or set VOCABULARY .*$'):
        prepare.main()


def test_overoptimization(run, toys, tmp_path):
    flags = f'--sft={toys.sft}', f'--rewards={toys.reward}', f'--output={tmp_path}', '--prompts=8', '--samples=4'
    run(script('overoptimization.py'), *flags)
    rows = list(csv.DictReader((tmp_path / 'overoptimization.csv').read_text().splitlines()))
    assert {row['n'] for row in rows} == {'1', '2', '4'} and {row['reward'] for row in rows} >= {
        'median',
        'weight average',
    }
    assert (tmp_path / 'overoptimization.png').exists()


def test_value_ceiling(run, toys):
    flags = f'--sft={toys.sft}', f'--reward={toys.reward}', f'--policies={toys.policy}', '--prompts=16', '--samples=4'
    assert re.search(r'prefix -?[\d.]+ .*; 16 prompts x 4', run(script('value_ceiling.py'), *flags))
