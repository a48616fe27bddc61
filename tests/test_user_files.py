"""A user's own rows as a task: public forms of rows, columns, templates and chat formats, and what is refused."""

import gzip
import json
import pathlib
import re

import numpy as np
import pytest

from perl_jax.data import datasets, providers
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.tasks import chat, registration, sources
from perl_jax.tasks.user_files import recognition, schemas, task
from perl_jax.tasks.user_files.form import Form

ROWS = pathlib.Path(__file__).parent / 'rows'
PEEL = '\n\nHuman: How do I peel an orange?\n\nAssistant: By hand or with a knife?\n\nHuman: By hand.\n\nAssistant:'
TREE = 'Be brief.\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Name a tree.\n\nAssistant:'
LONG = ' There are many trees, and I could not possibly choose.'


@pytest.fixture(autouse=True)
def fresh():
    sources._read.cache_clear()


def examples(paths, kind, **settings):
    """All examples of all splits, in the order of the splits, without their groups."""
    seqio_task = providers.find(task.task(str(paths) if isinstance(paths, pathlib.Path) else paths, kind, **settings))
    rows = [
        row for split in registration.SPLITS for row in seqio_task.source.get_dataset(split).as_numpy_iterator()
    ]  # fmt: skip
    return [
        {k: v.decode() if isinstance(v, bytes) else float(v) for k, v in row.items() if k != 'group'} for row in rows
    ]


def as_set(rows):
    return {tuple(sorted(row.items())) for row in rows}


def pair(inputs, chosen, rejected):
    return {'inputs': inputs, 'chosen': chosen, 'rejected': rejected}


def turn(inputs, targets):
    return {'inputs': inputs, 'targets': targets}


PUBLIC = {
    'trl_preference.jsonl': ('preferences', [
        pair('What colour is grass?\n', 'Green.', 'It is loud.'),
        pair('What is two plus two?\n', 'Four.', 'Four hundred.'),
        pair('Name a bird.\n', 'A heron.', 'A spoon.'),
    ]),
    'trl_conversational.jsonl': ('preferences', [
        pair('\n\nHuman: What colour is snow?\n\nAssistant:', ' White.', ' Loud.'),
        pair(TREE, ' Oak.', LONG),
    ]),
    'ultrafeedback.jsonl': ('preferences', [
        pair('Name a river.\n', 'The Danube.', 'Paris.'),
        pair('Name a lake.\n', 'Balaton.', 'A chair.'),
    ]),
    'hh.jsonl': ('preferences in dialogs', [
        pair(PEEL, ' Start at the stem.', ' Ask somebody.'),
        pair('\n\nHuman: Is tea a plant?\n\nAssistant:', ' Yes, its leaves are.', ' No.'),
    ]),
    'shp.jsonl': ('SHP', [
        pair('Why did my bread not rise?\n', 'Old yeast, most likely.', 'Bread is bread.'),
        pair('Can I freeze dough?\n', 'Yes, after the first rise.', 'No idea.'),
    ]),
    'kto.jsonl': ('ratings', [
        turn('Hey, hello\n', 'hi, nice to meet you') | {'label': 1.0},
        turn('How are you\n', 'leave me alone') | {'label': 0.0},
        turn('What is your name?\n', "I don't have one.") | {'label': 1.0},
    ]),
    'ratings.csv': ('ratings', [
        turn('Is it raining, now?\n', 'Yes,\nand hard.') | {'label': 1.0},
        turn('Is it late?\n', 'No.') | {'label': 0.0},
    ]),
    'alpaca.json': ('instructions', [
        turn('Translate into French.\n\ngood morning\n', 'bonjour'),
        turn('Name three colours.\n', 'Red, green and blue.'),
    ]),
    'messages.jsonl': ('dialogs', [
        turn('You sell tea.\n\nHuman: Have you any green tea?\n\nAssistant:', ' Yes, sencha.'),
        turn(
            'You sell tea.\n\nHuman: Have you any green tea?\n\nAssistant: Yes, sencha.\n\nHuman: A bag, please.'
            '\n\nAssistant:',
            ' Here you are.',
        ),
        turn('\n\nHuman: Bye!\n\nAssistant:', ' Goodbye.'),
    ]),
    'sharegpt.jsonl': ('dialogs', [
        turn('\n\nHuman: Count to three.\n\nAssistant:', ' 1, 2, 3'),
        turn('\n\nHuman: Count to three.\n\nAssistant: 1, 2, 3\n\nHuman: Backwards.\n\nAssistant:', ' 3, 2, 1'),
        turn('Rhyme.\n\nHuman: cat\n\nAssistant:', ' hat'),
    ]),
}  # fmt: skip


@pytest.mark.parametrize('name', PUBLIC)
def test_public_forms_are_recognised_and_read(name):
    schema_name, expected = PUBLIC[name]
    summary = recognition.summarise(str(ROWS / name), Form('prompts'))
    kind = summary.schema.kind
    assert (summary.schema.name, summary.reason) == (schema_name, None)
    assert as_set(examples(ROWS / name, kind)) == as_set(expected)
    good = [row for row in expected if row.get('label', 1) >= 0.5]
    sft = as_set(turn(row['inputs'], row.get('chosen', row.get('targets'))) for row in good)
    assert as_set(examples(ROWS / name, 'sft')) == sft
    assert as_set(examples(ROWS / name, 'prompts')) == {(('inputs', row['inputs']),) for row in expected}
    if kind in ('pairs', 'thumbs'):
        assert task.task(str(ROWS / name), 'reward') == task.task(str(ROWS / name), kind)
    else:
        with pytest.raises(UserError, match=f'the rows are {schema_name}; a reward needs pairs or ratings'):
            task.task(str(ROWS / name), 'reward')


def test_columns_that_no_form_reads_are_named():
    summary = recognition.summarise(str(ROWS / 'ultrafeedback.jsonl'), Form('prompts'))
    assert summary.unused == ('messages', 'prompt_id', 'score_chosen', 'score_rejected')
    assert recognition.summarise(str(ROWS / 'ratings.csv'), Form('prompts')).columns == {
        'prompt': 'question', 'answer': 'response', 'label': 'label',
    }  # fmt: skip


def test_a_dialog_is_learned_on_the_assistants_turns_alone():
    name = task.task(str(ROWS / 'messages.jsonl'), 'sft')
    config = DatasetConfig(name, {'inputs': 128, 'targets': 32}, 1, vocabulary=registration.DEFAULT)
    texts = []
    for split in registration.SPLITS:
        try:
            data = datasets.load(DatasetConfig(**vars(config) | {'split': split}), 'sft')
        except UserError as error:
            assert 'no examples' in str(error)
            continue
        for tokens, mask in zip(data.arrays['targets'], data.arrays['targets_mask'], strict=True):
            texts.append(registration.DEFAULT.decode([int(x) for x in tokens[mask.astype(bool)]]))
    assert sorted(texts) == [' Goodbye.', ' Here you are.', ' Yes, sencha.']


USER, BOT = (lambda text, role=role: {'role': role, 'content': text} for role in ('user', 'assistant'))
Q2 = '\n\nHuman: q0\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:'
DIALOGS = {  # a row beside its prompt and answers: nothing of a dialog is lost
    'answers go on': ({'prompt': [USER('q0')], 'chosen': [BOT('a1'), USER('q2'), BOT('good')],
                       'rejected': [BOT('a1'), USER('q2'), BOT('bad')]}, (Q2, ' good', ' bad')),
    'answers repeat a text': ({'prompt': 'q0', 'chosen': [USER('q0'), BOT('a1'), USER('q2'), BOT('good')],
                               'rejected': [USER('q0'), BOT('a1'), USER('q2'), BOT('bad')]}, (Q2, ' good', ' bad')),
    'a system message': ({'prompt': 'q0', 'chosen': [{'role': 'system', 'content': 'S'}, USER('q0'), BOT('good')],
                          'rejected': [{'role': 'system', 'content': 'S'}, USER('q0'), BOT('bad')]},
                         ('S\n\nHuman: q0\n\nAssistant:', ' good', ' bad')),
    'texts repeat the prompt': ({'prompt': 'Q: q0\nA:', 'chosen': 'Q: q0\nA: good', 'rejected': 'Q: q0\nA: bad'},
                                ('Q: q0\nA:', ' good', ' bad')),
    'transcripts repeat it': ({'prompt': '\n\nHuman: q0\n\nAssistant:', 'chosen': '\n\nHuman: q0\n\nAssistant: good',
                               'rejected': '\n\nHuman: q0\n\nAssistant: bad'},
                              ('\n\nHuman: q0\n\nAssistant:', ' good', ' bad')),
    'one message after a dialog': ({'messages': [USER('q0'), BOT('a1'), USER('q2')], 'chosen': BOT('good'),
                                    'rejected': BOT('bad')}, (Q2, ' good', ' bad')),
    'a copy of the chosen': ({'messages': [USER('q0'), BOT('good')], 'chosen': [USER('q0'), BOT('good')],
                              'rejected': [USER('q0'), BOT('bad')]},
                             ('\n\nHuman: q0\n\nAssistant:', ' good', ' bad')),
    'a column of system messages': ({'system': 'Be kind.', 'prompt': 'q0', 'chosen': 'good', 'rejected': 'bad'},
                                    ('Be kind.\n\nq0\n', 'good', 'bad')),
    'an empty one': ({'system_prompt': '', 'question': 'q0', 'chosen': 'good', 'rejected': 'bad'},
                     ('q0\n', 'good', 'bad')),
    'white space of its own': ({'prompt': 'The sky is', 'chosen': ' blue.', 'rejected': ' red.'},
                               ('The sky is', ' blue.', ' red.')),
    'names in other cases': ({'Prompt': 'q0', ' Chosen': 'good', 'REJECTED ': 'bad'}, ('q0\n', 'good', 'bad')),
}  # fmt: skip


@pytest.mark.parametrize('case', DIALOGS)
def test_nothing_of_a_dialog_is_lost(case, tmp_path):
    row, expected = DIALOGS[case]
    assert examples(lines(tmp_path / 'x.jsonl', row), 'pairs') == [pair(*expected)]
    assert examples(lines(tmp_path / 'y.jsonl', row), 'prompts') == [{'inputs': expected[0]}]


def test_of_two_system_messages_none_is_dropped(tmp_path):
    prompt = [{'role': 'system', 'content': 'S1'}, USER('q0')]
    path = lines(tmp_path / 'x.jsonl', {'system': 'S2', 'prompt': prompt, 'completion': 'a'})
    with pytest.raises(UserError, match='a system message in a column, and another as its first message'):
        examples(path, 'sft')


def test_a_dialog_that_contradicts_its_prompt_is_refused(tmp_path):
    path = lines(tmp_path / 'x.jsonl', {'prompt': 'OTHER', 'chosen': [USER('q0'), BOT('a')], 'rejected': 'b'})
    with pytest.raises(UserError, match='an answer neither continues the prompt nor repeats it'):
        examples(path, 'pairs')


@pytest.mark.parametrize('value', ['1.0', '0.0', 'TRUE', 'false', 1, 0.25])
def test_labels_as_programs_write_them(value):
    label = {'1.0': 1.0, '0.0': 0.0, 'TRUE': 1.0, 'false': 0.0}.get(value, value)
    (example,) = Form('thumbs')({'prompt': 'a', 'completion': 'b', 'label': value}).examples
    assert example['label'] == label


# Columns, templates, formats.


def lines(path, *rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


def test_columns_of_other_names(tmp_path):
    path = lines(tmp_path / 'x.jsonl', {'q': 'A?', 'good': 'yes', 'bad': 'no', 'prompt': 'not this'})
    columns = {'prompt': 'q', 'chosen': 'good', 'rejected': 'bad'}
    assert examples(path, 'pairs', columns=columns) == [pair('A?\n', 'yes', 'no')]
    assert examples(path, 'sft', columns={'question': 'q', 'completion': 'good'}) == [
        turn('A?\n', 'yes')
    ]  # our names for it
    with pytest.raises(UserError, match="it lacks 'Q', which COLUMNS names; it has q, good, bad, prompt"):
        examples(path, 'pairs', columns=columns | {'prompt': 'Q'})
    with pytest.raises(UserError, match=r"COLUMNS = \{'promt': 'q'\}: promt is none of prompt, answer"):
        task.task(path, 'pairs', columns={'promt': 'q'})


def test_a_template_makes_the_prompt_of_any_columns(tmp_path):
    path = lines(tmp_path / 'x.jsonl', {'title': 'Tea', 'year': 1999, 'prompt': 'unused', 'answer': '4'})
    template = '{title} ({year}, {{approx.}})\nA:'
    assert examples(
        path, 'sft', prompt_template=template, columns={'answer': 'answer'}, answer_template=' {answer}!'
    ) == [turn('Tea (1999, {approx.})\nA:', ' 4!')]
    with pytest.raises(UserError, match="x.jsonl row 1 .*it lacks 'titel'"):
        examples(path, 'sft', prompt_template='{titel}')
    for wrong in ('no column', '{title', '{title.__class__}', '{title[0]}', '{}', ''):
        with pytest.raises(UserError, match='PROMPT_TEMPLATE = '):
            task.task(path, 'sft', prompt_template=wrong)
    for wrong in ('', '{answer}{answer}', '{completion}'):
        with pytest.raises(UserError, match='ANSWER_TEMPLATE = .* needs {answer}, once'):
            task.task(path, 'sft', answer_template=wrong)


def test_a_chat_format_writes_texts_and_messages_alike(tmp_path):
    path = lines(
        tmp_path / 'x.jsonl',
        {'prompt': 'Hi', 'completion': 'Hello'},
        {'prompt': [{'role': 'user', 'content': 'Hi'}], 'completion': [{'role': 'assistant', 'content': 'Hello'}]},
        {'prompt': '\n\nHuman: Hi\n\nAssistant:', 'completion': 'Hello'},
    )
    settings = dict(chat='chatml', system='Be kind.')
    expected = turn(
        '<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n', 'Hello'
    )
    form = Form('sft', **settings)
    for line in pathlib.Path(path).read_text().splitlines():
        (example,) = form(json.loads(line)).examples
        assert example['inputs'] == expected['inputs'] and example['targets'] == 'Hello'
        marked = chat.chatml([{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hi'}]).marked
        assert example['inputs'].marked == marked  # control tokens, not the words
    (row,) = form({'prompt': 'Say <|im_end|>', 'completion': 'x'}).examples
    assert row['inputs'].marked.count('\ufdd0<|im_end|>') == 2  # the template's; the user's own is text


def test_a_system_message_of_the_row_stays(tmp_path):
    messages = [{'role': 'system', 'content': 'Mine.'}, {'role': 'user', 'content': 'Hi'}]
    row = {'prompt': messages, 'completion': 'Hello'}
    (example,) = Form('sft', system='Yours.')(row).examples
    assert example == turn('Mine.\n\nHuman: Hi\n\nAssistant:', ' Hello') | {'group': 'hi'}


def test_the_models_own_template_is_taken_where_there_is_one(tmp_path):
    config = {'chat_template': '{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[bot] '}
    with_template, without = tmp_path / 'with', tmp_path / 'without'
    for folder, text in ((with_template, config), (without, {})):
        folder.mkdir()
        (folder / 'tokenizer.json').write_text(
            '{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}'
        )
        (folder / 'tokenizer_config.json').write_text(json.dumps(text))
    row = {'prompt': 'Hi', 'completion': 'Hello'}
    (example,) = Form('sft', model=str(with_template))(row).examples
    assert example['inputs'] == '[user] Hi\n[bot] '
    for form in (Form('sft', model=str(without)), Form('sft'), Form('sft', model=str(with_template), chat='plain')):
        assert form(row).examples[0]['inputs'] == 'Hi\n'
    with pytest.raises(UserError, match="CHAT = 'own' takes the model's template: set INITIAL_CHECKPOINT_PATH"):
        Form('sft', chat='own')(row)


SEAMS = {  # a template -> what stands at the end of the prompt, and at the start of the answer
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
    '{% endif %}{% endfor %}': ('[INST] Hi [/INST]', ' Hello'),
    '{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<end>\n{% endfor %}': (
        '<user>\nHi<end>\n<assistant>\n', 'Hello',
    ),
    "{% for m in messages %}<{{ m.role }}>\n{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}<end>\n"
    '{% endfor %}'
    '{% if add_generation_prompt %}<assistant>\n{% endif %}': ('<user>\nHi<end>\n<assistant>\n', 'Hello'),
}  # fmt: skip


@pytest.mark.parametrize('text', SEAMS)
def test_what_a_template_writes_before_an_answer_is_kept(text, tmp_path):
    (tmp_path / 'tokenizer.json').write_text(
        '{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}'
    )
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template': text}))
    (example,) = Form('sft', model=str(tmp_path))({'prompt': 'Hi', 'completion': 'Hello'}).examples
    assert (example['inputs'], example['targets']) == SEAMS[text]


def test_a_row_that_a_template_refuses_is_one_odd_row(tmp_path, capsys):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}[x]{% endfor %}"
    )
    (tmp_path / 'tokenizer.json').write_text(
        '{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}'
    )
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template': template}))
    rows = [{'prompt': f'q{i}', 'answer': 'a'} | ({'system': 'S'} if i == 150 else {}) for i in range(200)]
    assert len(examples(lines(tmp_path / 'x.jsonl', *rows), 'sft', model=str(tmp_path))) == 199
    assert 'x.jsonl row 151 (the first: ' in (said := capsys.readouterr().err) and 'no system; CHAT = another' in said


# Places and splits.


@pytest.mark.parametrize('suffix', ['.jsonl', '.json', '.jsonl.gz', '.csv', '.csv.gz', '.tsv', '.parquet'])
def test_every_kind_of_file(suffix, tmp_path):
    rows = [{'prompt': f'a, "{i}"\té', 'completion': f'b\n{i}'} for i in range(3)]
    path = tmp_path / f'train{suffix}'
    if suffix == '.parquet':
        arrow, table = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
        table.write_table(arrow.Table.from_pylist(rows), path)
    else:
        separator = '\t' if 'tsv' in suffix else ','
        quote = lambda text: '"' + text.replace('"', '""') + '"'  # noqa: E731
        table_lines = [separator.join(map(quote, row.values())) for row in ({'p': 'prompt', 'c': 'completion'}, *rows)]
        text = {
            '.jsonl': '\n'.join(map(json.dumps, rows)), '.json': json.dumps(rows),
            '.jsonl.gz': '\n'.join(map(json.dumps, rows)),
        }.get(suffix, '\n'.join(table_lines))  # fmt: skip
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith('.gz') else text.encode())
    assert as_set(examples(path, 'sft')) == as_set(turn(f'{row["prompt"]}\n', row['completion']) for row in rows)


def test_files_of_each_split_and_patterns(tmp_path):
    for name, prompt in (('a-1', 'a'), ('a-2', 'b'), ('other', 'c'), ('late', 'd')):
        lines(tmp_path / f'{name}.jsonl', {'prompt': prompt, 'completion': 'x'})
    split = lambda name, split: [  # noqa: E731
        row['inputs'].decode() for row in providers.find(name).source.get_dataset(split).as_numpy_iterator()
    ]
    at = lambda name: str(tmp_path / name)  # noqa: E731
    by_split = task.task(
        {'train': at('a-*.jsonl'), 'validation': at('other.jsonl'), 'test': at('late.jsonl')}, 'prompts'
    )
    assert [split(by_split, x) for x in registration.SPLITS] == [['a\n', 'b\n'], ['c\n'], ['d\n']]
    lists = task.task({'train': [at('a-1.jsonl'), at('a-2.jsonl')], 'test': at('late.jsonl')}, 'prompts')
    assert split(lists, 'test') == ['d\n'] and set(split(lists, 'train')) <= {'a\n', 'b\n'}
    several = task.task([at('other.jsonl'), at('late.jsonl')], 'prompts')
    assert sorted(x for name in registration.SPLITS for x in split(several, name)) == ['c\n', 'd\n']
    for wrong in ('', [], {}, {'training': 'x'}, 3, [3], {'train': []}, {'train': 3}):
        with pytest.raises(UserError, match='PATHS = '):
            task.task(wrong, 'prompts')
    with pytest.raises(UserError, match=f'PATHS={tmp_path}/none: there is no such file or folder'):
        examples(tmp_path / 'none', 'prompts')
    with pytest.raises(UserError, match=r'PATHS=.*none\*.jsonl holds none of|holds none of'):
        examples(tmp_path / 'none*.jsonl', 'prompts')


def test_a_rows_own_split_counts_and_an_unknown_one_is_odd(tmp_path):
    names = ['train_prefs', 'dev', 'eval', 'test_sft', 'train', 'validation']
    rows = [{'prompt': name, 'completion': 'x', 'split': name} for name in names]
    task_name = task.task(lines(tmp_path / 'test_drive.jsonl', *rows), 'prompts')  # whose own name is no split
    of_split = {
        split: [
            row['inputs'].decode().strip()
            for row in providers.find(task_name).source.get_dataset(split).as_numpy_iterator()
        ]
        for split in registration.SPLITS
    }
    assert of_split == {
        'train': ['train_prefs', 'train'], 'validation': ['dev', 'eval', 'validation'], 'test': ['test_sft'],
    }  # fmt: skip
    path = lines(tmp_path / 'x.jsonl', {'prompt': 'a', 'completion': 'b', 'split': 'foo'})
    with pytest.raises(UserError, match="split is 'foo'; known are train"):
        examples(path, 'sft')


def test_a_file_of_no_split_beside_others_is_named(tmp_path, caplog):
    for name in ('train', 'eval', 'extra'):
        lines(tmp_path / f'{name}.jsonl', {'prompt': name, 'completion': 'x'})
    assert {row['inputs'] for row in examples(tmp_path, 'prompts')} == {'train\n', 'eval\n'}
    assert f'PATHS={tmp_path}: not read, since others name a split: extra.jsonl' in caplog.text


def test_columns_beyond_the_first_thousand_rows_are_seen(tmp_path):
    rows = [{'prompt': f'p{i}', 'completion': 'x'} | ({'late': 1} if i > 1500 else {}) for i in range(1600)]
    summary = recognition.summarise(lines(tmp_path / 'x.jsonl', *rows), Form('prompts'))
    assert summary.unused == ('late',) and summary.counts == {'demonstrations': 1600}


@pytest.mark.parametrize('separator', [',', ';', '\t', '|'])
def test_a_table_with_another_separator(separator, tmp_path):
    (tmp_path / 'x.csv').write_text(f'prompt{separator}completion\nq{separator}a\n')
    assert examples(tmp_path / 'x.csv', 'sft') == [turn('q\n', 'a')]
    (tmp_path / 'two.csv').write_text(f'prompt{separator}completion{separator}prompt\n1{separator}2{separator}3\n')
    with pytest.raises(UserError, match="two.csv cannot be read .ValueError: two columns are called 'prompt'"):
        examples(tmp_path / 'two.csv', 'sft')


def test_rows_of_one_prompt_are_in_one_split_whatever_the_kind(tmp_path):
    rows = [{'prompt': f'Prompt {i % 60}!', 'chosen': f'a{i}', 'rejected': f'b{i}'} for i in range(240)]
    path = lines(tmp_path / 'x.jsonl', *rows)
    of_kind = {}
    for kind in ('pairs', 'sft', 'prompts'):
        rows_of_split = providers.find(task.task(path, kind)).source.get_dataset
        for split in registration.SPLITS:
            of_kind[kind, split] = {row['inputs'] for row in rows_of_split(split).as_numpy_iterator()}
    for split in registration.SPLITS:
        assert of_kind['pairs', split] == of_kind['sft', split] == of_kind['prompts', split]
    assert sum(len(of_kind['pairs', split]) for split in registration.SPLITS) == 60  # none in two
    assert all(of_kind['pairs', split] for split in registration.SPLITS)


def test_a_task_is_registered_once(tmp_path):
    path = lines(tmp_path / 'my rows.v2.jsonl', {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'})
    name = task.task(path, 'pairs')
    assert name == task.task(path, 'pairs') and name.startswith('my_rows_pairs_')
    assert len({name, task.task(path, 'sft'), task.task(path, 'pairs', chat='chatml')}) == 3


# What is refused.

BAD = {
    'no known column': ({'text': 'x'}, 'sft', 'columns text are of no known form: .*prompt, chosen, rejected'),
    'two prompts': ({'prompt': 'a', 'question': 'b', 'answer': 'c'}, 'sft', 'prompt and question may each be'),
    'demonstrations as pairs': ({'prompt': 'a', 'answer': 'c'}, 'pairs', 'which give sft, prompts and no pairs'),
    'null': ({'prompt': 'a', 'chosen': 'c', 'rejected': None}, 'pairs', 'columns prompt, chosen, rejected are prompts'),
    'empty answer': ({'prompt': 'a', 'chosen': ' ', 'rejected': 'x'}, 'pairs', 'chosen is empty'),
    'a number': ({'prompt': 4, 'chosen': 'b', 'rejected': 'x'}, 'pairs', 'prompt is no text but'),
    'label': ({'prompt': 'a', 'completion': 'b', 'label': 5}, 'thumbs', 'label is 5; give true or false'),
    'label as a word': ({'prompt': 'a', 'completion': 'b', 'label': 'good'}, 'thumbs', "label is 'good'; give true"),
    'role': ({'messages': [{'role': 'tool', 'content': 'x'}]}, 'sft', "message 1 is by 'tool'; known are system"),
    'no content': ({'messages': [{'role': 'user', 'content': None}]}, 'sft', 'message 1: its content is no text'),
    'an image': ({'messages': [{'role': 'user', 'content': [{'type': 'image'}]}]}, 'sft', 'its content is no text'),
    'tools': (
        {'messages': [{'role': 'assistant', 'content': 'x', 'tool_calls': [{}]}]}, 'sft', 'has tool_calls',
    ),
    'nobody answers': ({'messages': [{'role': 'user', 'content': 'x'}]}, 'sft', 'the assistant says nothing'),
    'an answer first': ({'messages': [{'role': 'assistant', 'content': 'x'}]}, 'sft', 'an answer without a prompt'),
    'plain texts without a prompt': ({'chosen': 'a', 'rejected': 'b'}, 'pairs', 'no dialogs, and no column is'),
    'a user last': (
        {'prompt': 'a', 'chosen': [{'role': 'user', 'content': 'x'}], 'rejected': 'b'}, 'pairs', 'an answer neither',
    ),
    'other prompts': (
        {
            'chosen': [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': 'y'}],
            'rejected': [{'role': 'user', 'content': 'z'}, {'role': 'assistant', 'content': 'y'}],
        }, 'pairs', 'chosen and rejected part before the last answer',
    ),
    'SHP': ({'history': 'a', 'human_ref_A': 'b', 'human_ref_B': 'c', 'labels': 2}, 'pairs', 'labels is 2, not 1'),
}  # fmt: skip


@pytest.mark.parametrize('case', BAD)
def test_a_wrong_row_is_named(case, tmp_path):
    row, kind, words = BAD[case]
    path = lines(tmp_path / 'train.jsonl', row)
    with pytest.raises(UserError, match=rf'PATHS={path}: 1 of 1 rows cannot be read: train.jsonl row 1 .*{words}'):
        examples(path, kind)


def test_few_odd_rows_are_counted_and_left_out(tmp_path, capsys, caplog):
    good = [{'prompt': f'p{i}', 'chosen': 'a', 'rejected': 'b'} for i in range(200)]
    ties = [{'prompt': f't{i}', 'chosen': 'a', 'rejected': 'a'} for i in range(4)]
    path = lines(tmp_path / 'x.jsonl', *good, {'prompt': 'x', 'chosen': ''}, *ties)
    assert len(examples(path, 'pairs')) == 200
    assert '1 of 205 rows cannot be read: x.jsonl row 201' in capsys.readouterr().err
    tie_counts = re.findall(r': (\d+) of \d+ rows of \w+ have equal texts', caplog.text)
    assert sum(map(int, tie_counts)) == 4


def test_a_table_with_a_broken_line(tmp_path):
    path = tmp_path / 'train.csv'
    path.write_text('prompt,completion\na,b\nonly one\n')
    with pytest.raises(UserError, match="train.csv row 2 .the first: not an object but 'not as many fields as names'"):
        examples(path, 'sft')
    path = tmp_path / 'train.tsv'
    path.write_text('prompt\tcompletion\n"a\tb\n')
    with pytest.raises(UserError, match='train.tsv cannot be read .Error: unexpected end of data'):
        examples(path, 'sft')


def test_every_schema_reads_by_its_own_columns():
    assert {name for schema in schemas.SCHEMAS for name in schema.columns} <= schemas.SPELLINGS.keys()
    spelled = [x for name, others in schemas.SPELLINGS.items() for x in (name, *others)]
    assert len(spelled) == len(set(spelled))
    assert np.all([schema.kind in schemas.USES for schema in schemas.SCHEMAS])
