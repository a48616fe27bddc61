"""Vocabularies by name, tasks that are read with another vocabulary, and a vocabulary's BOS and EOS."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable
from typing import Any

from perl_jax.data import providers
from perl_jax.errors import UserError
from perl_jax.interop import paths

TASK, EOS = 'task:', paths.EOS  # parts of a vocabulary's name


def from_name(name: str) -> Any:
    """Load the vocabulary of a name: PATH (tokenizers/vocabularies.py), `PATH eos=TOKEN`, or `task:NAME` for a task's.

    Raises:
      UserError: it cannot be read, or another EOS is set where the file allows none.
    """
    if name.startswith(TASK):
        return providers.members(providers.find(name.removeprefix(TASK)))[0].output_features['inputs'].vocabulary
    from perl_jax.tokenizers import vocabularies

    path, _, eos = name.partition(EOS)
    vocabulary: Any = vocabularies.vocabulary(path)
    if eos and not hasattr(vocabulary, 'eos'):
        raise UserError(f"'{name}': only a tokenizer.json or a .gguf can be given another EOS, not '{path}'")
    vocabulary = type(vocabulary)(vocabulary.path, eos) if eos else copy.copy(vocabulary)
    vocabulary.name = absolute_name(name)  # for `name_of`: of a folder, a vocabulary knows only the file in it
    return vocabulary


def absolute_name(name: str) -> str:
    """Returns the name of a vocabulary with an absolute path."""
    path, eos_mark, eos_token = name.partition(EOS)
    if '://' in path or path == 'byt5' or path.startswith((paths.PREFIX, TASK)):
        return name
    return os.path.abspath(os.path.expanduser(path)) + eos_mark + eos_token


def name_of(vocabulary: Any, task: str | None = None) -> str:
    """Returns the name from which `from_name` loads an equal vocabulary; its type's name if there is none.

    Args:
      vocabulary: SeqIO's or one of tokenizers/.
      task: the name of a task that has the vocabulary.
    """
    import seqio

    if name := getattr(vocabulary, 'name', None):
        return name
    path = getattr(vocabulary, 'path', None) or getattr(vocabulary, 'sentencepiece_model_file', None)
    name = 'byt5' if isinstance(vocabulary, seqio.ByteVocabulary) else path and os.fspath(path)
    eos_suffix = getattr(vocabulary, 'eos', None)
    eos_suffix = EOS + eos_suffix if eos_suffix else ''
    try:
        candidate = from_name(name + eos_suffix) if name else None
        is_same = candidate == vocabulary and bos_id(candidate) == bos_id(vocabulary)
        is_same = is_same and eos_ids(candidate) == eos_ids(vocabulary)
        if name and is_same:
            return (os.path.abspath(name) if os.path.exists(name) else name) + eos_suffix
    except UserError:  # its file has no format that we read
        pass
    return TASK + task if task else type(vocabulary).__name__


def with_vocabulary(task: Any, vocabulary: Any) -> Any:
    """Returns the task with its token features read by another vocabulary; scalar features keep theirs."""
    if vocabulary is None:
        return task
    if isinstance(vocabulary, str):
        vocabulary = from_name(vocabulary)
    features = dict(task.output_features)
    for name, feature in task.output_features.items():
        if feature.rank == 1:
            features[name] = dataclasses.replace(feature, vocabulary=vocabulary)
    return task.replace(output_features=features)


def with_continuing_responses(task: Any) -> Any:
    """Returns the task with responses tokenized as continuations of the prompt (TokenizersVocabulary.continuing)."""
    features = dict(task.output_features)
    for name, feature in task.output_features.items():
        if name != 'inputs' and feature.rank == 1:
            features[name] = dataclasses.replace(feature, vocabulary=continuing(feature.vocabulary))
    return task.replace(output_features=features) if features != task.output_features else task


def continuing(vocabulary: Any) -> Any:
    """Returns the vocabulary for texts that continue others; most vocabularies have no separate one."""
    return getattr(vocabulary, 'continuing', vocabulary)


def check_vocabulary(vocabulary: Any, size: int, datasets: Iterable[Any | None] = ()) -> None:
    """Check that the model has an embedding for every token.

    Args:
      vocabulary: of the run.
      size: the rows of the embedding.
      datasets: whose rows are checked too, or None. A chat format may put in control tokens that no text is encoded to.

    Raises:
      UserError: the vocabulary is larger than the model's, or a row has such a token.
    """
    # The largest ids may be special tokens that no text is encoded to: Gemma 3 1B has 262,145 entries for 262,144 rows.
    if getattr(vocabulary, 'reachable_size', vocabulary.vocab_size) > size:
        raise UserError(
            f'the vocabulary has {vocabulary.vocab_size} tokens and the model only vocab_size = {size}; '
            "set VOCABULARY to the base model's, or correct the model's gin file"
        )
    largest_id = max((dataset.largest_id for dataset in datasets if dataset is not None), default=-1)
    if largest_id >= size:
        raise UserError(
            f'a row has the token id {largest_id} and the model only vocab_size = {size}; '
            "set VOCABULARY to the base model's, or take a chat format whose tokens the base model has"
        )


def bos_id(vocabulary: Any) -> int | None:
    """Returns the token that prompts begin with, or None; sentencepiece vocabularies of T5 say -1 for none."""
    try:
        token_id = vocabulary.bos_id
    except NotImplementedError:  # seqio's base class
        return None
    return token_id if token_id is not None and token_id >= 0 else None


def eos_ids(vocabulary: Any) -> tuple[int, ...]:
    """Returns the tokens that end a response; the first is the one that training targets end with."""
    return tuple(getattr(vocabulary, 'eos_ids', None) or [vocabulary.eos_id])
