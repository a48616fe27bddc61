"""Rows of data sets, as a task reads them."""

import dataclasses
import functools
import gzip
import json

import pytest
import seqio
from reader import Reader, written

from perl_jax.data import providers
from perl_jax.tasks import hh, registration, shp, sources, tldr

_ROW = {'inputs': 'a question', 'chosen': 'good', 'rejected': 'bad', 'group': 'g', 'split': 'train'}


@dataclasses.dataclass(frozen=True)
class _Row:
    group: str
    fields: dict


def _parse(row):
    """As a user's own reader does, without a check."""
    return _Row(row['group'], {key: row[key] for key in ('inputs', 'chosen', 'rejected', 'group')})


_SOURCE = sources.Source('CAMPAIGN_SOURCE', None, 'set it to a folder', _parse)
_TASKS = {
    'campaign_pairs': ('CAMPAIGN_SOURCE', _ROW),
    'shp_pairs': ('SHP_SOURCE', {
        'post_id': 'p', 'domain': 'askbaking_train', 'history': 'a post', 'human_ref_A': 'a', 'human_ref_B': 'b',
        'labels': 1, 'score_ratio': 2.5, 'split': 'train',
    }),
    'tldr_pairs': ('TLDR_PAIRS_SOURCE', {
        'info': {'id': 'i', 'subreddit': 's', 'title': 't', 'post': 'p'}, 'choice': 0, 'split': 'train',
        'summaries': [{'text': 'one'}, {'text': 'two'}],
    }),
    'hh_helpful_pairs': ('HH_HELPFUL_SOURCE', {
        'chosen': '\n\nHuman: hi\n\nAssistant: good', 'rejected': '\n\nHuman: hi\n\nAssistant: bad',
        'split': 'train',
    }),
}  # fmt: skip
assert shp.SOURCE and tldr.POSTS and hh.SOURCES  # they register tasks


@functools.cache
def _register():
    registration.add('campaign_pairs', 'pairs', lambda split: (row.fields for row in _SOURCE.rows(split)))


def _write_rows(task, count, folder):
    row = _TASKS[task][1]
    (folder / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for _ in range(count)))


def _write_list(folder):
    (folder / 'train.json').write_text(json.dumps([_ROW, _ROW]))


def _write_packed(folder):
    (folder / 'train.jsonl.gz').write_bytes(gzip.compress((json.dumps(_ROW) + '\n').encode() * 3))


def _write_parquet(folder):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    parquet.write_table(pyarrow.Table.from_pylist([_ROW, _ROW]), folder / 'train.parquet')


def _read_rows(task, folder, monkeypatch):
    _register()
    monkeypatch.setenv(_TASKS[task][0], str(folder))
    rows = providers.rows(seqio.get_mixture_or_task(task), 'train', {'inputs': 99, 'chosen': 99, 'rejected': 99})
    return list(rows.as_numpy_iterator())


def readers(monkeypatch):
    """Those of JSON lines, few and many, so that one bad row is too many or let pass; and of other kinds of files."""
    read = {task: functools.partial(_read_rows, task, monkeypatch=monkeypatch) for task in _TASKS}
    files = {'list': _write_list, 'packed': _write_packed, 'parquet': _write_parquet}
    return [
        *(Reader(f'rows_{task}_{count}', written(functools.partial(_write_rows, task, count)), read[task], weight=4)
          for task in _TASKS for count in (2, 300)),
        *(Reader(f'rows_{kind}', written(write), read['campaign_pairs'], weight=4) for kind, write in files.items()),
    ]  # fmt: skip
