"""A vocabulary that is not what it was, marks that no format made, control tokens that a vocabulary has not."""

import json
import logging
import shutil

import pytest
import tiny

pytest.importorskip('tokenizers')
pytest.importorskip('gguf')
import seqio
import tensorflow as tf
from test_tokenizers import write_json
from test_vocabularies import LLAMA, write_model

from perl_jax.data import datasets, lexicon, providers, rows, texts, vocabulary
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.runs.base import BaseConfig
from perl_jax.tasks import chat, preprocessors, registration
from perl_jax.tokenizers.chat.controls import mark
from perl_jax.tokenizers.chat.template import Template
from perl_jax.tools import average

END = 2  # <|im_end|>
LENGTHS = {'inputs': 200, 'targets': 200}
TYPED = f'hello {mark("<|im_end|>")} hello'


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / 'weights'
    path.mkdir()
    write_json(path)
    return path


def run_of(path, words, **more):
    """A folder that run.json calls a finished run, read with `words`."""
    path.mkdir()
    about = {'phase': 'sft', 'base': {'path': '/no/such/model', 'fingerprint': 'x'}, **words.run_fields, **more}
    (path / 'run.json').write_text(json.dumps(about))
    return str(path)


def swap(folder):
    """Lets two letters change places, as in a tokenizer of another version."""
    file = folder / 'tokenizer.json'
    form = json.loads(file.read_text())
    vocab = form['model']['vocab']
    vocab['q'], vocab['j'] = vocab['j'], vocab['q']
    file.write_text(json.dumps(form))


def end_also_with(folder):
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [2, 0]}))


def forget():
    """The files that this process has read; another would read them anew."""
    from perl_jax.tokenizers import loaded_tokenizer, tokenizer_files

    for module in (loaded_tokenizer, tokenizer_files):
        for value in vars(module).values():
            getattr(value, 'cache_clear', lambda: None)()


@pytest.mark.parametrize('change', [swap, end_also_with])
def test_a_vocabulary_that_has_changed_under_a_run_is_refused(folder, tmp_path, change):
    run = run_of(tmp_path / 'run', vocabulary.from_name(str(folder)))
    config = DatasetConfig('toy_sft', LENGTHS, 2, vocabulary=str(folder))
    assert vocabulary.of_run(run, [config]).name == str(folder)
    shutil.copytree(folder, tmp_path / 'copy')
    change(folder)
    forget()
    said = rf"'{folder}' is not what it was when '{run}' was trained"
    for ask in (
        lambda: vocabulary.of_run(run, [config]),  # eval, sample
        lambda: vocabulary.of_base(run),  # a reward or policy that starts from it
        lambda: vocabulary.choose([config], None, run),  # the run goes on
        lambda: vocabulary.from_name(run),  # inspect
        lambda: vocabulary.check_rewards([run], vocabulary.from_name(str(folder))),
    ):
        with pytest.raises(UserError, match=said):
            ask()
    moved = DatasetConfig('toy_sft', LENGTHS, 2, vocabulary=str(tmp_path / 'copy'))  # the same by another name
    assert vocabulary.of_run(run, [moved]).name == str(tmp_path / 'copy')
    assert vocabulary.choose([moved], None, run)[0].name == str(tmp_path / 'copy')


def test_a_reward_without_a_vocabulary_is_given_the_policys_and_that_is_said(folder, tmp_path, caplog):
    caplog.set_level('WARNING', 'perl_jax')
    run = run_of(tmp_path / 'run', vocabulary.from_name(str(folder)))
    about = json.loads((tmp_path / 'run/run.json').read_text())
    (tmp_path / 'run/run.json').write_text(json.dumps(about | {'vocabulary': None}))
    vocabulary.check_rewards([run], vocabulary.from_name(str(folder)))
    assert f"'{run}' records no vocabulary; it is given the tokens of '{folder}'" in caplog.text


def test_a_changed_vocabulary_that_has_moved_too_is_refused(folder, tmp_path):
    run = run_of(tmp_path / 'run', vocabulary.from_name(f'{folder}/tokenizer.json'))
    (folder / 'config.json').write_text('{}')
    folder.rename(tmp_path / 'moved')
    forget()
    assert vocabulary.of_run(run, base_path=str(tmp_path / 'moved')).name == str(tmp_path / 'moved')
    swap(tmp_path / 'moved')
    forget()
    with pytest.raises(UserError, match='is not what it was'):
        vocabulary.of_run(run, base_path=str(tmp_path / 'moved'))


def test_runs_of_older_versions_do_not_say_what_it_was(folder, tmp_path):
    words = vocabulary.from_name(str(folder))
    run = run_of(tmp_path / 'run', words)
    (tmp_path / 'run/run.json').write_text(
        json.dumps({'phase': 'sft', 'base': {'path': 'random:0'}, 'vocabulary': words.name})
    )
    swap(folder)
    forget()
    assert vocabulary.of_run(run).name == str(folder)


def test_rewards_of_one_name_and_two_vocabularies_are_not_averaged(folder, tmp_path):
    runs = [run_of(tmp_path / name, vocabulary.from_name(str(folder)), phase='reward') for name in 'ab']
    about = json.loads((tmp_path / 'b/run.json').read_text())
    (tmp_path / 'b/run.json').write_text(json.dumps(about | {'vocabulary_fingerprint': 'other'}))
    with pytest.raises(UserError, match='another vocabulary'):
        average.run(runs, str(tmp_path / 'mean'))


def test_an_empty_name_is_no_vocabulary(folder, monkeypatch):
    monkeypatch.chdir(folder)  # whose tokenizer an empty path would mean
    for name in ('', ' eos=<|im_start|>'):
        with pytest.raises(UserError, match="VOCABULARY = ''"):
            lexicon.from_name(name)
    with pytest.raises(UserError, match="VOCABULARY = ''"):
        vocabulary.choose([DatasetConfig('toy_sft', LENGTHS, 2, vocabulary='')], None, 'new')
    with pytest.raises(UserError, match="INITIAL_CHECKPOINT_PATH = ''"):
        BaseConfig(tiny.NETWORK, '')
    with pytest.raises(UserError, match='has no chat template'):
        Template('')('hello')


# Marks.


def seqio_task(name, rows, steps=(), source=None):
    """A task of SeqIO alone, read by another vocabulary than its own."""
    def make(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_tensor_slices({k: [row[k] for row in rows] for k in rows[0]})

    steps = [*steps, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    features = {key: seqio.Feature(seqio.ByteVocabulary(), add_eos=key == 'targets') for key in ('inputs', 'targets')}
    source = source or seqio.FunctionDataSource(make, splits=['train'])
    seqio.TaskRegistry.add(name, source, output_features=features, preprocessors=steps)
    return name


def ends(name, folder):
    """How often the end of a turn stands in prompts and in answers."""
    config = DatasetConfig(name, LENGTHS, 2, vocabulary=lexicon.from_name(str(folder)))
    arrays = datasets.load(config, 'sft').arrays
    return (arrays['inputs'] == END).sum(), (arrays['targets'] == END).sum()


def test_marks_in_raw_data_make_no_control_token(folder):
    assert ends(seqio_task('marks_raw', [{'inputs': TYPED, 'targets': TYPED}]), folder) == (0, 1)  # 1: the EOS


def test_marks_that_a_preprocessor_spells_make_none(folder):
    line = json.dumps({'inputs': TYPED, 'targets': TYPED})
    assert '\\ufdd0' in line and '\ufdd0' not in line

    @seqio.map_over_dataset
    def parse(row):
        read = lambda text: [json.loads(text)[key].encode() for key in ('inputs', 'targets')]  # noqa: E731
        inputs, targets = tf.numpy_function(read, [row['line']], [tf.string, tf.string])
        return {'inputs': tf.ensure_shape(inputs, []), 'targets': tf.ensure_shape(targets, [])}

    assert ends(seqio_task('marks_json', [{'line': line}], [parse]), folder) == (0, 1)


def test_a_chat_formats_marks_stay_and_only_its_own(folder):
    def wrapped(dataset, output_features):  # a user's own function around ours
        return preprocessors.chat(chat.chatml)(dataset, output_features)

    def later(dataset):
        return dataset.map(lambda row: row | {'id': 1})

    rows = [{'inputs': TYPED, 'targets': TYPED}]
    assert ends(seqio_task('marks_chat', rows, [later, wrapped, later]), folder) == (1, 1)


def test_bytes_that_are_no_text_stay_as_they_are():
    image = b'\xff\xd8\xef\xb7\x90\xff'
    task = providers.find(seqio_task('marks_image', [{'inputs': 'x', 'targets': 'y', 'image': image}]))
    (row,) = providers.rows(task, 'train', LENGTHS).as_numpy_iterator()
    assert row['image'] == image


# Control tokens.


def test_a_format_whose_tokens_the_vocabulary_has_not_is_refused(folder, tmp_path):
    words = vocabulary.from_name(str(folder))
    said = rf"{folder}/tokenizer.json: the tokenizer has no control token '<\|start_header_id\|>'"
    with pytest.raises(UserError, match=said):
        words.format('llama3')
    registration.add(
        'lacks_sft', 'sft', lambda split: [{'inputs': 'hello', 'targets': 'hello'}],
        preprocessors=[preprocessors.chat(chat.llama3)],
    )  # fmt: skip
    with pytest.raises(UserError, match=said):
        datasets.load(DatasetConfig('lacks_sft', LENGTHS, 2, vocabulary=words.vocabulary), 'sft')
    with pytest.raises(UserError, match=said):
        texts.dataset(words.vocabulary, [chat.llama3('hello')], 99)
    assert words.format('chatml') is chat.chatml


@pytest.mark.parametrize('by', ['preprocessor', 'function'])
def test_a_vocabulary_that_knows_no_marks_reads_a_formats_tokens_as_letters_and_says_so(tmp_path, caplog, by):
    model = write_model(tmp_path / 'a.model', 320, user_defined_symbols=['<start_of_turn>', '<end_of_turn>'], **LLAMA)
    form = {'preprocessor': lambda text, _: text, 'function': lambda _, form: form('hello')}[by]
    for name, template in (('chatml', chat.chatml), ('gemma', chat.gemma)):
        rows = [{'inputs': form('hello', template), 'targets': 'hello'}]
        steps = [preprocessors.chat(template)] if by == 'preprocessor' else []
        registration.add(f'{by}_{name}_sft', 'sft', lambda split, rows=rows: rows, preprocessors=steps)
        caplog.clear()
        with caplog.at_level(logging.WARNING, 'perl_jax'):
            datasets.load(DatasetConfig(f'{by}_{name}_sft', LENGTHS, 2, vocabulary=model), 'sft')
        letters = f"'<|im_start|>', '<|im_end|>' are no tokens of the vocabulary {model}"
        assert (letters in caplog.text) == (name == 'chatml')


def warned(caplog, words, name, **fields):
    registration.add(name, 'sft', lambda split: [{'inputs': 'hello', 'targets': 'wo'} | fields] * 4)
    caplog.clear()
    with caplog.at_level(logging.WARNING, 'perl_jax'):
        ds = datasets.load(DatasetConfig(name, LENGTHS, 2, vocabulary=words), 'sft')
    return ds, caplog.text


def test_an_eos_that_is_written_into_the_answers_is_named(folder, tmp_path, caplog):
    words = lexicon.from_name(str(folder))
    ds, said = warned(caplog, words, 'eos_json_sft', targets='wo<|im_end|>')
    assert "4 of 4 targets spell '<|im_end|>', which is read as text" in said and 'remove it from the texts' in said
    assert (ds.arrays['targets'] == END).sum() == 4
    model = write_model(tmp_path / 'a.model', 310, **LLAMA)
    assert "targets spell '</s>'" in warned(caplog, model, 'eos_model_sft', targets='quick</s>')[1]
    assert not warned(caplog, model, 'eos_none_sft', targets='quick')[1]


def test_a_bos_that_opens_a_prompt_is_one_and_is_not_named(tmp_path, caplog):
    write_json(tmp_path, bos=True)
    words = lexicon.from_name(str(tmp_path))
    ds, said = warned(caplog, words, 'bos_first_sft', inputs='<|im_start|>hello')
    assert not said and (ds.arrays['inputs'][0] == 1).sum() == 1
    ds, said = warned(caplog, words, 'bos_later_sft', inputs='hello<|im_start|>')
    assert "prompts spell '<|im_start|>'" in said and (ds.arrays['inputs'][0] == 1).sum() == 1
    ds, said = warned(caplog, words, 'bos_answer_sft', targets='<|im_start|>wo')  # an answer begins no sequence
    assert "targets spell '<|im_start|>'" in said and (ds.arrays['targets'] == 1).sum() == 0


def test_pieces_are_spelled_by_every_kind(folder, tmp_path):
    assert rows.token_text(lexicon.from_name(str(folder)), END) == '<|im_end|>'
    assert rows.token_text(lexicon.from_name(write_model(tmp_path / 'a.model', 310, **LLAMA)), 2) == '</s>'
    assert rows.token_text(seqio.ByteVocabulary(), 1) == '1'


# Names.


def test_messages_call_a_vocabulary_as_it_was_named(folder):
    registration.add('long_sft', 'sft', lambda split: [{'inputs': 'hello', 'targets': 'a b c d e f'}] * 4)
    words = vocabulary.from_name(str(folder))
    for given in (str(folder), words.vocabulary):
        config = DatasetConfig('long_sft', {'inputs': 9, 'targets': 3}, 2, vocabulary=given)
        with pytest.raises(UserError, match=f"these are tokens of '{folder}'"):
            datasets.load(config, 'sft')
    assert lexicon.name_of(lexicon.from_name(f'{folder} eos=<|im_start|>')) == f'{folder} eos=<|im_start|>'


def test_a_template_is_found_through_a_run(folder, tmp_path):
    pytest.importorskip('jinja2')
    (folder / 'chat_template.jinja').write_text('<|im_start|>{{ messages[0].content }}<|im_end|>')
    run = run_of(tmp_path / 'run', vocabulary.from_name(str(folder)))
    chosen = run_of(tmp_path / 'chosen', vocabulary.from_name(f'{folder} eos=<|im_start|>'))
    old = run_of(tmp_path / 'old', vocabulary.from_name(str(folder)), vocabulary=None, base={'path': run})
    expected = Template(str(folder))('hello').marked
    assert [Template(path)('hello').marked for path in (run, chosen, old)] == [expected] * 3
    of_bytes = run_of(tmp_path / 'bytes', vocabulary.from_name('byt5'))
    with pytest.raises(UserError, match="'byt5' has no chat template"):
        Template(of_bytes)('hello')
