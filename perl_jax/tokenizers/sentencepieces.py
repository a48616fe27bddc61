"""SeqIO's sentencepiece vocabulary, with the added tokens and EOS tokens of a model's metadata files."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import seqio
import tensorflow as tf

from perl_jax.errors import UserError
from perl_jax.tokenizers import in_graph, sentencepiece_tokens, token_ids
from perl_jax.tokenizers.chat import controls


class SentencepieceVocabulary(seqio.SentencePieceVocabulary):
    """A sentencepiece vocabulary with its metadata files' added tokens, a template's control tokens, and every EOS.

    User-defined pieces (Gemma's <start_of_turn>) are found anywhere in a text, unless the metadata files declare them
    special: sentencepiece cannot tell who wrote them. A tokenizer.json of the same model can (tokenizers.py).
    """

    @property
    def bos_id(self) -> int:
        """The token that prompts begin with; -1 if there is none, or tokenizer_config.json turns it off."""
        return self._tokens.bos_id

    @property
    def eos_id(self) -> int:
        """The token that ends a sequence; the metadata files take precedence over the model."""
        return self._tokens.eos_ids[0]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer, `eos_id` first."""
        return self._tokens.eos_ids

    @property
    def reachable_size(self) -> int:
        """One more than the largest id that a text, BOS or EOS can become: the least size of an embedding."""
        return self._tokens.reachable_size

    @property
    def reads_marks(self) -> bool:
        """Whether control tokens are those that controls.py marks: if the metadata files have templates or tokens."""
        return self._tokens.has_templates or bool(self._tokens.names)

    def spelled(self, text: str) -> str | None:
        """Returns a control token whose name the text contains, or None; it is read as text."""
        return next((token for token in self._tokens.spelled if token in text), None)

    def piece(self, i: int) -> str:
        """Returns the text of an id."""
        return self._tokens.names.get(i) or self.tokenizer.id_to_piece(i)

    @property
    def continuing(self) -> SentencepieceVocabulary:
        """This vocabulary for texts that continue others: no space is added in front, if the model adds one.

        Llama 2 then reads 'Answer: ' and 'Paris' as it reads both in one text. T5's answers begin a new sequence
        and keep the space; a T5 is recognized by having no BOS.
        """
        return self if self.tokenizer.bos_id() < 0 else self._spaceless

    @property
    def _spaceless(self) -> SentencepieceVocabulary:
        """This vocabulary without the space in front."""
        is_without_space = self._normalizer_spec_overrides is not None
        return (
            self if is_without_space else _without_leading_space(self.sentencepiece_model_file, self._extra_ids) or self
        )

    @property
    def _tokens(self) -> sentencepiece_tokens.SentencepieceTokens:
        return sentencepiece_tokens.read(self.sentencepiece_model_file)

    @property
    def _base_vocab_size(self) -> int:
        return self._tokens.size

    def _encode(self, s: str | bytes) -> list[int]:
        """Returns the ids of control tokens that are marked and of added tokens; sentencepiece encodes the rest."""
        text = s.decode('utf-8', 'replace') if isinstance(s, bytes) else controls.marked(s)
        tokens, continues = self._tokens, self._normalizer_spec_overrides is not None
        bos_token = '' if continues or tokens.bos_id < 0 else self.piece(tokens.bos_id)
        if bos_token and text.startswith(bos_token):  # a run adds the same token
            text = controls.mark(bos_token) + text[len(bos_token) :]
        ids, position = [], 0
        for match in tokens.pattern.finditer(text):
            token = match['marked'] or match['typed']
            strips_left, strips_right = tokens.strips.get(token, (False, False))
            text_between = text[position : match.start()]
            ids += self._encode_text(text_between.rstrip() if strips_left else text_between, position == 0)
            position = match.end()
            if match['marked']:
                ids.append(self._control_id(token))
            elif token in tokens.typed:
                ids.append(tokens.typed[token])
            else:  # the name of a control token in plain text
                ids += [i for piece in (token[0], token[1:]) for i in self._spaceless.tokenizer.EncodeAsIds(piece)]
            while strips_right and text[position : position + 1].isspace():
                position += 1
        return ids + self._encode_text(text[position:], position == 0)

    def _encode_text(self, text: str, adds_space: bool) -> list[int]:
        """Returns the ids of a text without tokens; behind a token it gets no space in front, as in transformers."""
        adds_space = adds_space or (self._tokens.adds_space_after_tokens and not text.startswith(' '))
        return list((self if adds_space else self._spaceless).tokenizer.EncodeAsIds(text)) if text else []

    def _control_id(self, token: str) -> int:
        if token not in self._tokens.control:
            raise UserError(
                f'{self.sentencepiece_model_file}: a chat format adds {token!r}, which this vocabulary lacks; '
                'use the format that the model was trained with'
            )
        return self._tokens.control[token]

    def _decode(self, ids: Sequence[int]) -> str:
        ids = [int(i) for i in ids]
        ids = ids[: next((position for position, i in enumerate(ids) if i in self.eos_ids), None)]
        names = self._tokens.names
        text, pending_ids, model = '', [], self.tokenizer
        for i in [*ids, None]:
            if i is not None and i not in names:
                pending_ids.append(i)
                continue
            text += model.DecodeIds(pending_ids) if pending_ids else ''
            text += '' if i is None else names[i]
            pending_ids, model = [], self._spaceless.tokenizer
        return text

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        return in_graph.encode(self._encode, s)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return in_graph.decode(self._decode, ids)


@functools.lru_cache(maxsize=16)
def _without_leading_space(file: str, extra_ids: int) -> SentencepieceVocabulary | None:
    """Returns the vocabulary that adds no space in front of a text; None if the model adds none."""
    vocabulary = SentencepieceVocabulary(file, extra_ids)
    normalizer = token_ids.model_proto(vocabulary.sp_model or b'').normalizer_spec
    if not normalizer.add_dummy_prefix:
        return None
    normalizer_spec = type(normalizer)(add_dummy_prefix=False)
    return SentencepieceVocabulary(file, extra_ids, normalizer_spec_overrides=normalizer_spec)
