"""A tokenizer's file with all that is said of it beside: what tokenizers.py makes a vocabulary of."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from perl_jax.errors import UserError
from perl_jax.tokenizers import gguf_tokenizer, marked_encoder, tokenizer_files
from perl_jax.tokenizers.chat import controls, render


@dataclasses.dataclass(frozen=True)
class Loaded:
    """tokenizer: as it is, to decode.   encoders: to encode; the second puts no space in front of a text.

    special: the control tokens' ids: what is special to the tokenizer, or named beside it.
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
        """The first of those that end a sequence."""
        return self.eos_ids[0]

    @property
    def puts_space(self) -> bool:
        """Whether a text that begins a sequence gets a space in front."""
        return self.encoders[0] is not self.encoders[1]

    def encode(self, text: str, goes_on: bool) -> list[int]:
        """The ids of a text with the marks of controls.py; a BOS that it begins with is one, whoever wrote it."""
        bos = None if goes_on or self.bos_id is None else self.tokenizer.id_to_token(self.bos_id)
        if bos and text.startswith(bos):  # the one that a run would put there anyway
            text = controls.mark(bos) + text[len(bos) :]
        return self.encoders[goes_on](text)


@functools.lru_cache(maxsize=8)
def load(found: pathlib.Path, path: str, eos: str | None) -> Loaded:
    """Read the file once for all vocabularies that name it.

    Args:
      path: what messages call it.
      eos: the token that ends a sequence, if not the one that the files name.

    Raises:
      UserError: it is no tokenizer, or nothing says what ends a sequence.
    """
    said = tokenizer_files.beside(found)
    tokenizer, special = _read(found, path, eos)
    special['eos'] = eos or special['eos'] or next((tokenizer.id_to_token(i) for i in said.ends), None)
    ids = {k: tokenizer.token_to_id(token) if token else None for k, token in special.items()}
    if ids['eos'] is None:
        named = f'has no token {special["eos"]!r}' if special['eos'] else 'names no token that ends a sequence'
        raise UserError(f'{path}: the tokenizer {named}; say which one: TokenizersVocabulary(path, eos=...)')
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    control = {text: vocab[text] for text in _control(tokenizer, said, ids['eos'])}
    turn = render.end_of_turn(said, control)
    ends = [ids['eos'], *said.ends, *([] if turn is None else [control[turn]])]
    written = ' '.join(said.templates.values())
    never = {i for text, i in control.items() if text not in written} - {*ends, *ids.values()}  # no text has them
    continues = 'bos' in said.tokens or ids['bos'] is not None
    return Loaded(
        tokenizer, marked_encoder.pair(tokenizer, control, continues), control, ids['bos'],
        tuple(dict.fromkeys(ends)), ids['unk'],
        size=max(vocab.values()) + 1, reachable_size=max(set(vocab.values()) - never) + 1,
    )  # fmt: skip


@functools.lru_cache(maxsize=8)
def control_tokens(found: pathlib.Path, path: str) -> tuple[str, ...]:
    """The tokens of a tokenizer that a chat template puts in and no text has.

    Raises:
      UserError: it is no tokenizer.
    """
    return tuple(_control(_read(found, path)[0], tokenizer_files.beside(found)))


def _control(tokenizer: Any, said: tokenizer_files.Beside, *ends: int) -> list[str]:
    """Special tokens; and of other added ones those that end answers, stand between turns or are said to be such."""
    added = tokenizer.get_added_tokens_decoder()
    special = [token.content for token in added.values() if token.special]
    plain = {token.content: i for i, token in added.items() if not token.special}
    others = {text: i for text, i in plain.items() if re.search(r'[^\w\s]', text)}  # no words, no spaces
    turns = render.between_turns(said, [*special, *others])
    end, named = render.end_of_turn(said, [*special, *others]), [settings['content'] for settings in said.special]
    no_text = {*turns, end, *said.control, *said.tokens.values(), *named}
    return special + [text for text, i in others.items() if i in {*ends, *said.ends} or text in no_text]


def _read(found: pathlib.Path, path: str, eos: str | None = None) -> tuple[Any, dict[str, str | None]]:
    """The tokenizer with the tokens that are only named beside it, and its bos, eos and unk."""
    said = tokenizer_files.beside(found)
    try:
        read = gguf_tokenizer.build(found) if found.suffix == '.gguf' else _from_json(found, said)
    except UserError:
        raise
    except ImportError as e:
        raise UserError(f'{path}: reading a tokenizer needs the tokenizers package; pip install tokenizers') from e
    except Exception as e:  # a bare Exception is what the package raises
        raise UserError(f'{path}: not a tokenizer that can be read ({e})') from e
    tokenizer, special = read
    _add(tokenizer, said, found, eos)
    said.check_ends(tokenizer.get_vocab_size(), path)
    tokenizer.no_truncation()  # a run's lengths and masks are its own
    tokenizer.no_padding()
    return tokenizer, special


def _add(tokenizer: Any, said: tokenizer_files.Beside, found: pathlib.Path, eos: str | None) -> None:
    """Add what is only said beside the tokenizer, as transformers does; and what is named there is special."""
    from tokenizers import AddedToken

    for i, settings in sorted(said.added.items()):
        if tokenizer.token_to_id(settings['content']) is None:
            token = AddedToken(**settings)
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
            if (got := tokenizer.token_to_id(token.content)) != i:
                raise UserError(
                    f'{said.added_in}: {i} for {token.content!r}, which is {got} behind the tokens of {found.name}'
                )
    by_hand = [] if eos is None or tokenizer.token_to_id(eos) is None else [{'content': eos, 'normalized': False}]
    for settings in (*said.special, *by_hand):
        if settings['content'] not in {token.content for token in tokenizer.get_added_tokens_decoder().values()}:
            tokenizer.add_special_tokens([AddedToken(**settings)])  # one that is there keeps its flags


def _from_json(found: pathlib.Path, said: tokenizer_files.Beside) -> tuple[Any, dict[str, str | None]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(found))
    opens = tokenizer.encode('').ids  # what its post-processor puts around an empty text
    bos = said.tokens.get('bos')
    if not said.add_bos:
        bos = tokenizer.id_to_token(opens[0]) if opens and said.add_bos is None else None
    return tokenizer, {
        'bos': None if bos == said.tokens.get('eos') else bos,
        'eos': said.tokens.get('eos'),
        'unk': said.tokens.get('unk') or getattr(tokenizer.model, 'unk_token', None),
    }
