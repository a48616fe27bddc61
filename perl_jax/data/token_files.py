"""A task's rows as flat files of tokens, which are mapped and not loaded: for data sets larger than memory.

    about.json                       what they were made of, how many rows, when and in how long
    inputs.tokens, inputs.ends       int32, all prompts one behind the other; int64 [N + 1], where each begins and ends
    chosen.tokens ..                 likewise, for each response of the kind
    label.values, weight.values      float32 [N], of thumbs, and of pairs that have one (pair_weights.py: scaled)
    examples.bytes, examples.ends    each row's texts and other fields, as msgpack

The folder is written once, whole or not at all. A batch then reads its own rows, wherever they lie, and nothing else.
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

from perl_jax import types
from perl_jax.data import pair_weights
from perl_jax.data.streams import Example
from perl_jax.errors import UserError

NUMBERS = {'thumbs': 'label', 'pairs': pair_weights.FIELD}  # what a kind has beside tokens


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """Rows that lie on disk, to be read by a Stream as a Dataset's are.

    `widths` is {'inputs': P, 'targets': R}; `responses` names the features that become the K rows of targets.
    """

    folder: str
    kind: str
    responses: Sequence[str]
    widths: Mapping[str, int]
    vocabulary: Any
    eos_ids: tuple[int, ...]
    ones: bool = False

    def __len__(self) -> int:
        return len(self._ends('inputs')) - 1

    @property
    def eos_id(self) -> int:
        """The token that training targets end with."""
        return self.eos_ids[0]

    @functools.cached_property
    def longest(self) -> dict[str, np.ndarray]:
        """The real tokens of each row's prompt, and of its longest response: see bucketing.py."""
        return self._lengths(np.maximum.reduce)

    @functools.cached_property
    def real(self) -> dict[str, np.ndarray]:
        """The real tokens of each row's prompt, and of all of its responses."""
        return self._lengths(np.add.reduce)

    @property
    def is_weighted(self) -> bool:
        """Whether the rows are pairs that do not all count alike."""
        return self.kind == 'pairs' and (self.ones or os.path.exists(self._path('weight.values')))

    def weighted(self) -> TokenFiles:
        """With the weights of its pairs, which are 1 where they have none."""
        return self if self.is_weighted else dataclasses.replace(self, ones=True)

    @property
    def K(self) -> int:
        """Responses to a prompt."""
        return len(self.responses)

    def rows(self, index: np.ndarray) -> tuple[Any, list[Example]]:
        """The batch (types.py) of these rows, and their examples."""
        tokens, mask = self._padded('inputs', index, self.widths['inputs'])
        arrays: dict[str, Any] = {'inputs': tokens, 'inputs_mask': mask}
        if self.responses:
            tokens, masks = zip(*(self._padded(name, index, self.widths['targets']) for name in self.responses))
            arrays |= {'targets': np.stack(tokens, axis=1), 'targets_mask': np.stack(masks, axis=1)}
        kind = types.Responses if self.responses else types.Prompts
        if self.kind == 'thumbs':
            kind, arrays['labels'] = types.Thumbs, self._map('label.values', np.float32)[index][:, None]
        if self.is_weighted:
            kind, arrays['weights'] = types.WeightedPairs, self._weights(index)
        examples, ends = self._map('examples.bytes', np.uint8), self._ends('examples')
        read: Any = serialization.msgpack_restore
        return kind(**arrays), [read(examples[ends[i] : ends[i + 1]].tobytes()) for i in index]

    def _weights(self, index: np.ndarray) -> np.ndarray:
        if self.ones:
            return np.ones(len(index), np.float32)
        return self._map('weight.values', np.float32)[index]

    def _padded(self, name: str, index: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        flat, ends = self._map(f'{name}.tokens', np.int32), self._ends(name)
        tokens, lengths = np.zeros((len(index), width), np.int32), ends[index + 1] - ends[index]
        for row, start, length in zip(tokens, ends[index], lengths, strict=True):
            row[:length] = flat[start : start + length]
        return tokens, np.arange(width) < lengths[:, None]

    def _lengths(self, of_responses: Any) -> dict[str, np.ndarray]:
        found = {'inputs': np.diff(self._ends('inputs'))}
        if self.responses:
            found['targets'] = of_responses([np.diff(self._ends(name)) for name in self.responses])
        return found

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
    """Where rows of this kind lie, or would: any difference in `about` makes it another place.

    Raises:
      UserError: a bucket, which cannot be mapped.
    """
    if '://' in tokens_dir:
        raise UserError(f"TOKENS_DIR = '{tokens_dir}': name a folder of this machine, or one that is mounted there")
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    return os.path.abspath(os.path.join(tokens_dir, re.sub(r'[^\w.-]', '_', name) + f'-{digest}'))


def announce(folder: str) -> None:
    """Says which files a run reads: they do not know whether the data behind them has changed."""
    about = json.loads(pathlib.Path(folder, 'about.json').read_text())
    logging.getLogger('perl_jax').info(
        f"{about['task']} ({about['split']}): {about['rows']:,} rows as they were on {about['written'][:10]}; "
        f'if the data has changed since, delete {folder}'
    )


def write(
    folder: str, rows: Iterable[tuple[Mapping[str, Any], Example]], features: Sequence[str], about: Mapping[str, Any]
) -> None:
    """Fill `folder`, in memory that does not grow with the rows; another process that was faster is left alone.

    Args:
      rows: of each row its features, tokens int [n] and perhaps its kind's number, and its example.
      features: those with tokens.
      about: what about.json is to say of them; `kind`, `task` and `split` among it.
    """
    draft = pathlib.Path(f'{folder}.{socket.gethostname()}.{os.getpid()}.tmp')
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    clock, numbers, number = time.perf_counter(), array.array('f'), NUMBERS.get(about['kind'])
    ends = {name: array.array('q', [0]) for name in (*features, 'examples')}
    try:
        with contextlib.ExitStack() as stack:
            open_ = lambda name: stack.enter_context((draft / name).open('wb'))  # noqa: E731
            tokens, examples = {name: open_(f'{name}.tokens') for name in features}, open_('examples.bytes')
            for row, example in rows:
                for name, file in tokens.items():
                    file.write(np.asarray(row[name], np.int32).tobytes())
                    ends[name].append(ends[name][-1] + len(row[name]))
                packed = serialization.msgpack_serialize(example)
                examples.write(packed)
                ends['examples'].append(ends['examples'][-1] + len(packed))
                if number is not None and number in row:
                    numbers.append(float(row[number]))
        for name, values in ends.items():
            (draft / f'{name}.ends').write_bytes(values.tobytes())
        if numbers:
            values = np.array(numbers)
            values = pair_weights.scaled(values, about['task']) if number == pair_weights.FIELD else values
            (draft / f'{number}.values').write_bytes(values.tobytes())
        count, seconds = len(ends['examples']) - 1, round(time.perf_counter() - clock, 1)
        written = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
        lines = {**about, 'rows': count, 'written': written, 'seconds': seconds}
        (draft / 'about.json').write_text(json.dumps(lines, indent=2) + '\n')
        with contextlib.suppress(OSError):  # another process has put its own there
            os.rename(draft, folder)
        logging.getLogger('perl_jax').info(f'wrote {count:,} rows of tokens to {folder} in {seconds} s')
    finally:
        shutil.rmtree(draft, ignore_errors=True)
