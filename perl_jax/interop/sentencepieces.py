"""SeqIO's sentencepiece vocabulary, with what a model's other files say of its answers."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import seqio
from sentencepiece import sentencepiece_model_pb2

from perl_jax.interop import tokenizer_files


class SentencepieceVocabulary(seqio.SentencePieceVocabulary):
    """Ends answers with every EOS of generation_config.json and config.json too, and reads answers as going on.

    User-defined pieces (Gemma's <start_of_turn>) are found wherever they stand in a text: sentencepiece cannot tell who
    wrote them. A tokenizer.json of the same model can (tokenizers.py).
    """

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer, `eos_id` first."""
        return tuple(dict.fromkeys([self.eos_id, *_ends(self.sentencepiece_model_file)]))

    def _decode(self, ids: Sequence[int]) -> str:
        ends = [n for n, i in enumerate(ids) if i in self.eos_ids]
        return super()._decode(ids[: ends[0]] if ends else ids)

    @property
    def continuing(self) -> SentencepieceVocabulary:
        """This vocabulary for texts that go on from others: no space is put in front, where the model puts one.

        Llama 2 reads 'Answer: ' and 'Paris' as it reads both in one text. T5's answers begin a sequence of their own
        and keep the space; a T5 is told by having no BOS.
        """
        if self.bos_id is None or self.bos_id < 0 or not _model(self).normalizer_spec.add_dummy_prefix:
            return self
        spec = sentencepiece_model_pb2.NormalizerSpec(add_dummy_prefix=False)
        return type(self)(self.sentencepiece_model_file, self._extra_ids, normalizer_spec_overrides=spec)


@functools.lru_cache(maxsize=8)
def _ends(file: str) -> tuple[int, ...]:
    return tokenizer_files.beside(pathlib.Path(file)).ends


def _model(vocabulary: seqio.SentencePieceVocabulary) -> Any:
    return sentencepiece_model_pb2.ModelProto.FromString(vocabulary.sp_model)
