"""Reads files of rows: JSON lines or one list, .csv and .tsv, all of them also packed by gzip; Parquet."""

import contextlib
import csv
import functools
import gzip
import io
import json
import pathlib
from collections.abc import Iterable, Iterator

from perl_jax.errors import UserError

_POINTER = b'version https://git-lfs'
_MAX_RATIO, _MIN_UNPACKED = 200, 2**26  # of a .gz: bytes that it may unpack to, by its size, and at least
_MAX_FIELD = 2**24  # characters; csv itself takes 2**17


def check_pointer(file: pathlib.Path) -> None:
    """Refuse a pointer of Git LFS, whatever the file's name says that it is."""
    with file.open('rb') as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(f'{file} is a pointer of Git LFS in place of the file: run `git lfs pull` in its clone')


@contextlib.contextmanager
def _text(file: pathlib.Path) -> Iterator[io.TextIOWrapper]:
    with (  # with or without a byte order mark
        _Unpacked(file) if file.suffix == '.gz' else file.open('rb') as opened,
        io.TextIOWrapper(opened, encoding='utf-8-sig', newline='') as text,
    ):
        yield text


def _json(file: pathlib.Path) -> Iterable:
    """JSON lines whatever the suffix, or one list. A line that is not JSON comes as text, which is an odd row."""
    with _text(file) as lines:
        first = lines.read(1)
        lines.seek(0)
        if first == '[':
            yield from json.load(lines)
            return
        for line in lines:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield line


def _table(file: pathlib.Path, delimiters: str = ',;\t|') -> Iterable:
    """Rows of a .csv or .tsv by the names in its first line; one of another length comes as text, an odd row."""
    csv.field_size_limit(_MAX_FIELD)
    with _text(file) as text:
        first_line = text.readline()
        text.seek(0)
        delimiter = max(delimiters, key=first_line.count)
        names = next(csv.reader([first_line], delimiter=delimiter), [])
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f'two columns are called {repeated[0]!r}')
        for row in csv.DictReader(text, delimiter=delimiter, strict=True):
            is_complete = None not in row and None not in row.values()
            yield row if is_complete else 'not as many fields as names'


class _Unpacked(gzip.GzipFile):
    """A .gz of texts, which shrink to a tenth or a twentieth; what unpacks to far more would fill the memory."""

    def __init__(self, file: pathlib.Path) -> None:
        super().__init__(file, 'rb')
        self._left = max(_MIN_UNPACKED, _MAX_RATIO * file.stat().st_size)

    def read1(self, size: int = -1) -> bytes:
        data = super().read1(size)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f'it unpacks to more than {_MAX_RATIO} times its size, as no texts do')
        return data


def _parquet(file: pathlib.Path) -> Iterable:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} needs the package pyarrow: pip install 'perl_jax[datasets]'") from None
    with pyarrow.parquet.ParquetFile(file) as table:
        for batch in table.iter_batches():
            yield from batch.to_pylist()


# By the end of a name in lower case.
READERS = (('*.jsonl', _json), ('*.json', _json), ('*.jsonl.gz', _json), ('*.json.gz', _json), ('*.parquet', _parquet))
_tsv = functools.partial(_table, delimiters='\t')
TABLES = (('*.csv', _table), ('*.csv.gz', _table), ('*.tsv', _tsv), ('*.tsv.gz', _tsv))  # of a user's own rows alone
