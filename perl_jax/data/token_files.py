"""A task's rows as flat files of tokens, which are memory-mapped: for data sets larger than memory.

    about.json                       how they were made, how many rows, when and in how many seconds
    inputs.tokens, inputs.ends       int32, all prompts concatenated; int64 [rows + 1], where each begins and ends
    chosen.tokens ..                 likewise, for each response of the kind
    label.values, weight.values      float32 [rows], labels of thumbs, weights of pairs that have them (mean 1)
    examples.bytes, examples.ends    each row's texts and other fields, as msgpack

The folder is written once, and renamed when it is complete. A batch then reads only its own rows.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import serialization

from perl_jax import json_files, types
from perl_jax.data import pair_weights
from perl_jax.data.batches.dataset import Example
from perl_jax.errors import UserError
from perl_jax.settings import Natural

NUMBER_FIELDS = {'thumbs': 'label', 'pairs': pair_weights.FIELD}  # the scalar feature of a kind
_ABOUT: dict[str, Any] = {'task': str, 'split': str, 'rows': Natural, 'written': str}  # of about.json


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """Rows on disk, with the interface that Stream needs of a Dataset.

    Attributes:
      folder: of the files.
      kind: sft, pairs, thumbs or prompts.
      responses: the features that become the K rows of targets.
      widths: {'inputs': P, 'targets': R}.
      vocabulary: that wrote the tokens.
      eos_ids: tokens that end a response.
      unit_weights: whether pairs get the weight 1, because pairs of other tasks in the mixture have weights.
    """

    folder: str
    kind: str
    responses: Sequence[str]
    widths: Mapping[str, int]
    vocabulary: Any
    eos_ids: tuple[int, ...]
    unit_weights: bool = False

    def __len__(self) -> int:
        return len(self._ends('inputs')) - 1

    @property
    def eos_id(self) -> int:
        """The token that training targets end with."""
        return self.eos_ids[0]

    @functools.cached_property
    def row_lengths(self) -> dict[str, np.ndarray]:
        """Returns the tokens in each row's prompt and longest response (bucketing.py)."""
        return self._lengths(np.maximum.reduce)

    @functools.cached_property
    def token_counts(self) -> dict[str, np.ndarray]:
        """Returns the tokens in each row's prompt and in all of its responses together."""
        return self._lengths(np.add.reduce)

    @property
    def largest_id(self) -> int:
        """The largest token id in the rows; -1 without rows."""
        tokens = (self._map(f'{name}.tokens', np.int32) for name in ('inputs', *self.responses))
        return max(int(x.max(initial=-1)) for x in tokens)

    @property
    def is_weighted(self) -> bool:
        """Whether the rows are pairs with different weights in the loss."""
        return self.kind == 'pairs' and (self.unit_weights or os.path.exists(self._path('weight.values')))

    def weighted(self) -> TokenFiles:
        """Returns the rows with weights of pairs; pairs without weights get 1."""
        return self if self.is_weighted else dataclasses.replace(self, unit_weights=True)

    @property
    def K(self) -> int:
        """The number of responses to a prompt."""
        return len(self.responses)

    def rows(self, index: np.ndarray) -> tuple[Any, list[Example]]:
        """Returns the batch (types.py) of these rows, and their examples."""
        tokens, mask = self._padded('inputs', index, self.widths['inputs'])
        arrays: dict[str, Any] = {'inputs': tokens, 'inputs_mask': mask}
        if self.responses:
            tokens, masks = zip(*(self._padded(name, index, self.widths['targets']) for name in self.responses))
            arrays |= {'targets': np.stack(tokens, axis=1), 'targets_mask': np.stack(masks, axis=1)}
        batch_class = types.Responses if self.responses else types.Prompts
        if self.kind == 'thumbs':
            batch_class, arrays['labels'] = types.Thumbs, self._map('label.values', np.float32)[index][:, None]
        if self.is_weighted:
            batch_class, arrays['weights'] = types.WeightedPairs, self._weights(index)
        examples, ends = self._map('examples.bytes', np.uint8), self._ends('examples')
        packed_examples = (examples[ends[i] : ends[i + 1]].tobytes() for i in index)
        return batch_class(**arrays), [_restored(packed, self._path('examples.bytes')) for packed in packed_examples]

    def _weights(self, index: np.ndarray) -> np.ndarray:
        if self.unit_weights:
            return np.ones(len(index), np.float32)
        return self._map('weight.values', np.float32)[index]

    def _padded(self, name: str, index: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        flat, ends = self._map(f'{name}.tokens', np.int32), self._ends(name)
        tokens, lengths = np.zeros((len(index), width), np.int32), ends[index + 1] - ends[index]
        for row, start, length in zip(tokens, ends[index], lengths, strict=True):
            row[:length] = flat[start : start + length]
        return tokens, np.arange(width) < lengths[:, None]

    def _lengths(self, reduce_responses: Any) -> dict[str, np.ndarray]:
        lengths = {'inputs': np.diff(self._ends('inputs'))}
        if self.responses:
            lengths['targets'] = reduce_responses([np.diff(self._ends(name)) for name in self.responses])
        return lengths

    def _ends(self, name: str) -> np.ndarray:
        return self._map(f'{name}.ends', np.int64)

    def _map(self, name: str, dtype: Any) -> np.ndarray:
        return _mapped(self._path(name), np.dtype(dtype).name)

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)


@functools.lru_cache(maxsize=256)
def _mapped(path: str, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype, mode='r')


def folder(tokens_dir: str, name: str, about: Mapping[str, Any]) -> str:
    """Returns the folder for rows of this kind: any difference in `about` gives another folder.

    Raises:
      UserError: it is in a bucket, whose files cannot be mapped.
    """
    if '://' in tokens_dir:
        raise UserError(f"TOKENS_DIR = '{tokens_dir}': name a local or mounted folder")
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    return os.path.abspath(os.path.join(tokens_dir, re.sub(r'[^\w.-]', '_', name) + f'-{digest}'))


def log_files_used(folder: str) -> None:
    """Log which files a run reads, since changes of the original data are not detected."""
    about = json_files.read(pathlib.Path(folder, 'about.json'), _ABOUT, f'delete {folder}')
    logging.getLogger('perl_jax').info(
        f"{about['task']} ({about['split']}): {about['rows']:,} rows as they were on {about['written'][:10]}; "
        f'if the data has changed since, delete {folder}'
    )


def check(folder: str, features: Sequence[str]) -> None:
    """Check that the files are as long as about.json and their ends say.

    Args:
      folder: of the files.
      features: the names of the token features.

    Raises:
      UserError: a file is missing, or has another size.
    """
    remedy = f'delete {folder}, and the next run writes it again'
    row_count = json_files.read(pathlib.Path(folder, 'about.json'), _ABOUT, remedy)['rows']
    for name in (*features, 'examples'):
        data_name, item_size = (f'{name}.bytes', 1) if name == 'examples' else (f'{name}.tokens', 4)
        _check_size(pathlib.Path(folder, f'{name}.ends'), 8 * (row_count + 1), remedy)
        last_end = int(np.fromfile(os.path.join(folder, f'{name}.ends'), np.int64)[-1])
        _check_size(pathlib.Path(folder, data_name), item_size * last_end, remedy)
    for path in pathlib.Path(folder).glob('*.values'):
        _check_size(path, 4 * row_count, remedy)


def _check_size(path: pathlib.Path, size: int, remedy: str) -> None:
    actual_size = path.stat().st_size if path.exists() else 0
    if actual_size != size:
        raise UserError(f'{path}: damaged, {actual_size} bytes in place of {size}; {remedy}')


def _restored(example: bytes, path: str) -> Example:
    """Returns an example of `examples.bytes`."""
    try:
        restore: Any = serialization.msgpack_restore
        return restore(example)
    except (ValueError, TypeError, KeyError) as error:  # msgpack's own errors are ValueErrors
        folder = os.path.dirname(path)
        raise UserError(f'{path}: damaged; delete {folder}, and the next run writes it again') from error


def write(
    folder: str, rows: Iterable[tuple[Mapping[str, Any], Example]], features: Sequence[str], about: Mapping[str, Any]
) -> None:
    """Write the files, in memory that does not grow with the number of rows.

    If another process finishes first, its folder stays.

    Args:
      folder: to write.
      rows: for each row its features (int [n] tokens, and a number for thumbs and weighted pairs) and its example.
      features: the names of the token features.
      about: the contents of about.json, with `kind`, `task` and `split`.
    """
    draft_folder = pathlib.Path(f'{folder}.{socket.gethostname()}.{os.getpid()}.tmp')
    shutil.rmtree(draft_folder, ignore_errors=True)
    draft_folder.mkdir(parents=True)
    start_time, numbers, number_name = time.perf_counter(), array.array('f'), NUMBER_FIELDS.get(about['kind'])
    ends = {name: array.array('q', [0]) for name in (*features, 'examples')}
    try:
        with contextlib.ExitStack() as stack:
            open_file = lambda name: stack.enter_context((draft_folder / name).open('wb'))  # noqa: E731
            tokens, examples = {name: open_file(f'{name}.tokens') for name in features}, open_file('examples.bytes')
            for row, example in rows:
                for name, file in tokens.items():
                    file.write(np.asarray(row[name], np.int32).tobytes())
                    ends[name].append(ends[name][-1] + len(row[name]))
                packed_example = serialization.msgpack_serialize(example)
                examples.write(packed_example)
                ends['examples'].append(ends['examples'][-1] + len(packed_example))
                if number_name is not None and number_name in row:
                    numbers.append(float(row[number_name]))
        for name, values in ends.items():
            (draft_folder / f'{name}.ends').write_bytes(values.tobytes())
        if numbers:
            values = np.array(numbers)
            values = pair_weights.normalized(values, about['task']) if number_name == pair_weights.FIELD else values
            (draft_folder / f'{number_name}.values').write_bytes(values.tobytes())
        row_count, seconds = len(ends['examples']) - 1, round(time.perf_counter() - start_time, 1)
        written_at = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
        metadata = {**about, 'rows': row_count, 'written': written_at, 'seconds': seconds}
        (draft_folder / 'about.json').write_text(json.dumps(metadata, indent=2) + '\n')
        with contextlib.suppress(OSError):  # another process finished first
            os.rename(draft_folder, folder)
        logging.getLogger('perl_jax').info(f'wrote {row_count:,} rows of tokens to {folder} in {seconds} s')
    finally:
        shutil.rmtree(draft_folder, ignore_errors=True)
