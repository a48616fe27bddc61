"""A SeqIO task's rows as SeqIO gives them: made now or from a cache that it wrote, of a split or a slice of one.

SeqIO and TensorFlow are imported on first use.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from perl_jax.errors import UserError
from perl_jax.tokenizers.chat import unmarked

SEED = 0  # of preprocessors that draw: a restart has to see the same rows


class _Lengths(dict):
    """TASK_FEATURE_LENGTHS as a preprocessor is given them."""

    def __missing__(self, key: str) -> int:
        raise UserError(f"TASK_FEATURE_LENGTHS = {dict(self)} has no '{key}', which a preprocessor asks for")


def find(name: str) -> Any:
    """The registered task or mixture; an unknown name is answered with the nearest ones."""
    import seqio

    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or sorted(known)[:8]
        raise UserError(
            f"no task or mixture is called '{name}'; nearest: {', '.join(near) or 'none is registered'} "
            '(is its module imported: `import MODULE` in a gin file, or --module=MODULE of inspect?)'
        )
    return seqio.get_mixture_or_task(name)


def members(provider: Any) -> list[Any]:
    """The tasks of a mixture; of a task, itself."""
    import seqio

    return list(provider.tasks) if isinstance(provider, seqio.Mixture) else [provider]


def rows(task: Any, split: str, lengths: Mapping[str, int], use_cached: bool = False) -> Any:
    """The preprocessed examples of a split, in the source's order, as a tf.data.Dataset; none is trimmed.

    Args:
      lengths: what preprocessors get as `sequence_length`.
      use_cached: read what SeqIO's `seqio_cache_tasks` wrote, where the task has a CacheDatasetPlaceholder.

    Raises:
      UserError: no such split or cache, a task that is for a cache alone, or one whose preprocessors SeqIO refuses.
    """
    cached = _from_cache(task, use_cached)
    if not has_split(task, split, cached):
        raise UserError(_no_split(task, split, cached))
    try:
        return _unmarked(_seeded(task), cached).get_dataset(
            _Lengths(lengths), split, use_cached=cached, shuffle=False, seed=SEED, num_epochs=1,
            trim_output_features=False,
        )  # fmt: skip
    except (ValueError, AssertionError) as error:  # what SeqIO says of a task; TFDS of a data set it cannot find
        raise UserError(f"task '{task.name}': {' '.join(str(error).split())}") from error


def with_split(tasks: Sequence[Any], split: str, use_cached: bool = False) -> list[Any]:
    """Those tasks that have the split, as SeqIO's mixtures take them; the others are named.

    Raises:
      UserError: none has it.
    """
    having = [task for task in tasks if has_split(task, split, _from_cache(task, use_cached))]
    if not having:
        raise UserError(_no_split(tasks[0], split, _from_cache(tasks[0], use_cached)))
    if without := [task.name for task in tasks if task not in having]:
        logging.getLogger('perl_jax').warning(f"skipped, having no split '{split}': {', '.join(without)}")
    return having


def has_split(task: Any, split: str, cached: bool = False) -> bool:
    """Whether a task can be asked for it. Sources of TFDS can for 'train[:90%]' and 'train+test' too."""
    import seqio
    import tensorflow as tf

    if cached:
        return tf.io.gfile.exists(seqio.utils.get_cached_info_path(task.cache_dir, split))
    if split in _splits(task):
        return True
    # With splits of its own (`splits=`) a source knows those names alone, and SeqIO no slices of them.
    if not isinstance(task.source, seqio.TfdsDataSource) or task.source._splits:
        return False
    try:
        return bool(task.source.tfds_dataset.info.splits[split].num_examples)
    except (KeyError, ValueError):
        return False


def identity(task: Any) -> dict[str, Any]:
    """What tells one reading of a task from another, as far as it can be seen without its data."""
    import seqio

    features = {k: [f.add_eos, f.dtype.name, f.rank] for k, f in task.output_features.items()}
    words = task.output_features['inputs'].vocabulary
    some = [words.decode([i]) for i in range(0, words.vocab_size, 1 + words.vocab_size // 256)]
    sizes = [type(words).__name__, words.vocab_size, words.encode('The quick brown fox: é, 3.14!')]
    steps = [seqio.utils.function_name(step) for step in task.preprocessors]
    seen = hashlib.sha256(json.dumps([some, sizes]).encode()).hexdigest()
    return {'task': task.name, 'features': features, 'preprocessors': steps, 'vocabulary': seen}


def check_text_cache(task: Any, split: str) -> None:
    """Of a task that is read by another vocabulary than its own, the cache has to hold texts, and not yet tokens."""
    import seqio
    import tensorflow as tf

    if not _from_cache(task, True):
        return
    with tf.io.gfile.GFile(seqio.utils.get_cached_info_path(task.cache_dir, split)) as file:
        dtype = json.load(file)['features'].get('inputs', {}).get('dtype')
    if dtype in ('int32', 'int64'):
        raise UserError(
            f"the cache of task '{task.name}' holds tokens of the task's own vocabulary, and VOCABULARY is another: "
            'put CacheDatasetPlaceholder before seqio.preprocessors.tokenize and cache it again, or set '
            'USE_CACHED_TASKS = False'
        )


def _from_cache(task: Any, wanted: bool) -> bool:
    """Whether to read the task from its cache."""
    import seqio

    if not wanted:
        if task.requires_caching:
            raise UserError(
                f"task '{task.name}' is read from a cache alone (CacheDatasetPlaceholder(required=True)): set "
                'USE_CACHED_TASKS = True, and name its folder by --seqio_additional_cache_dirs'
            )
        return False
    if not task.supports_caching:
        said = f"USE_CACHED_TASKS: task '{task.name}' has no CacheDatasetPlaceholder; its rows are made now"
        logging.getLogger('perl_jax').warning(said)
        return False
    if task.cache_dir is None:
        raise UserError(
            f"task '{task.name}' is in no cache (looked in {seqio.utils.get_global_cache_dirs() or 'no folder'}); "
            'name its folder by --seqio_additional_cache_dirs, or set USE_CACHED_TASKS = False'
        )
    return True


def _seeded(task: Any) -> Any:
    """The task, whose source can be given a seed: many a function of a FunctionDataSource takes none."""
    function = getattr(task.source, '_dataset_fn', None)
    if function is None or 'seed' in inspect.signature(function).parameters:
        return task
    source = copy.copy(task.source)
    source._dataset_fn = lambda split, shuffle_files, seed=None: function(split=split, shuffle_files=shuffle_files)
    return task.replace(source=source)


def _unmarked(task: Any, cached: bool) -> Any:
    """The task without marks in its raw texts, but where its source knows of them: tasks/registration.py."""
    if getattr(task.source, 'reads_marks', False):
        return task
    return task.replace(preprocessors=unmarked.steps(task.preprocessors, cached))


def _splits(task: Any) -> Sequence[str]:
    """The names of the task's splits; a source of TFDS looks them up."""
    try:
        return list(task.splits)
    except (ValueError, AssertionError, OSError) as error:
        raise UserError(
            f"task '{task.name}': TFDS does not find it ({' '.join(str(error).split())[:200]}); "
            'name the folder where it lies prepared by --tfds_data_dir'
        ) from error


def _no_split(task: Any, split: str, cached: bool) -> str:
    import tensorflow as tf

    if cached:
        files = tf.io.gfile.glob(os.path.join(task.cache_dir, 'info.*.json'))
        there = sorted(os.path.basename(file).split('.')[1] for file in files)
    else:
        there = sorted(_splits(task))
    where = f"the cache of task '{task.name}'" if cached else f"task '{task.name}'"
    without = '; a run without evaluation data: EVAL_DATASET = None' if split == 'validation' else ''
    return f"{where} has no split '{split}'; it has {', '.join(there)}{without}"
