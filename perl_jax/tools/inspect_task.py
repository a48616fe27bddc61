"""`perl_jax inspect`: examples, token lengths and anomalies of a task, to check before training."""

from __future__ import annotations

import importlib
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from perl_jax.data import lexicon, oddities, providers
from perl_jax.data import vocabulary as vocabularies
from perl_jax.data.user_code import task_errors
from perl_jax.errors import UserError
from perl_jax.printing import printable
from perl_jax.tokenizers.chat.controls import unmark

BUILTIN_MODULES = tuple(
    f'perl_jax.tasks.{name}' for name in ('toy', 'taskmaster', 'tldr', 'hh', 'shp', 'bolt', 'android_control')
)
MAX_LENGTH = 2**16  # tokens: the feature lengths passed to preprocessors, so that nothing is trimmed


def show(task: str, module: Sequence[str], split: str, num: int, vocabulary: str | None) -> None:
    """Print `num` examples of a task as text and tokens, the token lengths of each feature, and anomalies.

    Args:
      task: the name of a SeqIO task or mixture.
      module: modules to import first, which register tasks; BUILTIN_MODULES are always imported.
      split: the split to read.
      num: the number of examples to print.
      vocabulary: the tokenizer: a value of VOCABULARY, or a MODEL_DIR for that run's; None is the task's own.
    """
    for name in (*BUILTIN_MODULES, *module):
        try:
            importlib.import_module(name)
        except (ModuleNotFoundError, ValueError, TypeError) as error:  # no name, or a relative one
            missing_name = getattr(error, 'name', name)
            raise UserError(
                f"--module: no module named '{missing_name}'; it must be importable from this folder"
            ) from error
    tasks = providers.members(providers.find(task))
    shown_vocabulary = vocabularies.from_name(vocabulary) if vocabulary is not None else vocabularies.of_tasks([task])
    token_tasks = [
        lexicon.with_continuing_responses(lexicon.with_vocabulary(member, shown_vocabulary.vocabulary))
        for member in tasks
    ]
    cached = all(provider.requires_caching for provider in token_tasks)
    features = [k for k, f in token_tasks[0].output_features.items() if f.rank == 1]
    notes = oddities.SplitStatistics()
    lengths: dict[str, list[int]] = {name: [] for name in features}
    labels, count = [], 0
    for count, row in enumerate(_rows(token_tasks, split, features, cached), start=1):
        notes.add(row)
        if count <= num:
            _example(count, row, features)
        for name in features:
            lengths[name].append(len(row[name]))
        if 'label' in row:
            labels.append(float(row['label']))
    if not count:
        raise UserError(f"task '{task}' has no examples in its split '{split}'")
    print(f'{task}, {split}: {count:,} examples, {type(shown_vocabulary.vocabulary).__name__} {shown_vocabulary}')
    if labels:
        print(f'label: {np.mean(labels):.1%} up')
    for name in features:
        _histogram(name, np.array(lengths[name]))
    other_notes = {}
    for other_split in sorted(
        {other_split for token_task in token_tasks for other_split in token_task.splits} - {split}
    ):
        try:
            other_notes[other_split] = oddities.SplitStatistics()
            for row in _rows(token_tasks, other_split, features, cached):
                other_notes[other_split].add(row)
        except Exception as error:  # a user's reader may fail in any way, and other splits are optional
            print(f"not compared with '{other_split}': {str(error).strip().rpartition(chr(10))[2]}")
            other_notes.pop(other_split, None)
    print('', *notes.lines(split, other_notes), sep='\n')


def _rows(tasks: Sequence[Any], split: str, features: Sequence[str], cached: bool) -> Iterator[dict[str, Any]]:
    tasks_with_split = providers.tasks_with_split(tasks, split, cached)
    return itertools.chain.from_iterable(
        task_errors.read(providers.rows(task, split, dict.fromkeys(features, MAX_LENGTH), cached), task.name, split)
        for task in tasks_with_split
    )


def _example(number: int, row: dict[str, Any], features: Sequence[str]) -> None:
    print(f'--- example {number}')
    for name, value in row.items():
        if name in features:
            ids = ' '.join(map(str, value[:16])) + (' ..' if len(value) > 16 else '')
            text = unmark(row.get(f'{name}_pretokenized', b'').decode())
            print(f'{name} ({len(value)} tokens: {ids})\n{textwrap.indent(printable(text.rstrip()), "  | ")}')
        elif not name.endswith('_pretokenized'):
            print(f'{name}: {printable(value.decode()) if isinstance(value, bytes) else value}')


def _histogram(name: str, lengths: np.ndarray, bins: int = 10, width: int = 40) -> None:
    p50, p95, p99 = np.percentile(lengths, [50, 95, 99]).astype(int)
    print(f'\n{name}: tokens p50 {p50}, p95 {p95}, p99 {p99}, max {lengths.max()}')
    counts, edges = np.histogram(lengths, bins=min(bins, int(np.ptp(lengths)) + 1))
    for count, low, high in zip(counts, edges, edges[1:]):
        bar = '#' * round(width * count / counts.max())
        print(f'  {int(np.ceil(low)):5d} to {int(np.ceil(high)):5d}  {bar:{width}s} {count:,}')
