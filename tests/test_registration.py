import dataclasses
import itertools

import numpy as np
import pytest
import seqio

from perl_jax.errors import UserError
from perl_jax.tasks import chat, preprocessors, registration

_numbers = itertools.count()
VOCABULARY = seqio.ByteVocabulary()
EXAMPLES = {
    'sft': {'inputs': 'é?\n', 'targets': 'yes'},
    'pairs': {'inputs': 'q?\n', 'chosen': 'yes', 'rejected': 'no'},
    'thumbs': {'inputs': 'q?\n', 'targets': 'yes', 'label': 1},
    'prompts': {'inputs': 'q?\n', 'reference': 'yes', 'count': 3, 'weight': 0.5},
}


def add(kind, examples, **options):
    """Registers under a name of its own: SeqIO refuses the same name twice."""
    return registration.add(f'registration_{next(_numbers)}_{kind}', kind, examples, **options)


def read(task, split='train'):
    return list(task.get_dataset(None, split, shuffle=False, num_epochs=1).as_numpy_iterator())


@pytest.mark.parametrize('kind', registration.TEXTS)
def test_tokens_stand_beside_texts(kind):
    task = add(kind, lambda split: [EXAMPLES[kind]] if split == 'train' else [])
    (example,) = read(task)
    for key in registration.TEXTS[kind]:
        text = EXAMPLES[kind][key]
        assert example[f'{key}_pretokenized'].decode() == text
        eos = [] if key == 'inputs' else [VOCABULARY.eos_id]
        assert example[key].tolist() == VOCABULARY.encode(text) + eos
        assert example[key].dtype == np.int32
    assert set(task.output_features) == set(registration.features(kind, VOCABULARY))
    assert read(task, 'validation') == []


def test_a_label_is_a_float32_scalar():
    (example,) = read(add('thumbs', lambda split: [EXAMPLES['thumbs']]))
    assert example['label'].dtype == np.float32
    assert example['label'].shape == ()
    assert example['label'] == 1


def test_further_fields_pass_through():
    (example,) = read(add('prompts', lambda split: [EXAMPLES['prompts']]))
    assert (example['reference'], example['count'], example['weight']) == (b'yes', 3, 0.5)
    assert (example['count'].dtype, example['weight'].dtype) == (np.int64, np.float32)


def test_large_numbers_stay_what_they_are():
    (example,) = read(add('prompts', lambda split: [EXAMPLES['prompts'] | {'count': 10**11}]))
    assert example['count'] == 10**11


def test_order_and_number_are_those_of_the_function():
    task = add('sft', lambda split: ({'inputs': f'{n}', 'targets': 'x'} for n in range(30)))
    assert task.num_input_examples('train') == 30
    assert [e['inputs_pretokenized'] for e in read(task)] == [str(n).encode() for n in range(30)]


def test_nothing_is_read_at_registration():
    add('sft', lambda split: pytest.fail('read'))


def test_the_vocabulary_can_be_replaced():
    task = add('pairs', lambda split: [EXAMPLES['pairs']])
    bigger = seqio.ByteVocabulary(extra_ids=10)
    features = {key: dataclasses.replace(f, vocabulary=bigger) for key, f in task.output_features.items()}
    (example,) = read(task.replace(output_features=features))
    assert example['chosen'].tolist() == [*bigger.encode('yes'), bigger.eos_id]


def test_a_data_source_of_seqio_works(tmp_path):
    (tmp_path / 'train.txt').write_text('one\ntwo\n')
    source = seqio.TextLineDataSource({'train': str(tmp_path / 'train.txt')})

    def to_prompt(dataset):
        return dataset.map(lambda line: {'inputs': line})

    task = add('prompts', source, preprocessors=[to_prompt])
    assert [example['inputs_pretokenized'] for example in read(task)] == [b'one', b'two']


@pytest.mark.parametrize(
    ('system', 'head'), [(None, ''), ('You are a barista.', '<|im_start|>system\nYou are a barista.<|im_end|>\n')]
)
def test_the_preprocessor_chat(system, head):
    example = {'inputs': 'user: hi\nagent: \\s\n', 'targets': 'yes', 'label': 0.5}
    (example,) = read(add('thumbs', lambda split: [example], preprocessors=[preprocessors.chat(chat.chatml, system)]))
    text = f'{head}<|im_start|>user\nuser: hi\nagent: \\s<|im_end|>\n<|im_start|>assistant\n'
    assert example['inputs_pretokenized'].decode() == text
    assert example['inputs'].tolist() == VOCABULARY.encode(text)
    assert example['targets_pretokenized'] == b'yes'
    assert example['label'] == 0.5


def test_an_unknown_kind():
    with pytest.raises(UserError, match="no kind is called 'pair'; use one of sft, pairs, thumbs, prompts"):
        add('pair', lambda split: [])


def test_an_unknown_split():
    with pytest.raises(UserError, match="no split 'dev'; use one of train, validation, test"):
        read(add('sft', lambda split: []), 'dev')


@pytest.mark.parametrize(
    ('kind', 'second', 'reason'),
    [
        ('pairs', {'inputs': 'q', 'chosen': 'yes'}, 'it lacks rejected: pairs needs inputs, chosen, rejected'),
        ('sft', {'prompt': 'q', 'completion': 'yes'}, 'it lacks inputs, targets; has prompt, completion: sft needs'),
        ('sft', {'inputs': 'q', 'targets': 'yes', 'more': 'x'}, 'it has more: sft needs inputs, targets, and further'),
        ('prompts', {'inputs': 'q', 'reference': 'yes'}, 'it lacks count, weight; has reference: prompts needs inputs'),
        ('sft', {'inputs': 'q', 'targets': None}, 'targets must be of type str, not NoneType'),
        ('thumbs', {'inputs': 'q', 'targets': 'yes', 'label': 'up'}, 'label must be of type float, not str'),
        ('thumbs', {'inputs': 'q', 'targets': 'yes', 'label': -1}, 'label must be a number from 0 to 1, not -1'),
        ('thumbs', {'inputs': 'q', 'targets': 'yes', 'label': float('nan')}, 'label must be a number'),
        ('prompts', {**EXAMPLES['prompts'], 'count': 0.5}, 'count must be of type int, not float'),
    ],
)
def test_a_bad_example_is_named(kind, second, reason):
    with pytest.raises(UserError, match=f'split train, example 2: .*{reason}'):
        read(add(kind, lambda split: [EXAMPLES[kind], second]))


def test_a_first_example_of_other_names():
    with pytest.raises(UserError, match='example 1: it lacks inputs, targets; has prompt, completion: sft needs'):
        read(add('sft', lambda split: [{'prompt': 'q', 'completion': 'yes'}]))


def test_a_field_of_an_odd_type():
    with pytest.raises(UserError, match='example 1: tokens is of type list; give str, int or float'):
        read(add('prompts', lambda split: [{'inputs': 'q', 'tokens': [1]}]))
