"""SeqIO's sentencepiece vocabulary, with what a model's other files say of its tokens and answers."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import seqio
import tensorflow as tf

from perl_jax.errors import UserError
from perl_jax.tokenizers import in_graph, sentencepiece_tokens, token_ids
from perl_jax.tokenizers.chat import controls


class SentencepieceVocabulary(seqio.SentencePieceVocabulary):
    """Has the tokens that stand beside the model, a template's control tokens among them, and every EOS.

    User-defined pieces (Gemma's <start_of_turn>) are found wherever they stand in a text, unless the files beside call
    them special: sentencepiece cannot tell who wrote them. A tokenizer.json of the same model can (tokenizers.py).
    """

    @property
    def bos_id(self) -> int:
        """The token that prompts begin with; -1 where there is none, or tokenizer_config.json wants none."""
        return self._tokens.bos_id

    @property
    def eos_id(self) -> int:
        """The token that ends a sequence: what the files beside name counts more than the model."""
        return self._tokens.eos_ids[0]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer, `eos_id` first."""
        return self._tokens.eos_ids

    @property
    def reachable_size(self) -> int:
        """One more than the largest id that a text, its BOS or an EOS can become: what an embedding has to have."""
        return self._tokens.reachable_size

    @property
    def reads_marks(self) -> bool:
        """Whether control tokens are those that controls.py marks: where the files beside have templates or tokens."""
        return self._tokens.has_templates or bool(self._tokens.names)

    def spelled(self, text: str) -> str | None:
        """A control token that a text spells, if it does; it is not read as one."""
        return next((token for token in self._tokens.spelled if token in text), None)

    def piece(self, i: int) -> str:
        """The text of an id."""
        return self._tokens.names.get(i) or self.tokenizer.id_to_piece(i)

    @property
    def continuing(self) -> SentencepieceVocabulary:
        """This vocabulary for texts that go on from others: no space is put in front, where the model puts one.

        Llama 2 reads 'Answer: ' and 'Paris' as it reads both in one text. T5's answers begin a sequence of their own
        and keep the space; a T5 is told by having no BOS.
        """
        return self if self.tokenizer.bos_id() < 0 else self._inside

    @property
    def _inside(self) -> SentencepieceVocabulary:
        """This vocabulary without the space in front."""
        plain = self._normalizer_spec_overrides is not None
        return self if plain else _without_space(self.sentencepiece_model_file, self._extra_ids) or self

    @property
    def _tokens(self) -> sentencepiece_tokens.Tokens:
        return sentencepiece_tokens.read(self.sentencepiece_model_file)

    @property
    def _base_vocab_size(self) -> int:
        return self._tokens.size

    def _encode(self, s: str | bytes) -> list[int]:
        """Control tokens where they are marked, added ones where they stand; sentencepiece reads what is between."""
        text = s.decode('utf-8', 'replace') if isinstance(s, bytes) else controls.marked(s)
        tokens, goes_on = self._tokens, self._normalizer_spec_overrides is not None
        bos = '' if goes_on or tokens.bos_id < 0 else self.piece(tokens.bos_id)
        if bos and text.startswith(bos):  # the one that a run would put there anyway
            text = controls.mark(bos) + text[len(bos) :]
        ids, place = [], 0
        for each in tokens.pattern.finditer(text):
            token = each['marked'] or each['typed']
            before, behind = tokens.strips.get(token, (False, False))
            between = text[place : each.start()]
            ids += self._between(between.rstrip() if before else between, place == 0)
            place = each.end()
            if each['marked']:
                ids.append(self._control(token))
            elif token in tokens.typed:
                ids.append(tokens.typed[token])
            else:  # a control token that somebody typed
                ids += [i for part in (token[0], token[1:]) for i in self._inside.tokenizer.EncodeAsIds(part)]
            while behind and text[place : place + 1].isspace():
                place += 1
        return ids + self._between(text[place:], place == 0)

    def _between(self, text: str, begins: bool) -> list[int]:
        """The ids of a text without tokens; behind a token it gets no space in front, as in transformers."""
        begins = begins or (self._tokens.each_begins and not text.startswith(' '))
        return list((self if begins else self._inside).tokenizer.EncodeAsIds(text)) if text else []

    def _control(self, token: str) -> int:
        if token not in self._tokens.control:
            raise UserError(
                f'{self.sentencepiece_model_file}: a chat format puts in {token!r}, which is no token of it; '
                'use the format that the model was trained with'
            )
        return self._tokens.control[token]

    def _decode(self, ids: Sequence[int]) -> str:
        ids = [int(i) for i in ids]
        ids = ids[: next((n for n, i in enumerate(ids) if i in self.eos_ids), None)]
        names = self._tokens.names
        text, run, model = '', [], self.tokenizer
        for i in [*ids, None]:
            if i is not None and i not in names:
                run.append(i)
                continue
            text += model.DecodeIds(run) if run else ''
            text += '' if i is None else names[i]
            run, model = [], self._inside.tokenizer
        return text

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        return in_graph.encode(self._encode, s)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return in_graph.decode(self._decode, ids)


@functools.lru_cache(maxsize=16)
def _without_space(file: str, extra_ids: int) -> SentencepieceVocabulary | None:
    """The vocabulary that puts no space in front of a text; None where the model itself puts none."""
    whole = SentencepieceVocabulary(file, extra_ids)
    normalizer = token_ids.model_proto(whole.sp_model or b'').normalizer_spec
    if not normalizer.add_dummy_prefix:
        return None
    spec = type(normalizer)(add_dummy_prefix=False)
    return SentencepieceVocabulary(file, extra_ids, normalizer_spec_overrides=spec)
