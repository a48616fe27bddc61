"""TensorFlow takes seconds and most of a gigabyte to import: networks, steps and loops start without it."""

import fnmatch
import subprocess
import sys

from test_layout import MODULES

HEAVY = ('tensorflow', 'seqio', 'clu')
# What is about SeqIO itself may import it at once. Whoever needs these imports them where they are used.
MAY = ('data.features', 'tokenizers.sentencepieces', 'tokenizers.tokenizers', 'tasks', 'tasks.*')

CODE = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    found = [name for name in {heavy!r} if name in sys.modules]
    if found:
        sys.exit(f'{{module}} imports {{found}}')
"""


def run(modules):
    command = [sys.executable, '-c', CODE.format(heavy=HEAVY), *modules]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_library_imports_without_tensorflow():
    light = [name for name in MODULES if not any(fnmatch.fnmatchcase(name, pattern) for pattern in MAY)]
    result = run([f'perl_jax.{name}'.rstrip('.') for name in light if name != '__main__'])
    assert result.returncode == 0, result.stderr


def test_the_check_would_notice():
    assert 'clu imports' in run(['perl_jax.errors', 'clu']).stderr
