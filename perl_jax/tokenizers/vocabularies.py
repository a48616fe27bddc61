"""The tokenizer in a file of any kind as a SeqIO vocabulary: what VOCABULARY = 'PATH' means in a gin file."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from perl_jax.errors import UserError
from perl_jax.interop import hf
from perl_jax.interop.paths import resolve
from perl_jax.tokenizers import tokenizer_files

if TYPE_CHECKING:
    import seqio

_IN_A_FOLDER = ('tokenizer.json', '*.model', '*.gguf')  # in order of precedence
_MODELS = ('tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model', 'sentencepiece.model')  # transformers' names
_UNREAD = ('vocab.json', 'merges.txt', 'tekken.json', '*.tiktoken', 'vocab.txt')


def vocabulary(path: str) -> seqio.Vocabulary:
    """Load the tokenizer at a path, as a SeqIO vocabulary.

        byt5           bytes, as ByT5 uses them
        X.model        sentencepiece (T5, mT5, Llama 2, Gemma), whose sequences end with its own </s> or <eos>
        X.json X.gguf  TokenizersVocabulary, whose `eos` can be chosen
        a folder       the tokenizer in it, in Hugging Face's layout; hf://OWNER/NAME likewise

    A sentencepiece model of T5's kind (padding 0, no BOS) without sentinels gets the 100 that T5 appends.

    Args:
      path: as above.

    Returns:
      A seqio.Vocabulary: `encode(text)` gives ids without BOS and EOS, `decode(ids)` a text up to the first EOS.

    Raises:
      UserError: a folder without a tokenizer, or a file that is not a sentencepiece model. Errors in a tokenizer.json
        or a GGUF file are raised at first use.
    """
    if not path:
        raise UserError("VOCABULARY = '': name a tokenizer's file or folder; None uses the base model's")
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
    """Returns the name of the tokenizer that comes with weights: of a Hugging Face folder or a .gguf, else None.

    Raises:
      UserError: its format cannot be read.
    """
    if path.endswith('.gguf') or path.startswith(hf.HUB):
        return path
    if not hf.is_checkpoint(path):
        return None
    folder = pathlib.Path(path).expanduser()
    if file_in(folder) is not None or _is_byt5(folder):
        return path
    if unreadable := sorted(file.name for pattern in _UNREAD for file in folder.glob(pattern)):
        raise UserError(
            f'{folder / unreadable[0]}: a tokenizer of this form cannot be read; save it as tokenizer.json with '
            f"transformers (AutoTokenizer.from_pretrained('{path}').save_pretrained('{path}')), or set VOCABULARY"
        )
    return None


def file_in(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the tokenizer's file in a folder, None without one; names that transformers uses come first.

    Raises:
      UserError: there are several candidates.
    """
    for pattern in _IN_A_FOLDER:
        files = sorted(folder.glob(pattern))
        model_files = [folder / name for name in _MODELS if folder / name in files]
        if len(files) > 1 and not model_files:
            names = ', '.join(file.name for file in files)
            raise UserError(f'{folder}: which of {names} is the tokenizer? name its file in VOCABULARY')
        if files:
            return [*model_files, *files][0]
    return None


def _is_byt5(folder: pathlib.Path) -> bool:
    """Returns whether a folder's tokenizer is ByT5's, which has no file."""
    return tokenizer_files.read_config(folder).get('tokenizer_class') == 'ByT5Tokenizer'


def _sentencepiece(path: str) -> seqio.SentencePieceVocabulary:
    import sentencepiece

    from perl_jax.tokenizers import sentencepiece_tokens
    from perl_jax.tokenizers.sentencepieces import SentencepieceVocabulary

    file = str(resolve(path))
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=file)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: not a sentencepiece model that can be read ({error})') from error
    return SentencepieceVocabulary(file, extra_ids=sentencepiece_tokens.sentinels(model))
