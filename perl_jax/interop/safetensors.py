"""Tensors of a safetensors checkpoint, slice by slice: a single file, or the shards that an index names.

Read with plain file reads and not through a memory map, so that no page of the file counts as memory of the process;
bfloat16 comes as ml_dtypes' bfloat16, which the package's NumPy reader does not know.
Format: https://github.com/huggingface/safetensors (8 bytes with the header's length, a JSON header, the bytes).
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import ml_dtypes
import numpy as np
from annotated_types import Len

from perl_jax import json_files
from perl_jax.errors import UserError
from perl_jax.parallel import leaves
from perl_jax.settings import Size

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
SHARD_BYTES = 5 * 2**30
_OTHERS = {  # other files of weights: what they are, and what to do
    'adapter_model.*': 'an adapter of PEFT; make a MODEL_DIR of it with `perl_jax import --format=peft`',
    'consolidated*': "in Meta's or Mistral's own layout; take the model's Hugging Face form",
    'model.*.safetensors': f'a variant; rename it to {SINGLE}',
    '*.bin': 'a pickle of PyTorch; load and save the model with transformers (save_pretrained writes safetensors)',
    '*.gguf': 'a GGUF file; name that file itself',
    '*.h5': "TensorFlow's; take the model's safetensors",
    '*.msgpack': "Flax's; take the model's safetensors",
}
_DTYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
}  # fmt: skip
_TENSOR: dict[str, Any] = {  # in a header
    'tensor.dtype': str, 'tensor.shape': Sequence[Size],
    'tensor.data_offsets': Annotated[Sequence[Size], Len(2, 2)],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """The place of a tensor in a file.

    Attributes:
      file: the .safetensors file.
      dtype: as the file names it, such as BF16.
      shape: of the tensor.
      offset: bytes from the file's start to the tensor.
      size: bytes of the tensor.
    """

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def numpy_dtype(self) -> np.dtype:
        """Its dtype in NumPy's words.

        Raises:
          UserError: one that cannot be read, or that does not fit the shape and the bytes.
        """
        if self.dtype not in _DTYPES:
            raise UserError(f'{self.file}: dtype {self.dtype} cannot be read; convert it to BF16 or F32')
        kind = np.dtype(_DTYPES[self.dtype])
        if math.prod(self.shape) * kind.itemsize != self.size:
            raise UserError(f'{self.file}: {self.size} bytes do not hold {list(self.shape)} of {self.dtype}')
        return kind

    def read(self) -> np.ndarray:
        """All of the tensor, in its own dtype."""
        return leaves.read(self, leaves.full_index(self.shape), self.numpy_dtype())

    def equals(self, other: Entry) -> bool:
        """Whether another tensor holds the same numbers, in whatever dtype; both are read a few rows at a time."""
        if self.shape != other.shape:
            return False
        step = leaves.rows_at_once(math.prod(self.shape[1:]), 4)
        for first in range(0, self.shape[0], step):
            index = slice(first, min(first + step, self.shape[0])), *leaves.full_index(self.shape[1:])
            own_block, other_block = (leaves.read(entry, index, np.float32) for entry in (self, other))
            if not np.array_equal(own_block, other_block, equal_nan=True):
                return False
        return True

    def read_into(self, out: np.ndarray, index: leaves.Index) -> None:
        """Fill `out` with the slice at `index` (leaves.Leaf): of a matrix no other column is read, of others no row."""
        if not self.shape:
            dataclasses.replace(self, shape=(1,)).read_into(out[None], (slice(0, 1),))
            return
        rows, *rest = index
        matrix = len(self.shape) == 2
        inside = (slice(None), *([slice(None)] if matrix else rest))  # what is left to be cut from rows that are read
        across = rest[0] if matrix else slice(0, math.prod(self.shape[1:]))
        width, kind = across.stop - across.start, self.numpy_dtype()
        step = leaves.rows_at_once(width, kind.itemsize)
        buffer = np.empty((min(step, rows.stop - rows.start), width), kind)
        with self.file.open('rb', buffering=0) as file:
            for first in range(rows.start, rows.stop, step):
                block = buffer[: min(step, rows.stop - first)]
                self._fill(file, block, first, across.start)
                shaped = block if matrix else block.reshape(len(block), *self.shape[1:])
                # Cast first: NumPy casts strided numbers three times as slowly.
                out[first - rows.start :][: len(block)] = shaped[inside].astype(out.dtype, copy=False)

    def _fill(self, file: io.FileIO, block: np.ndarray, row: int, column: int) -> None:
        """Read rows from `row` on, from `column` on."""
        stride, itemsize = math.prod(self.shape[1:]), block.itemsize
        runs = block if block.shape[1] < stride else [block.reshape(-1)]  # whole rows lie behind each other
        for i, run in enumerate(runs):
            file.seek(self.offset + ((row + i) * stride + column) * itemsize)
            left = memoryview(run.view(np.uint8).data)
            while left:
                if not (got := file.readinto(left)):
                    raise UserError(f'{self.file}: truncated since it was opened; download it again')
                left = left[got:]


def entries(folder: str | os.PathLike) -> dict[str, Entry]:
    """Every tensor of the checkpoint in a folder, by name; only headers are read.

    Raises:
      UserError: no safetensors, a shard that is missing, or a file that is truncated or no safetensors file.
    """
    folder = pathlib.Path(folder)
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # as transformers has it: an index beside it is stale
        return header(folder / SINGLE)
    if not index.is_file():
        raise UserError(f'{folder}: neither {SINGLE} nor {INDEX}; {_instead(folder)}')
    where = json_files.read(index, {'weight_map': Mapping[str, str]})['weight_map']
    if away := [file for file in where.values() if os.path.basename(file) != file]:
        raise UserError(f'{index}: weight_map names {away[0]}, which is not beside it; download it again')
    entries = {name: e for file in sorted(set(where.values())) for name, e in header(folder / file).items()}
    if lacking := where.keys() - entries.keys():
        raise UserError(f'{folder / where[min(lacking)]}: lacks tensor {min(lacking)}, which {INDEX} says is in it')
    return entries


def _instead(folder: pathlib.Path) -> str:
    """What there is in place of the weights, and what to do with it."""
    for pattern, advice in _OTHERS.items():
        if files := sorted(file.name for file in folder.glob(pattern)):
            return f'{files[0]} is {advice}'
    return 'download the safetensors'


def header(file: pathlib.Path) -> dict[str, Entry]:
    """The tensors of one file."""
    if not file.is_file():
        raise UserError(f'{file}: there is no such shard; download it')
    size = file.stat().st_size
    try:
        with file.open('rb') as f:
            length = int.from_bytes(f.read(8), 'little')
            if length > size:
                raise ValueError('its header would be longer than the file')
            table = json_files.loads(f.read(length))
        if not isinstance(table, dict):
            raise ValueError('its header is not an object of JSON')
    except ValueError as error:
        raise UserError(f'{file}: not a safetensors file ({error}); download it again') from error
    entries: dict[str, Entry] = {}
    end = start = 8 + length
    for name, fields in table.items():
        if name != '__metadata__':
            json_files.check({'tensor': fields}, f'{file}: {name}', _TENSOR)
            first, last = fields['data_offsets']
            entries[name] = Entry(file, fields['dtype'], tuple(fields['shape']), start + first, last - first)
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset < end or entry.size < 0:
            raise UserError(f'{file}: tensor {name} overlaps another; download it again')
        if (end := entry.offset + entry.size) > size:
            raise UserError(f'{file}: truncated in tensor {name} ({size:,} bytes); download it again')
    return entries


def save(folder: str | os.PathLike, shapes: Mapping[str, int], read: Callable[[str], np.ndarray]) -> None:
    """Write a checkpoint in shards of at most `SHARD_BYTES`; only one shard is ever held.

    Args:
      shapes: every tensor's name and size in bytes, in the order to write.
      read: gives the tensor.
    """
    from safetensors.numpy import save_file

    folder = pathlib.Path(folder)
    shards = _shards(shapes.items())
    names = [SINGLE] if len(shards) == 1 else [
        f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)
    ]  # fmt: skip
    for file, shard in zip(names, shards):
        save_file({name: np.ascontiguousarray(read(name)) for name in shard}, folder / file, {'format': 'pt'})
    if len(shards) > 1:
        where: dict[str, Any] = {name: file for file, shard in zip(names, shards) for name in shard}
        index = {'metadata': {'total_size': sum(shapes.values())}, 'weight_map': where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n')


def _shards(sizes: Iterable[tuple[str, int]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    pending_bytes = 0
    for name, size in sizes:
        if shards[-1] and pending_bytes + size > SHARD_BYTES:
            shards.append([])
            pending_bytes = 0
        shards[-1].append(name)
        pending_bytes += size
    return shards
