"""The command line: what it says of itself, how settings are given, and what becomes of input that is wrong.

Bad input is one line on stderr that names what is wrong and says what to do, exit code 2, and nothing half-written.
"""
# ruff: noqa: F811 (a fixture is shared by importing it)

import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import gin
import jax
import numpy as np
import pytest
from toy_runs import ENVIRONMENT, configured, contents, perl, quoted, ran, rows, state, steps, toy, toys  # noqa: F401

from perl_jax.cli import configurables, exits, macros, main
from perl_jax.data import datasets

ROOT = pathlib.Path(__file__).parents[1]
FULL, LORA = '--gin_file=tuning/full.gin', '--gin_file=tuning/lora.gin'


# What it says of itself.


@pytest.mark.parametrize('argv', [[], ['--help'], ['-h'], ['help']], ids=['nothing', '--help', '-h', 'help'])
def test_help_has_what_a_newcomer_needs(argv):
    result = perl(*argv)
    assert result.code == 0 and not result.err
    for command in 'sft', 'reward', 'policy', 'eval', 'sample', 'judge', 'report', 'inspect':
        assert f'perl_jax {command} ' in result.out
    for needed in (
        '--gin_file', '--gin.NAME=VALUE', '--gin_bindings', '--gin_search_paths', '--gin.MODEL_DIR="\'runs/',
        'INITIAL_CHECKPOINT_PATH', 'REWARD_MODEL_DIR', 'tuning/full.gin', 'Rerun the same command to resume',
        'perl_jax/gin/recipes',
    ):  # fmt: skip
        assert needed in result.out
    assert max(map(len, result.out.splitlines())) <= 110


def test_help_needs_no_heavy_import():
    code = "import sys; from perl_jax.cli import main; main.cli(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize('command', ['eval', 'sample', 'judge', 'report', 'inspect'])
def test_a_command_explains_its_flags(command):
    with pytest.raises(SystemExit) as end:
        main.cli([command, '--help'])
    assert end.value.code == 0


def test_version():
    assert perl('--version').out.startswith('perl_jax 0.')


def test_an_interrupt_is_no_traceback(monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(main._COMMANDS, 'sft', interrupted)
    result = perl('sft')
    assert result.code == 130 and 'the same command goes on' in result.err


def ended(monkeypatch, capsys, error):
    """The exit code and the line of the program whose command raises that."""

    def broken(argv):
        raise error

    monkeypatch.setitem(main._COMMANDS, 'sft', broken)
    code = exits.run(main._dispatch, 'sft', ['sft', '--x'], is_main_program=True)
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def test_a_bug_is_one_line_with_the_path_of_its_traceback(monkeypatch, capsys):
    code, line = ended(monkeypatch, capsys, TypeError('no\nwonder'))
    assert code == 70 and line.startswith('perl_jax: sft: this is a bug (TypeError: no); its traceback')
    path = pathlib.Path(line.rpartition(' ')[2])
    text = path.read_text()
    path.unlink()
    assert 'Traceback' in text and 'in broken' in text and "['sft', '--x']" in text
    assert path.parent == pathlib.Path(tempfile.gettempdir())


@pytest.mark.parametrize('code', [2, 70, 75])
def test_a_command_that_failed_waits_for_no_thread(code):
    """Orbax's wait five minutes for others of a save that failed."""
    program = (
        'import threading, time; from perl_jax.cli import exits, main\n'
        'threading.Thread(target=time.sleep, args=(60,)).start()\n'
        f'exits.run = lambda *args, **settings: {code}\n'
        'raise SystemExit(main.cli())'
    )
    start = time.monotonic()
    process = subprocess.run([sys.executable, '-c', program, 'list', 'recipes'], cwd=ROOT, check=False)
    assert process.returncode == code and time.monotonic() - start < 30


def test_a_caller_in_python_gets_the_exception_itself(monkeypatch):
    monkeypatch.setitem(main._COMMANDS, 'sft', lambda argv: [].pop())
    with pytest.raises(IndexError):
        main.cli(['sft'])


@pytest.mark.parametrize('reason', ['No space left on device', 'Disk quota exceeded', 'Read-only file system'])
def test_a_full_disk_is_the_users_whoever_says_it(monkeypatch, capsys, reason):
    """TensorStore's errors are ValueErrors, with a page of context."""
    error = ValueError(f'RESOURCE_EXHAUSTED: Error writing "/data/run/checkpoints/5/d/1": [OS error: {reason}]\n[more]')
    code, line = ended(monkeypatch, capsys, error)
    assert (code, line) == (2, f'perl_jax: sft: {reason}: /data/run/checkpoints/5/d/1; nothing of this write is kept')


@pytest.mark.parametrize('error', [
    jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.\n[more]'),
    np._core._exceptions._ArrayMemoryError((2**40,), np.dtype(np.float32)), MemoryError(),
])  # fmt: skip
def test_out_of_memory_is_the_users_and_says_what_to_lower(monkeypatch, capsys, error):
    code, line = ended(monkeypatch, capsys, error)
    assert re.search('sft: (RESOURCE_EXHAUSTED: Out of memory|_?(Array)?MemoryError: ).*; lower BATCH', line)
    assert code == 2


# How settings are given.


def setting(text, name):
    """What an operative configuration says of one name."""
    (value,) = [line.partition(' = ')[2] for line in text.splitlines() if line.startswith(f'{name} = ')]
    return value


def test_settings_come_from_files_and_flags_and_the_later_one_counts(tmp_path):
    (tmp_path / 'mine.gin').write_text("include 'recipes/toy_sft.gin'\nBATCH_SIZE = 3\nRANDOM_SEED = 5\n")
    (tmp_path / 'more.gin').write_text('RANDOM_SEED = 6\n')
    text = configured(
        'sft', f'--gin_file={tmp_path}/mine.gin', '--gin_file', f'{tmp_path}/more.gin', quoted('MODEL_DIR', 'x'),
        '--gin_bindings=EVAL_PERIOD = 7', '--gin.optax.adafactor.decay_rate=0.5', '--gin.EVAL_EXAMPLES=1',
        '--gin.EVAL_EXAMPLES=9',
    )  # fmt: skip
    want = {'BATCH_SIZE': '3', 'RANDOM_SEED': '6', 'EVAL_PERIOD': '7', 'EVAL_EXAMPLES': '9', 'MODEL_DIR': "'x'"}
    assert {name: setting(text, name) for name in want} == want
    assert setting(text, 'adafactor.decay_rate') == '0.5'


def test_gin_files_are_looked_for_in_ones_own_folders_first(tmp_path):
    for name, seed in ('one', 1), ('two', 2):
        (tmp_path / name / 'recipes').mkdir(parents=True)
        (tmp_path / name / 'recipes/toy_sft.gin').write_text(f"include 'runs/sft.gin'\nRANDOM_SEED = {seed}\n")
    own = f'--gin_search_paths={tmp_path}/none,{tmp_path}/two,{tmp_path}/one'
    tasks = (f"--gin.{name}='toy_sft'" for name in ('MIXTURE_OR_TASK_NAME', 'PROMPTS_TASK_NAME'))
    lengths = "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}"
    given = toy('sft', 'x', lengths, *tasks, '--gin_file=models/toy.gin')
    assert setting(configured(*given, own), 'RANDOM_SEED') == '2'
    assert setting(configured(*given), 'RANDOM_SEED') == '0', 'the folders of an earlier call are forgotten'


def test_a_setting_of_one_call_does_not_reach_the_next():
    assert 'LoraSpec.rank = 3' in configured(*toy('sft', 'x', LORA, '--gin.lora.LoraSpec.rank=3'))
    assert 'LoraSpec.rank = 3' not in configured(*toy('sft', 'x', LORA))


def test_a_macro_of_ones_own_may_be_used(tmp_path):
    text = configured(*toy('sft', 'x', '--gin.SIZE=12', '--gin.BATCH_SIZE=%SIZE'))
    assert setting(text, 'SIZE') == '12' and setting(text, 'BATCH_SIZE') == '%SIZE'


def test_settings_are_spelled_alike_for_a_recipe_and_for_what_it_wrote(tmp_path):
    """gin writes what a macro made under the macro's scope, which would win."""
    written = tmp_path / 'config.gin'
    written.write_text(configured(*toy('sft', 'x', LORA)))
    again = lambda *flags: configured('sft', f'--gin_file={written}', *flags)  # noqa: E731
    settings = lambda text: {line for line in text.splitlines() if ' = ' in line}  # noqa: E731
    assert settings(again()) == settings(written.read_text())
    text = again('--gin.lora.LoraSpec.rank=3', '--gin.optax.adafactor.decay_rate=0.5')
    assert setting(text, 'LoraSpec.rank') == '3' and setting(text, 'adafactor.decay_rate') == '0.5'


# Bad flags and files.


@pytest.mark.parametrize(('argv', 'words'), [
    (['polcy'], ["'polcy'", 'sft, reward, policy']),
    (['sft'], ['--gin_file=recipes/toy_sft.gin']),
    (['sft', '--gin_file=recipes/toy_sft.gin', 'more'], ["unknown argument 'more'"]),
    (['sft', '--gin_fil=recipes/toy_sft.gin'], ["unknown argument '--gin_fil="]),
    (['sft', '--gin_file=recipes/toy_sft.gin', '--gin.BATCH_SIZE'], ["'--gin.BATCH_SIZE' has no value"]),
    (['eval'], ['--model_dir']),
    (['eval', '--model_dir=none'], ["'none'", 'no run.json']),
    (['sample', '--model_dir=none'], ["'none'", 'no run.json']),
    (['sample', '--model_dir=x', '--num=few'], ['--num', "'few'"]),
    (['report', 'none'], ['none']),
    (['inspect'], ['--task']),
    (['inspect', '--task=toy_pair'], ["'toy_pair'", 'toy_pairs']),
    (['inspect', '--task=toy_pairs', '--module=none'], ["'none'", '--module']),
    (['inspect', '--task=toy_pairs', '--split=half'], ["'half'", 'test, train, validation']),
    (['inspect', '--task=toy_pairs', '--vocabulary=none.json'], ['none.json', 'no such file']),
], ids=lambda x: '-'.join(x) if isinstance(x, list) and len(x) < 4 else None)  # fmt: skip
def test_bad_arguments(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = perl(*argv).line
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


BAD_SETTINGS = {
    'no such configurable': (['--gin.lra.LoraSpec.rank=1'], ["'lra.LoraSpec'", 'lra.LoraSpec.rank = 1']),
    'no such parameter': (['--gin.lora.LoraSpec.rnk=1'], ["'lora.LoraSpec'", "'rnk'"]),
    'no such reference': (['--gin.TUNING=@lora.LoraSpek()'], ['@lora.LoraSpek()']),
    'no such macro': (['--gin.TRAIN_STEP=1'], ["'TRAIN_STEP'", 'TRAIN_STEPS']),
    'no such macro to read': (['--gin.BATCH_SIZE=%SIZE'], ['SIZE is not given', '--gin.SIZE=']),
    'ambiguous': (['--gin.train.beta=1'], ["'train'", 'train_policy.train']),
    'no quotes': ([f'--gin.MODEL_DIR=runs{os.sep}x'], ['MODEL_DIR = runs/x', 'inner quotes']),
    'no quotes, one word': (['--gin_bindings=MODEL_DIR = x'], ['MODEL_DIR = x', 'inner quotes']),
    'no such file': (['--gin_file=recipes/none.gin'], ['recipes/none.gin']),
    'no whole number': (["--gin.TRAIN_STEPS='many'"], ["TRAIN_STEPS = 'many'", 'whole number']),
    'no steps': (['--gin.TRAIN_STEPS=0'], ['TRAIN_STEPS = 0', 'at least 1']),
    'no period': (['--gin.EVAL_PERIOD=0'], ['EVAL_PERIOD = 0', 'at least 1']),
    'no such task': (["--gin.MIXTURE_OR_TASK_NAME='toy_sftt'"], ["'toy_sftt'", 'nearest: toy_sft,']),
    'a task of another kind': (["--gin.MIXTURE_OR_TASK_NAME='toy_pairs'"], ["'toy_pairs'", 'targets', 'chosen']),
    'no such split': (["--gin.eval/data.DatasetConfig.split='half'"], ["'half'", 'test, train, validation']),
    'too long': (
        ["--gin.TASK_FEATURE_LENGTHS={'inputs': 26, 'targets': 5}"],
        ['toy_sft (train): 64 of 64', 'example 0 has', 'tokens of targets', "TASK_FEATURE_LENGTHS['targets']"],
    ),
    'no such path': ([quoted('INITIAL_CHECKPOINT_PATH', 'none')], ["INITIAL_CHECKPOINT_PATH: 'none'", '.gguf']),
    'no such weights': ([quoted('INITIAL_CHECKPOINT_PATH', 'none.gguf')], ['none.gguf']),
    'no such layer': ([LORA, quoted('lora.LoraSpec.targets', 'attn')], ["'attn'", 'self_attention/query']),
    'devices that do not divide': (['--gin.partitioning.Partitioner.num_partitions=3'], ['num_partitions = 3']),
    'no length of targets': (["--gin.TASK_FEATURE_LENGTHS={'inputs': 26}"], ['TASK_FEATURE_LENGTHS', 'targets']),
    'a length alone': (['--gin.TASK_FEATURE_LENGTHS=26'], ['TASK_FEATURE_LENGTHS = 26', "{'inputs': 512"]),
    'no tokens': (["--gin.TASK_FEATURE_LENGTHS={'inputs': 0, 'targets': 5}"], ["LENGTHS['inputs'] = 0: give a number"]),
    'no batch': (['--gin.BATCH_SIZE=0'], ['BATCH_SIZE = 0']),
    'no regex': ([LORA, quoted('lora.LoraSpec.targets', '(')], ["LoraSpec.targets = '('"]),
    'no rank': ([LORA, '--gin.lora.LoraSpec.rank=0'], ['LoraSpec.rank = 0']),
    'all dropped': ([LORA, '--gin.lora.LoraSpec.dropout=1.5'], ['LoraSpec.dropout = 1.5']),
    'too small a vocabulary': (['--gin.decoder.DecoderConfig.vocab_size=10'], ['vocab']),
    'no such dtype': ([quoted('BASE_DTYPE', 'bf16')], ["BASE_DTYPE = 'bf16'", "'bfloat16'"]),
    'a seed below 0': (['--gin.RANDOM_SEED=-1'], ['RANDOM_SEED = -1']),
    'a rate below 0': (['--gin.FULL_LEARNING_RATE=-1'], ['LEARNING_RATE = -1: give a number of at least 0']),
    'a rate of no number': (["--gin.LEARNING_RATE='abc'"], ["LEARNING_RATE = 'abc': give a number or a function"]),
    'no limit': (['--gin.eval/data.DatasetConfig.limit=-1'], ['EVAL_EXAMPLES = -1: give a number of at least 1']),
    'no width': (['--gin.decoder.DecoderConfig.emb_dim=0'], ['DecoderConfig.emb_dim = 0']),
    'heads that do not divide': (['--gin.decoder.DecoderConfig.num_kv_heads=5'], ['num_kv_heads = 5']),
    'too deep': (['--gin.decoder.DecoderConfig.num_layers=10**30'], ['num_layers', '10**30']),
    'no folder': ([quoted('MODEL_DIR', '')], ["MODEL_DIR = ''"]),
    'a home': ([quoted('MODEL_DIR', '~/run')], ["MODEL_DIR = '~/run'"]),
    'a model of no folder': (['--gin_file=models/from_hf.gin'], ['models/from_hf.gin: set INITIAL_CHECKPOINT_PATH']),
}


@pytest.mark.parametrize('name', BAD_SETTINGS)
def test_bad_settings(name, tmp_path):
    flags, words = BAD_SETTINGS[name]
    line = perl(*toy('sft', tmp_path / 'run', *flags)).line
    assert all(word in line for word in words), line
    assert not (tmp_path / 'run').exists()


NO_WEIGHTS = "INITIAL_CHECKPOINT_PATH: 'nowhere' is no .gguf file, no Hugging Face or T5X checkpoint"
NO_REWARD = "LearnedReward.model_dir: 'nowhere' is not the MODEL_DIR of a run"


@pytest.mark.parametrize(('phase', 'flags', 'words'), [
    ('sft', [quoted('INITIAL_CHECKPOINT_PATH', 'nowhere')], NO_WEIGHTS),
    ('reward', [quoted('INITIAL_CHECKPOINT_PATH', 'nowhere')], NO_WEIGHTS),
    ('policy', [quoted('INITIAL_CHECKPOINT_PATH', 'nowhere'), quoted('REWARD_MODEL_DIR', 'nowhere')], NO_WEIGHTS),
    ('policy', ['--gin.INITIAL_CHECKPOINT_PATH=None', quoted('REWARD_MODEL_DIR', 'nowhere')], NO_REWARD),
])  # fmt: skip
def test_a_folder_that_is_missing_is_told_before_the_data_are_read(tmp_path, monkeypatch, phase, flags, words):
    def read(*args, **kwargs):
        raise AssertionError('the data were read')

    monkeypatch.setattr(datasets, 'stream', read)
    monkeypatch.setattr(datasets, 'load', read)
    assert words in perl(*toy(phase, tmp_path / 'run', *flags)).line
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('macro', ['MODEL_DIR', 'INITIAL_CHECKPOINT_PATH', 'REWARD_MODEL_DIR'])
def test_what_is_missing_is_named(macro):
    names = {'MODEL_DIR', 'INITIAL_CHECKPOINT_PATH', 'REWARD_MODEL_DIR'} - {macro}
    argv = ['policy', '--gin_file=recipes/toy_policy.gin', *(quoted(name, 'none') for name in names)]
    assert f'{macro} is not given; add --gin.{macro}="{macros.EXAMPLES[macro]}"' in perl(*argv).line


def test_a_command_leaves_gin_unlocked_and_empty(toys, tmp_path):
    refused, made = toy('policy', tmp_path / 'run'), ['sample', f'--model_dir={toys.sft_lora}']
    for argv in (refused, made, ['eval', '--model_dir=none']):
        perl(*argv)
        assert not gin.config_is_locked() and not gin.config_str().strip()
        gin.parse_config('MINE = 1')  # raises where gin is locked
        gin.clear_config()


@pytest.mark.parametrize('phase', ['sft', 'reward', 'policy'])
def test_a_run_without_evaluation_data(phase, toys, tmp_path):
    flags = '--gin.EVAL_DATASET=None', '--gin.TRAIN_STEPS=2', '--gin.EVAL_PERIOD=1', '--gin.PROMPTS_DATASET=None'
    sources = {'sft': (), 'reward': toys.sources[:1], 'policy': toys.sources}[phase]
    ran(*toy(phase, tmp_path / 'run', *flags[: 4 if phase == 'sft' else 3], *sources))
    assert [set(row) & {'grad_norm', 'grad_norm/policy'} for row in rows(tmp_path / 'run')]
    assert not any(key.startswith('eval/') for row in rows(tmp_path / 'run') for key in row)
    assert steps(tmp_path / 'run')[-1] == 2
    assert 'EVAL_DATASET=@eval/data.DatasetConfig()' in perl('eval', f'--model_dir={tmp_path}/run').line
    if phase == 'reward':
        assert 'auc' in ran('eval', f'--model_dir={tmp_path}/run', '--gin.EVAL_DATASET=@eval/data.DatasetConfig()').out
        sources = toys.sources[0], quoted('REWARD_MODEL_DIR', tmp_path / 'run')
        ran(*toy('policy', tmp_path / 'policy', *sources, flags[1]))
        line = perl(*toy('reward', tmp_path / 'x', sources[0], flags[0], "--gin.BEST_METRIC='auc'")).line
        assert "BEST_METRIC = 'auc' is measured on EVAL_DATASET" in line
    assert ran('report', tmp_path / 'run').out


def test_a_model_is_missing(tmp_path):
    argv = ['sft', '--gin_file=runs/sft.gin', quoted('MODEL_DIR', tmp_path / 'run')]
    line = perl(*argv).line
    assert 'NETWORK, TASK_FEATURE_LENGTHS, TRAIN_STEPS are not given; add ' in line
    assert ' --gin_file=models/from_hf.gin ' in line
    assert not (tmp_path / 'run').exists()


def test_a_recipe_of_another_command(tmp_path):
    sft = toy('sft', tmp_path / 'run')[1:]
    for command in 'reward', 'policy':
        line = perl(command, *sft).line
        assert f'train_{command}.train' in line and 'recipe' in line
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('text', 'words'), [
    ('BATCH_SIZE = = 1\n', ['mine.gin', 'line 2']),
    ('data.DatasetConfig.batchsize = 1\n', ['batchsize', 'mine.gin', 'line 2']),
    ("include 'runs/none.gin'\n", ['runs/none.gin']),
    ('import perl_jax.tasks.none\n', ['perl_jax.tasks.none']),
    ('import leaves\n', ['an imported module ended the program (3)']),
])  # fmt: skip
def test_a_gin_file_with_a_mistake(text, words, tmp_path, monkeypatch):
    (tmp_path / 'mine.gin').write_text("include 'recipes/toy_sft.gin'\n" + text)
    (tmp_path / 'leaves.py').write_text('import sys\nsys.exit(3)\n')
    monkeypatch.syspath_prepend(tmp_path)
    line = perl('sft', f'--gin_file={tmp_path}/mine.gin', quoted('MODEL_DIR', tmp_path / 'run')).line
    assert all(word in line for word in words), line
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('function', ['none', 'perl_jax.tasks.toy_grammar.lies'])
def test_a_metric_that_does_not_exist(function, tmp_path):
    line = perl(*toy('sft', tmp_path / 'run', f"--gin.METRIC_FNS={{'truth': '{function}'}}")).line
    assert f"no function '{function}'" in line
    assert not (tmp_path / 'run').exists()


# Folders that are not what they should be.


def refused(folder, argv):
    """The line that a command ends with, which has changed nothing in a folder."""
    before = contents(folder)
    line = perl(*argv).line
    assert contents(folder) == before
    return line


def test_model_dir_of_another_phase(toys):
    line = refused(toys.reward, toy('sft', toys.reward))
    assert str(toys.reward) in line and 'another phase (reward, now sft)' in line and 'name another folder' in line


def test_model_dir_of_another_tuning(toys):
    line = refused(toys.sft, toy('sft', toys.sft, LORA))
    assert str(toys.sft) in line and 'another tuning (full, now lora)' in line


def test_model_dir_of_another_base(toys):
    line = refused(toys.sft, toy('sft', toys.sft, '--gin.RANDOM_SEED=1'))
    assert str(toys.sft) in line and 'another base (random:0 ' in line and 'now random:1 ' in line


def test_model_dir_of_another_rank(toys):
    argv = toy('reward', toys.reward, *toys.sources[:1], '--gin.lora.LoraSpec.rank=3')
    assert 'another trainable_parameters' in refused(toys.reward, argv)


def test_model_dir_of_another_alpha(toys):
    argv = toy('reward', toys.reward, *toys.sources[:1], '--gin.lora.LoraSpec.alpha=64')
    assert 'set LoraSpec.alpha as it was' in refused(toys.reward, argv)


@pytest.mark.parametrize('folder', ['file', 'file/run', '/proc/run'])
def test_model_dir_that_cannot_be(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    pathlib.Path('file').write_text('mine')
    line = perl(*toy('sft', folder)).line
    assert re.search(f"(File exists|Not a directory|No such file or directory): '{folder}", line)
    assert pathlib.Path('file').read_text() == 'mine'


def test_model_dir_with_checkpoints_of_nobody(tmp_path):
    (tmp_path / 'checkpoints/3').mkdir(parents=True)
    assert 'has checkpoints but no run.json' in refused(tmp_path, toy('sft', tmp_path))


def test_model_dir_with_a_run_json_that_is_none(tmp_path):
    (tmp_path / 'run.json').write_text('{"phase": "sf')
    assert 'run.json' in refused(tmp_path, toy('sft', tmp_path))


def test_a_policy_does_not_start_from_a_reward(toys, tmp_path):
    argv = toy('policy', tmp_path / 'run', *toys.sources, quoted('INITIAL_CHECKPOINT_PATH', toys.reward))
    line = refused(toys.reward, argv)
    assert f"INITIAL_CHECKPOINT_PATH: '{toys.reward}' is a run of reward; name one of sft" in line
    assert not (tmp_path / 'run').exists()


def test_a_policy_is_not_judged_by_an_sft_run(toys, tmp_path):
    line = refused(toys.sft, toy('policy', tmp_path / 'run', *toys.sources, quoted('REWARD_MODEL_DIR', toys.sft)))
    assert f"'{toys.sft}' is a run of sft; name one of reward" in line
    assert not (tmp_path / 'run').exists()


def test_a_reward_that_is_no_run(toys, tmp_path):
    (tmp_path / 'empty').mkdir()
    for folder in tmp_path / 'none', tmp_path / 'empty':
        line = perl(*toy('policy', tmp_path / 'run', *toys.sources, quoted('REWARD_MODEL_DIR', folder))).line
        assert f"'{folder}' is not the MODEL_DIR of a run" in line
    assert not (tmp_path / 'run').exists()


def test_a_run_that_has_learned_nothing_yet(toys, tmp_path):
    (tmp_path / 'sft/checkpoints').mkdir(parents=True)
    (tmp_path / 'sft/run.json').write_text((toys.sft / 'run.json').read_text())
    argv = toy('reward', tmp_path / 'run', quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'sft'))
    assert f"INITIAL_CHECKPOINT_PATH: '{tmp_path / 'sft'}' has no checkpoint yet" in perl(*argv).line
    assert not (tmp_path / 'run').exists()


def test_a_base_of_another_shape(toys, tmp_path):
    argv = toy('reward', tmp_path / 'run', *toys.sources[:1], '--gin.decoder.DecoderConfig.mlp_dim=8')
    line = perl(*argv).line
    assert f"'{toys.sft}' is of another network: mlp_dim is 192 there and 8 here" in line
    assert not (tmp_path / 'run').exists()


def test_a_task_that_is_for_no_reward(toys, tmp_path):
    argv = toy('reward', tmp_path / 'run', *toys.sources[:1], "--gin.MIXTURE_OR_TASK_NAME='toy_sft'")
    line = perl(*argv).line
    assert "'toy_sft'" in line and 'chosen and rejected' in line and 'label' in line
    assert not (tmp_path / 'run').exists()


def test_a_reward_gives_no_answers(toys):
    assert 'is a run of reward' in refused(toys.reward, ['sample', f'--model_dir={toys.reward}'])


def test_eval_of_a_split_that_does_not_exist(toys):
    assert "no split 'half'" in refused(toys.sft, ['eval', f'--model_dir={toys.sft}', '--split=half'])


# Checkpoints that are cut short.


def truncated(folder, copy):
    """A copy of a run with every array of its latest checkpoint cut in half."""
    shutil.copytree(folder, copy)
    checkpoint = copy / 'checkpoints' / str(steps(copy)[-1])
    for path in (checkpoint / 'state').rglob('*'):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    return checkpoint


def test_a_truncated_checkpoint_of_the_run_itself(toys, tmp_path):
    broken = truncated(toys.sft, tmp_path / 'sft')
    line = refused(tmp_path / 'sft', toy('sft', tmp_path / 'sft', '--gin.TRAIN_STEPS=8'))
    assert f'checkpoint {broken} cannot be read' in line and line.endswith('or move it elsewhere, and step 4 is used')


def test_a_truncated_checkpoint_of_the_base(toys, tmp_path):
    broken = truncated(toys.sft, tmp_path / 'sft')
    argv = toy('reward', tmp_path / 'run', quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'sft'))
    assert f'checkpoint {broken} cannot be read' in refused(tmp_path / 'sft', argv)
    assert not (tmp_path / 'run').exists()


def test_a_truncated_checkpoint_of_the_reward(toys, tmp_path):
    truncated(toys.reward, tmp_path / 'reward')
    for folder in (tmp_path / 'reward/checkpoints').iterdir():  # the best one may be another than the latest
        if folder.name != str(steps(tmp_path / 'reward')[-1]):
            shutil.rmtree(folder)
    argv = toy('policy', tmp_path / 'run', *toys.sources, quoted('REWARD_MODEL_DIR', tmp_path / 'reward'))
    assert f'checkpoint {tmp_path}/reward/checkpoints/6 cannot be read' in refused(tmp_path / 'reward', argv)
    assert not (tmp_path / 'run').exists()


# Data.


def rated(bad, total):
    """A reward file of Taskmaster with `bad` of its rows broken."""
    turns = lambda i: [{'role': 'user', 'text': f'coffee number {i} please'}]  # noqa: E731
    good = [
        {
            'context': json.dumps(turns(i)),
            'generation': json.dumps({'role': 'agent', 'text': 'which size?'}),
            'reward': i % 2,
            'conversation_id': f'dlg-{i}',
        }
        for i in range(total)
    ]
    for row in good[:bad]:
        row['context'] = row['context'][:-2]
    return good


@pytest.fixture
def taskmaster(tmp_path, monkeypatch):
    """Writes a reward file where the tasks look for it."""
    folder = tmp_path / 'Taskmaster/TM-4-2024/reward'
    folder.mkdir(parents=True)
    monkeypatch.setenv('TASKMASTER_DIR', str(tmp_path / 'Taskmaster'))
    return (folder / 'reward_00.json').write_text


def reward_of_taskmaster(toys, folder):
    return toy(
        'reward', folder, *toys.sources[:1], '--gin_bindings=import perl_jax.tasks.taskmaster',
        "--gin.MIXTURE_OR_TASK_NAME='taskmaster_coffee_thumbs'",
    )  # fmt: skip


def test_too_many_malformed_rows_stop_a_run(toys, taskmaster, tmp_path):
    taskmaster(json.dumps(rated(2, 100)))
    line = perl(*reward_of_taskmaster(toys, tmp_path / 'run')).line
    assert '2 of 100 rows cannot be read: reward_00.json row 1, reward_00.json row 2 (the first: ' in line
    assert 'more than 1% is too many: mend the data' in line
    assert not (tmp_path / 'run').exists()


def test_a_few_malformed_rows_are_counted_and_named(taskmaster):
    taskmaster(json.dumps(rated(2, 300)))
    result = ran('inspect', '--task=taskmaster_coffee_thumbs', '--num=0')
    assert '2 of 300 rows cannot be read: reward_00.json row 1, reward_00.json row 2 (the first: ' in result.err
    assert 'left out' in result.err and 'examples, ByteVocabulary' in result.out


def test_a_file_that_is_no_json(toys, taskmaster, tmp_path):
    taskmaster(json.dumps(rated(0, 100))[:-5])
    line = perl(*reward_of_taskmaster(toys, tmp_path / 'run')).line
    assert 'reward_00.json: not JSON' in line
    assert not (tmp_path / 'run').exists()


def test_data_that_are_not_there(toys, tmp_path, monkeypatch):
    monkeypatch.delenv('TASKMASTER_DIR', raising=False)
    assert 'TASKMASTER_DIR is not set' in perl(*reward_of_taskmaster(toys, tmp_path / 'run')).line
    monkeypatch.setenv('TASKMASTER_DIR', str(tmp_path))
    assert f'TASKMASTER_DIR={tmp_path} holds no' in perl(*reward_of_taskmaster(toys, tmp_path / 'run')).line
    assert not (tmp_path / 'run').exists()


TASKS = """
from perl_jax.tasks import registration, toy

def examples(texts):
    return lambda split: ({'inputs': 'user: a latte\\n', 'targets': text} for text in texts)

right, long = 'call: add_order_item(item=latte)', ' latte' * 30
for name, texts in {
    'odd_empty': [right] * 9 + [''], 'odd_long': [right] * 9 + [long], 'odd_none': [],
    'odd_few': [right] * 58 + ['', long],
}.items():
    registration.add(name, 'sft', examples(texts), vocabulary=toy.vocabulary())
"""


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A user's module of tasks with odd examples, in the current folder."""
    (tmp_path / 'odd_tasks.py').write_text(TASKS)
    monkeypatch.chdir(tmp_path)
    return lambda name: toy('sft', 'run', '--gin_bindings=import odd_tasks', quoted('MIXTURE_OR_TASK_NAME', name))


@pytest.mark.parametrize(('name', 'words'), [
    ('odd_empty', ['odd_empty (train): 1 of 10 examples', 'example 9 has empty targets', '5%']),
    ('odd_long', ['odd_long (train): 1 of 10 examples', 'example 9 has 31 tokens of targets, more than the 24', '5%']),
    ('odd_none', ['odd_none', 'no examples']),
])  # fmt: skip
def test_examples_that_are_empty_or_too_long(odd, name, words, tmp_path):
    line = perl(*odd(name)).line
    assert all(word in line for word in words), line
    assert not (tmp_path / 'run').exists()


def test_a_few_odd_examples_are_counted_and_dropped(odd, tmp_path):
    result = ran(*odd('odd_few'), '--gin.TRAIN_STEPS=1', '--gin.PROMPTS_DATASET=None', '--gin.EVAL_EXAMPLES=None')
    assert 'perl_jax: odd_few (train): 2 of 60 examples dropped; example 58 has empty targets' in result.err
    assert 'perl_jax: odd_few (validation): 2 of 60 examples dropped' in result.err
    assert steps(tmp_path / 'run') == [1]


# A run that goes wrong.


@pytest.mark.parametrize('period', [1, 2])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    toys, period, tmp_path, monkeypatch
):
    """Even if it is the loss after the next checkpoint that would show it."""
    folder = shutil.copytree(toys.sft, tmp_path / 'sft')
    argv = toy('sft', folder, f'--gin.EVAL_PERIOD={period}', '--gin.TRAIN_STEPS=10')
    good, lines = state(folder), rows(folder)
    with monkeypatch.context() as patch:
        patch.setattr(configurables, '_OPTIMIZERS', {})  # which would refuse the rate
        line = perl(*argv, '--gin.LEARNING_RATE=1e30').line
    assert str(folder) in line and ('nan' in line or 'inf' in line) and 'lower the learning rate' in line
    now = state(folder)
    assert steps(folder)[-1] == 6 and all((now[path] == x).all() for path, x in good.items())
    assert all(math.isfinite(v) for row in rows(folder) for k, v in row.items() if k != 'phase')
    assert json.loads((folder / 'run.json').read_text())['finished'] is None
    ran(*argv)  # with a sane rate it goes on
    assert rows(folder)[: len(lines)] == lines and steps(folder)[-1] == 10
    assert json.loads((folder / 'run.json').read_text())['finished']


def test_a_batch_that_does_not_divide_over_the_mesh(tmp_path):
    """In a process of its own: there, stderr holds that line and nothing of the libraries'."""
    flags = '--xla_force_host_platform_device_count=8'
    argv = toy('sft', tmp_path / 'run', '--gin.BATCH_SIZE=12')
    result = subprocess.run(
        [sys.executable, '-m', 'perl_jax', *argv], cwd=ROOT, env=os.environ | ENVIRONMENT | {'XLA_FLAGS': flags},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and not result.stdout
    want = 'perl_jax: BATCH_SIZE = 12 is not divisible by the data-parallel size 8; use a multiple of 8\n'
    assert result.stderr == want
    assert not (tmp_path / 'run').exists()


def test_what_a_chat_template_refuses_is_one_line_of_the_command(tmp_path, monkeypatch):
    """The template is called inside tf.data, which wraps what it raises."""
    from test_tokenizers import write_json

    write_json(tmp_path)
    refuse = "{% if 'b' in messages[0].content %}{{ raise_exception('No b') }}{% endif %}x"
    (tmp_path / 'chat_template.jinja').write_text(refuse)
    (tmp_path / 'refusing.py').write_text(
        'from perl_jax.tokenizers.chat.template import Template\n'
        'from perl_jax.tasks import preprocessors, registration\n'
        f'wrap = preprocessors.chat(Template({str(tmp_path)!r}))\n'
        "registration.add('refusing_prompts', 'prompts', lambda split: [{'inputs': 'b'}], preprocessors=[wrap])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = perl('inspect', '--task=refusing_prompts', '--module=refusing')
    assert result.line.endswith('chat_template.jinja: the chat template refuses this conversation: No b')
