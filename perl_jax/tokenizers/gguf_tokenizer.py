"""Rebuild a byte-level BPE tokenizer (GPT-2's kind) from the metadata of a GGUF file."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
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
_UNDERSTOOD = (
    'model', 'pre', 'tokens', 'token_type', 'merges', 'add_bos_token', 'bos_token_id', 'eos_token_id', 'eot_token_id',
    'eom_token_id', 'unknown_token_id', 'padding_token_id',
)  # fmt: skip
_HARMLESS = {  # patterns of further keys of tokenizer.ggml: why they change nothing of a byte-level BPE
    'add_eos_token': 'EOS ends what is learned to answer, and no prompt, whatever this says',
    'add_sep_token': 'for encoders',
    'seperator_token_id': 'likewise',
    'cls_token_id': 'likewise',
    'mask_token_id': 'likewise',
    'token_type_count': 'likewise: how many kinds of segments',
    'fim_*_token_id': 'a token is used where a text has it',
    '*fix_token_id': 'likewise',
    'middle_token_id': 'likewise',
    'scores': 'merges say the order',
    'add_space_prefix': 'of sentencepiece; llama.cpp reads it for no BPE',
    'remove_extra_whitespaces': 'likewise',
    'precompiled_charsmap': 'likewise',
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
    _check_keys(path, fields)
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

    def named(kind: str) -> str | None:
        index = fields.get(key := f'tokenizer.ggml.{kind}_token_id')
        if index is not None and not 0 <= index < len(tokens):
            raise UserError(f'{path}: {key} = {index}: the tokenizer has only {len(tokens):,} tokens; convert it again')
        return None if index is None else tokens[index]

    opens = fields.get('tokenizer.ggml.add_bos_token', pre == 'llama-bpe')
    return tokenizer, {'bos': named('bos') if opens else None, 'eos': named('eos'), 'unk': named('unknown')}


def _check_keys(path: str | os.PathLike, fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        name = key.removeprefix('tokenizer.ggml.')
        known = name == key or any(fnmatch.fnmatchcase(name, pattern) for pattern in (*_UNDERSTOOD, *_HARMLESS))
        if not known and value not in (None, False, 0, ''):
            raise UserError(f'{path}: {key} = {str(value)[:60]!r} is not understood; give a tokenizer.json')


def _pre_tokenizer(words: str | None) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if words is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words == 'digits':
        cut, regex = pre_tokenizers.Digits(individual_digits=True), True
    else:
        cut, regex = pre_tokenizers.Split(Regex(words), 'isolated'), False
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)])
