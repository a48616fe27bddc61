"""Preprocessors of text that any task may use, each a function from tf.data.Dataset to tf.data.Dataset."""

from collections.abc import Callable

import tensorflow as tf

from perl_jax.tasks.chat import Conversation

_HERE = '\0'  # what no template has


def chat(
    template: Callable[[Conversation], str], system: str | None = None, key: str = 'inputs'
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    r"""Wraps a text field as one user message in a format of chat.py, behind a system message if there is one.

    Give it to registration.add, which runs it before the tokenizer:

        add('mine_sft', 'sft', examples, preprocessors=[chat(chatml, system='You take coffee orders.')])

    With chatml `inputs` becomes, without the system block where there is none,

        <|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{inputs}<|im_end|>\n<|im_start|>assistant\n

    White space around `inputs` is dropped. chat.py says which EOS the vocabulary should have.
    """
    messages = [] if system is None else [{'role': 'system', 'content': system}]
    head, tail = template([*messages, {'role': 'user', 'content': _HERE}]).split(_HERE)

    def wrap(example):
        return {**example, key: tf.strings.join([head, tf.strings.strip(example[key]), tail])}

    return lambda dataset: dataset.map(wrap, num_parallel_calls=tf.data.AUTOTUNE)
