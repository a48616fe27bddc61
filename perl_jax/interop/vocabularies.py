"""Whatever kind of file a tokenizer lies in, a SeqIO vocabulary: what VOCABULARY = 'PATH' means in a gin file."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from perl_jax.errors import UserError
from perl_jax.interop import hf
from perl_jax.interop.paths import resolve

if TYPE_CHECKING:
    import seqio

_IN_A_FOLDER = ('tokenizer.json', '*.model', '*.gguf')  # the first that is there
_EXTRA_IDS = 100  # T5's sentinels


def vocabulary(path: str) -> seqio.Vocabulary:
    """The vocabulary that a path names.

        byt5           bytes, as ByT5 has them
        X.model        sentencepiece (T5, mT5, Llama 2, Gemma), ending sequences with its own </s> or <eos>
        X.json X.gguf  TokenizersVocabulary, whose `eos` can also be chosen: see there
        a folder       the tokenizer in it, as Hugging Face lays models out; hf://OWNER/NAME likewise

    A sentencepiece model of T5's kind (padding 0, no BOS) that has no sentinels gets the 100 that T5 puts behind it.

    Raises:
      UserError: a folder without a tokenizer, or a file that is no sentencepiece model. What is wrong with a
        tokenizer.json or a GGUF file is said at first use.
    """
    if path == 'byt5':
        import seqio

        return seqio.ByteVocabulary()
    folder = hf.resolve(path) if path.startswith(hf.HUB) else pathlib.Path(path).expanduser()
    if folder.is_dir():
        found = [file for pattern in _IN_A_FOLDER for file in sorted(folder.glob(pattern))]
        if not found:
            raise UserError(f'{path}: there is no tokenizer in this folder ({", ".join(_IN_A_FOLDER)}); name its file')
        path = str(found[0])
    if path.endswith('.model'):
        return _sentencepiece(path)
    from perl_jax.interop.tokenizers import TokenizersVocabulary

    return TokenizersVocabulary(path)


def of_base(path: str) -> str | None:
    """The name of the tokenizer that a base's weights bring: a Hugging Face folder's or a .gguf's own, else None."""
    if path.endswith('.gguf') or path.startswith(hf.HUB):
        return path
    folder = pathlib.Path(path).expanduser()
    return path if hf.is_checkpoint(path) and any(any(folder.glob(pattern)) for pattern in _IN_A_FOLDER) else None


def _sentencepiece(path: str) -> seqio.SentencePieceVocabulary:
    import sentencepiece

    found = str(resolve(path))
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=found)
    except RuntimeError as e:
        raise UserError(f'{path}: not a sentencepiece model that can be read ({e})') from e
    lacks = model.pad_id() == 0 and model.bos_id() < 0 and model.piece_to_id('▁<extra_id_0>') == model.unk_id()
    from perl_jax.interop.sentencepieces import SentencepieceVocabulary

    return SentencepieceVocabulary(found, extra_ids=_EXTRA_IDS if lacks else 0)
