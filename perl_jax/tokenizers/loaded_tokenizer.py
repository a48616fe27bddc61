"""A tokenizer's file together with the metadata files beside it; tokenizers.py makes a vocabulary of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from perl_jax.errors import UserError
from perl_jax.parallel.stderr import silenced
from perl_jax.tokenizers import gguf_tokenizer, marked_encoder, tokenizer_files
from perl_jax.tokenizers.chat import controls, render


@dataclasses.dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and what its files specify about its tokens.

    Attributes:
      tokenizer: the original `tokenizers.Tokenizer`, for decoding.
      encoders: for encoding; the second adds no space in front of a text.
      special: ids of the control tokens: those that are special to the tokenizer, or named by the metadata files.
      bos_id: None if sequences begin without BOS.
      eos_ids: the tokens that end an answer.
      unk_id: the unknown token, if any.
      size: one more than the largest id.
      reachable_size: one more than the largest id that a text, BOS or EOS can become.
    """

    tokenizer: Any
    encoders: tuple[marked_encoder.Encoder, marked_encoder.Encoder]
    special: Mapping[str, int]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    unk_id: int | None
    size: int
    reachable_size: int

    @property
    def eos_id(self) -> int:
        """The first of the tokens that end a sequence."""
        return self.eos_ids[0]

    @property
    def adds_leading_space(self) -> bool:
        """Whether a text at the beginning of a sequence gets a space in front."""
        return self.encoders[0] is not self.encoders[1]

    def encode(self, text: str, continues: bool) -> list[int]:
        """Returns the ids of a text with marks (controls.py); a BOS at its beginning counts as one, marked or not."""
        bos_token = None if continues or self.bos_id is None else self.tokenizer.id_to_token(self.bos_id)
        if bos_token and text.startswith(bos_token):  # a run adds the same token
            text = controls.mark(bos_token) + text[len(bos_token) :]
        return self.encoders[continues](text)


@functools.lru_cache(maxsize=8)
def load(file: pathlib.Path, path: str, eos: str | None) -> LoadedTokenizer:
    """Load a tokenizer's files; cached, since several vocabularies name the same file.

    Args:
      file: a tokenizer.json or a GGUF file.
      path: what messages call it.
      eos: the token that ends a sequence, if not the one that the files specify.

    Raises:
      UserError: it is not a tokenizer, or nothing specifies the token that ends a sequence.
    """
    metadata = tokenizer_files.read_metadata(file)
    tokenizer, special = _read_tokenizer(file, path, eos)
    special['eos'] = eos or special['eos'] or next((tokenizer.id_to_token(i) for i in metadata.ends), None)
    ids = {kind: tokenizer.token_to_id(token) if token else None for kind, token in special.items()}
    if ids['eos'] is None:
        problem = f'has no token {special["eos"]!r}' if special['eos'] else 'specifies no token that ends a sequence'
        raise UserError(f'{path}: the tokenizer {problem}; name one: TokenizersVocabulary(path, eos=...)')
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    control = {text: vocab[text] for text in _control_tokens(tokenizer, metadata, ids['eos'])}
    turn_end = render.end_of_turn(metadata, control)
    eos_ids = [ids['eos'], *metadata.ends, *([] if turn_end is None else [control[turn_end]])]
    template_text = ' '.join(metadata.templates.values())
    unreachable_ids = {i for text, i in control.items() if text not in template_text} - {
        *eos_ids,
        *ids.values(),
    }  # no text or template contains them
    continues = 'bos' in metadata.tokens or ids['bos'] is not None
    return LoadedTokenizer(
        tokenizer, marked_encoder.encoder_pair(tokenizer, control, continues), control, ids['bos'],
        tuple(dict.fromkeys(eos_ids)), ids['unk'],
        size=max(vocab.values()) + 1, reachable_size=max(set(vocab.values()) - unreachable_ids) + 1,
    )  # fmt: skip


@functools.lru_cache(maxsize=8)
def control_tokens(file: pathlib.Path, path: str) -> tuple[str, ...]:
    """Returns the tokens of a tokenizer that chat templates add and that plain text never becomes.

    Raises:
      UserError: it is not a tokenizer.
    """
    return tuple(_control_tokens(_read_tokenizer(file, path)[0], tokenizer_files.read_metadata(file)))


def _control_tokens(tokenizer: Any, metadata: tokenizer_files.TokenizerMetadata, *eos_ids: int) -> list[str]:
    """Returns special tokens, and added tokens that end answers, separate turns or are named as control tokens."""
    added = tokenizer.get_added_tokens_decoder()
    special = [token.content for token in added.values() if token.special]
    plain = {token.content: i for i, token in added.items() if not token.special}
    symbols = {text: i for text, i in plain.items() if re.search(r'[^\w\s]', text)}  # not words or spaces
    turn_tokens = render.between_turns(metadata, [*special, *symbols])
    turn_end, named_tokens = (
        render.end_of_turn(metadata, [*special, *symbols]),
        [settings['content'] for settings in metadata.special],
    )
    control = {*turn_tokens, turn_end, *metadata.control, *metadata.tokens.values(), *named_tokens}
    return special + [text for text, i in symbols.items() if i in {*eos_ids, *metadata.ends} or text in control]


def _read_tokenizer(file: pathlib.Path, path: str, eos: str | None = None) -> tuple[Any, dict[str, str | None]]:
    """Returns the tokenizer, with the tokens that metadata files add, and its bos, eos and unk."""
    metadata = tokenizer_files.read_metadata(file)
    try:
        with silenced():  # a panic of Rust prints its own lines
            loaded = gguf_tokenizer.build(file) if file.suffix == '.gguf' else _from_json(file, metadata)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f'{path}: reading a tokenizer needs the tokenizers package; pip install tokenizers') from error
    except BaseException as error:  # the package raises bare Exceptions, and panics, which are none
        if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
            raise
        raise UserError(f'{path}: not a tokenizer that can be read ({error})') from error
    tokenizer, special = loaded
    _add_tokens(tokenizer, metadata, file, eos)
    metadata.check_ends(tokenizer.get_vocab_size(), path)
    return tokenizer, special


def _add_tokens(
    tokenizer: Any, metadata: tokenizer_files.TokenizerMetadata, file: pathlib.Path, eos: str | None
) -> None:
    """Add the tokens of the metadata files, as transformers does; tokens that are named there become special."""
    from tokenizers import AddedToken

    for token_id, settings in sorted(metadata.added.items()):
        if tokenizer.token_to_id(settings['content']) is None:
            token = AddedToken(**settings)
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
            if (actual_id := tokenizer.token_to_id(token.content)) != token_id:
                raise UserError(
                    f'{metadata.added_in}: {token_id} for {token.content!r}, which is {actual_id} behind the tokens of '
                    f'{file.name}'
                )
    explicit_eos = [] if eos is None or tokenizer.token_to_id(eos) is None else [{'content': eos, 'normalized': False}]
    for settings in (*metadata.special, *explicit_eos):
        if settings['content'] not in {token.content for token in tokenizer.get_added_tokens_decoder().values()}:
            tokenizer.add_special_tokens([AddedToken(**settings)])  # an existing token keeps its flags


def _from_json(file: pathlib.Path, metadata: tokenizer_files.TokenizerMetadata) -> tuple[Any, dict[str, str | None]]:
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()  # batches are truncated and padded by the data pipeline
    tokenizer.no_padding()
    if getattr(tokenizer.model, 'dropout', None):
        tokenizer.model.dropout = None  # of BPE, for training: it splits the same text in other ways at each call
    _check_prefix_space(tokenizer, metadata, file)
    eos = metadata.tokens.get('eos')
    text_ids, processed_ids = (tokenizer.encode('a', add_special_tokens=add).ids for add in (False, True))
    begins_with_bos = processed_ids and (not text_ids or processed_ids[: len(text_ids)] != text_ids)
    bos = tokenizer.id_to_token(processed_ids[0]) if begins_with_bos else None
    bos = None if bos == eos else bos
    named_bos = metadata.tokens.get('bos') if metadata.add_bos else None
    named_bos = None if named_bos == eos else named_bos
    if metadata.add_bos is not None and bos != named_bos:  # versions of transformers differ in which of them wins
        disagreement = (
            f'{file.parent / tokenizer_files.CONFIG}: add_bos_token = {json.dumps(metadata.add_bos)} asks for '
            f'{named_bos or "no BOS"} before a text, and the post_processor of {file.name} adds {bos or "none"}'
        )
        if bos is not None:
            raise UserError(f'{disagreement}; make them agree: set add_bos_token, or edit the post_processor')
        _warn(f'{disagreement}; BOS is added, which not all versions of transformers do')
        bos = named_bos
    return tokenizer, {
        'bos': bos,
        'eos': eos,
        'unk': metadata.tokens.get('unk') or getattr(tokenizer.model, 'unk_token', None),
    }


@functools.cache  # a file is read for its ids and again for its control tokens
def _warn(message: str) -> None:
    logging.getLogger('perl_jax').warning(message)


def _check_prefix_space(tokenizer: Any, metadata: tokenizer_files.TokenizerMetadata, file: pathlib.Path) -> None:
    """Refuse a tokenizer_config.json whose add_prefix_space transformers obeys against tokenizer.json."""
    if tokenizer.pre_tokenizer is None:
        return
    pre_tokenizer = json.loads(tokenizer.pre_tokenizer.__getstate__())
    for step in pre_tokenizer.get('pretokenizers', [pre_tokenizer]):
        adds = step.get('add_prefix_space') if step.get('type') == 'ByteLevel' else None
        if None not in (adds, metadata.add_prefix_space) and adds != metadata.add_prefix_space:
            raise UserError(
                f'{file.parent / tokenizer_files.CONFIG}: add_prefix_space = {json.dumps(metadata.add_prefix_space)} '
                f'(the default is false), and {json.dumps(adds)} in the pre_tokenizer of {file.name}; make them agree'
            )
