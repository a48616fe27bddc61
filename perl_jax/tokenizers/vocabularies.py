"""Whatever kind of file a tokenizer lies in, a SeqIO vocabulary: what VOCABULARY = 'PATH' means in a gin file."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from perl_jax.errors import UserError
from perl_jax.interop import hf
from perl_jax.interop.paths import resolve
from perl_jax.tokenizers import tokenizer_files

if TYPE_CHECKING:
    import seqio

_IN_A_FOLDER = ('tokenizer.json', '*.model', '*.gguf')  # the first that is there
_MODELS = ('tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model', 'sentencepiece.model')  # transformers' names
_UNREAD = ('vocab.json', 'merges.txt', 'tekken.json', '*.tiktoken', 'vocab.txt')


def vocabulary(path: str) -> seqio.Vocabulary:
    """Load the tokenizer at a path, as a SeqIO vocabulary.

        byt5           bytes, as ByT5 has them
        X.model        sentencepiece (T5, mT5, Llama 2, Gemma), ending sequences with its own </s> or <eos>
        X.json X.gguf  TokenizersVocabulary, whose `eos` can also be chosen: see there
        a folder       the tokenizer in it, as Hugging Face lays models out; hf://OWNER/NAME likewise

    A sentencepiece model of T5's kind (padding 0, no BOS) that has no sentinels gets the 100 that T5 puts behind it.

    Args:
      path: as above.

    Returns:
      A seqio.Vocabulary: `encode(text)` gives ids without BOS and EOS, `decode(ids)` a text up to the first EOS.

    Raises:
      UserError: a folder without a tokenizer, or a file that is no sentencepiece model. What is wrong with a
        tokenizer.json or a GGUF file is said at first use.
    """
    if not path:
        raise UserError("VOCABULARY = '': name a tokenizer's file or folder; None is the base model's own")
    if path == 'byt5':
        import seqio

        return seqio.ByteVocabulary()
    folder = hf.resolve(path, weights=False) if path.startswith(hf.HUB) else pathlib.Path(path).expanduser()
    if folder.is_dir():
        file = file_in(folder)
        if file is None and _is_byt5(folder):
            return vocabulary('byt5')
        if file is None:
            raise UserError(f'{path}: there is no tokenizer in this folder ({", ".join(_IN_A_FOLDER)}); name its file')
        path = str(file)
    if path.endswith('.model'):
        return _sentencepiece(path)
    from perl_jax.tokenizers.tokenizers import TokenizersVocabulary

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
    if file_in(folder) is not None or _is_byt5(folder):
        return path
    if others := sorted(file.name for pattern in _UNREAD for file in folder.glob(pattern)):
        raise UserError(
            f'{folder / others[0]}: a tokenizer of this form cannot be read; save it as tokenizer.json with '
            f"transformers (AutoTokenizer.from_pretrained('{path}').save_pretrained('{path}')), or set VOCABULARY"
        )
    return None


def file_in(folder: pathlib.Path) -> pathlib.Path | None:
    """The tokenizer in a folder: the one of the model itself where others lie there.

    Raises:
      UserError: it cannot be told which.
    """
    for pattern in _IN_A_FOLDER:
        files = sorted(folder.glob(pattern))
        usual = [folder / name for name in _MODELS if folder / name in files]
        if len(files) > 1 and not usual:
            names = ', '.join(file.name for file in files)
            raise UserError(f'{folder}: which of {names} is the tokenizer? name its file in VOCABULARY')
        if files:
            return [*usual, *files][0]
    return None


def _is_byt5(folder: pathlib.Path) -> bool:
    """Whether its tokenizer is ByT5's, which has no file."""
    return tokenizer_files.read_config(folder).get('tokenizer_class') == 'ByT5Tokenizer'


def _sentencepiece(path: str) -> seqio.SentencePieceVocabulary:
    import sentencepiece

    from perl_jax.tokenizers import sentencepiece_tokens
    from perl_jax.tokenizers.sentencepieces import SentencepieceVocabulary

    found = str(resolve(path))
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=found)
    except RuntimeError as e:
        raise UserError(f'{path}: not a sentencepiece model that can be read ({e})') from e
    return SentencepieceVocabulary(found, extra_ids=sentencepiece_tokens.sentinels(model))
