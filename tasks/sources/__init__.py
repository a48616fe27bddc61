r"""Where a data set's rows come from: an environment variable names files, the Hugging Face hub or TFDS.

    TLDR_SOURCE=/data/tldr                         a file, a folder of files or a pattern such as /data/*.jsonl:
                                                   .jsonl, .json (lines or one list), both also .gz, and .parquet
    TLDR_SOURCE=hf:OWNER/NAME[/FOLDER][:CONFIG]    the `datasets` package: pip install 'perl_jax[datasets]'; FOLDER
                                                   may be the name of a config too
    TLDR_SOURCE=tfds:NAME[/CONFIG]                 tensorflow_datasets, from TFDS_DATA_DIR if that is set

A split is, in this order: what a row's own field `split` says; what a file or folder says by its name (train*, valid*
or dev*, test*) or the hub by its splits; and where there is no such split, a share of another one by a hash of the
row's group, so that no post, prompt or episode is in two: half of validation for test, 5% of train for each otherwise.
"""

import csv
import dataclasses
import functools
import glob
import itertools
import logging
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from perl_jax.errors import UserError
from perl_jax.tasks import splits
from perl_jax.tasks.sources import files, odd_rows

Rows = Iterable[tuple[str, Any]]  # (which file and row, content)
Place = str | tuple[str, ...] | tuple[tuple[str, str], ...]  # one, several, or (split, one) of each split
_SHARE = 5  # percent of the groups of train that a missing split takes
_SPLIT = re.compile(r'(train|valid|val|dev|eval|test)(?![a-z])|(validation|evaluation)')


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that the user can name the place of.

    Attributes:
      variable: the environment variable.
      default: what is read where that is not set; None where the user has to say.
      hint: what to do, for the message when there is nothing to read.
      read: from a row to an object with a str field `group`, or None (odd_rows.parse).
      files: further kinds of files, {glob pattern: reader of a path}; they come before the common ones.
      most: the share of odd rows let pass.
      split: the split that a row says it is in, or None.
    """

    variable: str
    default: str | None
    hint: str
    read: Callable[[Any], Any]
    files: tuple[tuple[str, Callable[[pathlib.Path], Iterable]], ...] = ()
    most: float = odd_rows.MAX_BAD_ROWS
    split: Callable[[Mapping], str | None] = lambda row: row.get('split')

    def rows(self, split: str) -> list[Any]:
        """All that `read` made of the rows of 'train', 'validation' or 'test', in order.

        Raises:
          UserError: nothing is there, a package is missing, a file cannot be read, or too many rows are odd.
        """
        place = os.environ.get(self.variable) or self.default
        if not place:
            raise UserError(f'{self.variable} is not set: {self.hint}')
        return self.rows_at(place, split)

    def rows_at(self, place: Place, split: str) -> list[Any]:
        """As `rows`, from this place instead of the variable's."""
        return _read(self, place, split)


# Two places of one split each: pairs and prompts of a data set are read one after the other.
@functools.lru_cache(maxsize=2)
def _read(source: Source, place: Place, split: str) -> list[Any]:
    by_split = rows_by_split(source, place)
    upstream = next((s for s in (split, *(('validation',) if split == 'test' else ()), 'train') if s in by_split), None)
    if upstream is None:
        raise UserError(f'{source.variable}={place} has no split {split!r}, only {", ".join(by_split)}: {source.hint}')

    def read(row: Any) -> Any:
        if not isinstance(row, Mapping):
            raise ValueError(f'not an object but {str(row)[:40]!r}')
        row_split = source.split(row)
        if row_split is not None and row_split != split:  # not read: it may be large
            return odd_rows.OTHER_SPLIT
        parsed = source.read(row)
        if parsed is None:
            return None
        belongs = row_split or _by_hash(source.variable, parsed.group, upstream, by_split)
        return parsed if belongs == split else None

    return odd_rows.parse(f'{source.variable}={place}', by_split[upstream](), read, most=source.most)


def rows_by_split(source: Source, place: Place) -> dict[str, Callable[[], Rows]]:
    """Returns a function for each split that the files or the hub name; its rows are read when it is called.

    Raises:
      UserError: nothing is there, or a package is missing.
    """
    if not isinstance(place, str):
        merged: dict[str, list[Callable[[], Rows]]] = {}
        for item in place:
            named, path = (None, item) if isinstance(item, str) else item
            for split, rows in rows_by_split(source, path).items():
                merged.setdefault(named or split, []).append(rows)
        return {split: functools.partial(_chain, parts) for split, parts in merged.items()}
    scheme, _, name = place.partition(':')
    open_ = {'hf': _hub, 'tfds': _tfds}.get(scheme)
    return open_(source, name) if open_ else _local(source, pathlib.Path(place).expanduser())


def _chain(parts: Iterable[Callable[[], Rows]]) -> Rows:
    return itertools.chain.from_iterable(rows() for rows in parts)


def split_named(name: str) -> str | None:
    """The split that a name begins with, or None: train.jsonl -> train, valid2 and dev-0.parquet -> validation .."""
    match = _SPLIT.match(name.lower())
    return match and {'train': 'train', 'test': 'test'}.get(match.group(), 'validation')


def _by_hash(variable: str, group: str, upstream: str, by_split: Mapping) -> str:
    """The split of a row that does not say: its upstream split's, less what goes to those that upstream lacks."""
    missing = [s for s in ('validation', 'test') if s not in by_split]
    bucket = splits.bucket(variable, group)
    if upstream == 'validation' and missing:
        return 'test' if bucket < 50 else 'validation'
    if upstream == 'train' and 'validation' in missing:
        return missing[bucket // _SHARE] if bucket < _SHARE * len(missing) else 'train'
    return upstream


def _hub(source: Source, name: str) -> dict[str, Callable[[], Rows]]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]  of an extra
    except ImportError:
        raise UserError(
            f"{source.variable}=hf:{name} needs the package datasets: pip install 'perl_jax[datasets]', "
            f'or set {source.variable} to a folder'
        ) from None
    path, _, config = name.partition(':')
    owner, _, rest = path.partition('/')
    title, _, folder = rest.partition('/')
    try:
        if folder and not config and folder in datasets.get_dataset_config_names(f'{owner}/{title}'):
            config, folder = folder, ''
        by_split = datasets.load_dataset(f'{owner}/{title}', config or None, data_dir=folder or None)
    except Exception as error:  # the package has dozens of its own; what the user needs is the name and the reason
        raise UserError(f'{source.variable}=hf:{name} cannot be loaded ({_line(error)}): {source.hint}') from None
    return {split: functools.partial(_numbered, split, by_split[split]) for split in by_split}


def _tfds(source: Source, name: str) -> dict[str, Callable[[], Rows]]:
    import tensorflow_datasets as tfds

    try:
        by_split = cast(Any, tfds.load(name))
    except Exception as error:  # as above
        raise UserError(f'{source.variable}=tfds:{name} cannot be loaded ({_line(error)}): {source.hint}') from None

    def rows(split: str) -> Rows:
        return ((place, _plain(row)) for place, row in _numbered(split, cast(Any, tfds.as_numpy(by_split[split]))))

    return {split: functools.partial(rows, split) for split in by_split}


def _local(source: Source, path: pathlib.Path) -> dict[str, Callable[[], Rows]]:
    path, paths = _matches(path)
    if not path.exists():
        raise UserError(f'{source.variable}={path}: there is no such file or folder: {source.hint}')
    readers = []
    for kinds in (source.files, files.READERS):
        if not readers:
            readers = [(p, reader) for pattern, reader in kinds for p in paths if p.match(pattern)]
    if not readers:
        patterns = ', '.join(dict.fromkeys(pattern for pattern, _ in source.files + files.READERS))
        raise UserError(f'{source.variable}={path} holds none of {patterns}: {source.hint}')
    by_split: dict[str | None, list] = {}
    for file, reader in sorted(readers, key=lambda item: item[0]):
        inside = file.relative_to(path).parts[::-1] or (file.name,)
        named = next((split for component in inside if (split := split_named(component))), None)
        by_split.setdefault(named, []).append((file, reader))
    if list(by_split) == [None] or path.is_file():  # nothing says a split: the rows do, or a hash
        by_split = {'train': [item for items in by_split.values() for item in items]}
    if unnamed := by_split.pop(None, []):
        names = ', '.join(file.name for file, _ in unnamed)
        logging.getLogger('perl_jax').warning(f'{source.variable}={path}: not read, since others name a split: {names}')
    return {split: functools.partial(_read_files, readers) for split, readers in by_split.items() if split}


def _matches(path: pathlib.Path) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """The folder that names of splits are looked for in, or the file; and the files of a file, folder or pattern."""
    if path.exists() or not glob.has_magic(str(path)):
        return path, [p for p in ([path] if path.is_file() else path.rglob('*')) if p.is_file()]
    root = path
    while glob.has_magic(str(root)):
        root = root.parent
    return root, [p for p in map(pathlib.Path, glob.iglob(str(path), recursive=True)) if p.is_file()]


def _read_files(readers: Iterable[tuple[pathlib.Path, Callable]]) -> Rows:
    for file, reader in readers:
        files.check_pointer(file)
        try:
            yield from _numbered(file.name, reader(file))
        except (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error) as error:
            raise UserError(f'{file} cannot be read ({_line(error)}): mend it or get it again') from None


def _numbered(name: str, rows: Iterable) -> Rows:
    return ((f'{name} row {number}', row) for number, row in enumerate(rows, start=1))


def _plain(value: Any) -> Any:
    """TFDS's bytes and arrays as Python's str, numbers and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode('utf-8')
    if hasattr(value, 'tolist'):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _line(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'.splitlines()[0]
