"""Rebuild a byte-level BPE tokenizer (GPT-2's kind) from the metadata of a GGUF file."""

from __future__ import annotations

import os
from typing import Any

from perl_jax.errors import UserError
from perl_jax.interop import gguf

# What cuts a text into words before BPE, by `tokenizer.ggml.pre`; the same as in llama.cpp's llama-vocab.cpp.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE = {
    'gpt-2': None,  # ByteLevel's own regex
    'smollm': 'digits',  # the same, after every digit has become a word
    'starcoder': 'digits',
    'llama-bpe': _WORDS % '{1,3}',
    'qwen2': _WORDS % '',
}
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def build(path: str | os.PathLike) -> tuple[Any, dict[str, str | None]]:
    """The `tokenizers.Tokenizer` and the names of its special tokens: bos (None if no text opens with it), eos, unk.

    Raises:
      UserError: no GGUF file, or a tokenizer that is no byte-level BPE of a kind that stands in `_PRE`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    fields = gguf.metadata(path)
    kind, pre = fields.get('tokenizer.ggml.model'), fields.get('tokenizer.ggml.pre')
    if kind != 'gpt2' or pre not in _PRE:
        known = ', '.join(_PRE)
        raise UserError(f'{path}: its tokenizer is of the kind {kind}/{pre}; give a tokenizer.json (or one of {known})')
    tokens = fields['tokenizer.ggml.tokens']
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(' ', 1)) for merge in fields['tokenizer.ggml.merges']]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == 'llama-bpe'))
    tokenizer.pre_tokenizer = _pre_tokenizer(_PRE[pre])
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get('tokenizer.ggml.token_type', [])
    for token, type_ in zip(tokens, types, strict=False):
        if type_ in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=type_ == _CONTROL)])

    def token(kind: str) -> str | None:
        index = fields.get(f'tokenizer.ggml.{kind}_token_id')
        return None if index is None else tokens[index]

    opens = fields.get('tokenizer.ggml.add_bos_token', pre == 'llama-bpe')
    return tokenizer, {'bos': token('bos') if opens else None, 'eos': token('eos'), 'unk': token('unknown')}


def _pre_tokenizer(words: str | None) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if words is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words == 'digits':
        cut, regex = pre_tokenizers.Digits(individual_digits=True), True
    else:
        cut, regex = pre_tokenizers.Split(Regex(words), 'isolated'), False
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)])
