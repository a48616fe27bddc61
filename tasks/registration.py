r"""Registers a data set as a SeqIO task. One's own takes a dozen lines, in any module that gin or a user imports:

    import csv
    from perl_jax.tasks import registration

    def examples(split):                                     # 'train', 'validation' or 'test'
        with open(f'tickets_{split}.csv') as file:
            for row in csv.DictReader(file):
                yield {'inputs': row['question'] + '\n', 'chosen': row['good'], 'rejected': row['bad']}

    registration.add('tickets_pairs', 'pairs', examples)

The kind says what an example holds; further fields (str, int or float) pass through untouched, but for the `weight` of
pairs, what each counts in the loss beside others, such as 1 / (pairs of its inputs): docs/howto/tasks.md.

    sft      inputs, targets              show an answer
    pairs    inputs, chosen, rejected     which of two answers is better
    thumbs   inputs, targets, label       is this answer good: label from 0 (no) to 1 (yes)
    prompts  inputs                       what the policy is to answer
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import seqio
import tensorflow as tf
from seqio.utils import Feature

from perl_jax.errors import UserError
from perl_jax.tasks.preprocessors import without_marks
from perl_jax.tokenizers.chat.controls import marked

Examples = Callable[[str], Iterable[Mapping[str, Any]]]

SPLITS = ('train', 'validation', 'test')
TEXTS = {
    'sft': ('inputs', 'targets'),
    'pairs': ('inputs', 'chosen', 'rejected'),
    'thumbs': ('inputs', 'targets'),
    'prompts': ('inputs',),
}
DEFAULT = seqio.ByteVocabulary()  # where a task names none; by this object vocabulary.py tells that none was named
_LABEL = Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.float32, rank=0)


def add(
    name: str,
    kind: str,
    source: Examples | seqio.DataSource,
    vocabulary: seqio.Vocabulary | None = None,
    splits: Sequence[str] = SPLITS,
    preprocessors: Sequence[Callable] = (),
) -> seqio.Task:
    """Registers and returns a task whose examples are texts and, for thumbs, a label.

    Args:
      name: the task's name, by convention DATA_KIND, such as toy_pairs.
      kind: sft, pairs, thumbs or prompts: which fields an example has.
      source: a function from a split's name to that split's examples, called when the data is first asked for and
        not at import; its examples are held in memory, in the order given. For more than memory holds, any
        seqio.DataSource (TextLineDataSource, TFExampleDataSource ..) with preprocessors that make the fields, and
        TOKENS_DIR in the run, which would else hold all rows (docs/howto/tasks.md).
      vocabulary: bytes where None, for random weights. A run puts its base model's in its place, if that brings one; on
        weights that bring none, as T5X's, it takes a vocabulary that is given here, and refuses None.
      splits: the splits that a function can be asked for; a seqio.DataSource knows its own.
      preprocessors: run on the texts, before SeqIO's tokenize and append_eos. EOS ends targets, chosen and rejected.

    Raises:
      UserError: unknown kind; later, from get_dataset, an example that lacks a field or has one of another type.
    """
    if kind not in TEXTS:
        raise UserError(f'task {name}: no kind is called {kind!r}; use one of {", ".join(TEXTS)}')
    return seqio.TaskRegistry.add(
        name,
        source=cast(Any, source if isinstance(source, seqio.DataSource) else _Source(name, kind, source, splits)),
        preprocessors=[*preprocessors, without_marks, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features=features(kind, vocabulary or DEFAULT),
    )


def features(kind: str, vocabulary: seqio.Vocabulary) -> dict[str, Feature]:
    """The output features of a kind: int32 tokens of rank 1, and for thumbs a float32 label of rank 0."""
    texts = {key: Feature(vocabulary, add_eos=key != 'inputs') for key in TEXTS[kind]}
    return texts | {'label': _LABEL} if kind == 'thumbs' else texts


class _Source(seqio.FunctionDataSource):
    """A Python function as a data source that checks its examples and knows how many there are.

    The examples become tensors at once instead of one by one inside tf.data, so that an error keeps its own type and
    message, and no Python runs while a model trains.
    """

    reads_marks = True  # of controls.py: a template's stay, others are taken out

    def __init__(self, name: str, kind: str, examples: Examples, splits: Sequence[str]):
        self._name, self._kind, self._examples, self._counts = name, kind, examples, {}
        super().__init__(self._read, splits=splits)

    def num_input_examples(self, split: str) -> int:
        if split not in self._counts:
            self._read(split, shuffle_files=False)
        return self._counts[split]

    def _read(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # one order; the task shuffles
        if split not in self.splits:
            raise UserError(f'task {self._name} has no split {split!r}; use one of {", ".join(self.splits)}')
        columns = {key: [] for key in TEXTS[self._kind]}
        columns |= {'label': []} if self._kind == 'thumbs' else {}
        types = {key: float if key == 'label' else str for key in columns}
        count = 0
        for count, example in enumerate(self._examples(split), start=1):
            if count == 1:  # further fields are those of the first example
                kind = lambda value: str if isinstance(value, str) else type(value)  # noqa: E731 (a template's, too)
                extra = {key: kind(value) for key, value in example.items() if key not in types}
                types, columns = types | extra, columns | {key: [] for key in extra}
            self._check(split, count, example, types)
            for key, column in columns.items():
                column.append(marked(example[key]) if types[key] is str else types[key](example[key]))
        self._counts[split] = count
        dtypes = {str: tf.string, int: tf.int64, float: tf.float32}
        tensors: Any = {key: tf.constant(column, dtypes[types[key]]) for key, column in columns.items()}
        return tf.data.Dataset.from_tensor_slices(tensors)

    def _check(self, split: str, number: int, example: Mapping[str, Any], types: Mapping[str, type]) -> None:
        where = f'task {self._name}, split {split}, example {number}'
        needed = [key for key in types if key in (*TEXTS[self._kind], 'label')]
        lacks = [key for key in types if key not in example]
        unknown = [key for key in example if key not in (needed if lacks else types)]
        if lacks or unknown:
            differences = [f'{verb} {", ".join(keys)}' for verb, keys in (('lacks', lacks), ('has', unknown)) if keys]
            rule = f'{self._kind} needs {", ".join(needed)}, and further fields are those of the first example'
            raise UserError(f'{where}: it {"; ".join(differences)}: {rule}')
        for key, kind in types.items():
            value = example[key]
            if kind not in (str, int, float):
                raise UserError(f'{where}: {key} is of type {kind.__name__}; give str, int or float')
            if not isinstance(value, (int, float) if kind is float else kind):
                raise UserError(f'{where}: {key} must be of type {kind.__name__}, not {type(value).__name__}')
        if 'label' in types and not 0 <= example['label'] <= 1:
            raise UserError(f'{where}: label must be a number from 0 to 1, not {example["label"]}')
