"""A SeqIO vocabulary by its name, a task that is read with it, and what it says of its own tokens."""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any

from perl_jax.data import providers
from perl_jax.errors import UserError
from perl_jax.interop import paths

TASK, EOS = 'task:', paths.EOS  # in the name of a vocabulary


def named(name: str) -> Any:
    """The vocabulary of a name: a path (interop/vocabularies.py), `PATH eos=TOKEN`, or `task:NAME` for a task's own.

    Raises:
      UserError: there is none.
    """
    if name.startswith(TASK):
        return providers.members(providers.find(name.removeprefix(TASK)))[0].output_features['inputs'].vocabulary
    from perl_jax.tokenizers import vocabularies

    path, _, eos = name.partition(EOS)
    found: Any = vocabularies.vocabulary(path)
    if eos and not hasattr(found, 'eos'):
        raise UserError(f"'{name}': another EOS can be had of a tokenizer.json or a .gguf alone, not of '{path}'")
    found = type(found)(found.path, eos) if eos else copy.copy(found)
    found.name = absolute(name)  # for `name_of`: of a folder, a vocabulary knows the file in it alone
    return found


def absolute(name: str) -> str:
    """The name of a vocabulary with a path that can be followed from any folder."""
    path, eos, token = name.partition(EOS)
    if '://' in path or path == 'byt5' or path.startswith((paths.PREFIX, TASK)):
        return name
    return os.path.abspath(os.path.expanduser(path)) + eos + token


def name_of(vocabulary: Any, task: str | None = None) -> str:
    """What a vocabulary is `named`: `task` is one that has it. One that no name finds is called its type."""
    import seqio

    if name := getattr(vocabulary, 'name', None):
        return name
    path = getattr(vocabulary, 'path', None) or getattr(vocabulary, 'sentencepiece_model_file', None)
    name = 'byt5' if isinstance(vocabulary, seqio.ByteVocabulary) else path and os.fspath(path)
    eos = getattr(vocabulary, 'eos', None)
    eos = EOS + eos if eos else ''
    try:
        found = named(name + eos) if name else None
        same = found == vocabulary and (bos_id(found), eos_ids(found)) == (bos_id(vocabulary), eos_ids(vocabulary))
        if name and same:
            return (os.path.abspath(name) if os.path.exists(name) else name) + eos
    except UserError:  # its file is none that we can read
        pass
    return TASK + task if task else type(vocabulary).__name__


def with_vocabulary(task: Any, vocabulary: Any) -> Any:
    """The task with its token features read by another vocabulary; scalar features keep theirs."""
    if vocabulary is None:
        return task
    if isinstance(vocabulary, str):
        vocabulary = named(vocabulary)
    swapped = {
        k: dataclasses.replace(f, vocabulary=vocabulary) if f.rank == 1 else f for k, f in task.output_features.items()
    }
    return task.replace(output_features=swapped)


def as_answers(task: Any) -> Any:
    """The task with its responses read as what goes on from a prompt: see TokenizersVocabulary.continuing."""
    features = {
        k: dataclasses.replace(f, vocabulary=continuing(f.vocabulary)) if k != 'inputs' and f.rank == 1 else f
        for k, f in task.output_features.items()
    }
    return task.replace(output_features=features) if features != task.output_features else task


def continuing(vocabulary: Any) -> Any:
    """The vocabulary for texts that go on from others; most are their own."""
    return getattr(vocabulary, 'continuing', vocabulary)


def check_vocabulary(vocabulary: Any, size: int) -> None:
    """A model must have an embedding for every token."""
    # Its largest id may be a special token that no text becomes: Gemma 3 1B has 262,145 entries for 262,144 rows.
    if getattr(vocabulary, 'reachable_size', vocabulary.vocab_size) > size:
        raise UserError(
            f'the vocabulary has {vocabulary.vocab_size} tokens and the model only vocab_size = {size}; '
            "set VOCABULARY to the base model's, or mend the model's gin file"
        )


def bos_id(vocabulary: Any) -> int | None:
    """The token that prompts begin with, if any: sentencepiece vocabularies of the T5 kind say -1."""
    try:
        found = vocabulary.bos_id
    except NotImplementedError:  # seqio's base class
        return None
    return found if found is not None and found >= 0 else None


def eos_ids(vocabulary: Any) -> tuple[int, ...]:
    """The tokens that end a response, the one that training targets end with first; SeqIO's vocabularies have one."""
    return tuple(getattr(vocabulary, 'eos_ids', None) or [vocabulary.eos_id])
