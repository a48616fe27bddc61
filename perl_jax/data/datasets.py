"""From the name of a SeqIO task to batches that are a function of (seed, step).

A task is read, tokenized and converted once, into arrays. Batch n of a run is then a lookup, so a resumed run reads the
same batches as an uninterrupted one, and no iterator state is saved. seqio and TensorFlow are imported on first use.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax import settings, types
from perl_jax.data import lexicon, pair_weights, providers, rows, token_files
from perl_jax.data.batches.dataset import Dataset, Example
from perl_jax.data.batches.streams import Stream
from perl_jax.data.token_files import TokenFiles
from perl_jax.data.user_code import task_errors
from perl_jax.errors import UserError

SAMPLE = 1000  # rows that are searched for control tokens where rows are streamed to files
TOO_LONG = 'more than the'  # in the reason to drop a row
LOOK = 16  # an evaluation of n rows chooses them from the first LOOK * n of the split


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Which examples a run reads (T5X has a class of this name).

    Attributes:
      mixture_or_task_name: a registered SeqIO task or mixture, with the features of its kind: inputs; and targets
        (sft), chosen and rejected (pairs), targets and label (thumbs), nothing else (prompts). A reward may name
        several.
      task_feature_lengths: {'inputs': P, 'targets': R} in tokens. Of a longer prompt the END is kept, behind the
        vocabulary's BOS if it has one; an example with a longer response, or an empty one, is dropped and counted.
      batch_size: prompts a batch, over all devices.
      split: of the task, such as 'train' or 'validation'.
      vocabulary: the base model's vocabulary, or its name (lexicon.py), which replaces the task's. With None a run uses
        its base's vocabulary (vocabulary.py); outside a run a task keeps its own.
      limit: the most examples to read, split equally over a mixture's tasks; None reads all. Training takes the first
        ones. Evaluations take a fixed sample of the first `LOOK` * limit rows, spread over groups
        (rows.spread_indices).
      max_dropped: a run stops if a larger share of its examples is empty or too long.
      use_cached: read tasks from SeqIO's cache, if they have a CacheDatasetPlaceholder.
      tokens_dir: a folder for files of tokens (token_files.py), which a run maps instead of loading all rows into
        memory. The first run writes them; later runs that read the same task with the same settings reuse them. None:
        in memory.
      length_buckets: the number of widths. Training batches take rows of similar lengths (bucketing.py), at the
        smallest width that holds them. Dense layers compute only real tokens (unpadding.py): the fraction of real
        tokens is rounded up to one of at most length_buckets equal steps, for sampled answers too. Each shape compiles
        its own program (bucketing.max_shapes). 1: full width, in the order drawn.

    Raises:
      UserError: no task is named, or a setting of another type or out of range.
    """

    mixture_or_task_name: str | Sequence[str]
    task_feature_lengths: Mapping[str, settings.Count]
    batch_size: settings.Count
    split: str = 'train'
    vocabulary: Any = None
    limit: settings.Count | None = None
    max_dropped: settings.Share = 0.05
    use_cached: bool = False
    tokens_dir: str | None = None
    length_buckets: settings.Count = 1

    def __post_init__(self) -> None:
        if not self.mixture_or_task_name:
            raise UserError('a data set names no task; set MIXTURE_OR_TASK_NAME (for prompts/: PROMPTS_TASK_NAME)')
        if not isinstance(self.task_feature_lengths, Mapping):
            lengths = self.task_feature_lengths
            raise UserError(f"TASK_FEATURE_LENGTHS = {lengths!r}: give tokens, as in {{'inputs': 512, 'targets': 64}}")
        settings.check(self)

    def each(self) -> list[DatasetConfig]:
        """Returns one config per task that is named."""
        names = self.mixture_or_task_name
        names = [names] if isinstance(names, str) else names
        return [dataclasses.replace(self, mixture_or_task_name=name) for name in names]

    @property
    def task_name(self) -> str:
        """The name of the only task.

        Raises:
          UserError: there are several, which only a reward's training takes.
        """
        if isinstance(self.mixture_or_task_name, str):
            return self.mixture_or_task_name
        raise UserError(f'MIXTURE_OR_TASK_NAME = {self.mixture_or_task_name!r}: give one name here')


def stream(
    config: DatasetConfig, kind: str, seed: int, rows: np.ndarray | None = None, groups: int = 1, parts: int = 1
) -> Stream:
    """Returns the endless training batches of a task or mixture (see Stream).

    Args:
      config: which examples to read.
      kind: sft, pairs, thumbs or prompts.
      seed: of the order.
      rows: which rows of each batch this process reads (Partitioner.rows); None reads all.
      groups: the number of data partitions.
      parts: the number of microbatches.
    """
    rows = np.arange(config.batch_size) if rows is None else rows
    provider, tasks = providers.find(config.task_name), _tasks(config)
    rates = [providers.rate(provider, task) for task in tasks] if len(tasks) > 1 else [1.0]
    read = _read_token_files if config.tokens_dir else _read_rows_in_memory
    datasets = with_same_fields(_read_tasks(tasks, config, kind, read))
    return Stream(datasets, rates, config.batch_size, seed, rows, config.length_buckets, groups, parts)


def reward_kind(name: str) -> str:
    """Returns the kind of a task or mixture of rewards, by its features.

    Args:
      name: of the task or mixture.

    Returns:
      'pairs', or 'thumbs' (binary labels).

    Raises:
      UserError: its features are of neither kind.
    """
    features = providers.find(name).output_features.keys()
    if 'chosen' in features:
        return 'pairs'
    if 'label' in features:
        return 'thumbs'
    raise UserError(
        f"task '{name}' cannot train a reward: it has neither chosen and rejected nor a label, but {sorted(features)}"
    )


def load(config: DatasetConfig, kind: str) -> Dataset:
    """Read one split of a task, or of every task of a mixture in turn.

    Args:
      config: which examples to read.
      kind: sft, pairs, thumbs or prompts.

    Raises:
      UserError: an unknown task or split, features that do not fit the kind, or more than `max_dropped` dropped.
    """
    if config.limit is None:
        return concatenate(_read_tasks(_tasks(config), config, kind, _read_rows_in_memory))
    candidates = dataclasses.replace(config, limit=config.limit * LOOK)
    datasets = _read_tasks(_tasks(config), candidates, kind, _read_rows_in_memory)
    task_limit = -(-config.limit // len(datasets))
    samples = []
    for dataset in datasets:
        groups = [example.get('group', i) for i, example in enumerate(dataset.examples)]
        samples.append(dataset.take(rows.spread_indices(groups, task_limit)))
    combined = concatenate(samples)
    return combined.take(np.arange(min(config.limit, len(combined))))


def tasks_with_rows(config: DatasetConfig, kind: str) -> list[tuple[Any, Dataset, list[Mapping[str, Any]]]]:
    """Returns each task of `load`, its part of the data set, and that part's rows as SeqIO yields them."""
    tasks = _tasks(config)
    return [(lexicon.with_vocabulary(task, config.vocabulary), *_load_task(task, config, kind)) for task in tasks]


def _tasks(config: DatasetConfig) -> list[Any]:
    """Returns the task, or a mixture's tasks, leaving out those that lack the split."""
    tasks = providers.members(providers.find(config.task_name))
    return providers.tasks_with_split(tasks, config.split, config.use_cached)


def concatenate(datasets: Sequence[Dataset]) -> Dataset:
    """Returns the rows of several datasets as one dataset.

    Args:
      datasets: of one kind and the same widths.

    Returns:
      A Dataset with the vocabulary of the first.
    """
    datasets = with_same_fields(datasets)
    arrays = {k: np.concatenate([dataset.arrays[k] for dataset in datasets]) for k in datasets[0].arrays}
    examples = [example for dataset in datasets for example in dataset.examples]
    return dataclasses.replace(datasets[0], arrays=arrays, examples=examples)


def with_same_fields(datasets: Sequence[Any]) -> list[Any]:
    """Returns datasets of one kind whose batches have the same fields: if some pairs have weights, all get them."""
    weighted = any(dataset.is_weighted for dataset in datasets)
    return [dataset.weighted() if weighted else dataset for dataset in datasets]


def _read_tasks(tasks: Sequence[Any], config: DatasetConfig, kind: str, read: Callable[..., Any]) -> list[Any]:
    task_limit = None if config.limit is None else -(-config.limit // len(tasks))
    return [read(task, dataclasses.replace(config, limit=task_limit), kind) for task in tasks]


def _open_task(task: Any, config: DatasetConfig, kind: str) -> tuple[Any, Any, dict[str, int], Any]:
    """Returns a task's rows before filtering, its feature converter, the feature lengths, and its vocabulary."""
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
            message = f"TASK_FEATURE_LENGTHS = {dict(lengths)} has no '{key}': give the most tokens of {key} to read"
            raise UserError(message)
    vocabulary, provider = provider.output_features['inputs'].vocabulary, lexicon.with_continuing_responses(provider)
    max_lengths = {'inputs': lengths['inputs']} | {key: lengths['targets'] for key in converter.RESPONSES}
    if config.use_cached and vocabulary != task.output_features['inputs'].vocabulary:
        providers.check_text_cache(provider, split)
    ds = providers.rows(provider, split, {**max_lengths, **lengths}, config.use_cached)
    ds = features.with_dtypes(ds, converter.TASK_FEATURES, name)
    if kind == 'pairs' and pair_weights.FIELD in ds.element_spec:
        ds, converter = pair_weights.with_float_weights(ds, name), features.WeightedPairsFeatureConverter()
    return ds if config.limit is None else ds.take(config.limit), converter, max_lengths, vocabulary


def _load_task(task: Any, config: DatasetConfig, kind: str) -> tuple[Dataset, list[Mapping[str, Any]]]:
    ds, converter, max_lengths, vocabulary = _open_task(task, config, kind)
    ds, name = ds.cache(), f'{task.name} ({config.split})'
    raw = list(task_errors.read(ds, task.name, config.split))
    weighted = pair_weights.FIELD in converter.TASK_FEATURES
    for i, row in enumerate(raw if weighted else []):
        pair_weights.check(row[pair_weights.FIELD], f'{name}: example {i}')
    vocabulary_name = lexicon.name_of(vocabulary, task.name)
    is_usable = _usable_rows(raw, max_lengths, converter.RESPONSES, name, vocabulary_name, config.max_dropped)
    rows.warn_about_controls(raw, ['inputs', *converter.RESPONSES], vocabulary, name)
    ds = rows.truncate_prompts(ds, is_usable, max_lengths['inputs'], lexicon.bos_id(vocabulary))
    ds = converter(ds, {f: max_lengths.get(f, 1) for f in converter.TASK_FEATURES})
    arrays = next(ds.batch(int(is_usable.sum())).as_numpy_iterator())
    if weighted:
        arrays['weights'] = pair_weights.normalized(arrays['weights'], name)
    raw = [row for row, usable in zip(raw, is_usable) if usable]
    examples = [rows.to_example(row, max_lengths, kind, vocabulary) for row in raw]
    return Dataset(arrays, examples, vocabulary, lexicon.eos_ids(vocabulary)), raw


def _read_rows_in_memory(task: Any, config: DatasetConfig, kind: str) -> Dataset:
    return _load_task(task, config, kind)[0]


def _read_token_files(task: Any, config: DatasetConfig, kind: str) -> TokenFiles:
    """Returns the task's rows as files under `tokens_dir`; writes the files if they do not exist."""
    from perl_jax.data import features

    assert config.tokens_dir is not None
    responses = getattr(features, f'{kind.capitalize()}FeatureConverter').RESPONSES
    provider = lexicon.with_vocabulary(task, config.vocabulary)
    vocabulary = provider.output_features['inputs'].vocabulary
    about = providers.identity(provider) | {
        'kind': kind, 'split': config.split, 'lengths': dict(config.task_feature_lengths), 'limit': config.limit,
        'cached': config.use_cached, 'bos': lexicon.bos_id(vocabulary), 'eos': lexicon.eos_ids(vocabulary),
    }  # fmt: skip
    about |= {'weighted': True} if kind == 'pairs' else {}  # so that files from versions without weights are not reused
    folder = token_files.folder(config.tokens_dir, f'{task.name}-{config.split}-{kind}', about)
    if not os.path.isdir(folder):
        token_files.write(folder, _usable_rows_one_by_one(task, config, kind), ('inputs', *responses), about)
    token_files.check(folder, ('inputs', *responses))
    token_files.log_files_used(folder)
    names = ('inputs', 'targets') if responses else ('inputs',)
    widths = {name: config.task_feature_lengths[name] for name in names}
    return TokenFiles(folder, kind, responses, widths, vocabulary, lexicon.eos_ids(vocabulary))


def _usable_rows_one_by_one(task: Any, config: DatasetConfig, kind: str) -> Iterator[tuple[Mapping[str, Any], Example]]:
    """Yields the features of each usable row, and its example: `_load_task` without holding all rows in memory."""
    ds, converter, max_lengths, vocabulary = _open_task(task, config, kind)
    bos, first_reason, dropped, total, sampled_rows = lexicon.bos_id(vocabulary), '', 0, 0, []
    bos_tokens, name = np.array([] if bos is None else [bos], np.int32), f'{task.name} ({config.split})'
    for total, row in enumerate(task_errors.read(ds, task.name, config.split), start=1):
        sampled_rows += [row] if total <= SAMPLE else []
        if pair_weights.FIELD in converter.TASK_FEATURES:
            pair_weights.check(row[pair_weights.FIELD], f'{name}: example {total - 1}')
        if reason := _rejection_reason(total - 1, row, max_lengths, converter.RESPONSES):
            first_reason, dropped = first_reason or reason, dropped + 1
            continue
        prompt = row['inputs'][1:] if len(bos_tokens) and row['inputs'][0] == bos else row['inputs']  # no second BOS
        tail = prompt[max(0, len(prompt) - max_lengths['inputs'] + len(bos_tokens)) :]
        yield row | {'inputs': np.concatenate([bos_tokens, tail])}, rows.to_example(row, max_lengths, kind, vocabulary)
    _check_dropped(total, dropped, first_reason, name, lexicon.name_of(vocabulary, task.name), config.max_dropped)
    rows.warn_about_controls(sampled_rows, ['inputs', *converter.RESPONSES], vocabulary, name)


def _usable_rows(
    rows: list[Example],
    max_lengths: Mapping[str, int],
    responses: Sequence[str],
    name: str,
    vocabulary: str,
    max_dropped: float,
) -> np.ndarray:
    """Returns a mask [rows] of the rows whose prompt and responses fit; logs how many do not, and stops if too many."""
    reasons = [_rejection_reason(i, row, max_lengths, responses) for i, row in enumerate(rows)]
    rejections = [reason for reason in reasons if reason]
    _check_dropped(len(rows), len(rejections), rejections[0] if rejections else '', name, vocabulary, max_dropped)
    return np.array([not reason for reason in reasons])


def _rejection_reason(index: int, row: Example, max_lengths: Mapping[str, int], responses: Sequence[str]) -> str:
    """Returns why a row cannot be used, or an empty string."""
    for feature in ('inputs', *responses):
        length = len(row[feature])
        if length <= (0 if feature == 'inputs' else 1):  # a response of one token is its EOS alone
            return f'example {index} has empty {feature}'
        if feature != 'inputs' and length > max_lengths[feature]:
            return f'example {index} has {length} tokens of {feature}, {TOO_LONG} {max_lengths[feature]} allowed'
    return ''


def _check_dropped(total: int, dropped: int, first_reason: str, name: str, vocabulary: str, max_dropped: float) -> None:
    if dropped:
        message = f'{name}: {dropped} of {total} examples dropped; {first_reason}'
        if dropped > max_dropped * total:
            remedies = 'raise MAX_DROPPED'
            if TOO_LONG in first_reason:
                tokens = f"these are tokens of '{vocabulary}'"
                remedies = f"raise TASK_FEATURE_LENGTHS['targets'] or MAX_DROPPED, or set VOCABULARY ({tokens})"
            raise UserError(f'{message}; over {max_dropped:.0%}: fix the data, or {remedies}')
        logging.getLogger('perl_jax').warning(message)
    if dropped == total:
        raise UserError(f'{name}: no examples')


def decode(vocabulary: Any, batch: types.Responses) -> list[list[str]]:
    """Decode responses with their vocabulary, without EOS and padding.

    Returns:
      A list of K texts for each of B prompts.
    """
    tokens, mask = np.asarray(batch.targets), np.asarray(batch.targets_mask)
    eos_ids = getattr(vocabulary, 'eos_ids', ())  # SeqIO's vocabularies have one EOS, at which `decode` stops by itself

    def text(row: np.ndarray) -> str:
        return vocabulary.decode([int(t) for t in itertools.takewhile(lambda t: t not in eos_ids, row)])

    return [[text(row[keep]) for row, keep in zip(*responses)] for responses in zip(tokens, mask)]
