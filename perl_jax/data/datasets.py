"""From the name of a SeqIO task to batches that are a function of (seed, step).

A task is read, tokenized and converted once, into arrays; batch n of a run is then a lookup, so that a resumed run sees
what an unbroken one would have seen, and no iterator has to be saved. seqio and TensorFlow are imported on first use.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax import types
from perl_jax.data import lexicon, pair_weights, providers, rows, token_files
from perl_jax.data.streams import Dataset, Example, Stream
from perl_jax.data.token_files import TokenFiles
from perl_jax.errors import UserError, check_count, check_number

SAMPLE = 1000  # rows that are looked at where not all are held
LOOK = 16  # times as many rows are read as an evaluation takes, to choose from


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Which examples a run reads (T5X has a class of this name).

    mixture_or_task_name: a registered SeqIO task or mixture, with the features of its kind: inputs; and targets (sft),
      chosen and rejected (pairs), targets and label (thumbs), nothing else (prompts). A reward may name several.
    task_feature_lengths: {'inputs': P, 'targets': R} in tokens. Of a longer prompt the END is kept, behind the
      vocabulary's BOS if it has one; an example with a longer response, or an empty one, is dropped and counted.
    batch_size: prompts a batch, over all devices.
    vocabulary: the base model's, in place of the task's own, or what it is `named`. A run that is given None finds its
      base's own (vocabulary.py); read by itself, a task keeps its own.
    limit: at most so many examples, of a mixture's tasks alike; None is all. Training takes the first; evaluations take
      the same few each time, spread over the groups of the first rows, `LOOK` times as many (rows.spread).
    max_dropped: a run stops if a larger share of its examples is empty or too long.
    use_cached: read tasks from the cache that SeqIO wrote of them, where they have a place for one.
    tokens_dir: a folder for the rows as files of tokens, which a run then maps in place of holding them: written by the
      first that starts, and taken by every later one that reads the same task alike. None holds them in memory.
    length_buckets: training batches take rows of like lengths (bucketing.py), the least of so many widths holds them;
      dense layers see real tokens alone (unpadding.py), their share rounded up likewise, and a policy's answers' too.
      Each shape compiles its own step (bucketing.most_shapes). 1 is full width, in the order drawn.
    """

    mixture_or_task_name: str | Sequence[str]
    task_feature_lengths: Mapping[str, int]
    batch_size: int
    split: str = 'train'
    vocabulary: Any = None
    limit: int | None = None
    max_dropped: float = 0.05
    use_cached: bool = False
    tokens_dir: str | None = None
    length_buckets: int = 1

    def __post_init__(self) -> None:
        check_count('LENGTH_BUCKETS', self.length_buckets)
        check_count('BATCH_SIZE', self.batch_size)
        check_number('MAX_DROPPED', self.max_dropped, 0, 1)
        if self.limit is not None:
            check_count('DatasetConfig.limit (EVAL_EXAMPLES)', self.limit)
        if not self.mixture_or_task_name:
            raise UserError('a data set names no task; set MIXTURE_OR_TASK_NAME (of prompts/: PROMPTS_TASK_NAME)')
        lengths = self.task_feature_lengths
        if not isinstance(lengths, Mapping) or not all(isinstance(n, int) and n > 0 for n in lengths.values()):
            raise UserError(f"TASK_FEATURE_LENGTHS = {lengths!r}: give tokens, as in {{'inputs': 512, 'targets': 64}}")

    def each(self) -> list[DatasetConfig]:
        """One config for each task that is named."""
        names = self.mixture_or_task_name
        names = [names] if isinstance(names, str) else names
        return [dataclasses.replace(self, mixture_or_task_name=name) for name in names]

    @property
    def task_name(self) -> str:
        """The one name; raises UserError where there are several, which only a reward's training takes."""
        if isinstance(self.mixture_or_task_name, str):
            return self.mixture_or_task_name
        raise UserError(f'MIXTURE_OR_TASK_NAME = {self.mixture_or_task_name!r}: give one name here')


def stream(
    config: DatasetConfig, kind: str, seed: int, rows: np.ndarray | None = None, groups: int = 1, parts: int = 1
) -> Stream:
    """The endless training batches of a task or mixture; `rows` of each batch, by default all. See Stream."""
    rows = np.arange(config.batch_size) if rows is None else rows
    provider, tasks = providers.find(config.task_name), _tasks(config)
    rates = [float(provider.get_rate(t)) for t in tasks] if len(tasks) > 1 else [1.0]
    loaded = alike(_parts(tasks, config, kind, _stored if config.tokens_dir else _loaded))
    return Stream(loaded, rates, config.batch_size, seed, rows, config.length_buckets, groups, parts)


def reward_kind(name: str) -> str:
    """Whether a task or mixture holds 'pairs' or 'thumbs', by its features."""
    have = providers.find(name).output_features.keys()
    if 'chosen' in have:
        return 'pairs'
    if 'label' in have:
        return 'thumbs'
    raise UserError(
        f"task '{name}' is for no reward: it has neither chosen and rejected nor a label, but {sorted(have)}"
    )


def load(config: DatasetConfig, kind: str) -> Dataset:
    """Read one split of a task, or of every task of a mixture in turn; `kind` is sft, pairs, thumbs or prompts.

    Raises:
      UserError: an unknown task or split, features that do not fit the kind, or more than `max_dropped` dropped.
    """
    if config.limit is None:
        return joined(_parts(_tasks(config), config, kind, _loaded))
    parts = _parts(_tasks(config), dataclasses.replace(config, limit=config.limit * LOOK), kind, _loaded)
    share = -(-config.limit // len(parts))
    groups = [[example.get('group', i) for i, example in enumerate(part.examples)] for part in parts]
    whole = joined([part.take(rows.spread(names, share)) for part, names in zip(parts, groups, strict=True)])
    return whole.take(np.arange(min(config.limit, len(whole))))


def tasks_with_rows(config: DatasetConfig, kind: str) -> list[tuple[Any, Dataset, list[Mapping[str, Any]]]]:
    """Each task of `load`, its part of the data set, and that part's rows as SeqIO gives them."""
    tasks = _tasks(config)
    return [(lexicon.with_vocabulary(task, config.vocabulary), *_load(task, config, kind)) for task in tasks]


def _tasks(config: DatasetConfig) -> list[Any]:
    """The tasks that are named, or a mixture's, as far as they have the split."""
    tasks = providers.members(providers.find(config.task_name))
    return providers.with_split(tasks, config.split, config.use_cached)


def joined(parts: Sequence[Dataset]) -> Dataset:
    """The rows of datasets of one kind, one after the other."""
    parts = alike(parts)
    arrays = {k: np.concatenate([part.arrays[k] for part in parts]) for k in parts[0].arrays}
    return dataclasses.replace(parts[0], arrays=arrays, examples=[e for part in parts for e in part.examples])


def alike(parts: Sequence[Any]) -> list[Any]:
    """Datasets of one kind whose batches have the same fields: where some pairs have weights, all have."""
    weighted = any(part.is_weighted for part in parts)
    return [part.weighted() if weighted else part for part in parts]


def _parts(tasks: Sequence[Any], config: DatasetConfig, kind: str, read: Callable[..., Any]) -> list[Any]:
    share = None if config.limit is None else -(-config.limit // len(tasks))
    return [read(task, dataclasses.replace(config, limit=share), kind) for task in tasks]


def _open(task: Any, config: DatasetConfig, kind: str) -> tuple[Any, Any, dict[str, int], Any]:
    """A task's rows before they are admitted, its feature converter, the tokens there is room for, its vocabulary."""
    from perl_jax.data import features

    name, split, lengths = task.name, config.split, config.task_feature_lengths
    converter = getattr(features, f'{kind.capitalize()}FeatureConverter')()
    provider = lexicon.with_vocabulary(task, config.vocabulary)
    missing = converter.TASK_FEATURES.keys() - provider.output_features.keys()
    if missing:
        raise UserError(
            f"task '{name}' has no feature {', '.join(sorted(missing))}, which {kind} needs; "
            f'it has {", ".join(sorted(provider.output_features))}'
        )
    for key in ['inputs', 'targets'][: 1 + bool(converter.RESPONSES)]:
        if key not in lengths:
            raise UserError(f"TASK_FEATURE_LENGTHS = {dict(lengths)} has no '{key}', the most tokens of {key} to read")
    vocabulary, provider = provider.output_features['inputs'].vocabulary, lexicon.as_answers(provider)
    room = {f: lengths['inputs' if f == 'inputs' else 'targets'] for f in ('inputs', *converter.RESPONSES)}
    if config.use_cached and vocabulary != task.output_features['inputs'].vocabulary:
        providers.check_text_cache(provider, split)
    ds = providers.rows(provider, split, {**room, **lengths}, config.use_cached)
    if kind == 'pairs' and pair_weights.FIELD in ds.element_spec:
        ds, converter = pair_weights.of_rows(ds, name), features.WeightedPairsFeatureConverter()
    return ds if config.limit is None else ds.take(config.limit), converter, room, vocabulary


def _load(task: Any, config: DatasetConfig, kind: str) -> tuple[Dataset, list[Mapping[str, Any]]]:
    ds, converter, room, vocabulary = _open(task, config, kind)
    ds, name = ds.cache(), f'{task.name} ({config.split})'
    raw = list(ds.as_numpy_iterator())
    weighted = pair_weights.FIELD in converter.TASK_FEATURES
    for i, row in enumerate(raw if weighted else []):
        pair_weights.check(row[pair_weights.FIELD], f'{name}: example {i}')
    keep = _admit(raw, room, converter.RESPONSES, name, lexicon.name_of(vocabulary, task.name), config.max_dropped)
    rows.look_for_controls(raw, ['inputs', *converter.RESPONSES], vocabulary, name)
    ds = rows.fit(ds, keep, room['inputs'], lexicon.bos_id(vocabulary))
    ds = converter(ds, {f: room.get(f, 1) for f in converter.TASK_FEATURES})
    arrays = next(ds.batch(int(keep.sum())).as_numpy_iterator())
    if weighted:
        arrays['weights'] = pair_weights.scaled(arrays['weights'], name)
    raw = [row for row, ok in zip(raw, keep) if ok]
    examples = [rows.example(row, room, kind, vocabulary) for row in raw]
    return Dataset(arrays, examples, vocabulary, lexicon.eos_ids(vocabulary)), raw


def _loaded(task: Any, config: DatasetConfig, kind: str) -> Dataset:
    return _load(task, config, kind)[0]


def _stored(task: Any, config: DatasetConfig, kind: str) -> TokenFiles:
    """The task's rows as files under `tokens_dir`, which are written where there are none."""
    from perl_jax.data import features

    assert config.tokens_dir is not None
    responses = getattr(features, f'{kind.capitalize()}FeatureConverter').RESPONSES
    provider = lexicon.with_vocabulary(task, config.vocabulary)
    vocabulary = provider.output_features['inputs'].vocabulary
    about = providers.identity(provider) | {
        'kind': kind, 'split': config.split, 'lengths': dict(config.task_feature_lengths), 'limit': config.limit,
        'cached': config.use_cached, 'bos': lexicon.bos_id(vocabulary), 'eos': lexicon.eos_ids(vocabulary),
    }  # fmt: skip
    about |= {'weighted': True} if kind == 'pairs' else {}  # older files of pairs know of no weights
    folder = token_files.folder(config.tokens_dir, f'{task.name}-{config.split}-{kind}', about)
    if not os.path.isdir(folder):
        token_files.write(folder, _admitted(task, config, kind), ('inputs', *responses), about)
    token_files.announce(folder)
    names = ('inputs', 'targets') if responses else ('inputs',)
    widths = {name: config.task_feature_lengths[name] for name in names}
    return TokenFiles(folder, kind, responses, widths, vocabulary, lexicon.eos_ids(vocabulary))


def _admitted(task: Any, config: DatasetConfig, kind: str) -> Iterator[tuple[Mapping[str, Any], Example]]:
    """One after the other what `_load` takes at once: the features of each row as a batch has them, and its example."""
    ds, converter, room, vocabulary = _open(task, config, kind)
    bos, first, dropped, total, some = lexicon.bos_id(vocabulary), '', 0, 0, []
    head, name = np.array([] if bos is None else [bos], np.int32), f'{task.name} ({config.split})'
    for total, row in enumerate(ds.as_numpy_iterator(), start=1):
        some += [row] if total <= SAMPLE else []
        if pair_weights.FIELD in converter.TASK_FEATURES:
            pair_weights.check(row[pair_weights.FIELD], f'{name}: example {total - 1}')
        if reason := _unfit(total - 1, row, room, converter.RESPONSES):
            first, dropped = first or reason, dropped + 1
            continue
        text = row['inputs'][1:] if len(head) and row['inputs'][0] == bos else row['inputs']  # no second BOS
        tail = text[max(0, len(text) - room['inputs'] + len(head)) :]
        yield row | {'inputs': np.concatenate([head, tail])}, rows.example(row, room, kind, vocabulary)
    _check_dropped(total, dropped, first, name, lexicon.name_of(vocabulary, task.name), config.max_dropped)
    rows.look_for_controls(some, ['inputs', *converter.RESPONSES], vocabulary, name)


def _admit(
    raw: list[Example], room: Mapping[str, int], responses: Sequence[str], name: str, vocabulary: str, most: float
) -> np.ndarray:
    """Which rows have a prompt and responses that fit; says how many have not, and stops where there are too many."""
    reasons = [_unfit(i, row, room, responses) for i, row in enumerate(raw)]
    bad = [reason for reason in reasons if reason]
    _check_dropped(len(raw), len(bad), bad[0] if bad else '', name, vocabulary, most)
    return np.array([not reason for reason in reasons])


def _unfit(i: int, row: Example, room: Mapping[str, int], responses: Sequence[str]) -> str:
    """Why a row cannot be taken, or nothing."""
    for feature in ('inputs', *responses):
        length = len(row[feature])
        if length <= (0 if feature == 'inputs' else 1):  # a response of one token is its EOS alone
            return f'example {i} has empty {feature}'
        if feature != 'inputs' and length > room[feature]:
            return f'example {i} has {length} tokens of {feature}, more than the {room[feature]} allowed'
    return ''


def _check_dropped(total: int, dropped: int, first: str, name: str, vocabulary: str, most: float) -> None:
    if dropped:
        said = f'{name}: {dropped} of {total} examples dropped; {first}'
        if dropped > most * total:
            raise UserError(
                f"{said}; over {most:.0%}: mend the data, or raise TASK_FEATURE_LENGTHS['targets'] or MAX_DROPPED, or "
                f"set VOCABULARY (these are tokens of '{vocabulary}')"
            )
        logging.getLogger('perl_jax').warning(said)
    if dropped == total:
        raise UserError(f'{name}: no examples')


def decode(vocabulary: Any, batch: types.Responses) -> list[list[str]]:
    """The responses [B, K] as text, without EOS and padding."""
    tokens, mask = np.asarray(batch.targets), np.asarray(batch.targets_mask)
    ends = getattr(vocabulary, 'eos_ids', ())  # where there is only one, `decode` stops at it by itself

    def text(row: np.ndarray) -> str:
        return vocabulary.decode([int(t) for t in itertools.takewhile(lambda t: t not in ends, row)])

    return [[text(row[keep]) for row, keep in zip(rows, keeps)] for rows, keeps in zip(tokens, mask)]
