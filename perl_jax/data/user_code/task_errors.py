"""Errors that a task's own source or preprocessors raise, as one line that names the task: they are its user's."""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from typing import Any

import perl_jax
from perl_jax.errors import UserError

LONGEST = 500  # letters of what a library says
# Not the task's: exits.py knows what to do about memory, networks and storage.
_OF_MACHINE = (MemoryError, ConnectionError, TimeoutError)
_OF_MACHINE_IN_TENSORFLOW = re.compile(
    'ResourceExhausted|Unavailable|Aborted|DeadlineExceeded|Cancelled|Unimplemented|PermissionDenied'
)
_LIBRARIES = (sysconfig.get_paths()['stdlib'], sysconfig.get_paths()['purelib'], os.path.dirname(perl_jax.__file__))


def read(ds: Any, task_name: str, split: str) -> Iterator[Any]:
    """Yields the rows of a task's tf.data.Dataset as NumPy.

    Raises:
      UserError: the source or a preprocessor fails.
    """
    with converted(task_name, split):
        yield from ds.as_numpy_iterator()


@contextlib.contextmanager
def converted(task_name: str, split: str) -> Iterator[None]:
    """Convert what the code of a task raises into a UserError that names the task, the split, and the place."""
    try:
        yield
    except (UserError, *_OF_MACHINE):
        raise
    except Exception as error:
        is_tensorflow = type(error).__module__.startswith('tensorflow')
        if is_tensorflow and _OF_MACHINE_IN_TENSORFLOW.search(type(error).__name__):
            raise
        if 'UserError: ' in str(error) or 'HTTP request' in str(error):  # of our own inside a tf.data map; a network
            raise
        problem = f'{_summary(error)}{_place(error)}'
        raise UserError(f"task '{task_name}': split '{split}': {problem}; mend its source or preprocessors") from error


def _summary(error: Exception) -> str:
    """Returns the class and the text of an error, without what TensorFlow adds around them."""
    text = re.sub(r'\{\{.*?\}\}|\[\[.*?\]\]|\[Op:.*', '', str(error)).strip()
    if text.startswith('in user code:'):  # traced: the error itself is the last line, with its class
        return text.splitlines()[-1].strip()
    text = ' '.join(text.partition('Traceback (most recent call last)')[0].split())[:LONGEST]
    has_class = re.match(r'[\w.]+(Error|Exception): ', text)  # of a tf.py_function
    return text if has_class else f'{type(error).__name__}: {text}'


def _place(error: Exception) -> str:
    """Returns ' (FILE:LINE)' of the innermost code that is neither ours nor a library's, or an empty string."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    frames += re.findall(r'File "([^"]+)", line (\d+)', str(error))
    places = [f'{file}:{line}' for file, line in frames if not file.startswith(_LIBRARIES) and _is_source(file)]
    return f' ({places[-1]})' if places else ''


def _is_source(file: str) -> bool:
    return os.path.exists(file) and '__autograph_generated_file' not in file
