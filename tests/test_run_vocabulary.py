"""The base's own tokenizer goes through sft, reward, policy, eval, sample, judge and inspect, by the command line."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import dataclasses
import json
import os
import pathlib
import shutil

import pytest

pytest.importorskip('tokenizers')
pytest.importorskip('gguf')
import seqio
import tiny
import tiny_gguf
from test_tokenizers import write_json
from toy_runs import contents, perl, quoted, ran, toys  # noqa: F401

from perl_jax.data import datasets, lexicon, texts, vocabulary
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.interop import hf
from perl_jax.models.decoder import Decoder
from perl_jax.tasks import registration
from perl_jax.tasks import toy as toy_tasks

pytestmark = pytest.mark.slow

T5X = pathlib.Path(os.environ.get('PERL_JAX_DATA', pathlib.Path(__file__).parents[2] / 'shared/data')) / 't5x_tiny'
# One token each, hello and wo, in the base's vocabulary; five and two bytes in the task's.
ROWS = [{'inputs': 'hello ' * (1 + i % 3), 'good': 'hello', 'bad': 'wo wo'} for i in range(12)]


def _register(prefix, **options):
    for kind, fields in {
        'sft': {'targets': 'good'}, 'pairs': {'chosen': 'good', 'rejected': 'bad'}, 'prompts': {'reference': 'good'},
    }.items():  # fmt: skip
        rows = [{'inputs': row['inputs']} | {key: row[name] for key, name in fields.items()} for row in ROWS]
        registration.add(f'{prefix}_{kind}', kind, lambda split, rows=rows: rows, **options)


_register('plain')  # as a user's task that names no vocabulary
_register('own', vocabulary=seqio.ByteVocabulary())
_register('toyish', vocabulary=toy_tasks.vocabulary())

KINDS = {'sft': 'sft', 'reward': 'pairs', 'policy': 'prompts'}
SMALL = ['--gin.TRAIN_STEPS=1', '--gin.EVAL_PERIOD=1', '--gin.BATCH_SIZE=2', '--gin.EVAL_EXAMPLES=2']


def sizes(config):
    """A gin file's lines for a decoder."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    given = {k: v for k, v in fields.items() if isinstance(v, bool | int | float | str)}
    lines = ['NETWORK = @decoder.Decoder()', 'decoder.Decoder.config = @decoder.DecoderConfig()']
    return '\n'.join(lines + [f'decoder.DecoderConfig.{k} = {v!r}' for k, v in given.items()])


def command(phase, model_dir, *flags, task='plain', lengths="{'inputs': 8, 'targets': 6}"):
    folder = pathlib.Path(model_dir).parent
    (folder / 'tiny.gin').write_text(sizes(tiny_gguf.CONFIG))
    return [
        phase, f'--gin_file={folder}/tiny.gin', f'--gin_file=runs/{phase}.gin', quoted('MODEL_DIR', model_dir),
        quoted('MIXTURE_OR_TASK_NAME', f'{task}_{KINDS[phase]}'), f'--gin.TASK_FEATURE_LENGTHS={lengths}', *SMALL,
        *(['--gin.MAX_DECODE_LENGTH=4', '--gin.NUM_SAMPLES=2'] if phase == 'policy' else []), *flags,
    ]  # fmt: skip


def sampled(phase='sft'):
    """The flags with which an SFT run can be asked."""
    return [quoted('PROMPTS_TASK_NAME', 'plain_prompts'), '--gin.PROMPTS_DATASET=@prompts/data.DatasetConfig()',
            '--gin.sampling.SamplingConfig.max_decode_length=4']  # fmt: skip


def hf_folder(path, tokenizer=True):
    """A tiny Llama as Hugging Face lays it out."""
    path.mkdir()
    network = Decoder(tiny_gguf.CONFIG)
    hf.save(str(path), network, tiny.base(network), 'float32')
    if tokenizer:
        write_json(path)
    return path


def about(model_dir):
    return json.loads((pathlib.Path(model_dir) / 'run.json').read_text())


def config_of(model_dir):
    return (pathlib.Path(model_dir) / 'config.gin').read_text()


@pytest.fixture(scope='module')
def chain(tmp_path_factory):
    """weights -> sft -> reward -> policy; no command says VOCABULARY."""
    folder = tmp_path_factory.mktemp('chain')
    weights = hf_folder(folder / 'weights')
    results = {'sft': ran(*command('sft', folder / 'sft', quoted('INITIAL_CHECKPOINT_PATH', weights), *sampled()))}
    start = quoted('INITIAL_CHECKPOINT_PATH', folder / 'sft')
    results['reward'] = ran(*command('reward', folder / 'reward', start))
    judge = quoted('REWARD_MODEL_DIR', folder / 'reward')
    results['policy'] = ran(*command('policy', folder / 'policy', start, judge))
    return folder, results


PHASES = pytest.mark.parametrize('phase', KINDS)


@PHASES
def test_the_bases_own_tokenizer_is_read_with_and_recorded(chain, phase):
    folder, results = chain
    weights = str(folder / 'weights')
    assert about(folder / phase)['vocabulary'] == weights
    first = results[phase].err.splitlines()[0]
    base = weights if phase == 'sft' else folder / 'sft'
    assert first.startswith(f'perl_jax: {phase}: base {base}, vocabulary {weights} (268 tokens, EOS')
    assert "'<|im_end|>'" in first


@PHASES
def test_config_gin_names_what_was_used(chain, phase, tmp_path):
    """Read as it is, it gives the same run again."""
    folder, _ = chain
    config = config_of(folder / phase)
    assert f"VOCABULARY = \\\n    '{folder}/weights'" in config or f"VOCABULARY = '{folder}/weights'" in config
    assert 'DatasetConfig.vocabulary = %VOCABULARY' in config and 'vocabulary = None' not in config
    (tmp_path / 'config.gin').write_text(config)
    ran(phase, f'--gin_file={tmp_path}/config.gin', quoted('MODEL_DIR', tmp_path / 'again'))
    assert about(tmp_path / 'again')['vocabulary'] == str(folder / 'weights')
    lines = [(path / 'metrics.jsonl').read_text() for path in (folder / phase, tmp_path / 'again')]
    first, second = ([json.loads(x) for x in text.splitlines()] for text in lines)
    drop = lambda rows: [{k: v for k, v in row.items() if 'throughput' not in k} for row in rows]  # noqa: E731
    assert drop(first) == drop(second)


def test_finished_runs_are_asked_and_measured_with_it(chain, monkeypatch):
    folder, _ = chain
    seen, load = [], datasets._load_task
    note = lambda task, config, kind: seen.append(config.vocabulary) or load(task, config, kind)  # noqa: E731
    monkeypatch.setattr(datasets, '_load_task', note)
    for name in ('sft', 'reward', 'policy'):
        ran('eval', f'--model_dir={folder / name}', '--split=test')
    ran('sample', f'--model_dir={folder}/policy', '--num=2')
    ran('judge', f'--model_dir={folder}/policy', '--against=sft', f'--judge={folder}/reward', '--num=2')
    assert len(seen) == 6 and all(lexicon.eos_ids(v)[0] == 2 and v.vocab_size == 268 for v in seen)


def test_a_prompt_that_is_typed_in_and_a_text_that_is_judged_are_read_with_it(chain, monkeypatch):
    folder, _ = chain
    seen, dataset = [], texts.dataset

    def noted(words, *args):
        seen.append(words)
        return dataset(words, *args)

    monkeypatch.setattr(texts, 'dataset', noted)
    ran('sample', f'--model_dir={folder}/policy', '--prompt=hello hello')
    ran('judge', f'--model_dir={folder}/policy', '--against=sft', f'--judge={folder}/reward', '--num=2')
    perl('judge', f'--model_dir={folder}/policy', f'--judge={folder}/sft', '--rubric=harmless', '--num=2')
    assert len(seen) == 3 and all(words.vocab_size == 268 for words in seen)


def test_inspect_counts_with_a_runs_or_a_bases_vocabulary(chain):
    folder, _ = chain
    for name in ('weights', 'weights/tokenizer.json', 'sft', 'policy'):
        out = ran('inspect', '--task=plain_sft', f'--vocabulary={folder / name}').out
        assert 'targets (2 tokens' in out and '(268 tokens, EOS' in out  # hello and EOS
    assert 'targets (6 tokens' in ran('inspect', '--task=plain_sft').out


def test_a_task_that_names_a_vocabulary_is_read_with_the_bases_too(chain, tmp_path):
    folder, _ = chain
    start = quoted('INITIAL_CHECKPOINT_PATH', folder / 'weights')
    for task in ('own', 'toyish'):
        ran(*command('sft', tmp_path / task, start, task=task))
        assert about(tmp_path / task)['vocabulary'] == str(folder / 'weights')


def test_the_ggufs_own_tokenizer_is_read_with(tmp_path):
    path = tiny_gguf.write(tmp_path / 'tiny.gguf')
    ran(*command('sft', tmp_path / 'sft', quoted('INITIAL_CHECKPOINT_PATH', path)))
    assert about(tmp_path / 'sft')['vocabulary'] == str(path)
    ran(*command('reward', tmp_path / 'reward', quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'sft')))
    assert about(tmp_path / 'reward')['vocabulary'] == str(path)


def test_what_is_set_comes_before_all_else_and_is_inherited(chain, tmp_path, monkeypatch):
    folder, _ = chain
    start = quoted('INITIAL_CHECKPOINT_PATH', folder / 'weights')
    ran(*command('sft', tmp_path / 'sft', start, quoted('VOCABULARY', 'byt5')))
    assert about(tmp_path / 'sft')['vocabulary'] == 'byt5'
    assert "VOCABULARY = 'byt5'" in config_of(tmp_path / 'sft')
    ran(*command('reward', tmp_path / 'reward', quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'sft')))
    assert about(tmp_path / 'reward')['vocabulary'] == 'byt5'
    monkeypatch.chdir(folder)  # a path that is typed in another folder
    ran(*command('reward', tmp_path / 'other', quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'sft'),
                 quoted('VOCABULARY', 'weights/tokenizer.json')))  # fmt: skip
    assert about(tmp_path / 'other')['vocabulary'] == f'{folder}/weights/tokenizer.json'
    monkeypatch.chdir(tmp_path)
    ran('eval', f'--model_dir={tmp_path}/other', '--split=test')


def test_an_eos_that_is_chosen_is_inherited_too(chain, tmp_path):
    folder, _ = chain
    flags = ['--gin.VOCABULARY=@tokenizers.TokenizersVocabulary()',
             quoted('tokenizers.TokenizersVocabulary.path', folder / 'weights/tokenizer.json'),
             quoted('tokenizers.TokenizersVocabulary.eos', '<|im_start|>')]  # fmt: skip
    ran(*command('sft', tmp_path / 'sft', quoted('INITIAL_CHECKPOINT_PATH', folder / 'weights'), *flags))
    ran(*command('reward', tmp_path / 'reward', quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'sft')))
    for name in ('sft', 'reward'):
        assert about(tmp_path / name)['vocabulary'] == f'{folder}/weights/tokenizer.json eos=<|im_start|>'
    assert vocabulary.from_name(about(tmp_path / 'reward')['vocabulary']).vocabulary.eos_id == 1
    ran('eval', f'--model_dir={tmp_path}/reward', '--split=test')


def test_an_import_records_what_its_input_brings(chain, tmp_path):
    folder, _ = chain
    gin = f'--gin_file={folder}/tiny.gin'
    ran('import', '--format=hf', f'--input={folder}/weights', f'--model_dir={tmp_path}/theirs', gin)
    assert about(tmp_path / 'theirs')['vocabulary'] == f'{folder}/weights'
    ran(*command('reward', tmp_path / 'reward', quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'theirs')))
    assert about(tmp_path / 'reward')['vocabulary'] == f'{folder}/weights'
    ran('export', f'--model_dir={folder}/sft', '--format=peft', f'--output={tmp_path}/adapter')
    base = quoted('INITIAL_CHECKPOINT_PATH', folder / 'weights')
    ran('import', '--format=peft', f'--input={tmp_path}/adapter', f'--model_dir={tmp_path}/peft', gin, base)
    assert about(tmp_path / 'peft')['vocabulary'] == f'{folder}/weights'
    asked = ran('inspect', '--task=plain_sft', f'--vocabulary={tmp_path}/peft').out
    assert 'targets (2 tokens' in asked


def test_an_average_keeps_it_and_takes_runs_of_one_alone(chain, tmp_path):
    folder, _ = chain
    ran('average', f'--model_dirs={folder}/reward,{folder}/reward', f'--model_dir={tmp_path}/mean')
    assert about(tmp_path / 'mean')['vocabulary'] == f'{folder}/weights'
    start = quoted('INITIAL_CHECKPOINT_PATH', folder / 'sft')
    ran(*command('reward', tmp_path / 'bytes', start, quoted('VOCABULARY', 'byt5')))
    argv = ['average', f'--model_dirs={folder}/reward,{tmp_path}/bytes', f'--model_dir={tmp_path}/both']
    assert 'has another vocabulary' in perl(*argv).line


def test_a_reward_of_another_vocabulary_does_not_judge_a_policy(chain, tmp_path):
    """It is given the policy's tokens, and would take them for its own."""
    folder, _ = chain
    start = quoted('INITIAL_CHECKPOINT_PATH', folder / 'sft')
    ran(*command('reward', tmp_path / 'bytes', start, quoted('VOCABULARY', 'byt5')))
    line = perl(*command('policy', tmp_path / 'policy', start, quoted('REWARD_MODEL_DIR', tmp_path / 'bytes'))).line
    assert f"'{tmp_path}/bytes' was trained with the vocabulary 'byt5'" in line and f'{folder}/weights' in line
    assert not (tmp_path / 'policy').exists()


# Weights that bring none.


def test_weights_without_a_tokenizer_take_no_default(tmp_path):
    weights = hf_folder(tmp_path / 'weights', tokenizer=False)
    start = quoted('INITIAL_CHECKPOINT_PATH', weights)
    line = perl(*command('sft', tmp_path / 'sft', start)).line
    assert f"'{weights}' has no tokenizer" in line and "'plain_sft'" in line and "VOCABULARY = 'byt5'" in line
    assert not (tmp_path / 'sft').exists()
    ran(*command('sft', tmp_path / 'own', start, task='own'))  # somebody named it
    assert about(tmp_path / 'own')['vocabulary'] == 'byt5'
    ran(*command('sft', tmp_path / 'set', start, quoted('VOCABULARY', 'byt5')))


@pytest.mark.skipif(not T5X.is_dir(), reason='needs t5x_tiny/ in ../shared/data or PERL_JAX_DATA')
def test_a_t5x_checkpoint_brings_none(tmp_path):
    start = [quoted('INITIAL_CHECKPOINT_PATH', T5X / 'orbax/checkpoint_20')]
    line = perl(*command('sft', tmp_path / 'sft', *start)).line
    assert 't5x_tiny' in line and 'has no tokenizer' in line and 'VOCABULARY' in line
    assert not (tmp_path / 'sft').exists()


def test_an_old_run_on_weights_that_bring_none_is_no_better(chain, tmp_path):
    """Before run.json named it; a run on Hugging Face's weights leads to their tokenizer."""
    folder, _ = chain
    old = shutil.copytree(folder / 'sft', tmp_path / 'old')
    written = about(old)
    del written['vocabulary']
    (old / 'run.json').write_text(json.dumps(written))
    start = quoted('INITIAL_CHECKPOINT_PATH', old)
    ran(*command('reward', tmp_path / 'reward', start))
    assert about(tmp_path / 'reward')['vocabulary'] == f'{folder}/weights'
    (old / 'run.json').write_text(json.dumps(written | {'base': written['base'] | {'path': '/no/such/model'}}))
    line = perl(*command('reward', tmp_path / 'other', start)).line
    assert "'/no/such/model' has no tokenizer" in line


def test_random_weights_take_the_tasks_own(toys, tmp_path):
    for run in (toys.sft, toys.reward, toys.policy):
        assert about(run)['vocabulary'] == 'task:toy_sft'
        assert 'VOCABULARY = None' in config_of(run)
    ran(*command('sft', tmp_path / 'bytes'))
    assert about(tmp_path / 'bytes')['vocabulary'] == 'byt5'
    out = ran('inspect', '--task=toy_pairs', f'--vocabulary={toys.sft}').out
    assert 'WordVocabulary task:toy_sft (' in out


def test_tasks_of_two_vocabularies_are_not_read_as_one(tmp_path):
    flags = [quoted('eval/data.DatasetConfig.mixture_or_task_name', 'toyish_sft')]
    line = perl(*command('sft', tmp_path / 'run', *flags)).line
    assert "'plain_sft'" in line and "'toyish_sft'" in line and 'set VOCABULARY' in line
    flags = [quoted('eval/data.DatasetConfig.vocabulary', 'byt5'),
             quoted('train/data.DatasetConfig.vocabulary', 'task:toy_sft')]  # fmt: skip
    line = perl(*command('sft', tmp_path / 'run', *flags)).line
    assert "'byt5'" in line and "'task:toy_sft'" in line and 'set VOCABULARY' in line


# Going on.


def test_a_run_goes_on_with_its_vocabulary_alone(chain, tmp_path):
    folder, _ = chain
    run, start = tmp_path / 'sft', quoted('INITIAL_CHECKPOINT_PATH', folder / 'weights')
    ran(*command('sft', run, start))
    before = contents(run)
    line = perl(*command('sft', run, start, quoted('VOCABULARY', 'byt5'), '--gin.TRAIN_STEPS=2')).line
    assert 'another vocabulary' in line and f'{folder}/weights' in line and 'byt5' in line
    assert contents(run) == before
    ran(*command('sft', run, start, quoted('VOCABULARY', folder / 'weights'), '--gin.TRAIN_STEPS=2'))


def test_a_run_goes_on_where_its_base_has_moved(chain, tmp_path):
    folder, _ = chain
    shutil.copytree(folder / 'weights', tmp_path / 'one')
    ran(*command('sft', tmp_path / 'sft', quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'one'), *sampled()))
    (tmp_path / 'one').rename(tmp_path / 'two')
    moved = quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'two')
    ran('eval', f'--model_dir={tmp_path}/sft', '--split=test', moved)
    ran(*command('sft', tmp_path / 'sft', moved, *sampled(), '--gin.TRAIN_STEPS=2'))
    assert about(tmp_path / 'sft')['vocabulary'] == str(tmp_path / 'two')


def test_a_run_that_an_older_version_began_goes_on_as_it_was(chain, tmp_path):
    folder, _ = chain
    start = quoted('INITIAL_CHECKPOINT_PATH', folder / 'weights')
    ran(*command('sft', tmp_path / 'sft', start, quoted('VOCABULARY', 'byt5'), *sampled()))
    written = about(tmp_path / 'sft')
    del written['vocabulary']
    (tmp_path / 'sft/run.json').write_text(json.dumps(written))
    config = tmp_path / 'sft/config.gin'
    config.write_text(config.read_text().replace("VOCABULARY = 'byt5'", 'VOCABULARY = None'))  # bytes, and silent
    ran('eval', f'--model_dir={tmp_path}/sft', '--split=test')
    ran(*command('sft', tmp_path / 'sft', start, '--gin.TRAIN_STEPS=2', *sampled()))
    assert about(tmp_path / 'sft')['vocabulary'] == 'byt5'


def test_a_tokenizer_that_is_gone_is_named(chain, tmp_path):
    folder, _ = chain
    shutil.copy(folder / 'weights/tokenizer.json', tmp_path)
    shutil.copy(folder / 'weights/tokenizer_config.json', tmp_path)
    start = quoted('INITIAL_CHECKPOINT_PATH', folder / 'weights')
    ran(*command('sft', tmp_path / 'sft', start, quoted('VOCABULARY', tmp_path / 'tokenizer.json'), *sampled()))
    (tmp_path / 'tokenizer.json').unlink()
    line = perl(*command('reward', tmp_path / 'reward', quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'sft'))).line
    assert all(word in line for word in (f'{tmp_path}/tokenizer.json', f'{tmp_path}/sft', 'set VOCABULARY'))


def test_too_many_dropped_examples_name_the_vocabulary_that_counted(chain, tmp_path):
    folder, _ = chain
    start = quoted('INITIAL_CHECKPOINT_PATH', folder / 'weights')
    lengths = "{'inputs': 8, 'targets': 3}"
    line = perl(*command('sft', tmp_path / 'a', start, quoted('VOCABULARY', 'byt5'), lengths=lengths)).line
    assert '12 of 12 examples dropped; example 0 has 6 tokens of targets' in line and "'byt5'" in line
    ran(*command('sft', tmp_path / 'b', start, lengths=lengths))
    line = perl(*command('sft', tmp_path / 'c', start, lengths="{'inputs': 8, 'targets': 1}")).line
    assert f'{folder}/weights' in line


# Whoever calls the library.


def test_choose_without_a_command_line(chain, tmp_path):
    folder, _ = chain
    config = DatasetConfig('plain_sft', {'inputs': 8, 'targets': 6}, 2)
    for base in ('weights', 'sft', 'policy'):
        words, (read, none) = vocabulary.choose([config, None], str(folder / base), str(tmp_path / 'new'))
        assert words.name == str(folder / 'weights') and read.vocabulary is words.vocabulary and none is None
        assert datasets.load(read, 'sft').eos_ids[0] == 2
    with pytest.raises(UserError, match="one data set and 'byt5' for another"):
        two = [dataclasses.replace(config, vocabulary=v) for v in (str(folder / 'weights'), seqio.ByteVocabulary())]
        vocabulary.choose(two, None, str(tmp_path / 'new'))


def test_a_vocabulary_by_any_name_is_called_by_the_one_that_finds_it(chain):
    folder, _ = chain
    path = f'{folder}/weights/tokenizer.json'
    assert lexicon.name_of(seqio.ByteVocabulary()) == 'byt5'
    assert lexicon.name_of(lexicon.from_name(path)) == path
    assert lexicon.name_of(lexicon.from_name(f'{path} eos=<|im_start|>')) == f'{path} eos=<|im_start|>'
    assert lexicon.name_of(toy_tasks.vocabulary(), 'toy_sft') == 'task:toy_sft'
    with pytest.raises(UserError, match="'byt5 eos=x': only a tokenizer.json or a .gguf can be given another EOS"):
        lexicon.from_name('byt5 eos=x')


# Without a data set.

DATA = ['--gin.EVAL_DATASET=@eval/data.DatasetConfig()', quoted('MIXTURE_OR_TASK_NAME', 'plain_prompts'),
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 8}"]  # fmt: skip
SHORT = '--gin.sampling.SamplingConfig.max_decode_length=4'


def test_an_imported_model_is_asked_and_measured(chain, tmp_path):
    folder, _ = chain
    model = tmp_path / 'theirs'
    ran('import', '--format=hf', f'--input={folder}/weights', f'--model_dir={model}', f'--gin_file={folder}/tiny.gin')
    assert about(model)['vocabulary_fingerprint'] == about(folder / 'sft')['vocabulary_fingerprint']
    ask = 'sample', f'--model_dir={model}', SHORT
    assert ran(*ask, '--prompt=hello wo').out.startswith('hello wo')
    assert len(ran(*ask, '--num=2', *DATA).out.split('\n\n')) == 3
    ran('eval', f'--model_dir={model}', SHORT, '--split=test', *DATA)
    assert (model / 'eval_test.json').exists()
    assert 'set MIXTURE_OR_TASK_NAME' in perl(*ask, DATA[0]).line
    for command in ('eval', 'sample'):
        line = perl(command, f'--model_dir={model}').line
        assert '--gin.EVAL_DATASET=@eval/data.DatasetConfig()' in line and 'MIXTURE_OR_TASK_NAME' in line


def test_an_imported_model_without_tokenizer_is_asked_with_one_that_is_named(chain, tmp_path):
    folder, _ = chain
    weights, model = hf_folder(tmp_path / 'weights', tokenizer=False), tmp_path / 'theirs'
    ran('import', '--format=hf', f'--input={weights}', f'--model_dir={model}', f'--gin_file={folder}/tiny.gin')
    ask = 'sample', f'--model_dir={model}', '--prompt=hello', SHORT
    assert f"'{weights}' has no tokenizer; set VOCABULARY" in perl(*ask).line
    assert ran(*ask, quoted('VOCABULARY', 'byt5')).out.startswith('hello')


def test_a_prompt_that_is_typed_in_needs_no_data_and_is_not_cut(chain, monkeypatch):
    folder, _ = chain
    seen, dataset = [], texts.dataset
    monkeypatch.setattr(texts, 'dataset', lambda *args: seen.append(dataset(*args)) or seen[-1])
    ask = 'sample', f'--model_dir={folder}/sft', '--gin.PROMPTS_DATASET=None'
    ran(*ask, f'--prompt={"hello" * 20}')
    ran(*ask, '--prompt=hello', quoted('VOCABULARY', 'byt5'))
    assert [(int(x.arrays['inputs_mask'].sum()), x.eos_ids[0]) for x in seen] == [(20, 2), (5, 1)]
    assert 'the run has no evaluation data' in perl(*ask).line


def test_an_empty_name_is_not_the_folder_one_stands_in(chain, monkeypatch):
    folder, _ = chain
    monkeypatch.chdir(folder / 'weights')
    assert "VOCABULARY = ''" in perl('inspect', '--task=plain_sft', '--vocabulary=').line
    judged = perl('judge', f'--model_dir={folder}/policy', f'--judge={folder}/sft', '--rubric=harmless',
                  '--judge_vocabulary=', '--num=2')  # fmt: skip
    assert judged.code == 2 and "VOCABULARY = ''" in judged.err.splitlines()[-1]


# Chats.


def test_a_prompt_is_put_into_a_chat_format(chain):
    folder, _ = chain
    out = ran('sample', f'--model_dir={folder}/policy', '--prompt=hello', '--chat=chatml').out
    assert out.startswith('<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n')
    assert '--prompt' in perl('sample', f'--model_dir={folder}/policy', '--chat=chatml').line
    assert '--chat' in perl('sample', f'--model_dir={folder}/policy', '--prompt=x', '--chat=jinja').line


def test_a_prompt_that_is_typed_in_is_put_into_the_models_own_format(chain):
    folder, _ = chain
    template = folder / 'weights/chat_template.jinja'
    asked = 'sample', f'--model_dir={folder}/policy', '--prompt=hello <|im_end|>', '--chat=own'
    template.write_text("<|im_start|>{{ messages[0].content }}<|im_end|>")
    try:
        assert ran(*asked).out.startswith('<|im_start|>hello <|im_end|><|im_end|>')
    finally:
        template.unlink()
