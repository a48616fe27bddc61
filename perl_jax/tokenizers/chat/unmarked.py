"""Raw data hold no marks of controls.py: whatever spells one there is taken out, until a chat format puts in its own.

The texts are cleaned in front of each preprocessor: a preprocessor may find a mark where nobody saw one, in a line of
JSON that spells it \\ufdd0. Behind one that called `formatted`, as preprocessors.chat does, marks are a format's own.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any

from perl_jax.tokenizers.chat.controls import MARKS

_FORMATTED: contextvars.ContextVar[list[bool] | None] = contextvars.ContextVar('formatted', default=None)


def formatted() -> None:
    """Say that the preprocessor that is called puts marks into texts, which those behind it have to leave there."""
    if (seen := _FORMATTED.get()) is not None:
        seen.append(True)


def steps(preprocessors: Sequence[Any], cached: bool) -> list[Any]:
    """A task's preprocessors, each with its own place, seed and arguments, on texts without marks of the raw data.

    Args:
      cached: what stands in front of the CacheDatasetPlaceholder was called when the cache was written. If that was
        more than SeqIO's own, it may have been a chat format, and marks stay.
    """
    import seqio

    places = [i for i, step in enumerate(preprocessors) if isinstance(step, seqio.CacheDatasetPlaceholder)]
    before = preprocessors[: places[0]] if cached and places else []
    seen = [True for step in before if not getattr(step, '__module__', '').startswith('seqio.')]
    return [
        step if isinstance(step, seqio.CacheDatasetPlaceholder) else _cleaned(step, seen) for step in preprocessors
    ]


def _cleaned(step: Callable[..., Any], seen: list[bool]) -> Callable[..., Any]:
    @functools.wraps(step)  # SeqIO looks at its arguments: which it takes, and where those may stand
    def call(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        token = _FORMATTED.set(seen)
        try:
            return step(dataset if seen else clean(dataset), *args, **kwargs)
        finally:
            _FORMATTED.reset(token)

    return call


def clean(dataset: Any) -> Any:
    """A tf.data.Dataset with no marks in its texts; bytes that are no text, as of an image, stay as they are."""
    import tensorflow as tf

    def text(x: Any) -> Any:
        if isinstance(x, tf.RaggedTensor):
            return x.with_flat_values(text(x.flat_values))
        if not isinstance(x, tf.Tensor) or x.dtype != tf.string:
            return x
        is_text = tf.strings.regex_full_match(x, '(?s).*')
        return tf.where(is_text, tf.strings.regex_replace(x, MARKS, ''), x)

    if not any(getattr(spec, 'dtype', None) == tf.string for spec in tf.nest.flatten(dataset.element_spec)):
        return dataset
    row = lambda parts: parts[0] if len(parts) == 1 else parts  # noqa: E731
    return dataset.map(lambda *parts: tf.nest.map_structure(text, row(parts)), tf.data.AUTOTUNE)
