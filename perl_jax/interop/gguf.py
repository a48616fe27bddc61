"""Read a Llama from a GGUF file (llama.cpp's format), dequantized slice by slice, under this library's parameter names.

    token_embd.weight           -> token_embedder/embedding                         [V, D]
    blk.I.attn_norm.weight      -> decoder/layers/pre_self_attention_layer_norm     [L, D]
    blk.I.attn_{q,k,v}.weight   -> decoder/layers/self_attention/{query,key,value}  [L, D, heads E]
    blk.I.attn_output.weight    -> decoder/layers/self_attention/out                [L, H E, D]
    blk.I.ffn_norm.weight       -> decoder/layers/pre_mlp_layer_norm                [L, D]
    blk.I.ffn_{gate,up}.weight  -> decoder/layers/mlp/{wi_0,wi_1}                   [L, D, F]
    blk.I.ffn_down.weight       -> decoder/layers/mlp/wo                            [L, F, D]
    output_norm.weight          -> decoder/decoder_norm                             [D]
    output.weight               -> decoder/logits_dense                             [D, V]; absent when tied

GGUF keeps a kernel as [out, in]. For the architecture llama it also keeps the rows of q and k in the order of the
interleaved RoPE, in which the dimensions 2i and 2i + 1 turn together; here i and i + E/2 do (`split_halves`).
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import traverse_util

from perl_jax.errors import UserError
from perl_jax.interop import gguf_keys
from perl_jax.interop.paths import resolve
from perl_jax.parallel.leaves import Index, Leaf, Stacked, Transposed, rows_at_once, to_host

if TYPE_CHECKING:
    from perl_jax.models.decoder import DecoderConfig

_LAYER = {
    'attn_norm': ('pre_self_attention_layer_norm', 'scale'),
    'attn_q': ('self_attention', 'query', 'kernel'),
    'attn_k': ('self_attention', 'key', 'kernel'),
    'attn_v': ('self_attention', 'value', 'kernel'),
    'attn_output': ('self_attention', 'out', 'kernel'),
    'ffn_norm': ('pre_mlp_layer_norm', 'scale'),
    'ffn_gate': ('mlp', 'wi_0', 'kernel'),
    'ffn_up': ('mlp', 'wi_1', 'kernel'),
    'ffn_down': ('mlp', 'wo', 'kernel'),
}
_TOP = {
    'token_embd': ('token_embedder', 'embedding'),
    'output_norm': ('decoder', 'decoder_norm', 'scale'),
    'output': ('decoder', 'logits_dense', 'kernel'),
}
_ABSENT = object()


def split_halves(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a q or k kernel [heads E, in] from interleaved RoPE (0 1 2 3) to half-split (0 2 1 3)."""
    out, width = kernel.shape
    return kernel.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The file's key-value pairs as plain Python values (`tokenizer.ggml.tokens` is a list of 49,152 strings...)."""
    return _open(path)[0]


def config(path: str | os.PathLike) -> DecoderConfig:
    """The sizes of the model in the file.

    Raises:
      UserError: not a GGUF file, a truncated one, or a model that is not a plain Llama.
    """
    from perl_jax.models.decoder import DecoderConfig

    fields, tensors = _open(path)
    get = functools.partial(_get, path, fields)
    if (arch := get('general.architecture')) != 'llama':
        raise UserError(f'{path}: the architecture is {arch!r}, and only llama can be read from GGUF')
    gguf_keys.check(path, fields)
    size = functools.partial(_size, path, fields)
    dim, heads = size('llama.embedding_length'), size('llama.attention.head_count')
    head_dim = size('llama.attention.key_length', dim // heads)
    for key in ('llama.attention.value_length', 'llama.rope.dimension_count'):
        if (value := get(key, head_dim)) != head_dim:
            raise UserError(f'{path}: {key} is {value}, and only the head dimension, {head_dim}, can be read')
    if 'token_embd.weight' not in tensors:
        raise UserError(f'{path}: the tensor token_embd.weight is missing')
    theta, divisors = _shortest(get('llama.rope.freq_base', 1e4)), tensors.get(gguf_keys.ROPE_FREQS)
    divisors = None if divisors is None else np.asarray(divisors.data, np.float32).reshape(-1)
    sizes: dict[str, Any] = dict(
        vocab_size=int(tensors['token_embd.weight'].shape[-1]),
        num_layers=size('llama.block_count'),
        emb_dim=dim,
        num_heads=heads,
        num_kv_heads=size('llama.attention.head_count_kv', heads),
        head_dim=head_dim,
        mlp_dim=size('llama.feed_forward_length'),
        rope_theta=theta,
        rope_scaling=gguf_keys.rope_scaling(path, fields, divisors, head_dim, theta),
        norm_epsilon=_shortest(get('llama.attention.layer_norm_rms_epsilon')),
        logits_via_embedding='output.weight' not in tensors,
    )
    try:
        return DecoderConfig(**sizes)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None


def load(path: str | os.PathLike, dtype: Any = np.float32) -> dict[str, Any]:
    """All weights as `leaves` finds them, on the host: NumPy arrays of `dtype`."""
    return to_host(leaves(path), dtype)


def leaves(path: str | os.PathLike) -> dict[str, Any]:
    """Find all weights, as a nested dict of leaves.Leaf in the shapes that stand above; none is dequantized yet.

    Raises:
      UserError: as `config`, or a tensor is missing, unknown, of a wrong shape or of a type that cannot be read.
    """
    c, tensors = config(path), _open(path)[1]
    shapes = _shapes(c)
    if missing := shapes.keys() - tensors.keys():
        raise UserError(f'{path}: the tensor {min(missing)} is missing ({len(missing)} in all); take a whole file')
    if extra := tensors.keys() - shapes.keys() - {gguf_keys.ROPE_FREQS}:
        raise UserError(f'{path}: the tensor {min(extra)} ({len(extra)} in all) has no place in a plain Llama')
    apart: dict[tuple[str, ...], list[Leaf]] = {}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if (actual := tuple(int(n) for n in reversed(tensor.shape))) != shape:
            raise UserError(f'{path}: {name} is {list(actual)}, and {list(shape)} by the metadata; take a whole file')
        try:
            _dequantize(np.zeros((1, _block(tensor)[1]), np.uint8), tensor)
        except NotImplementedError as e:
            raise UserError(f'{path}: {name} is quantized as {tensor.tensor_type.name}, which cannot be read') from e
        prefix, _, rest = name.removesuffix('.weight').rpartition('.')
        heads = {'attn_q': c.num_heads, 'attn_k': c.num_kv_heads}.get(rest)
        place = ('decoder', 'layers', *_LAYER[rest]) if prefix else _TOP[rest]
        read = _Tensor(tensor, shape, heads)
        apart.setdefault(place, []).append(Transposed(read) if place[-1] == 'kernel' else read)
    tree = {place: Stacked(each) if 'layers' in place else each[0] for place, each in apart.items()}
    return traverse_util.unflatten_dict(tree)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the file (leaves.Leaf), [n] or [out, in], dequantized by rows and by the blocks along a row.

    heads: of q and k, whose rows lie in the order of the interleaved RoPE.
    """

    tensor: Any
    shape: tuple[int, ...]
    heads: int | None = None

    def read_into(self, out: np.ndarray, index: Index) -> None:
        if len(self.shape) == 1:
            _Tensor(self.tensor, (1, *self.shape)).read_into(out[None], (slice(0, 1), *index))
            return
        rows, columns = np.arange(self.shape[0]), index[1]
        if self.heads is not None:
            rows = split_halves(rows[:, None], self.heads)[:, 0]
        rows = rows[index[0]]
        block, size = _block(self.tensor)
        first, last = columns.start // block, -(-columns.stop // block)
        data = self.tensor.data.view(np.uint8).reshape(self.shape[0], -1)[:, first * size : last * size]
        inside = slice(columns.start - first * block, columns.stop - first * block)
        step = rows_at_once((last - first) * block, 4)
        for start in range(0, len(rows), step):
            chunk = slice(start, start + step)
            out[chunk] = _dequantize(data[rows[chunk]], self.tensor)[:, inside]


def _block(tensor: Any) -> tuple[int, int]:
    """How many numbers are quantized together, and in how many bytes."""
    from gguf import GGML_QUANT_SIZES

    return GGML_QUANT_SIZES[tensor.tensor_type]


def _dequantize(rows: np.ndarray, tensor: Any) -> np.ndarray:
    """Rows of whole blocks, uint8, as float32."""
    from gguf import dequantize

    return dequantize(rows, tensor.tensor_type)


def _shapes(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the file must hold, and the shape that the configuration gives it."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    D, F, V = c.emb_dim, c.mlp_dim, c.vocab_size
    layer = {
        'attn_norm': (D,),
        'attn_q': (q, D),
        'attn_k': (kv, D),
        'attn_v': (kv, D),
        'attn_output': (D, q),
        'ffn_norm': (D,),
        'ffn_gate': (F, D),
        'ffn_up': (F, D),
        'ffn_down': (D, F),
    }
    top = {'token_embd': (V, D), 'output_norm': (D,)}
    if not c.logits_via_embedding:
        top['output'] = (V, D)
    blocks = {f'blk.{i}.{k}.weight': s for i in range(c.num_layers) for k, s in layer.items()}
    return {f'{k}.weight': s for k, s in top.items()} | blocks


def _open(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata and the tensors (memory-mapped, still quantized) of a file."""
    resolved = resolve(path)
    stat = resolved.stat()
    try:
        return _read(resolved, stat.st_mtime_ns, stat.st_size)
    # What GGUFReader raises at bytes that are not what it expects: it checks little and indexes much.
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, OSError) as e:
        raise UserError(f'{path}: not a whole GGUF file ({e}); download it again') from e


# Config, weights and tokenizer each ask for the same file, whose 100,000 strings take the reader seconds.
@functools.lru_cache(maxsize=2)
def _read(path: pathlib.Path, mtime_ns: int, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    del mtime_ns, size  # they only tell the cache when a file has changed
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise UserError(f'{path}: reading GGUF needs the gguf package; pip install gguf') from e
    with path.open('rb') as f:
        if (magic := f.read(4)) != b'GGUF':
            raise ValueError(f'it opens with {magic!r}')
    reader = GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def _get(path: Any, fields: dict[str, Any], key: str, default: Any = _ABSENT) -> Any:
    if (value := fields.get(key, default)) is _ABSENT:
        raise UserError(f'{path}: the metadata has no {key}')
    if isinstance(value, list):
        raise UserError(f'{path}: {key} differs from layer to layer, which cannot be read')
    return value


def _size(path: Any, fields: dict[str, Any], key: str, default: Any = _ABSENT) -> int:
    value = _get(path, fields, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f'{path}: {key} = {value!r}: it must be a whole number of at least 1')
    return value


def _shortest(value: float) -> float:
    """1e-05, which the file keeps in float32, and not the 9.999999747378752e-06 that it becomes as a double."""
    return float(str(np.float32(value)))
