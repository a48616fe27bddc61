"""A reader of files from outside, and the right files that its wrong ones are made of."""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Reader:
    """A kind of folder.

    Attributes:
      name: of the reader.
      files: makes the right files, {name: bytes}.
      read: reads a folder of such files.
      mutable: the files that are mutated; empty: all.
      weight: of 100 cases about so many are its own.
    """

    name: str
    files: Callable[[], dict[str, bytes]]
    read: Callable[[pathlib.Path], object]
    mutable: tuple[str, ...] = ()
    weight: int = 10


def written(make):
    """The files that `make(folder)` writes, as a function without arguments that does so once."""

    @functools.cache
    def files():
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            make(folder)
            paths = sorted(path for path in folder.rglob('*') if path.is_file())
            return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    return files
