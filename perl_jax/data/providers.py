"""Rows of a SeqIO task as SeqIO yields them, computed or from SeqIO's cache, of a split or a slice of one.

SeqIO and TensorFlow are imported on first use.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from perl_jax import json_files
from perl_jax.data.user_code import fingerprints, task_errors
from perl_jax.errors import UserError
from perl_jax.tokenizers.chat import unmarked

SEED = 0  # of random preprocessors: a restarted run has to read the same rows


class _Lengths(dict):
    """TASK_FEATURE_LENGTHS as preprocessors receive it; a missing key is a UserError."""

    def __missing__(self, key: str) -> int:
        raise UserError(f"TASK_FEATURE_LENGTHS = {dict(self)} has no '{key}', which a preprocessor reads")


def find(name: str) -> Any:
    """Returns the registered task or mixture.

    Raises:
      UserError: it is not registered; the message lists similar names.
    """
    import seqio

    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        suggestions = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or sorted(known)[:8]
        raise UserError(
            f"no task or mixture is called '{name}'; nearest: {', '.join(suggestions) or 'none is registered'} "
            '(is its module imported: `import MODULE` in a gin file, or --module=MODULE of inspect?)'
        )
    return seqio.get_mixture_or_task(name)


def members(provider: Any) -> list[Any]:
    """Returns the tasks of a mixture, or a task as the only one."""
    import seqio

    return list(provider.tasks) if isinstance(provider, seqio.Mixture) else [provider]


def rows(task: Any, split: str, lengths: Mapping[str, int], use_cached: bool = False) -> Any:
    """Returns the preprocessed examples of a split, in the source's order, untrimmed, as a tf.data.Dataset.

    Args:
      task: a SeqIO task.
      split: its name, or a slice of one for TFDS's sources.
      lengths: what preprocessors receive as `sequence_length`.
      use_cached: read what SeqIO's `seqio_cache_tasks` wrote, where the task has a CacheDatasetPlaceholder.

    Raises:
      UserError: no such split or cache, a task that can only be read from a cache, or preprocessors that SeqIO rejects
        or that fail.
    """
    from_cache = _reads_cache(task, use_cached)
    if not has_split(task, split, from_cache):
        raise UserError(_no_split(task, split, from_cache))
    with task_errors.converted(task.name, split):
        return _unmarked(_seeded(task), from_cache).get_dataset(
            _Lengths(lengths), split, use_cached=from_cache, shuffle=False, seed=SEED, num_epochs=1,
            trim_output_features=False,
        )  # fmt: skip


def tasks_with_split(tasks: Sequence[Any], split: str, use_cached: bool = False) -> list[Any]:
    """Returns the tasks that have the split, as SeqIO's mixtures do; a warning names the others.

    Raises:
      UserError: no task has it.
    """
    selected = [task for task in tasks if has_split(task, split, _reads_cache(task, use_cached))]
    if not selected:
        raise UserError(_no_split(tasks[0], split, _reads_cache(tasks[0], use_cached)))
    if skipped := [task.name for task in tasks if task not in selected]:
        logging.getLogger('perl_jax').warning(f"tasks without a split '{split}' are skipped: {', '.join(skipped)}")
    return selected


def has_split(task: Any, split: str, cached: bool = False) -> bool:
    """Returns whether a task has a split. Sources of TFDS also accept 'train[:90%]' and 'train+test'."""
    import seqio
    import tensorflow as tf

    if cached:
        return tf.io.gfile.exists(seqio.utils.get_cached_info_path(task.cache_dir, split))
    if split in _splits(task):
        return True
    # A source that was given `splits=` has only those names, and SeqIO cannot slice them.
    if not isinstance(task.source, seqio.TfdsDataSource) or task.source._splits:
        return False
    try:
        return bool(task.source.tfds_dataset.info.splits[split].num_examples)
    except (KeyError, ValueError):
        return False


def identity(task: Any) -> dict[str, Any]:
    """Returns what distinguishes one way of reading a task from another, without reading its data.

    Raises:
      UserError: a preprocessor holds a value that cannot be told from another.
    """
    import seqio

    features = {k: [f.add_eos, f.dtype.name, f.rank] for k, f in task.output_features.items()}
    vocabulary = fingerprints.of_vocabulary(task.output_features['inputs'].vocabulary)
    preprocessors = []
    for step in task.preprocessors:
        name = seqio.utils.function_name(step)
        try:
            preprocessors.append(f'{name} {fingerprints.fingerprint(step)}')
        except (fingerprints.OpaqueError, RecursionError) as error:
            raise UserError(
                f"TOKENS_DIR: task '{task.name}': the preprocessor {name} holds {error}, so files of its rows could "
                'not be told from those of another; give its class __getstate__, or set TOKENS_DIR = None'
            ) from error
    return {'task': task.name, 'features': features, 'preprocessors': preprocessors, 'vocabulary': vocabulary}


def rate(provider: Any, task: Any) -> float:
    """The rate of a mixture's member; SeqIO computes some from numbers that not every task has."""
    try:
        return float(provider.get_rate(task))
    except (TypeError, ValueError, AssertionError, OSError) as error:
        raise UserError(
            f"mixture '{provider.name}': no rate of '{task.name}' can be computed ({' '.join(str(error).split())}); "
            'give its source num_input_examples, cache the task, or give the mixture a number as its rate'
        ) from error


def check_text_cache(task: Any, split: str) -> None:
    """Check that the cache of a task holds texts: tokens would be those of the task's own vocabulary.

    Raises:
      UserError: it holds tokens.
    """
    import seqio
    import tensorflow as tf

    if not _reads_cache(task, True):
        return
    path = seqio.utils.get_cached_info_path(task.cache_dir, split)
    with tf.io.gfile.GFile(path) as file:
        info = json_files.parse(file.read(), path, {'features': dict[str, dict[str, Any]]}, 'cache the task again')
    dtype = info['features'].get('inputs', {}).get('dtype')
    if dtype in ('int32', 'int64'):
        raise UserError(
            f"the cache of task '{task.name}' holds tokens of the task's own vocabulary, and VOCABULARY is another: "
            'put CacheDatasetPlaceholder before seqio.preprocessors.tokenize and cache it again, or set '
            'USE_CACHED_TASKS = False'
        )


def _reads_cache(task: Any, use_cached: bool) -> bool:
    """Returns whether to read the task from its cache."""
    import seqio

    if not use_cached:
        if task.requires_caching:
            raise UserError(
                f"task '{task.name}' can only be read from a cache (CacheDatasetPlaceholder(required=True)): set "
                'USE_CACHED_TASKS = True, and name its folder by --seqio_additional_cache_dirs'
            )
        return False
    if not task.supports_caching:
        message = f"USE_CACHED_TASKS: task '{task.name}' has no CacheDatasetPlaceholder; its rows are computed instead"
        logging.getLogger('perl_jax').warning(message)
        return False
    if task.cache_dir is None:
        raise UserError(
            f"task '{task.name}' is in no cache (looked in {seqio.utils.get_global_cache_dirs() or 'no folder'}); "
            'name its folder by --seqio_additional_cache_dirs, or set USE_CACHED_TASKS = False'
        )
    return True


def _seeded(task: Any) -> Any:
    """Returns the task with a source that accepts a seed: the functions of many FunctionDataSources take none."""
    function = getattr(task.source, '_dataset_fn', None)
    if function is None or 'seed' in inspect.signature(function).parameters:
        return task
    source = copy.copy(task.source)
    source._dataset_fn = lambda split, shuffle_files, seed=None: function(split=split, shuffle_files=shuffle_files)
    return task.replace(source=source)


def _unmarked(task: Any, cached: bool) -> Any:
    """Returns the task with marks removed from raw texts, unless its source handles them (tasks/registration.py)."""
    if getattr(task.source, 'reads_marks', False):
        return task
    return task.replace(preprocessors=unmarked.cleaned_preprocessors(task.preprocessors, cached))


def _splits(task: Any) -> Sequence[str]:
    """Returns the names of the task's splits; a source of TFDS looks them up."""
    try:
        return list(task.splits)
    except (ValueError, AssertionError, OSError) as error:
        raise UserError(
            f"task '{task.name}': TFDS does not find it ({' '.join(str(error).split())[:200]}); "
            'name the folder of the prepared data set by --tfds_data_dir'
        ) from error


def _no_split(task: Any, split: str, cached: bool) -> str:
    import tensorflow as tf

    if cached:
        files = tf.io.gfile.glob(os.path.join(task.cache_dir, 'info.*.json'))
        splits = sorted(os.path.basename(file).split('.')[1] for file in files)
    else:
        splits = sorted(_splits(task))
    place = f"the cache of task '{task.name}'" if cached else f"task '{task.name}'"
    hint = '; a run without evaluation data: EVAL_DATASET = None' if split == 'validation' else ''
    return f"{place} has no split '{split}'; it has {', '.join(splits)}{hint}"
