"""The tokens of a sentencepiece model with those that the small files beside it name, as transformers reads both."""

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
class Tokens:
    """What a model alone does not say.

    control: ids of what a template puts in: what is no text, and pieces that a user has defined.
    spelled: those that the same words in a text are not.
    typed: ids of the tokens that are found in any text, though they are no pieces.
    pattern: what is no text for the model: tokens that are `marked`, or `typed`, or control tokens that are spelled out
        and that it would make of the words.
    strips: which tokens take the space in front, or behind, along: (True, False).
    names: the texts of ids that are no pieces, or are called otherwise.
    each_begins: whether a space is put in front of the text behind a token too.
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
    each_begins: bool


def sentinels(model: Any) -> int:
    """How many of T5's sentinels are to be put behind a model of its kind (padding 0, no BOS) that has none."""
    lacks = model.pad_id() == 0 and model.bos_id() < 0 and model.piece_to_id('▁<extra_id_0>') == model.unk_id()
    return _SENTINELS if lacks else 0


@functools.lru_cache(maxsize=8)
def read(file: str) -> Tokens:
    """Read a model and what stands beside it.

    Raises:
      UserError: no sentencepiece model, a token at another id than is said of it, or nothing that ends a sequence.
    """
    model, path = _model(file), pathlib.Path(file)
    said, more, kinds = tokenizer_files.beside(path), sentinels(model), _kinds(model)
    pieces = {model.id_to_piece(i): i for i in range(len(kinds))}
    pieces |= {f'▁<extra_id_{more - 1 - i}>': len(kinds) + i for i in range(more)}
    added = _added(said, pieces, path)
    special = {text: i for text, i in pieces.items() if i < len(kinds) and kinds[i] in (_UNKNOWN, _CONTROL)}
    special |= {text: i for text, (i, settings) in added.items() if settings['special']}
    plain = {text: i for text, (i, settings) in added.items() if not settings['special']}
    bos_id, eos_id = _ends(model, said, special | plain, file)
    given = [*special, *(text for text in plain if re.search(r'[^\w\s]', text))]
    turn = render.end_of_turn(said, given)
    no_text = {*render.between_turns(said, given), *said.control, turn}
    control = special | {t: i for t, i in plain.items() if t in no_text or i in {eos_id, *said.ends}}
    eos_ids = tuple(dict.fromkeys((eos_id, *said.ends, *(() if turn is None else (control[turn],)))))
    size = 1 + max([len(pieces) - 1, *(i for i, _ in added.values())])
    said.check_ends(size, file)
    written = ' '.join(said.templates.values())
    needed = {i for text, (i, _) in added.items() if text not in special or text in written} | {*eos_ids, bos_id}
    as_text = {text for text, i in pieces.items() if i < len(kinds) and kinds[i] in (_NORMAL, _USER_DEFINED)}
    typed = {text: i for text, i in plain.items() if text not in control}
    broken = [text for text in control if text in as_text and len(text) > 1]
    return Tokens(
        control={text: i for text, i in pieces.items() if i < len(kinds) and kinds[i] == _USER_DEFINED} | control,
        spelled=tuple(control),
        typed=typed,
        pattern=_pattern([*typed, *broken]),
        strips={text: (bool(each.get('lstrip')), bool(each.get('rstrip'))) for text, (_, each) in added.items()},
        names={i: text for text, (i, _) in added.items() if text not in pieces},
        bos_id=bos_id,
        eos_ids=eos_ids,
        size=size,
        reachable_size=1 + max(len(pieces) - 1, *needed),
        has_templates=bool(said.templates),
        each_begins=bool(tokenizer_files.read_config(path.parent).get('legacy')),
    )


def _kinds(model: Any) -> list[int]:
    """The kind of each piece."""
    return [piece.type for piece in token_ids.model_proto(model.serialized_model_proto()).pieces]


def _added(
    said: tokenizer_files.Beside, pieces: Mapping[str, int], path: pathlib.Path
) -> dict[str, tuple[int, dict[str, Any]]]:
    """Ids and settings of the tokens that are named beside a model, by text; new ones stand behind its pieces."""
    added: dict[str, tuple[int, dict[str, Any]]] = {}
    new = len(pieces)
    for i, settings in [*sorted(said.added.items()), *((None, settings) for settings in said.special)]:
        text = settings['content']
        if text in added or f'▁{text}' in pieces:  # sentencepiece finds T5's sentinels by itself
            continue
        if text in pieces or (i is not None and i < len(pieces)):
            added[text] = pieces.get(text, i), settings
        elif i in (None, new):
            added[text], new = (new, settings), new + 1
        else:
            raise UserError(f'{said.added_in}: {i} for {text!r}, which is {new} behind the tokens of {path.name}')
    return added


def _pattern(typed: Sequence[str]) -> re.Pattern[str]:
    names = '|'.join(map(re.escape, sorted(typed, key=len, reverse=True))) or '(?!)'
    return re.compile(f'{OPEN}(?P<marked>.*?){CLOSE}|(?P<typed>{names})', re.DOTALL)


def _ends(model: Any, said: tokenizer_files.Beside, ids: Mapping[str, int], file: str) -> tuple[int, int]:
    """BOS, -1 if texts have none, and EOS: what the files beside name counts more than the model."""
    bos = ids.get(said.tokens.get('bos', ''), model.bos_id())
    eos = ids.get(said.tokens.get('eos', ''), model.eos_id())
    if eos < 0:
        eos = next(iter(said.ends), -1)
    if eos < 0:
        raise UserError(
            f'{file}: the tokenizer names no token that ends a sequence; name one beside it: "eos_token" in '
            f'{tokenizer_files.CONFIG}'
        )
    return -1 if said.add_bos is False else bos, eos


def _model(file: str) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=file)
    except (RuntimeError, OSError) as error:
        raise UserError(f'{file}: not a sentencepiece model that can be read ({error})') from error
