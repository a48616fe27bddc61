"""How a command ends: the exit code of each exception, and the one line that reports it.

    0 done    2 an error that the user can correct    70 a bug (EX_SOFTWARE)    75 preempted and saved (EX_TEMPFAIL)
    76 in a job of several processes: another was lost    130 interrupted    141 the output's reader has exited
    1 a connection that broke, or an unexpected error in a job of several processes
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence

import perl_jax
from perl_jax.errors import Lost, Preempted, UserError
from perl_jax.parallel import startup, survivor
from perl_jax.printing import printable

LONGEST = 1500  # letters of a message
UNREACHABLE, USER_ERROR, BUG, PREEMPTED, INTERRUPTED, PIPE_CLOSED = 1, 2, 70, 75, 130, 141
# Errors of the file system that TensorStore, Orbax and TensorFlow raise as errors of their own.
_STORAGE = re.compile(r'No space left on device|Disk quota exceeded|Read-only file system|Permission denied')
_LIBRARIES = (  # errors of libraries, which are of many classes: what they say, the code, and the remedy
    (r"RESOURCE_EXHAUSTED: [^\n]*|\b_?(Array)?MemoryError: [^\n]*", USER_ERROR,
     'lower BATCH_SIZE or the lengths, or raise NUM_MICROBATCHES; `perl_jax plan --fit=batch` finds the largest batch'),
    (r"File system scheme '[^']*' not implemented", USER_ERROR, 'name a local path, or one in gs://'),
    (r"GCS path doesn't contain[^\n]*", USER_ERROR, 'write gs://BUCKET/NAME'),
    (r'Error executing an HTTP request: [^\n]*', UNREACHABLE, 'check the network and the name of the bucket'),
)


def run(command: Callable[[Sequence[str]], None], name: str, argv: Sequence[str], *, is_main_program: bool) -> int:
    """Run a command; report how it ended in one line, if not well.

    Args:
      command: takes the arguments.
      name: of the command, for messages.
      argv: the arguments.
      is_main_program: whether an unexpected exception ends the process; a caller in Python gets the exception itself.

    Returns:
      The exit code.
    """
    try:
        command(argv)
        return 0
    except UserError as error:  # gin and TensorFlow add text around its message
        code, message = USER_ERROR, _user_error_line(error)
    except Preempted as error:
        code, message = PREEMPTED, f'preempted; {_first_line(error)}; the same command goes on'
    except Lost as error:
        code, message = survivor.LOST, str(error)
    except BrokenPipeError:  # the reader, such as `| head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:  # a full disk, missing permissions
        is_network = isinstance(error, ConnectionError | TimeoutError)
        code = UNREACHABLE if is_network else USER_ERROR  # which is never retried on a pod
        message = f'{name}: {_first_line(error)}'
    except KeyboardInterrupt as error:
        saved = f'; {error}' if str(error) else ''
        code, message = INTERRUPTED, f'interrupted{saved}; the same command goes on from the last checkpoint'
        if is_main_program:  # threads of libraries may still run, and the interpreter would wait for them
            _exit_with_message(code, message)
            os._exit(code)
    except Exception as error:
        code, message = _unexpected(error, name, argv, is_main_program)
    return _exit_with_message(code, message)


def leave(code: int) -> int:
    """Return the exit code of a program; after an error exit at once if threads of libraries still run.

    Those of Orbax wait minutes for others of a save that failed, and the interpreter would wait for them.
    """
    waited_for = [thread for thread in threading.enumerate() if not thread.daemon]  # the main one too
    if code and len(waited_for) > 1 and not _is_one_of_several():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)
    return code


def _unexpected(error: Exception, name: str, argv: Sequence[str], is_main_program: bool) -> tuple[int, str]:
    if type(error).__module__.startswith('tensorflow') and 'UserError: ' in str(error):  # from inside a tf.data map
        return USER_ERROR, _user_error_line(error)
    if device_error := startup.missing_devices():
        return USER_ERROR, device_error
    if reason := _STORAGE.search(str(error)):
        paths = re.findall(r'[\'"](/[^\'"]+)[\'"]', str(error))
        return USER_ERROR, f'{name}: {reason[0]}{f": {paths[0]}" if paths else ""}; nothing of this write is kept'
    for pattern, code, remedy in _LIBRARIES:
        if reason := re.search(pattern, f'{type(error).__name__}: {error}'):
            return code, f'{name}: {reason[0][:300]}; {remedy}'
    if _is_one_of_several():
        from perl_jax.parallel import distributed

        return distributed.exit_status(error)
    if not is_main_program:
        raise error
    path = _save_traceback(error, name, argv)
    summary = f'{type(error).__name__}: {_first_line(error)[:200]}'
    return BUG, f'{name}: this is a bug ({summary}); its traceback, to be reported with the command, is in {path}'


def _save_traceback(error: Exception, name: str, argv: Sequence[str]) -> str:
    text = ''.join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile('w', prefix='perl_jax_', suffix='.txt', delete=False, errors='replace') as file:
        file.write(f'perl_jax {perl_jax.__version__}, Python {sys.version}\n{name} {list(argv)}\n\n{text}')
    return file.name


def _user_error_line(error: Exception) -> str:
    return str(error).rpartition('UserError: ')[2].strip().partition('\n')[0]


def _shown(message: str) -> str:
    """Return a message as a line that can be read, whatever it quotes from a file: a megabyte, or escape sequences."""
    message = printable(' '.join(message.splitlines()))
    return message if len(message) <= LONGEST else f'{message[: LONGEST - 300]} ... {message[-300:]}'


def _first_line(error: BaseException) -> str:
    return str(error).partition('\n')[0]


def _exit_with_message(code: int, message: str) -> int:
    """Print the message and return the code; in a job of several processes exit at once, since others may hang."""
    message = _shown(message)
    if not _is_one_of_several():
        print(f'perl_jax: {message}', file=sys.stderr)
        return code
    from perl_jax.parallel import distributed

    print(f'perl_jax: {distributed.process_name()}: {message}', file=sys.stderr, flush=True)
    if code != PREEMPTED:  # on preemption all processes stop together and shut down in order
        os._exit(code)
    return code


def _is_one_of_several() -> bool:
    return 'jax' in sys.modules and sys.modules['jax'].distributed.is_initialized()
