"""The tokens of a sentencepiece model and of the metadata files beside it, as transformers reads both."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from perl_jax.errors import UserError
from perl_jax.tokenizers import token_ids, tokenizer_files
from perl_jax.tokenizers.chat import render
from perl_jax.tokenizers.chat.controls import CLOSE, OPEN

_SENTINELS = 100  # T5's
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # kinds of pieces


@dataclasses.dataclass(frozen=True)
class SentencepieceTokens:
    """Tokens of a model and its metadata files.

    Attributes:
      control: ids of the tokens that templates add: control tokens, and user-defined pieces.
      spelled: the control tokens whose names in plain text are read as text.
      typed: ids of added tokens that are found in any text, though they are not pieces.
      pattern: finds what sentencepiece must not encode: tokens that are `marked`, or `typed`, and the names of control
        tokens that it would encode as the token.
      strips: whether a token removes the space before and after it: (True, False).
      names: the texts of ids that are not pieces, or have another name.
      bos_id: -1 if sequences begin without BOS.
      eos_ids: the tokens that end an answer.
      size: one more than the largest id.
      reachable_size: one more than the largest id that a text, BOS or EOS can become.
      has_templates: whether there is a chat template.
      adds_space_after_tokens: whether a space is added in front of text behind a token too ('legacy').
    """

    control: Mapping[str, int]
    spelled: tuple[str, ...]
    typed: Mapping[str, int]
    pattern: re.Pattern[str]
    strips: Mapping[str, tuple[bool, bool]]
    names: Mapping[int, str]
    bos_id: int
    eos_ids: tuple[int, ...]
    size: int
    reachable_size: int
    has_templates: bool
    adds_space_after_tokens: bool


def sentinels(model: Any) -> int:
    """Returns how many of T5's sentinels to append: 100 to a model of its kind (padding 0, no BOS) without, else 0."""
    has_none = model.pad_id() == 0 and model.bos_id() < 0 and model.piece_to_id('▁<extra_id_0>') == model.unk_id()
    return _SENTINELS if has_none else 0


@functools.lru_cache(maxsize=8)
def read(file: str) -> SentencepieceTokens:
    """Read a model and the metadata files beside it.

    Raises:
      UserError: not a sentencepiece model, a token whose id is not the specified one, or no token that ends a sequence.
    """
    model, path = _model(file), pathlib.Path(file)
    metadata, num_sentinels, kinds = tokenizer_files.read_metadata(path), sentinels(model), _kinds(model)
    try:
        pieces = {model.id_to_piece(i): i for i in range(len(kinds))}
    except UnicodeDecodeError as error:
        raise UserError(f'{file}: a piece is not text in UTF-8 ({error}); download it again') from error
    pieces |= {f'▁<extra_id_{num_sentinels - 1 - i}>': len(kinds) + i for i in range(num_sentinels)}
    added = _added_tokens(metadata, pieces, path)
    special = {text: i for text, i in pieces.items() if i < len(kinds) and kinds[i] in (_UNKNOWN, _CONTROL)}
    special |= {text: i for text, (i, settings) in added.items() if settings['special']}
    plain = {text: i for text, (i, settings) in added.items() if not settings['special']}
    bos_id, eos_id = _bos_and_eos(model, metadata, special | plain, file)
    candidates = [*special, *(text for text in plain if re.search(r'[^\w\s]', text))]
    turn_end = render.end_of_turn(metadata, candidates)
    control_texts = {*render.between_turns(metadata, candidates), *metadata.control, turn_end}
    control = special | {text: i for text, i in plain.items() if text in control_texts or i in {eos_id, *metadata.ends}}
    eos_ids = tuple(dict.fromkeys((eos_id, *metadata.ends, *(() if turn_end is None else (control[turn_end],)))))
    size = 1 + max([len(pieces) - 1, *(i for i, _ in added.values())])
    metadata.check_ends(size, file)
    template_text = ' '.join(metadata.templates.values())
    reachable_ids = {i for text, (i, _) in added.items() if text not in special or text in template_text} | {
        *eos_ids,
        bos_id,
    }
    text_pieces = {text for text, i in pieces.items() if i < len(kinds) and kinds[i] in (_NORMAL, _USER_DEFINED)}
    plain_added = {text: i for text, i in plain.items() if text not in control}
    spelled_by_pieces = [text for text in control if text in text_pieces and len(text) > 1]
    return SentencepieceTokens(
        control={text: i for text, i in pieces.items() if i < len(kinds) and kinds[i] == _USER_DEFINED} | control,
        spelled=tuple(control),
        typed=plain_added,
        pattern=_pattern([*plain_added, *spelled_by_pieces]),
        strips={
            text: (bool(settings.get('lstrip')), bool(settings.get('rstrip'))) for text, (_, settings) in added.items()
        },
        names={i: text for text, (i, _) in added.items() if text not in pieces},
        bos_id=bos_id,
        eos_ids=eos_ids,
        size=size,
        reachable_size=1 + max(len(pieces) - 1, *reachable_ids),
        has_templates=bool(metadata.templates),
        adds_space_after_tokens=bool(tokenizer_files.read_config(path.parent).get('legacy')),
    )


def _kinds(model: Any) -> list[int]:
    """Returns the kind of each piece."""
    return [piece.type for piece in token_ids.model_proto(model.serialized_model_proto()).pieces]


def _added_tokens(
    metadata: tokenizer_files.TokenizerMetadata, pieces: Mapping[str, int], path: pathlib.Path
) -> dict[str, tuple[int, dict[str, Any]]]:
    """Returns ids and settings of added tokens by text; new ones get the ids after the pieces."""
    added: dict[str, tuple[int, dict[str, Any]]] = {}
    next_id = len(pieces)
    for token_id, settings in [*sorted(metadata.added.items()), *((None, settings) for settings in metadata.special)]:
        text = settings['content']
        if text in added or f'▁{text}' in pieces:  # sentencepiece finds T5's sentinels itself
            continue
        if text in pieces or (token_id is not None and token_id < len(pieces)):
            added[text] = pieces.get(text, token_id), settings
        elif token_id in (None, next_id):
            added[text], next_id = (next_id, settings), next_id + 1
        else:
            raise UserError(
                f'{metadata.added_in}: {token_id} for {text!r}, which is {next_id} behind the tokens of {path.name}'
            )
    return added


def _pattern(texts: Sequence[str]) -> re.Pattern[str]:
    names = '|'.join(map(re.escape, sorted(texts, key=len, reverse=True))) or '(?!)'
    return re.compile(f'{OPEN}(?P<marked>.*?){CLOSE}|(?P<typed>{names})', re.DOTALL)


def _bos_and_eos(
    model: Any, metadata: tokenizer_files.TokenizerMetadata, ids: Mapping[str, int], file: str
) -> tuple[int, int]:
    """Returns the ids of BOS (-1 if there is none) and EOS; metadata files take precedence over the model."""
    bos_id = ids.get(metadata.tokens.get('bos', ''), model.bos_id())
    eos_id = ids.get(metadata.tokens.get('eos', ''), model.eos_id())
    if eos_id < 0:
        eos_id = next(iter(metadata.ends), -1)
    if eos_id < 0:
        raise UserError(
            f'{file}: the tokenizer specifies no token that ends a sequence; add "eos_token" to '
            f'{tokenizer_files.CONFIG}'
        )
    return -1 if metadata.add_bos is False else bos_id, eos_id


def _model(file: str) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=file)
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        raise UserError(f'{file}: not a sentencepiece model that can be read ({error})') from error
