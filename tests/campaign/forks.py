"""Commands in processes of their own, forked from one that has imported the libraries: they import for ten seconds.

A command may be told to come to harm by itself, which hits places that no signal from outside hits reliably:

    harm = {'before': ['write', FOLDER, 3], 'by': 'SIGKILL'}        before the third change of a file below FOLDER
    harm = {'before': ['call', 'perl_jax.runs.x:f', 2], 'by': ...}  before the second call of a function
    harm = {.., 'by': 'ENOSPC'}                                     by an error of the system from then on
    harm = {.., 'by': 'memory'}                                     by having no more than 64 MiB of memory left

The first process that reads the rows of a toy task keeps them in a file: TensorFlow takes half the time of a small run.
"""

import atexit
import dataclasses
import errno
import functools
import gc
import hashlib
import importlib
import json
import os
import pathlib
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
LIBRARIES = (
    'perl_jax.cli.main', 'perl_jax.cli.configurables', 'clu.metric_writers', 'tqdm', 'orbax.checkpoint', 'seqio',
    'matplotlib.figure', 'perl_jax.tools.report', 'perl_jax.tools.exchange', 'perl_jax.tools.average',
    'perl_jax.tools.sweep', 'perl_jax.evals.judging.judge', 'tensorboard.compat.proto.event_pb2',
)  # fmt: skip
CHANGES = ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.truncate', 'os.link', 'sqlite3.connect')


class Forked:
    """A command that runs, with the methods of subprocess.Popen that the tests need."""

    def __init__(self, argv, harm=None):
        self.returncode, descriptor_and_path = None, tempfile.mkstemp(prefix='perl_jax_fork_')
        os.close(descriptor_and_path[0])
        self._output = pathlib.Path(descriptor_and_path[1])
        self.pid = _ask(start=[str(word) for word in argv], output=str(self._output), harm=harm)

    def poll(self):
        if self.returncode is None:
            self.returncode = _ask(poll=self.pid)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def is_stopped(self):
        """Whether it is suspended by SIGSTOP."""
        return self.poll() is None and _status(self.pid) == 'T'

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=180):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired('perl_jax', timeout)
            time.sleep(0.01)
        lines = self._output.read_text(errors='replace').splitlines() if self._output.exists() else []
        self._output.unlink(missing_ok=True)
        return '', '\n'.join(line for line in lines if 'cuda_platform.cc' not in line)  # TensorFlow looks for a GPU


def _status(pid):
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]


def run(argv, harm=None):
    """The exit code of a command, and what it said on both streams."""
    process = Forked(argv, harm)
    _, err = process.communicate()
    return process.returncode, err


@functools.cache
def _server():
    from toy_runs import ENVIRONMENT

    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    pipe = subprocess.PIPE
    environment = os.environ | ENVIRONMENT | {'PYTHONPATH': path}
    process = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, env=environment, text=True)
    atexit.register(process.communicate)  # closes its input, at whose end it ends
    return process


def _ask(**question):
    server = _server()
    server.stdin.write(json.dumps(question) + '\n')
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def _serve():
    """Answers the questions of `_ask`; returns in a child, with what it is to do."""
    for line in sys.stdin:
        question, answer = json.loads(line), None
        if 'poll' in question:
            pid, status = os.waitpid(question['poll'], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            return question
        print(json.dumps(answer), flush=True)
    os._exit(0)


def _come_to_harm(before, by):
    """Arranges that this process is killed, or sees an error, at a place."""
    kind, place, count = before
    seen, number = 0, getattr(errno, by, None)

    def reach():
        nonlocal seen
        seen += 1
        if number is not None and seen >= count:
            raise OSError(number, os.strerror(number), place)
        if by == 'memory' and seen == count:
            size = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, resource.RLIM_INFINITY))
        elif number is None and seen == count:
            os.kill(os.getpid(), signal.Signals[by])

    def audit(event, args):
        is_write = event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        is_below = bool(args) and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(place)
        if is_below and (is_write or event in CHANGES):
            reach()

    if kind == 'write':
        sys.addaudithook(audit)
        return
    module, _, names = place.partition(':')
    *parents, name = names.split('.')
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    function = getattr(owner, name)

    @functools.wraps(function)
    def harmed(*args, **kwargs):
        reach()
        return function(*args, **kwargs)

    setattr(owner, name, harmed)


def _keep_rows():
    from perl_jax.data import datasets, lexicon
    from perl_jax.tasks import toy

    read = datasets._read_rows_in_memory

    def read_once(task, config, kind):
        if not task.name.startswith('toy_') or config.vocabulary not in (None, toy.vocabulary()):
            return read(task, config, kind)
        key = task.name, dataclasses.replace(config, vocabulary=None), kind
        name = hashlib.sha256(repr(key).encode()).hexdigest()
        path = pathlib.Path(os.environ['PERL_JAX_TESTS'], f'{name}.rows')
        if not path.exists():
            dataset = read(task, config, kind)
            draft = path.with_suffix(f'.{os.getpid()}')
            draft.write_bytes(pickle.dumps((dataset.arrays, dataset.examples)))
            draft.rename(path)
        vocabulary = lexicon.with_vocabulary(task, config.vocabulary).output_features['inputs'].vocabulary
        arrays, examples = pickle.loads(path.read_bytes())
        return datasets.Dataset(arrays, examples, vocabulary, lexicon.eos_ids(vocabulary))

    datasets._read_rows_in_memory = read_once
    toy.SIZES['train'] = 64  # the first ones are always the same


if __name__ == '__main__':
    for library in LIBRARIES:
        importlib.import_module(library)
    _keep_rows()
    gc.freeze()  # so that no process looks for garbage in what all share
    command = _serve()
    output = os.open(command['output'], os.O_WRONLY | os.O_APPEND)
    for descriptor, target in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(target, descriptor)
    if command['harm']:
        _come_to_harm(**command['harm'])
    sys.argv[:] = ['perl_jax', *command['start']]
    sys.exit(sys.modules['perl_jax.cli.main'].cli())
