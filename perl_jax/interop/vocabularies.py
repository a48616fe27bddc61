"""Whatever kind of file a tokenizer lies in, a SeqIO vocabulary: what VOCABULARY = 'PATH' means in a gin file."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from perl_jax.errors import UserError
from perl_jax.interop import hf, tokenizer_files
from perl_jax.interop.paths import resolve

if TYPE_CHECKING:
    import seqio

_IN_A_FOLDER = ('tokenizer.json', '*.model', '*.gguf')  # the first that is there
_UNREAD = ('vocab.json', 'merges.txt', 'tekken.json', '*.tiktoken', 'vocab.txt')
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
    folder = hf.resolve(path, weights=False) if path.startswith(hf.HUB) else pathlib.Path(path).expanduser()
    if folder.is_dir():
        files = _files(folder)
        if not files and _is_byt5(folder):
            return vocabulary('byt5')
        if not files:
            raise UserError(f'{path}: there is no tokenizer in this folder ({", ".join(_IN_A_FOLDER)}); name its file')
        path = str(files[0])
    if path.endswith('.model'):
        return _sentencepiece(path)
    from perl_jax.interop.tokenizers import TokenizersVocabulary

    return TokenizersVocabulary(path)


def of_base(path: str) -> str | None:
    """The name of the tokenizer that a base's weights bring: a Hugging Face folder's or a .gguf's own, else None.

    Raises:
      UserError: they bring one of a form that cannot be read.
    """
    if path.endswith('.gguf') or path.startswith(hf.HUB):
        return path
    if not hf.is_checkpoint(path):
        return None
    folder = pathlib.Path(path).expanduser()
    if _files(folder) or _is_byt5(folder):
        return path
    if others := sorted(file.name for pattern in _UNREAD for file in folder.glob(pattern)):
        raise UserError(
            f'{folder / others[0]}: a tokenizer of this form cannot be read; save it as tokenizer.json with '
            f"transformers (AutoTokenizer.from_pretrained('{path}').save_pretrained('{path}')), or set VOCABULARY"
        )
    return None


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The tokenizers in a folder, the one that is read first."""
    return [file for pattern in _IN_A_FOLDER for file in sorted(folder.glob(pattern))]


def _is_byt5(folder: pathlib.Path) -> bool:
    """Whether its tokenizer is ByT5's, which has no file."""
    return tokenizer_files.read_config(folder).get('tokenizer_class') == 'ByT5Tokenizer'


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
