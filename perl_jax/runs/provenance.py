"""What a run came from, for its run.json: the command line, the versions of packages, the commit of the code."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import shlex
import subprocess
import sys

import perl_jax

_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'seqio', 'gin-config', 'numpy')


def describe() -> dict[str, str]:
    """Returns `command`, `versions`, and the `commit` of perl_jax where it is a checkout of git."""
    versions = {'perl_jax': perl_jax.__version__, 'python': platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # seqio is only needed for its tasks
            continue
    about = {
        'command': shlex.join(['perl_jax', *sys.argv[1:]]),
        'versions': ', '.join(f'{name} {version}' for name, version in versions.items()),
    }
    return about | ({'commit': commit} if (commit := _commit()) else {})


def _commit() -> str | None:
    """Returns the commit of the checkout, with `+` if files that it has were changed since; None without git."""
    root = pathlib.Path(perl_jax.__file__).parents[1]
    if not (root / '.git').exists():  # an installed package, maybe inside a checkout of something else
        return None
    try:
        commit, changes = (
            subprocess.run(['git', '-C', root, *words], capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (['rev-parse', 'HEAD'], ['status', '--porcelain', '--untracked-files=no'])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + '+' * bool(changes.strip())
