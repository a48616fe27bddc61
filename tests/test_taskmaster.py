import json
import os
import pathlib
import re

import numpy as np
import pytest
import seqio

from perl_jax.errors import UserError
from perl_jax.tasks import dialog_text, registration, taskmaster
from perl_jax.tasks.taskmaster import files

GREETING = {'role': 'agent', 'text': 'Welcome.'}
MENU = {'menu_item_id': 'latte-0002', 'name': 'Latte', 'options': ['Single', 'Double']}
CALL = {'role': 'agent', 'api': {'get_menu_items': {'query': 'latte', 'fields': ['description']}}}
RESPONSE = {'role': 'api', 'response': {'get_menu_items': {'items': [MENU]}}}
TEXT = 'call: get_menu_items(query=latte, fields=description)'

DATA = pathlib.Path(os.environ.get('TASKMASTER_DIR') or pathlib.Path(__file__).parents[2] / 'shared/data/taskmaster')
needs_data = pytest.mark.skipif(
    not (DATA / 'TM-4-2024').is_dir(), reason='needs a clone of Taskmaster: set TASKMASTER_DIR'
)


def user(text):
    return {'role': 'user', 'text': text}


def agent(text):
    return {'role': 'agent', 'text': text}


def rated(context, generation, reward, conversation_id='dlg-1'):
    return {
        'conversation_id': conversation_id,
        'context': json.dumps(context),
        'generation': json.dumps(generation),
        'reward': reward,
    }


def utterance(speaker, text, *annotations):
    return {'speaker': speaker, 'text': text, 'annotations': [{'name': n, 'value': v} for n, v in annotations]}


def write(folder, pattern, content):
    path = folder / pattern
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')


def write_rated(folder, rows):
    write(folder, 'TM-4-2024/reward/reward_00.json', rows)


def write_dialogs(folder, rows):
    write(folder, 'TM-4-2024/data/data_00.json', rows)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('TASKMASTER_DIR', str(tmp_path))
    return tmp_path


def in_split(split, domain='coffee'):
    """A user utterance whose opening falls into a split."""
    texts = (f'A latte, number {n}!' for n in range(1000))
    return next(t for t in texts if files.split_of(domain, files.opening(t)) == split)


TRAIN, VALIDATION, TEST = (in_split(split) for split in registration.SPLITS)


def everything(task, split='train'):
    dataset = seqio.get_mixture_or_task(task).get_dataset(None, split, shuffle=False, num_epochs=1)
    return list(dataset.as_numpy_iterator())


# The text.


def test_lines_golden():
    turns = [
        GREETING,
        user(' two\nlattes, s’il vous plaît  '),
        CALL,
        RESPONSE,
        {'role': 'agent', 'api': {'add': {'location': 'Salem, Oregon', 'name.movie': 'Nope (R)', 'empty': '', 'n': 2}}},
        {'role': 'api', 'response': {'add': {'success': True, 'order': {'total': '12.34'}, 'seats': []}}},
        {'role': 'agent', 'api': {'add': {'attributes': [{'id': 'milk', 'option': 'Oat'}], 'note': 'say "hi"'}}},
        {'role': 'api', 'response': {'add': 'empty'}},
        {'role': 'agent', 'api': {'show_menu': {}}},
        {'role': 'api', 'response': {'show_menu': {}}},
        {'role': 'agent', 'api': {'': {}}},
        {'role': 'api', 'response': {'invalid_intent': {}}},
        agent('\n'),
    ]
    assert dialog_text.lines(turns) == [
        'agent: Welcome.',
        'user: two lattes, s’il vous plaît',
        'call: get_menu_items(query=latte, fields=description)',
        'resp: items=[{menu_item_id=latte-0002, name=Latte, options=[Single, Double]}]',
        'call: add(location="Salem, Oregon", name.movie=Nope (R), empty="", n=2)',
        'resp: success=true, order={total=12.34}, seats=[]',
        'call: add(attributes=[{id=milk, option=Oat}], note="say \\"hi\\"")',
        'resp: empty',
        'call: show_menu()',
        'resp: {}',
        'call: ()',
        'resp: invalid_intent {}',
        'agent:',
    ]


def test_prompt_ends_with_the_cue_and_is_never_empty():
    assert dialog_text.prompt(['user: hi', 'agent: hello']) == 'user: hi\nagent: hello\n'
    assert dialog_text.prompt([]) == '\n'


@pytest.mark.parametrize(
    'turn', ['text', {}, {'role': 'system', 'text': 'x'}, {'role': 'agent', 'text': None},
             {'role': 'agent', 'api': {'a': {}, 'b': {}}}, {'role': 'agent', 'api': {'a': 'x'}}]
)  # fmt: skip
def test_what_is_no_turn_raises(turn):
    with pytest.raises(ValueError, match='not a turn|must be an object'):
        dialog_text.lines([turn])


def test_a_call_parses_back():
    args = {
        'location': 'Salem, Oregon', 'name.movie': 'Nope (R)', 'note': 'a "b" {c}=[d]', 'milk-options': '',
        'attributes': [{'id': 'milk', 'options': ['Oat', 'Whole, cold']}, {}], 'order': {'total': '12.34'}, 'none': [],
    }  # fmt: skip
    (line,) = dialog_text.lines([{'role': 'agent', 'api': {'add_order_item': args}}])
    assert dialog_text.parse_call(line) == ('add_order_item', args)


@pytest.mark.parametrize(
    ('response', 'well_formed'),
    [
        ('agent: Sure, how many shots?', 1.0),
        ('agent: Sure.\n', 1.0),
        ('call: show_menu()', 1.0),
        ('call: add(attributes=[{id=milk, option=Oat}], n=1)', 1.0),
        ('', 0.0),
        ('agent:', 0.0),
        ('agent: Sure.\nuser: Thanks.', 0.0),
        ('Sure.', 0.0),
        ('user: hi', 0.0),
        ('call: ()', 0.0),
        ('call: add', 0.0),
        ('call: add(', 0.0),
        ('call: add(x)', 0.0),
        ('call: add(n=)', 0.0),
        ('call: add(n=1, )', 0.0),
        ('call: add(n=1,, m=2)', 0.0),
        ('call: add(n=1) and more', 0.0),
        ('call: add(place=Salem, Oregon)', 0.0),
        ('call: add(attributes=[{id=milk, option=Oat])', 0.0),
        ('call: add(note="open)', 0.0),
        ('call: add(' + 'a={' * 5000 + ')', 0.0),
    ],
)
def test_is_well_formed(response, well_formed):
    assert dialog_text.is_well_formed(response) == well_formed


@pytest.mark.parametrize(
    ('response', 'valid'),
    [
        ('call: show_menu()', 1.0),
        ('call: show_menu(size=large)', 1.0),
        ('call: show_menu(size=large, query={moon=full})', 1.0),
        ('call: show_menu(phase=full)', 0.0),
        ('call: show_menu(size=large, phase=full)', 0.0),
        ('call: show_moon(size=large)', 0.0),
        ('agent: Which size?', 1.0),
        ('call: show_menu(size=large', 0.0),
        ('call: tip(amount=full)', 1.0),
        ('call: spill()', 0.0),
    ],
)
def test_a_valid_call_is_of_a_known_api_with_known_arguments(monkeypatch, response, valid):
    said = ['agent: Hi', 'call: show_menu(size=small)', 'call: show_menu(query=latte)', 'call: pay()', 'call: ()']
    monkeypatch.setattr(taskmaster, 'sft', lambda domain, split: [{'targets': line} for line in said])
    given = ('train', 'call: tip(amount=1)', 1.0), ('train', 'call: spill()', 0.0), ('test', 'call: spill()', 1.0)
    ratings = [files.Rated(split, '', (), answer, label) for split, answer, label in given]
    monkeypatch.setattr(files, 'rated', lambda domain: ratings)
    taskmaster.known_calls.cache_clear()
    try:
        known = {'show_menu': {'size', 'query'}, 'pay': frozenset(), 'tip': {'amount'}}
        assert taskmaster.known_calls('coffee') == known
        for function in (taskmaster.valid_coffee_call, taskmaster.valid_ticketing_call):
            assert function('user: a large one, Full', response, {}) == valid
    finally:
        taskmaster.known_calls.cache_clear()


@pytest.mark.parametrize(('response', 'grounded'), [
    ('agent: anything', 1.0), ('call: pay()', 1.0), ('call: add(item=Latte, id=latte-0002)', 1.0),
    ('call: add(item=Latte, id=latte-0003)', 0.0), ('call: add(extras=[{name=Oat Milk}, {name=Ice}])', 1.0),
    ('call: add(extras=[{name=Oat Milk}, {name=Sugar}])', 0.0), ('call: add(item=Latte) \n', 1.0),
    # a part of a word is not it; a plural and a number's word are, and "a latte" is one
    ('call: add(id=latte-000)', 0.0), ('call: add(id=0002)', 0.0), ('call: add(item=Lat)', 0.0),
    ('call: add(item=Latte, quantity=1)', 1.0), ('call: add(quantity=3)', 1.0), ('call: add(quantity=2)', 0.0),
    # who speaks is not said
    ('call: add(query=user)', 0.0), ('call: add(query=resp)', 0.0),
    ('call: add(item=cookie)', 1.0), ('call: add(name="12\\" Pie, large")', 1.0), ('call: add(name="2\\" Pie")', 0.0),
])  # fmt: skip
def test_a_calls_values_stand_in_the_context(response, grounded):
    context = (
        'user: a latte with oat milk and ice, three cookies\n'
        'resp: items=[{id=latte-0002, name=Latte}, {name="12\\" Pie, large"}]\n'
    )
    assert dialog_text.is_grounded(response, context) == grounded


# The split.


def test_opening_is_normalised():
    assert files.opening("  I'd like a CHAI—please!! ") == 'i d like a chai please'


def test_split_rule_golden():
    golden = {
        'can i get an espresso please': ('train', 'train'),
        'latte': ('test', 'train'),
        'chai please': ('validation', 'validation'),
        'hello': ('train', 'validation'),
    }
    found = {key: tuple(files.split_of(domain, key) for domain in taskmaster.DOMAINS) for key in golden}
    assert found == golden


# The tasks, on files of the real schema.


def test_thumbs(folder):
    rows = [
        rated([GREETING, user(TRAIN)], CALL, 1.0),
        rated([GREETING, user(VALIDATION)], agent('Sure — à bientôt.'), 0.0),
        rated([user(TRAIN)], {'role': 'agent', 'api': {'': {}}}, 1.0),
        rated([GREETING, user(TRAIN), CALL, agent('No answer came.')], agent(''), 0.0),  # a call without a response
        rated([GREETING, user(TRAIN)], CALL, 0.0),  # contradicts the first row
    ]
    write_rated(folder, rows)
    first, opens_with_user, no_response, contradiction = everything('taskmaster_coffee_thumbs')
    inputs = f'agent: Welcome.\nuser: {TRAIN}\n'
    assert first['inputs_pretokenized'].decode() == inputs
    assert first['targets_pretokenized'].decode() == TEXT
    assert first['group'].decode() == files.opening(TRAIN)
    vocabulary = seqio.ByteVocabulary()
    assert first['inputs'].tolist() == vocabulary.encode(inputs)
    assert first['targets'].tolist() == [*vocabulary.encode(TEXT), vocabulary.eos_id]
    assert first['label'] == np.float32(1)
    assert first['label'].dtype == np.float32
    assert first['label'].shape == ()
    assert opens_with_user['inputs_pretokenized'].decode() == f'user: {TRAIN}\n'
    assert opens_with_user['targets_pretokenized'] == b'call: ()'
    assert no_response['targets_pretokenized'] == b'agent:'
    assert contradiction['label'] == 0
    (held_out,) = everything('taskmaster_coffee_thumbs', 'validation')
    assert held_out['targets_pretokenized'].decode() == 'agent: Sure — à bientôt.'
    assert held_out['nearness'] == b'far' and 'nearness' not in first  # 3 of 5 words are train's
    assert everything('taskmaster_coffee_thumbs', 'test') == []
    assert seqio.TaskRegistry.get('taskmaster_coffee_thumbs').num_input_examples('train') == 4


def test_empty_contexts_split_by_id(folder):
    rows = [rated([], agent('Hello.'), 1.0, f'dlg-{n}') for n in range(20)]
    write_rated(folder, rows)
    for split in registration.SPLITS:
        count = sum(files.split_of('coffee', f'dlg-{n}') == split for n in range(20))
        examples = everything('taskmaster_coffee_thumbs', split)
        assert [example['inputs_pretokenized'] for example in examples] == [b'\n'] * count


def test_pairs_and_prompts(folder):
    context, other = [GREETING, user(TRAIN)], [user(TRAIN)]
    rows = [
        rated(context, agent('good'), 1.0),
        rated(other, agent('alone'), 0.0),
        rated(context, agent('bad'), 0.0),
        rated(context, agent('bad'), 0.0),  # again
        rated(context, agent('good'), 0.0),  # contradicts: never against itself
        rated(context, CALL, 1.0),
    ]
    write_rated(folder, rows)
    found = [(e['chosen_pretokenized'], e['rejected_pretokenized']) for e in everything('taskmaster_coffee_pairs')]
    call = TEXT.encode()
    assert found == [(b'agent: good', b'agent: bad'), (call, b'agent: bad'), (call, b'agent: good')]
    example = everything('taskmaster_coffee_pairs')[0]
    assert example['weight'] == pytest.approx(1 / 3) and 'nearness' not in example
    assert example['chosen'][-1] == example['rejected'][-1] == seqio.ByteVocabulary().eos_id
    prompts = everything('taskmaster_coffee_prompts')
    assert [(p['inputs_pretokenized'].decode(), p['reference']) for p in prompts] == [
        (f'agent: Welcome.\nuser: {TRAIN}\n', b'agent: good'),
        (f'user: {TRAIN}\n', b''),
    ]


def test_coffee_dialogs(folder, capsys):
    menu = '{"menu_items": [{"name": "Latte"}]}'
    annotations = [
        ('api_call', 'get_menu_items'), ('request', '{"query": "latte"}'),
        ('api_response', 'get_menu_items'), ('response', menu),
        ('api_call', 'show_menu'), ('api_response', 'show_menu'), ('response', '{"success": true}'),
    ]  # fmt: skip
    dialog = {
        'conversation_id': 'dlg-1',
        'utterances': [utterance('user', TRAIN, *annotations), utterance('assistant', 'Here you are.')],
    }
    broken = ('response', '{"menu_item_id":""latte""}')
    unreadable = {**dialog, 'utterances': [utterance('user', TRAIN, *annotations[:3], broken)]}
    others = [
        {'conversation_id': f'dlg-{n}', 'utterances': [utterance('user', TEST), utterance('assistant', f'{n}')]}
        for n in range(100)
    ]
    write_dialogs(folder, [dialog, {**dialog, 'conversation_id': 'dlg-2'}, unreadable, *others])
    examples = everything('taskmaster_coffee_sft')
    assert [e['targets_pretokenized'].decode() for e in examples] == [
        'call: get_menu_items(query=latte)',
        'call: show_menu()',
        'agent: Here you are.',
    ]
    assert examples[-1]['inputs_pretokenized'].decode() == (
        f'user: {TRAIN}\ncall: get_menu_items(query=latte)\nresp: items=[{{name=Latte}}]\n'
        'call: show_menu()\nresp: success=true\n'
    )
    assert len(everything('taskmaster_coffee_sft', 'test')) == 100
    few_files, warning = capsys.readouterr().err.splitlines()  # once, though it was read three times
    assert 'holds 1 of the 8 files' in few_files
    assert '1 of 103 rows cannot be read: data_00.json row 3 ' in warning
    assert '1 duplicates' in warning


def test_ticketing_dialogs(folder):
    opening = in_split('train', 'ticketing')
    history = f'<S><A>Hello.<U>{opening}<PN>find_theaters<PAN>location<PAV>Salem, Oregon'
    last = '<PR>find_theaters<PRAN>name.theater<PRAV>AMC 16<PRAV>Regal'
    rows = [
        f'{last}<C>{history}\t[A]AMC 16 or Regal?\tdlg-1',
        f'<U>{opening}<C><S><A>Hello.\t[A]One moment.[PN]find_theaters[PAN]location[PAV]Salem, Oregon\tdlg-2',
        f'<U>{opening}<C><S><A>Hello.\t[PN]find_theaters[PAN]location[PAV]Salem, Oregon\tdlg-1',  # part of the first
        f'"<U>{opening}"\t"[A]Say ""when""."\tdlg-3',
    ]
    write(folder, 'TM-3-2020/splits/train/train-bc.tsv', '\n'.join(rows) + '\n')
    examples = everything('taskmaster_ticketing_sft')
    call = 'call: find_theaters(location="Salem, Oregon")'
    assert [e['targets_pretokenized'].decode() for e in examples] == [
        'agent: Hello.', call, 'agent: AMC 16 or Regal?', 'agent: Hello.', 'agent: One moment.', call,
        'agent: Say "when".',
    ]  # fmt: skip
    assert examples[0]['inputs_pretokenized'] == b'\n'
    assert examples[2]['inputs_pretokenized'].decode() == (
        f'agent: Hello.\nuser: {opening}\n{call}\nresp: name.theater=[AMC 16, Regal]\n'
    )


def test_ticketing_dialogs_are_read_from_all_parts_or_from_them_joined(folder, capsys):
    opening = in_split('train', 'ticketing')
    rows = [f'<U>{opening} \t[A]Part {n}.\tdlg-{n}' for n in range(3)]
    parts = folder / 'TM-3-2020/splits/train'
    for name, row in zip(('aa', 'ab', 'bc'), rows):
        write(parts, f'train-{name}.tsv', row + '\n')
    want = [f'agent: Part {n}.' for n in range(3)]
    assert [e['targets'] for e in taskmaster.sft('ticketing', 'train')] == want
    assert 'holds 3 of the 29 files TM-3-2020/splits/train/train-*.tsv' in capsys.readouterr().err
    files._dialogs.cache_clear()
    write(parts, 'train.tsv', '\n'.join([*rows, f'<U>{opening} \t[A]Part 3.\tdlg-3']) + '\n')
    assert [e['targets'] for e in taskmaster.sft('ticketing', 'train')] == [*want, 'agent: Part 3.']
    assert capsys.readouterr().err == ''


# Bad input.


def test_the_folder_must_be_named(monkeypatch):
    monkeypatch.delenv('TASKMASTER_DIR', raising=False)
    with pytest.raises(UserError, match='TASKMASTER_DIR is not set: clone .*google-research-datasets/Taskmaster'):
        everything('taskmaster_coffee_thumbs')


def test_the_folder_must_hold_the_files(folder):
    with pytest.raises(UserError, match='holds no TM-3-2020/reward'):
        everything('taskmaster_ticketing_prompts')
    with pytest.raises(UserError, match=r'holds no TM-3-2020/splits/train/train-\*.tsv'):
        everything('taskmaster_ticketing_sft')


@pytest.mark.parametrize(('content', 'reason'), [
    ('{"a": ', 'not JSON'), ('{}', 'not a list of JSON'), ('[' * 10**5, r'not JSON \(it is nested too deeply'),
])  # fmt: skip
def test_a_file_that_is_not_json(folder, content, reason):
    write_rated(folder, content)
    with pytest.raises(UserError, match=rf'reward_00\.json: {reason}'):
        everything('taskmaster_coffee_pairs')


GOOD = rated([GREETING, user(TRAIN)], CALL, 1.0)
BAD_ROWS = [
    ({k: v for k, v in GOOD.items() if k != 'context'}, 'lacks'),
    ({**GOOD, 'context': '[{"role"'}, 'Expecting'),
    ({**GOOD, 'context': '3'}, 'iterable'),
    ({**GOOD, 'context': '[3]'}, 'not a turn'),
    ({**GOOD, 'generation': 'Sure.'}, 'Expecting'),
    ({**GOOD, 'generation': json.dumps(user('hi'))}, 'a turn of the user'),
    ({**GOOD, 'reward': 0.5}, 'reward is 0.5'),
    ({**GOOD, 'reward': None}, 'float'),
    ('row', 'indices'),
]


@pytest.mark.parametrize(('row', 'reason'), BAD_ROWS)
def test_a_bad_row_is_named_and_left_out(folder, capsys, row, reason):
    write_rated(folder, [GOOD, row, *[GOOD] * 98])
    assert len(files.rated('coffee')) == 99
    _, warning = capsys.readouterr().err.splitlines()  # the first says that there is one file alone
    assert warning.startswith('warning: TM-4-2024/reward/*.json: 1 of 100 rows cannot be read: reward_00.json row 2 ')
    assert reason in warning


@pytest.mark.parametrize(('name', 'read', 'count'), [
    ('TM-4-2024/reward', lambda: files.rated('coffee'), 7),
    ('TM-4-2024/data', lambda: files.dialogs('coffee'), 8),
    ('TM-3-2020/reward', lambda: files.rated('ticketing'), 8),
])  # fmt: skip
def test_files_that_are_missing_are_counted(folder, capsys, name, read, count):
    for number in range(count - 1):
        write(folder, f'{name}/file_{number:02}.json', [])
    read()
    assert f'holds {count - 1} of the {count} files {name}/*.json' in capsys.readouterr().err
    files._rated.cache_clear(), files._dialogs.cache_clear()
    write(folder, f'{name}/file_{count:02}.json', [])
    read()
    assert capsys.readouterr().err == ''


def test_many_bad_rows_stop(folder):
    write_rated(folder, [GOOD, *[row for row, _ in BAD_ROWS[:2]], *[GOOD] * 97])
    with pytest.raises(UserError, match=r'2 of 100 rows cannot be read: reward_00.json row 2, .* row 3 .*more than 1%'):
        everything('taskmaster_coffee_thumbs')


@pytest.mark.parametrize(
    'row', ['<U>hi\t[A]Hello.', 'hi<U>\t[A]Hello.\tdlg-1', '<U>hi\t[U]Hello.\tdlg-1', '<U>hi\t\tdlg-1', '']
)
def test_a_bad_tsv_row_stops(folder, row):
    write(folder, 'TM-3-2020/splits/train/train-bc.tsv', row + '\n')
    with pytest.raises(UserError, match='1 of 1 rows cannot be read: train-bc.tsv row 1 '):
        everything('taskmaster_ticketing_sft')


# The real files, whole or with the test rows held back.


@pytest.fixture(scope='module')
def real():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TASKMASTER_DIR', str(DATA))
        yield


@needs_data
@pytest.mark.parametrize(
    ('kind', 'domain', 'train', 'validation'),
    [
        ('sft', 'coffee', 15468, 3444), ('thumbs', 'coffee', 2232, 570),
        ('pairs', 'coffee', 466, 108), ('prompts', 'coffee', 1532, 385),
        ('sft', 'ticketing', 8587, 2256), ('thumbs', 'ticketing', 2617, 540),
        ('pairs', 'ticketing', 14, 6), ('prompts', 'ticketing', 2551, 525),
    ],
)  # fmt: skip
def test_real_counts(real, kind, domain, train, validation):
    examples = getattr(taskmaster, kind)
    assert len(list(examples(domain, 'train'))) == train
    assert len(list(examples(domain, 'validation'))) == validation


@needs_data
@pytest.mark.parametrize(
    ('kind', 'domain', 'openings', 'near', 'rows'),
    [('thumbs', 'coffee', 138, 11, 42), ('pairs', 'coffee', 34, 3, 5), ('thumbs', 'ticketing', 38, 7, 108)],
)
def test_real_near_openings(real, kind, domain, openings, near, rows):
    examples = list(getattr(taskmaster, kind)(domain, 'validation'))
    nearness = {example['group']: example['nearness'] for example in examples}
    assert (len(nearness), sum(value == 'near' for value in nearness.values())) == (openings, near)
    assert sum(example['nearness'] == 'near' for example in examples) == rows
    assert all('nearness' not in example for example in getattr(taskmaster, kind)(domain, 'train'))


@needs_data
@pytest.mark.parametrize(('domain', 'share'), [('coffee', 0.853), ('ticketing', 0.155)])
def test_real_labels(real, domain, share):
    rows = [row for row in files.rated(domain) if row.split != 'test']
    assert np.mean([row.label for row in rows]) == pytest.approx(share, abs=5e-4)


@needs_data
@pytest.mark.parametrize('domain', taskmaster.DOMAINS)
def test_real_openings_do_not_leak(real, domain):
    splits = {}
    for row in files.rated(domain):
        splits.setdefault(row.opening, set()).add(row.split)
    for dialog in files.dialogs(domain):
        said = [line.removeprefix('user: ') for line in dialog.lines if line.startswith('user: ')]
        key = files.opening(said[0]) if said else dialog.conversation_id
        splits.setdefault(key, set()).add(dialog.split)
    assert all(len(names) == 1 for names in splits.values())


@needs_data
@pytest.mark.parametrize(('domain', 'apis', 'odd'), [('coffee', 11, 19), ('ticketing', 9, 4)])
def test_real_answers_are_well_formed(real, domain, apis, odd):
    assert len(taskmaster.known_calls(domain)) == apis
    names = taskmaster.known_calls(domain)
    assert all(dialog_text.is_well_formed(e['targets'], names) for e in taskmaster.sft(domain, 'train'))
    rows = [*taskmaster.thumbs(domain, 'train'), *taskmaster.thumbs(domain, 'validation')]
    assert sum(not dialog_text.is_well_formed(row['targets']) for row in rows) == odd


@needs_data
def test_real_thumbs_agree_with_valid_coffee_calls(real):
    """AUC of validation's; known calls alone have 0.504."""
    rows = list(taskmaster.thumbs('coffee', 'validation'))
    scores = np.array([taskmaster.valid_coffee_call(row['inputs'], row['targets'], row) for row in rows])
    up = np.array([row['label'] for row in rows]) > 0.5
    above, ties = scores[up][:, None] > scores[~up], scores[up][:, None] == scores[~up]
    assert above.mean() + ties.mean() / 2 == pytest.approx(0.675, abs=5e-4)


@needs_data
def test_real_files_through_seqio(real):
    examples = everything('taskmaster_coffee_thumbs', 'validation')
    assert len(examples) == 570
    assert max(len(example['inputs']) for example in examples) == 2425
    assert {float(example['label']) for example in examples} == {0.0, 1.0}


@needs_data
def test_real_dialogs_that_cannot_be_read_are_counted(real, capsys):
    files._dialogs.cache_clear()
    files.dialogs('coffee')
    # Held back rows shift the numbers: 16 of 3158 without them.
    assert re.search(r'\d+ of \d+ rows cannot be read: data_00.json row \d+, ', capsys.readouterr().err)
