"""Rebuild a byte-level BPE tokenizer (GPT-2's kind) from the metadata of a GGUF file."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from typing import Any

from perl_jax.errors import UserError
from perl_jax.interop import gguf

# How a text is split into words before BPE, by `tokenizer.ggml.pre`; as in llama.cpp's llama-vocab.cpp.
_WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    'gpt-2': None,  # ByteLevel's own regex
    'smollm': 'digits',  # the same, after splitting off every digit
    'starcoder': 'digits',
    'llama-bpe': _WORD_PATTERN % '{1,3}',
    'qwen2': _WORD_PATTERN % '',
}
_UNDERSTOOD = (
    'model', 'pre', 'tokens', 'token_type', 'merges', 'add_bos_token', 'bos_token_id', 'eos_token_id', 'eot_token_id',
    'eom_token_id', 'unknown_token_id', 'padding_token_id',
)  # fmt: skip
_HARMLESS = {  # patterns of further keys of tokenizer.ggml: why they change nothing of a byte-level BPE
    'add_eos_token': 'EOS is added to training targets and to no prompt, whatever the value',
    'add_sep_token': 'for encoders',
    'seperator_token_id': 'likewise',
    'cls_token_id': 'likewise',
    'mask_token_id': 'likewise',
    'token_type_count': 'likewise: how many kinds of segments',
    'fim_*_token_id': 'a token occurs only where a text contains it',
    '*fix_token_id': 'likewise',
    'middle_token_id': 'likewise',
    'scores': 'merges define the order',
    'add_space_prefix': 'of sentencepiece; llama.cpp ignores it for BPE',
    'remove_extra_whitespaces': 'likewise',
    'precompiled_charsmap': 'likewise',
}
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def build(path: str | os.PathLike) -> tuple[Any, dict[str, str | None]]:
    """Rebuild a tokenizer from a GGUF file.

    Returns:
      The `tokenizers.Tokenizer`, and the texts of its special tokens: bos (None if sequences begin without), eos, unk.

    Raises:
      UserError: not a GGUF file, or a tokenizer that is not a byte-level BPE with a pre-tokenizer in `_PRE_TOKENIZERS`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    fields = gguf.metadata(path)
    kind, pre = fields.get('tokenizer.ggml.model'), fields.get('tokenizer.ggml.pre')
    if kind != 'gpt2' or pre not in _PRE_TOKENIZERS:
        known = ', '.join(_PRE_TOKENIZERS)
        raise UserError(f'{path}: its tokenizer is of the kind {kind}/{pre}; give a tokenizer.json (or one of {known})')
    _check_keys(path, fields)
    tokens = fields['tokenizer.ggml.tokens']
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(' ', 1)) for merge in fields['tokenizer.ggml.merges']]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == 'llama-bpe'))
    tokenizer.pre_tokenizer = _pre_tokenizer(_PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get('tokenizer.ggml.token_type', [])
    for token, type_ in zip(tokens, types, strict=False):
        if type_ in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=type_ == _CONTROL)])

    def special_token(kind: str) -> str | None:
        index = fields.get(key := f'tokenizer.ggml.{kind}_token_id')
        if index is not None and not 0 <= index < len(tokens):
            raise UserError(f'{path}: {key} = {index}: the tokenizer has only {len(tokens):,} tokens; convert it again')
        return None if index is None else tokens[index]

    adds_bos = fields.get('tokenizer.ggml.add_bos_token', pre == 'llama-bpe')
    return tokenizer, {
        'bos': special_token('bos') if adds_bos else None,
        'eos': special_token('eos'),
        'unk': special_token('unknown'),
    }


def _check_keys(path: str | os.PathLike, fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        name = key.removeprefix('tokenizer.ggml.')
        is_known = name == key or any(fnmatch.fnmatchcase(name, pattern) for pattern in (*_UNDERSTOOD, *_HARMLESS))
        if not is_known and value not in (None, False, 0, ''):
            raise UserError(f'{path}: {key} = {str(value)[:60]!r} is not understood; give a tokenizer.json')


def _pre_tokenizer(pattern: str | None) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern == 'digits':
        splitter, use_regex = pre_tokenizers.Digits(individual_digits=True), True
    else:
        splitter, use_regex = pre_tokenizers.Split(Regex(pattern), 'isolated'), False
    return pre_tokenizers.Sequence([splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])
