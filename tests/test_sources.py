"""Where rows come from: files of every kind, the hub through a stand-in, TFDS for real; and who gets which split."""

import gzip
import json
import sys
import types

import pytest
import tensorflow as tf

from perl_jax.errors import UserError
from perl_jax.tasks import sources

SPLITS = ('train', 'validation', 'test')


def read(row):
    return types.SimpleNamespace(group=row['text'], text=row['text'])


@pytest.fixture
def source():
    """A source of rows {text}; every test reads it anew."""
    sources._read.cache_clear()
    return sources.Source('MY_SOURCE', None, 'do this', read)


def texts(source, split='train'):
    return [row.text for row in source.rows(split)]


def rows(*names):
    return [{'text': name} for name in names]


def lines(*names):
    return ''.join(json.dumps(row) + '\n' for row in rows(*names))


def parquet(path, *names):
    arrow, table = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    table.write_table(arrow.table({'text': list(names)}), path)


def test_every_kind_of_file(source, tmp_path, monkeypatch):
    monkeypatch.setenv('MY_SOURCE', str(tmp_path))
    (tmp_path / 'train-1.jsonl').write_text(lines('a', 'é\u2028\x85') + '\n')
    (tmp_path / 'train-2.json').write_text(json.dumps(rows('b')))
    (tmp_path / 'train-3.json').write_text(lines('c'))
    (tmp_path / 'train-4.jsonl.gz').write_bytes(gzip.compress(lines('d').encode()))
    parquet(tmp_path / 'train-5.parquet', 'e', 'f')
    (tmp_path / 'README.md').write_text('no data')
    (tmp_path / 'info.json').write_text('{"says": "no split"}')
    (tmp_path / 'validation').mkdir()
    (tmp_path / 'validation/0000.jsonl').write_text(lines('v'))
    (tmp_path / 'test.jsonl').write_text(lines('t'))
    assert texts(source) == ['a', 'é\u2028\x85', *'bcdef']
    assert texts(source, 'validation') == ['v'] and texts(source, 'test') == ['t']


@pytest.mark.parametrize('name', ['train.jsonl', 'train-00000-of-00001.parquet', 'TRAIN_2.json', 'train'])
def test_names_of_train(name):
    assert sources.split_named(name) == 'train'


def test_names_of_splits():
    named = dict.fromkeys(('valid.jsonl', 'valid2', 'validation_1', 'val.json', 'dev.json'), 'validation')
    named |= {'test-0': 'test', 'training': None, 'value.json': None, 'batch3.json': None}
    assert {name: sources.split_named(name) for name in named} == named


def test_one_file_is_divided_by_group(source, tmp_path, monkeypatch):
    file = tmp_path / 'all.jsonl'
    names = [f'row {n}' for n in range(400)]
    file.write_text(lines(*names, *names))
    monkeypatch.setenv('MY_SOURCE', str(file))
    found = {split: texts(source, split) for split in SPLITS}
    assert sorted(sum(found.values(), [])) == sorted(names * 2)
    assert not set(found['train']) & set(found['validation']) and not set(found['validation']) & set(found['test'])
    assert 330 < len(set(found['train'])) < 385


def test_test_is_half_of_validation_where_there_is_no_test(source, tmp_path, monkeypatch):
    monkeypatch.setenv('MY_SOURCE', str(tmp_path))
    names = [f'row {n}' for n in range(200)]
    (tmp_path / 'train.jsonl').write_text(lines('a', 'b', 'c'))
    (tmp_path / 'valid.jsonl').write_text(lines(*names))
    validation, test = texts(source, 'validation'), texts(source, 'test')
    assert texts(source) == ['a', 'b', 'c']
    assert sorted(validation + test) == sorted(names) and 70 < len(test) < 130


def test_the_split_rule_is_for_ever():
    found = [sources._by_hash('MY_SOURCE', f'row {n}', 'train', ['train']) for n in range(40)]
    assert {n: split for n, split in enumerate(found) if split != 'train'} == {12: 'test', 16: 'test', 23: 'validation'}


def hub(monkeypatch, calls, **splits):
    def load_dataset(path, name=None, data_dir=None):
        calls.append((path, name, data_dir))
        if not splits:
            raise ConnectionError('no network\nand more')
        return splits

    stand_in = types.SimpleNamespace(
        load_dataset=load_dataset, get_dataset_config_names=lambda path: ['default', 'small']
    )
    monkeypatch.setitem(sys.modules, 'datasets', stand_in)


def test_the_hub_through_a_stand_in(source, monkeypatch):
    calls = []
    hub(monkeypatch, calls, train=rows('a', 'b'), test=rows('t'), other=rows('o'))
    for name in ('hf:OWNER/NAME', 'hf:OWNER/NAME:config', 'hf:OWNER/NAME/folder/inner', 'hf:OWNER/NAME/small'):
        monkeypatch.setenv('MY_SOURCE', name)
        assert texts(source, 'test') == ['t']
        assert sorted(texts(source) + texts(source, 'validation')) == ['a', 'b']
    assert list(dict.fromkeys(calls)) == [
        ('OWNER/NAME', None, None),
        ('OWNER/NAME', 'config', None),
        ('OWNER/NAME', None, 'folder/inner'),
        ('OWNER/NAME', 'small', None),
    ]


def test_the_hub_in_one_line_where_it_fails(source, monkeypatch):
    monkeypatch.setenv('MY_SOURCE', 'hf:OWNER/NAME')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UserError, match=r'MY_SOURCE=hf:OWNER/NAME needs the package datasets: .*perl_jax\[datasets\]'):
        source.rows('train')
    hub(monkeypatch, [])
    with pytest.raises(UserError, match='hf:OWNER/NAME cannot be loaded .ConnectionError: no network.: do this$'):
        source.rows('train')


def test_tfds(source, tmp_path, monkeypatch):
    """A data set that TFDS itself wrote into a folder."""
    pytest.importorskip('importlib_resources')  # which TFDS writes with
    tfds = pytest.importorskip('tensorflow_datasets')
    columns = {'text': ['é'], 'choice': [1], 'summaries': {'text': [['x', 'y']]}}
    text = tfds.features.Text()
    tfds.dataset_builders.store_as_tfds_dataset(
        name='mine',
        config='default',
        version='1.0.0',
        data_dir=str(tmp_path),
        split_datasets={split: tf.data.Dataset.from_tensor_slices(columns) for split in ('train', 'validation')},
        features=tfds.features.FeaturesDict(
            {'text': text, 'choice': tf.int32, 'summaries': tfds.features.Sequence({'text': text})}
        ),
    )
    load = tfds.load
    monkeypatch.setattr(tfds, 'load', lambda name: load(name, data_dir=str(tmp_path)))  # as TFDS_DATA_DIR would
    monkeypatch.setenv('MY_SOURCE', 'tfds:mine')
    seen = []
    whole = sources.Source('MY_SOURCE', None, 'do this', lambda row: seen.append(row) or read(row))
    assert texts(whole) == ['é']
    assert seen == [{'text': 'é', 'choice': 1, 'summaries': {'text': ['x', 'y']}}]
    monkeypatch.setenv('MY_SOURCE', 'tfds:no_such_set')
    with pytest.raises(UserError, match='MY_SOURCE=tfds:no_such_set cannot be loaded .*: do this'):
        source.rows('train')


def test_what_is_not_there(source, tmp_path, monkeypatch):
    monkeypatch.delenv('MY_SOURCE', raising=False)
    with pytest.raises(UserError, match='^MY_SOURCE is not set: do this$'):
        source.rows('train')
    monkeypatch.setenv('MY_SOURCE', str(tmp_path))
    with pytest.raises(UserError, match=r'holds none of \*.jsonl, .*: do this'):
        source.rows('train')
    (tmp_path / 'test.jsonl').write_text(lines('a'))
    with pytest.raises(UserError, match="has no split 'train', only test: do this"):
        source.rows('train')


@pytest.mark.parametrize(
    ('name', 'content'),
    [('a.json', b'[{"text"'), ('a.jsonl', b'\xff\xfe\n'), ('a.jsonl.gz', b'no gzip'), ('a.parquet', b'PAR1 no'),
     ('a.json.gz', gzip.compress(b'x' * 9999, mtime=0)[:-9]), ('a.json', b'[' * 100_000),
     ('a.jsonl.gz', gzip.compress(b'x' * 2**27, 1))],
)  # fmt: skip
def test_a_broken_file_is_named(source, tmp_path, monkeypatch, name, content):
    (tmp_path / name).write_bytes(content)
    monkeypatch.setenv('MY_SOURCE', str(tmp_path))
    with pytest.raises(UserError, match=f'{name} (cannot be read|row 1)'):
        source.rows('train')


@pytest.mark.parametrize('name', ['train.jsonl', 'train.jsonl.gz', 'train.json.gz', 'train.json', 'train.parquet'])
def test_a_pointer_of_git_lfs_says_what_to_do(source, tmp_path, monkeypatch, name):
    pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n'
    (tmp_path / name).write_text(pointer)
    monkeypatch.setenv(source.variable, str(tmp_path))
    with pytest.raises(UserError, match='Git LFS in place of the file: run `git lfs pull`'):
        source.rows('train')


def test_odd_rows_are_counted_against_their_own_split(source, tmp_path, monkeypatch):
    """A thousand good rows of train do not make nine of ten broken rows of validation few."""
    row = lambda split, **fields: json.dumps({'split': split} | fields) + '\n'  # noqa: E731
    good = ''.join(row('train', text=f'x{i}') for i in range(1000)) + row('validation', text='y')
    (tmp_path / 'rows.jsonl').write_text(good + row('validation') * 9)
    monkeypatch.setenv('MY_SOURCE', str(tmp_path))
    assert len(source.rows('train')) == 1000
    with pytest.raises(UserError, match='9 of 10 rows cannot be read'):
        source.rows('validation')


def test_a_broken_line_is_an_odd_row(source, tmp_path, monkeypatch, capsys):
    (tmp_path / 'train.jsonl').write_text(lines(*'ab' * 100) + '{"text": \n')
    monkeypatch.setenv('MY_SOURCE', str(tmp_path))
    assert texts(source)
    assert 'train.jsonl row 201 (the first: not an object but \'{"text": ' in capsys.readouterr().err
