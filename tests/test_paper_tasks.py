"""The paper's data sets as tasks, on small files of the upstream schemas, odd rows included; and `inspect` on each."""

import json
import re

import pytest
import seqio
import tensorflow as tf
from toy_runs import ran

from perl_jax.errors import UserError
from perl_jax.tasks import android_control, bolt, hh, shp, tldr
from perl_jax.tasks.android_control import files

SPLITS = ('train', 'validation', 'test')


def examples(task, split='train'):
    dataset = seqio.get_mixture_or_task(task).get_dataset(None, split, shuffle=False, num_epochs=1)
    rows = [
        {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()} for row in dataset.as_numpy_iterator()
    ]
    return [
        {k.removesuffix('_pretokenized'): v for k, v in row.items() if not hasattr(v, 'shape') or not v.shape}
        for row in rows
    ]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')


def inspected(task, split='train'):
    out = ran('inspect', f'--task={task}', f'--split={split}', '--num=1').out
    return int(re.search(rf'^{task}, {split}: ([\d,]+) examples', out, re.MULTILINE).group(1))


# Reddit TL;DR.


def post(number, summary=' a summary '):
    info = {'id': f't3_{number}', 'subreddit': 'dogs', 'title': 'Puppy', 'post': f'Post {number}.\n'}
    return info | {'summary': summary}


def comparison(number, choice, split, texts=(' first', ' second\n')):
    info = post(number)
    del info['summary']
    return {'info': info, 'summaries': [{'text': t, 'policy': 'x'} for t in texts], 'choice': choice, 'split': split}


TEXT = 'SUBREDDIT: r/dogs\n\nTITLE: Puppy\n\nPOST: Post {}.\n\nTL;DR:'


@pytest.fixture
def posts(tmp_path, monkeypatch):
    monkeypatch.setenv('TLDR_SOURCE', str(tmp_path))
    return tmp_path


@pytest.fixture
def comparisons(tmp_path, monkeypatch):
    monkeypatch.setenv('TLDR_PAIRS_SOURCE', str(tmp_path))
    return tmp_path


def test_tldr_posts(posts):
    for name, number in (('train', 1), ('valid', 2), ('test', 3)):
        write(posts / f'{name}.jsonl', [post(number)])
    for split, number in zip(SPLITS, (1, 2, 3)):
        (example,) = examples('tldr_sft', split)
        assert example == {'inputs': TEXT.format(number), 'targets': ' a summary', 'group': f't3_{number}'}
        (example,) = examples('tldr_prompts', split)
        assert example == {'inputs': TEXT.format(number), 'reference': 'a summary', 'group': f't3_{number}'}
    assert inspected('tldr_sft', 'test') == inspected('tldr_prompts') == 1


def test_tldr_comparisons_say_their_split_and_cnndm_is_passed_over(comparisons):
    article = {
        **comparison(9, 0, 'valid2'),
        'info': {'id': 'x', 'site': 'cnn', 'title': 't', 'article': 'a', 'post': None},
    }
    write(
        comparisons / 'batch3.json', [comparison(1, 0, 'train'), comparison(1, 1, 'train'), comparison(2, 1, 'valid1')]
    )
    write(
        comparisons / 'batch11.json',
        [comparison(3, 1, 'valid2'), article, comparison(4, 0, 'train', [' same', 'same '])],
    )
    first, second = examples('tldr_pairs')
    assert first == {'inputs': TEXT.format(1), 'chosen': ' first', 'rejected': ' second', 'group': 't3_1'}
    assert (second['chosen'], second['rejected']) == (' second', ' first')
    assert [e['group'] for e in examples('tldr_pairs', 'validation')] == ['t3_2']
    assert [e['group'] for e in examples('tldr_pairs', 'test')] == ['t3_3']
    assert inspected('tldr_pairs') == 2


ODD_COMPARISONS = [
    ({**comparison(1, 2, 'train')}, 'choice 2'),
    ({**comparison(1, 0, 'train'), 'summaries': [{'text': 'one'}]}, '1 summaries'),
    (comparison(1, 0, 'train', [' ', 'b']), 'a summary is empty'),
    ({k: v for k, v in comparison(1, 0, 'train').items() if k != 'info'}, "lacks 'info'"),
    ({**comparison(1, 0, 'train'), 'info': {**post(1), 'post': None}}, 'post is None'),
]


@pytest.mark.parametrize(('row', 'reason'), ODD_COMPARISONS)
def test_an_odd_comparison_is_named_and_left_out(comparisons, capsys, row, reason):
    write(comparisons / 'batch3.json', [*[comparison(1, 0, 'train')] * 99, row])
    assert len(tldr.COMPARISONS.rows('train')) == 99
    assert re.search(rf'1 of 100 rows cannot be read: batch3.json row 100 .*{reason}', capsys.readouterr().err)
    write(comparisons / 'batch4.json', [row])
    tldr.sources._read.cache_clear()
    with pytest.raises(UserError, match='TLDR_PAIRS_SOURCE=.* 2 of 101 rows .*batch3.json row 100, batch4.json row 1 '):
        tldr.COMPARISONS.rows('train')


# Anthropic's dialogs.


def test_hh(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HH_HARMLESS_SOURCE', str(tmp_path))
    dialog = '\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: {}\n\nAssistant:'

    def row(n):
        return {'chosen': dialog.format(n) + " I won't.", 'rejected': dialog.format(n) + ' I will.'}

    equal = {'chosen': dialog.format(0) + ' a', 'rejected': dialog.format(0) + ' a'}
    odd = {'chosen': '\n\nHuman: a\n\nAssistant: b', 'rejected': '\n\nHuman: c\n\nAssistant: b'}
    more = [row(n) for n in range(2, 18)] * 6
    write(tmp_path / 'test.jsonl', [row(1), row(1), equal, odd, *more])
    first = examples('hh_harmless_pairs', 'test')[0]
    assert first == {'inputs': dialog.format(1), 'chosen': " I won't.", 'rejected': ' I will.', 'group': 'hi'}
    warning = capsys.readouterr().err
    assert 'test.jsonl row 4 (the first: the transcripts do not open alike)' in warning
    assert len(examples('hh_harmless_pairs', 'test')) == 98
    assert len(examples('hh_harmless_prompts', 'test')) == 17
    assert inspected('hh_harmless_sft', 'test') == 98
    # The source has no validation: it is a part of train, and no group is in both.
    rows = [{k: v.replace('Hi', f'Hi {n}') for k, v in row(n).items()} for n in range(200)]
    write(tmp_path / 'train.jsonl', [*rows, *rows])
    train, held = ({e['group'] for e in examples('hh_harmless_pairs', s)} for s in ('train', 'validation'))
    assert len(train | held) == 200 and not train & held and 2 <= len(held) <= 20


@pytest.mark.parametrize(
    ('chosen', 'rejected', 'reason'),
    [
        ('\n\nHuman: a\n\nAssistant: b', '\n\nHuman: a\n\nAssistant: ', 'empty'),
        ('\n\nHuman: a\n\nAssistant: b', '\n\nHuman: a\n\nAssistant: c\n\nHuman: d\n\nAssistant: e', 'part before'),
        ('\n\nHuman: a\n\nAssistant: b', '\n\nHuman: a\n\nAssistant:\n\nHuman: d\n\nAssistant: e', 'part before'),
        ('a', 'b', 'open alike'),
    ],
)
def test_hh_odd_rows(chosen, rejected, reason):
    with pytest.raises(ValueError, match=reason):
        hh.read({'chosen': chosen, 'rejected': rejected})


@pytest.mark.parametrize('space', [' ', '\n\n'])
def test_hh_an_answer_may_begin_with_human(space):
    """27 of the 2,312 real test rows."""
    dialog = '\n\nHuman: Hi, you!\n\nAssistant:'
    row = hh.read({'chosen': f'{dialog}{space}Human: I will not.', 'rejected': f'{dialog} I will.'})
    assert (row.inputs, row.chosen, row.rejected) == (dialog, ' Human: I will not.', ' I will.')


@pytest.mark.parametrize('said', ['Hi, you!', 'hi you', ' HI -- you? ', 'Hi\n_you_'])
def test_hh_openings_that_differ_in_case_and_punctuation_are_one_group(said):
    dialog = f'\n\nHuman: {said}\n\nAssistant:'
    assert hh.read({'chosen': f'{dialog} a', 'rejected': f'{dialog} b'}).group == 'hi you'


# SHP.


def test_shp(tmp_path, monkeypatch):
    monkeypatch.setenv('SHP_SOURCE', str(tmp_path))

    def row(number, domain, labels, text='Q?'):
        texts = {'history': text, 'human_ref_A': 'Yes.\n', 'human_ref_B': 'No.'}
        ratio = {'score_ratio': 2.0 + labels}
        return texts | ratio | {'post_id': f'p{number}', 'domain': f'{domain}_train', 'labels': labels, 'score_A': 3}

    for split in SPLITS:
        write(tmp_path / f'askhr/{split}.json', [row(1, 'askhr', 1), row(1, 'askhr', 0)])
        write(tmp_path / f'askvet/{split}.json', [row(2, 'askvet', 0, 'Dog?') | {'score_ratio': 9}])
    first, second, third = examples('shp_pairs')
    assert first == {'inputs': 'POST: Q?\n\nRESPONSE:', 'chosen': ' Yes.', 'rejected': ' No.', 'group': 'p1'}
    assert (second['chosen'], third['chosen'], third['group']) == (' No.', ' No.', 'p2')
    assert [e['group'] for e in examples('shp_askvet_pairs', 'test')] == ['p2']
    assert examples('shp_prompts', 'validation') == [
        {'inputs': 'POST: Q?\n\nRESPONSE:', 'reference': 'Yes.', 'group': 'p1'},
        {'inputs': 'POST: Dog?\n\nRESPONSE:', 'reference': 'No.', 'group': 'p2'},
    ]
    assert inspected('shp_askhr_pairs') == 2 and inspected('shp_sft', 'test') == 2
    assert len(shp.DOMAINS) == 18 and all(f'shp_{d}_prompts' in seqio.TaskRegistry.names() for d in shp.DOMAINS)
    for name, value, kept in (
        ('SHP_SCORE_RATIO', '2', ['p1', 'p1', 'p2']), ('SHP_SCORE_RATIO', '2.5', ['p1', 'p2']),
        ('SHP_POST_PAIRS', '1', ['p1', 'p2']),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert [e['group'] for e in examples('shp_pairs')] == kept
    for name, value in ('SHP_SCORE_RATIO', 'much'), ('SHP_SCORE_RATIO', '0.5'), ('SHP_POST_PAIRS', '1.5'):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(UserError, match=f'{name}={value}: give a'):
                examples('shp_pairs')
    for odd in ({'labels': 2}, {'domain': 'pics_train'}, {'history': ' '}, {'human_ref_B': ''}, {'human_ref_A': None}):
        with pytest.raises((ValueError, AttributeError)):
            shp.read(row(1, 'askhr', 1) | odd)


# BOLT.

XML = """<?xml version="1.0" encoding="UTF-8"?>
<conversation id="{}" medium="SMS" donated="true"><messages>
<message id="m0" date="2013-01-01" participant="115"><body>Call me at
555-123-4567 &amp; hurry</body></message>
<message id="m1" date="2013-01-01" participant="99"><body> </body></message>
<message id="m2" date="2013-01-02" participant="7"><body>At 10:30, 2013?</body></message>
<message id="m3" date="2013-01-02" participant="115"><body>ok</body></message>
</messages></conversation>
"""


def test_bolt(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('BOLT_SOURCE', str(tmp_path))
    for number in range(100):
        (tmp_path / f'SMS_ENG_{number:03}.xml').write_text(XML.format(f'SMS_ENG_{number:03}'))
    (tmp_path / 'SMS_ENG_100.xml').write_text('<conversation>')
    found = {split: examples('bolt_prompts', split) for split in SPLITS}
    assert 'SMS_ENG_100.xml row 1' in capsys.readouterr().err
    assert found['train'][0]['inputs'] == ('A: Call me at [number] & hurry\nB: At 10:30, 2013?\nA: ok\n\nTL;DR:')
    groups = [example['group'] for split in SPLITS for example in found[split]]
    assert len(groups) == len(set(groups)) == 100 and all(found.values())
    assert inspected('bolt_prompts') == len(found['train']) > 80
    with pytest.raises(ValueError, match='no message has a text'):
        bolt.read({'id': 1, 'messages': [{'participant': 'a', 'text': ' '}]})


# AndroidControl.

CLICK, OPEN = {'action_type': 'click', 'x': 15, 'y': 15}, {'action_type': 'open_app', 'app_name': 'Mail'}
ROW = {
    'episode_id': 7, 'goal': 'Mail Bob', 'step_instructions': ['Open Mail', 'Click Compose'],
    'accessibility_trees': ['[0] Icon "Mail"', '[0] Button "Compose"', ''],
    'actions': [json.dumps(OPEN), {'action_type': 'click', 'element': 0, 'text': None}], 'split': 'train',
}  # fmt: skip


def test_android_control(tmp_path, monkeypatch):
    monkeypatch.setenv('ANDROID_CONTROL_SOURCE', str(tmp_path / 'rows.jsonl'))
    alone = {**ROW, 'episode_id': 8, 'split': 'test', 'accessibility_trees': ['x']}
    alone |= {'step_instructions': ['go'], 'actions': [{'action_type': 'navigate_home'}]}
    write(tmp_path / 'rows.jsonl', [ROW, alone])
    opened, clicked = ' {"action_type": "open_app", "app_name": "Mail"}', ' {"action_type": "click", "element": 0}'
    first, second = examples('android_control_pairs')
    assert first == {
        'inputs': 'goal: Mail Bob\nstep: Open Mail\nscreen:\n[0] Icon "Mail"\naction:',
        'chosen': opened, 'rejected': clicked, 'group': '7',
    }  # fmt: skip
    assert second['inputs'].startswith(f'goal: Mail Bob\ndid:{opened}\nstep: Click Compose\nscreen:\n')
    assert second['chosen'] == clicked
    assert [(e['targets'], e['label']) for e in examples('android_control_thumbs')] == [
        (opened, 1), (clicked, 0), (clicked, 1), (opened, 0)
    ]  # fmt: skip
    assert examples('android_control_pairs', 'test') == []
    assert [e['label'] for e in examples('android_control_thumbs', 'test')] == [1]
    assert inspected('android_control_thumbs') == 4 and inspected('android_control_sft') == 2
    assert examples('android_control_prompts')[0]['reference'] == opened.strip()
    for odd in (
        {'actions': []},
        {'actions': ['{']},
        {'actions': [{}, {}]},
        {'step_instructions': ['one']},
        {'goal': None},
    ):
        with pytest.raises((ValueError, AttributeError)):
            android_control.read(ROW | odd)


def tree(*nodes):
    """A serialised AndroidAccessibilityForest: the app's window, and a status bar that is not to be seen."""
    forest = files._forest()()
    bar = forest.windows.add(window_type=3)
    bar.tree.nodes.add(text='12:00', is_visible_to_user=True)
    window = forest.windows.add(window_type=1)
    for kind, text, left, right, visible, *more in nodes:
        node = window.tree.nodes.add(
            class_name=kind, text=text, is_visible_to_user=visible, is_clickable=kind == 'a.Button', **dict(more)
        )
        node.bounds_in_screen.left, node.bounds_in_screen.right, node.bounds_in_screen.bottom = left, right, 100
    return forest.SerializeToString()


def test_android_control_tfrecords(tmp_path, monkeypatch, capsys):
    screen = tree(
        ('a.Layout', '', 0, 99, True),
        ('a.Text', 'Bob\nB.', 0, 90, True),
        ('a.Button', '', 10, 20, True),
        ('a.Text', 'no', 0, 9, False),
        ('a.Switch', 'Wifi', 0, 9, True, ('is_checked', True)),
        ('a.Tab', '', 0, 9, True, ('is_selected', True), ('tooltip_text', 'Inbox')),
    )
    texts = {'goal': [b'Mail Bob'], 'accessibility_trees': [screen] * 3, 'step_instructions': [b'a', b'b'],
             'actions': [json.dumps(a).encode() for a in (CLICK, OPEN)], 'screenshots': [b'png'] * 3}  # fmt: skip

    def record(number, **changed):
        features = {k: tf.train.Feature(bytes_list=tf.train.BytesList(value=v)) for k, v in (texts | changed).items()}
        features['episode_id'] = tf.train.Feature(int64_list=tf.train.Int64List(value=[number]))
        return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()

    file = tmp_path / 'android_control-00000-of-00020'
    with tf.io.TFRecordWriter(str(file), 'GZIP') as writer:
        for number in range(100):
            writer.write(record(number))
        writer.write(record(100, accessibility_trees=[b'\xff'] * 3))
    (tmp_path / 'splits.json').write_text(json.dumps({'train': [*range(99), 100], 'test': [99]}))
    monkeypatch.setenv('ANDROID_CONTROL_SOURCE', str(tmp_path))
    first, second = examples('android_control_sft', 'test')
    assert first['inputs'] == (
        'goal: Mail Bob\nstep: a\nscreen:\n[0] Text "Bob B."\n[1] Button\n'
        '[2] Switch "Wifi" checked\n[3] Tab "Inbox" selected\naction:'
    )
    assert first['targets'] == ' {"action_type": "click", "element": 1}'
    assert second['targets'] == ' {"action_type": "open_app", "app_name": "Mail"}'
    assert capsys.readouterr().err == ''  # screens of other splits are not unpacked
    assert len(examples('android_control_sft')) == 198
    assert 'android_control-00000-of-00020 row 101 ' in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-20])
    tldr.sources._read.cache_clear()
    with pytest.raises(UserError, match='android_control-00000-of-00020 cannot be read'):
        android_control.SOURCE.rows('train')
