"""Preprocessors of text that any task may use, each a function from tf.data.Dataset to tf.data.Dataset."""

from collections.abc import Callable

import tensorflow as tf


def chatml(system: str | None = None, key: str = 'inputs') -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    r"""Wraps a text field as one user message in ChatML, the format of SmolLM2-Instruct, Qwen and others.

    `inputs` becomes, without the system block where there is no system message,

        <|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{inputs}<|im_end|>\n<|im_start|>assistant\n

    White space at the end of `inputs` is dropped. Give it to registration.add, which runs it before the tokenizer:
    `add('mine_sft', 'sft', examples, preprocessors=[chatml('You take coffee orders.')])`. The vocabulary must know the
    two markers as tokens, and its EOS should be <|im_end|>.
    """
    head = '<|im_start|>user\n' if system is None else f'<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n'
    tail = '<|im_end|>\n<|im_start|>assistant\n'

    def wrap(example):
        text = tf.strings.regex_replace(example[key], r'\s+\z', '')
        return {**example, key: tf.strings.join([head, text, tail])}

    return lambda dataset: dataset.map(wrap, num_parallel_calls=tf.data.AUTOTUNE)
