"""`perl_jax inspect`: what a task really holds, before anything is trained on it."""

from __future__ import annotations

import importlib
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from perl_jax.data import lexicon, oddities, providers
from perl_jax.data import vocabulary as vocabularies
from perl_jax.errors import UserError
from perl_jax.tokenizers.chat.controls import unmark

OURS = tuple(f'perl_jax.tasks.{name}' for name in ('toy', 'taskmaster', 'tldr', 'hh', 'shp', 'bolt', 'android_control'))
LONG = 2**16  # tokens: what preprocessors are told that there is room for


def show(task: str, module: Sequence[str], split: str, num: int, vocabulary: str | None) -> None:
    """Print `num` examples of a task as text and as tokens, every feature's lengths in tokens, and what is odd.

    Args:
      module: modules to import first, so that they register their tasks; ours are always there.
      vocabulary: what to count with: what VOCABULARY takes, or a MODEL_DIR, for its run's; None is the task's own.
    """
    for name in (*OURS, *module):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(
                f"--module: no module named '{error.name}'; it must be importable from this folder"
            ) from error
    tasks = providers.members(providers.find(task))
    words = vocabularies.named(vocabulary) if vocabulary is not None else vocabularies.of_tasks([task])
    read = [lexicon.as_answers(lexicon.with_vocabulary(member, words.vocabulary)) for member in tasks]
    cached = all(provider.requires_caching for provider in read)
    features = [k for k, f in read[0].output_features.items() if f.rank == 1]
    notes = oddities.Notes()
    lengths: dict[str, list[int]] = {name: [] for name in features}
    labels, count = [], 0
    for count, row in enumerate(_rows(read, split, features, cached), start=1):
        notes.add(row)
        if count <= num:
            _example(count, row, features)
        for name in features:
            lengths[name].append(len(row[name]))
        if 'label' in row:
            labels.append(float(row['label']))
    if not count:
        raise UserError(f"task '{task}' has no examples in its split '{split}'")
    print(f'{task}, {split}: {count:,} examples, {type(words.vocabulary).__name__} {words}')
    if labels:
        print(f'label: {np.mean(labels):.1%} up')
    for name in features:
        _histogram(name, np.array(lengths[name]))
    others = {}
    for other in sorted({other for each in read for other in each.splits} - {split}):
        try:
            rows, others[other] = _rows(read, other, features, cached), oddities.Notes()
            for row in rows:
                others[other].add(row)
        except UserError as error:  # it is not what was asked for
            print(f"not compared with '{other}': {error}")
    print('', *notes.lines(split, others), sep='\n')


def _rows(tasks: Sequence[Any], split: str, features: Sequence[str], cached: bool) -> Iterator[dict[str, Any]]:
    having = providers.with_split(tasks, split, cached)
    return itertools.chain.from_iterable(
        providers.rows(each, split, dict.fromkeys(features, LONG), cached).as_numpy_iterator() for each in having
    )


def _example(number: int, row: dict[str, Any], features: Sequence[str]) -> None:
    print(f'--- example {number}')
    for name, value in row.items():
        if name in features:
            ids = ' '.join(map(str, value[:16])) + (' ..' if len(value) > 16 else '')
            text = unmark(row.get(f'{name}_pretokenized', b'').decode())
            print(f'{name} ({len(value)} tokens: {ids})\n{textwrap.indent(text.rstrip(), "  | ")}')
        elif not name.endswith('_pretokenized'):
            print(f'{name}: {value.decode() if isinstance(value, bytes) else value}')


def _histogram(name: str, lengths: np.ndarray, bins: int = 10, width: int = 40) -> None:
    p50, p95, p99 = np.percentile(lengths, [50, 95, 99]).astype(int)
    print(f'\n{name}: tokens p50 {p50}, p95 {p95}, p99 {p99}, max {lengths.max()}')
    counts, edges = np.histogram(lengths, bins=min(bins, int(np.ptp(lengths)) + 1))
    for n, low, high in zip(counts, edges, edges[1:]):
        bar = '#' * round(width * n / counts.max())
        print(f'  {int(np.ceil(low)):5d} to {int(np.ceil(high)):5d}  {bar:{width}s} {n:,}')
