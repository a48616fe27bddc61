"""Preprocessors of text that any task may use, each a function from tf.data.Dataset to tf.data.Dataset."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import tensorflow as tf
from seqio.utils import Feature

from perl_jax.data import rows
from perl_jax.tasks.chat import Conversation
from perl_jax.tokenizers.chat import controls, unmarked


def chat(
    template: Callable[[Conversation], str], system: str | None = None, key: str = 'inputs'
) -> Callable[[tf.data.Dataset, Mapping[str, Feature]], tf.data.Dataset]:
    r"""Wraps a text field as one user message in a format of chat.py, behind a system message if there is one.

    Give it to registration.add, which runs it before the tokenizer:

        add('mine_sft', 'sft', examples, preprocessors=[chat(chatml, system='You take coffee orders.')])

    With chatml `inputs` becomes, without the system block where there is none,

        <|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{inputs}<|im_end|>\n<|im_start|>assistant\n

    White space around `inputs` is dropped. What stands in it never becomes a control token, though it be spelled so.
    chat.py says which EOS the vocabulary should have; a checkpoint's own template is interop.chat_template.Template.

    Raises (when the data are read):
      UserError: what the template says, or a control token of it that the vocabulary has not.
    """
    messages = [] if system is None else [{'role': 'system', 'content': system}]

    def formatted(content: str) -> str:
        return template([*messages, {'role': 'user', 'content': content.strip()}])

    def wrap(dataset: tf.data.Dataset, output_features: Mapping[str, Feature]) -> tf.data.Dataset:
        example = formatted('a message')  # what is wrong with the template is said before the data are read
        rows.check_controls(example, output_features[key].vocabulary)
        form = controls.marked if reads_marks(output_features[key]) else str
        dataset = unmarked.clean(dataset)
        unmarked.note_marks()

        def convert_row(row):
            text = tf.numpy_function(lambda text: form(formatted(text.decode())).encode(), [row[key]], tf.string)
            return {**row, key: tf.ensure_shape(text, [])}

        return dataset.map(convert_row, num_parallel_calls=tf.data.AUTOTUNE)

    return wrap


def reads_marks(feature: Feature) -> bool:
    """Whether the vocabulary of a feature tells a template's control tokens from the same words in a text."""
    return getattr(feature.vocabulary, 'reads_marks', False)


def without_marks(dataset: tf.data.Dataset, output_features: Mapping[str, Feature]) -> tf.data.Dataset:
    """Takes a template's marks out of texts that a vocabulary reads which knows none (bytes, sentencepiece)."""
    plain = [name for name, feature in output_features.items() if feature.rank == 1 and not reads_marks(feature)]
    if plain and tf.executing_eagerly():  # a format is the same for all rows
        for row in cast(Iterator[Any], dataset.take(1).as_numpy_iterator()):
            for name in (name for name in plain if isinstance(row.get(name), bytes)):
                rows.check_controls(row[name].decode(), output_features[name].vocabulary)
    clean = lambda text: tf.strings.regex_replace(text, controls.MARKS, '')  # noqa: E731
    return dataset.map(
        lambda example: example | {name: clean(example[name]) for name in plain if name in example},
        num_parallel_calls=tf.data.AUTOTUNE,
    )
