"""launch/local_pod.sh with a perl_jax whose processes are forked from one that has imported the libraries, 10 s each.

The program perl_jax asks a server for a process, stays until that ends, and ends as it does. Signals reach the process,
and it dies when the program is killed.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """#!{python} -ISs
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
read, write = os.pipe()  # it ends when this process does
question = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(connection, [len(question).to_bytes(8, 'big') + question], [1, 2, read])
answers = connection.makefile()
pid = int(answers.readline())
for number in signal.SIGTERM, signal.SIGINT:
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(answers.readline())
if code < 0:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
LIBRARIES = (
    'perl_jax.cli.main', 'perl_jax.cli.configurables', 'clu.metric_writers', 'tqdm', 'orbax.checkpoint', 'seqio',
    'tensorboard.compat.proto.event_pb2',
)  # fmt: skip


@functools.cache
def launcher():
    """The script in a checkout with this program; the server has been started."""
    from toy_runs import ENVIRONMENT

    folder = pathlib.Path(tempfile.mkdtemp(prefix='perl_jax_pods_'))
    program, address = folder / '.venv/bin/perl_jax', str(folder / 'socket')
    program.parent.mkdir(parents=True)
    program.write_text(PROGRAM.format(python=sys.executable, address=address))
    program.chmod(0o755)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    environment = os.environ | ENVIRONMENT | {'PYTHONPATH': path}
    server = subprocess.Popen([sys.executable, __file__, address], env=environment, stdout=subprocess.PIPE)
    assert server.stdout.readline() == b'ready\n'
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.kill)
    return shutil.copytree(ROOT / 'launch', folder / 'launch') / 'local_pod.sh'


def _serve(address):
    """Forks for each program that connects; returns in the child, with what it is to do."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(100)
        print('ready', flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
        while True:
            connection, _ = listener.accept()
            if os.fork():
                connection.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            data, descriptors, _, _ = socket.recv_fds(connection, 2**20, 3)
            while len(data) < 8 + int.from_bytes(data[:8], 'big'):
                data += connection.recv(2**20)
            if not (child := os.fork()):
                connection.close()
                return json.loads(data[8:]), descriptors
            with contextlib.suppress(OSError):  # the program has been killed
                connection.sendall(f'{child}\n'.encode())
                connection.sendall(f'{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n'.encode())
            os._exit(0)


def _die_with(descriptor):
    os.read(descriptor, 1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == '__main__':
    for library in LIBRARIES:
        importlib.import_module(library)
    (arguments, variables, folder), (out, err, end) = _serve(sys.argv[1])
    for descriptor, target in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
        os.dup2(target, descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    threading.Thread(target=_die_with, args=[end], daemon=True).start()
    sys.argv[:] = ['perl_jax', *arguments]
    sys.exit(sys.modules['perl_jax.cli.main'].cli())
