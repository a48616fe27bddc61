"""Removal of marks (controls.py) from raw data: only a chat format may put marks into texts.

Texts are cleaned before each preprocessor, since a preprocessor may decode a mark from data that showed none, such as
\\ufdd0 in a line of JSON. After a preprocessor that called `note_marks`, as preprocessors.chat does, marks stay.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any

from perl_jax.tokenizers.chat.controls import MARKS

_FORMATTED: contextvars.ContextVar[list[bool] | None] = contextvars.ContextVar('formatted', default=None)


def note_marks() -> None:
    """Record that the running preprocessor puts marks into texts, so that later ones keep them."""
    if (calls := _FORMATTED.get()) is not None:
        calls.append(True)


def cleaned_preprocessors(preprocessors: Sequence[Any], cached: bool) -> list[Any]:
    """Returns a task's preprocessors, each applied to texts without marks; places, seeds and arguments stay.

    Args:
      preprocessors: of the task.
      cached: whether rows come from a cache, so that preprocessors before the CacheDatasetPlaceholder ran when it was
        written. If one of them was not SeqIO's, it may have been a chat format, and marks stay.
    """
    import seqio

    placeholders = [i for i, step in enumerate(preprocessors) if isinstance(step, seqio.CacheDatasetPlaceholder)]
    cached_steps = preprocessors[: placeholders[0]] if cached and placeholders else []
    format_calls = [True for step in cached_steps if not getattr(step, '__module__', '').startswith('seqio.')]
    is_placeholder = lambda step: isinstance(step, seqio.CacheDatasetPlaceholder)  # noqa: E731
    return [step if is_placeholder(step) else _cleaned(step, format_calls) for step in preprocessors]


def _cleaned(step: Callable[..., Any], format_calls: list[bool]) -> Callable[..., Any]:
    @functools.wraps(step)  # SeqIO inspects the signature
    def call(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        token = _FORMATTED.set(format_calls)
        try:
            return step(dataset if format_calls else clean(dataset), *args, **kwargs)
        finally:
            _FORMATTED.reset(token)

    return call


def clean(dataset: Any) -> Any:
    """Returns a tf.data.Dataset without marks in its texts; bytes that are not UTF-8, as of an image, stay."""
    import tensorflow as tf

    def clean_text(x: Any) -> Any:
        if isinstance(x, tf.RaggedTensor):
            return x.with_flat_values(clean_text(x.flat_values))
        if not isinstance(x, tf.Tensor) or x.dtype != tf.string:
            return x
        is_text = tf.strings.regex_full_match(x, '(?s).*')
        return tf.where(is_text, tf.strings.regex_replace(x, MARKS, ''), x)

    if not any(getattr(spec, 'dtype', None) == tf.string for spec in tf.nest.flatten(dataset.element_spec)):
        return dataset
    unpack = lambda parts: parts[0] if len(parts) == 1 else parts  # noqa: E731
    return dataset.map(lambda *parts: tf.nest.map_structure(clean_text, unpack(parts)), tf.data.AUTOTUNE)
