"""The offline toy task: coffee orders from a grammar (toy_grammar.py), as four SeqIO tasks. Deterministic.

toy_sft      demonstrations, most of them with a mistake      toy_pairs    two answers, ranked by a rater
toy_prompts  what users say; `reference` is the right call    toy_thumbs   one answer, up or down
toy_noisy_pairs, toy_noisy_thumbs   the same of a rater who mixes up a quarter: for rewards that can be exploited;
               their splits train_1 and train_2 are other draws of 256, for rewards that share no rating
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Iterator

import seqio
import tensorflow as tf

from perl_jax.tasks import dialog_text, registration
from perl_jax.tasks import toy_grammar as grammar

SIZES = {'train': 12288, 'validation': 512, 'test': 512}
OTHER_DRAWS = {'train_1': 256, 'train_2': 256}
MIXED_UP = 0.25


class WordVocabulary(seqio.Vocabulary):
    """A closed set of words, each with the `=`, `(` or `:` behind it, and of punctuation.

    0 is padding, 1 EOS, 2 unknown. A word is the same token wherever it stands; decoding puts a space before it, but
    not after `=`, `(` or a line break: so all that the grammar says round-trips.
    """

    _PIECE = re.compile(r'\w+[=(:]?|[^\w ]', re.ASCII)  # TensorFlow's \w is ASCII's

    def __init__(self, texts: Iterator[str]) -> None:
        super().__init__()
        self._pieces = sorted({piece for text in texts for piece in self._PIECE.findall(text)})
        self._ids = {piece: 3 + i for i, piece in enumerate(self._pieces)}

    @property
    def bos_id(self) -> None:
        return None

    @property
    def eos_id(self) -> int:
        return 1

    @property
    def unk_id(self) -> int:
        return 2

    @property
    def _base_vocab_size(self) -> int:
        return 3 + len(self._pieces)

    def _encode(self, s: str) -> list[int]:
        return [self._ids.get(piece, 2) for piece in self._PIECE.findall(s)]

    def _decode(self, ids: list[int]) -> str:
        text = ''
        for piece in (self._pieces[i - 3] if i > 2 else '??' for i in ids if i > 1):
            joined = not text or text[-1] in '=(\n' or not piece[0].isalnum()
            text += piece if joined else f' {piece}'
        return text

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        cut = tf.strings.regex_replace(s, f' ?({self._PIECE.pattern})', '\\1\0')
        pieces = tf.strings.split(cut, '\0')[:-1]
        return self._table.lookup(pieces)

    @functools.cached_property
    def _table(self) -> tf.lookup.StaticHashTable:
        with tf.init_scope():
            known = tf.lookup.KeyValueTensorInitializer(self._pieces, list(self._ids.values()), value_dtype=tf.int32)
            return tf.lookup.StaticHashTable(known, default_value=self.unk_id)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.numpy_function(lambda row: self.decode(row.tolist()), [ids], tf.string)

    def __hash__(self) -> int:
        return hash(tuple(self._pieces))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordVocabulary) and self._pieces == other._pieces


def _prompt(words: str) -> str:
    return dialog_text.prompt(dialog_text.lines([{'role': 'user', 'text': words}]))


def _answer(arguments: grammar.Answer) -> str:
    """One line as dialog_text writes calls; it takes a dict, which could not hold an argument twice."""
    return f'call: add_order_item({", ".join(f"{slot}={value}" for slot, value in arguments)})'


def _requests(kind: str, split: str) -> Iterator[tuple[random.Random, str, grammar.Order, grammar.Order]]:
    """Each split and kind draws its own; sizes are `SIZES` and `OTHER_DRAWS`."""
    rng = random.Random(f'{kind} {split}')
    for _ in range((SIZES | OTHER_DRAWS)[split]):
        words, meant, first = grammar.request(rng)
        yield rng, _prompt(words), meant, first


def sft(split: str) -> Iterator[dict]:
    """What careless baristas entered."""
    for rng, inputs, meant, first in _requests('sft', split):
        yield {'inputs': inputs, 'targets': _answer(grammar.demonstrate(rng, meant, first))}


def pairs(split: str) -> Iterator[dict]:
    """Two answers, the one that the rater prefers first."""
    for rng, inputs, meant, first in _requests('pairs', split):
        chosen, rejected = grammar.compare(rng, meant, first)
        yield {'inputs': inputs, 'chosen': _answer(chosen), 'rejected': _answer(rejected)}


def thumbs(split: str) -> Iterator[dict]:
    """One answer and the rater's thumb."""
    for rng, inputs, meant, first in _requests('thumbs', split):
        answer, label = grammar.judge(rng, meant, first)
        yield {'inputs': inputs, 'targets': _answer(answer), 'label': label}


def noisy_pairs(split: str) -> Iterator[dict]:
    """`pairs`, a quarter of them the wrong way round."""
    rng = random.Random(f'noisy_pairs {split}')
    for pair in pairs(split):
        mixed_up = rng.random() < MIXED_UP
        yield pair | {'chosen': pair['rejected'], 'rejected': pair['chosen']} if mixed_up else pair


def noisy_thumbs(split: str) -> Iterator[dict]:
    """`thumbs`, a quarter of them the wrong way round."""
    rng = random.Random(f'noisy_thumbs {split}')
    for thumb in thumbs(split):
        mixed_up = rng.random() < MIXED_UP
        yield thumb | {'label': 1 - thumb['label']} if mixed_up else thumb


def prompts(split: str) -> Iterator[dict]:
    """What users say; `reference` is for the final measurement alone."""
    for _, inputs, meant, _ in _requests('prompts', split):
        yield {'inputs': inputs, 'reference': _answer(grammar.right(meant))}


def vocabulary() -> WordVocabulary:
    """Every piece of text that the grammar can say."""
    rng = random.Random('vocabulary')
    orders = [grammar.request(rng) for _ in range(5000)]
    texts = ((_prompt(words), _answer(grammar.right(meant))) for words, meant, _ in orders)
    return WordVocabulary(itertools.chain.from_iterable(texts))


_VOCABULARY = vocabulary()
for _kind in (sft, pairs, thumbs, prompts):
    registration.add(f'toy_{_kind.__name__}', _kind.__name__, _kind, _VOCABULARY)
for _kind in (noisy_pairs, noisy_thumbs):
    _name = _kind.__name__
    registration.add(f'toy_{_name}', _name.removeprefix('noisy_'), _kind, _VOCABULARY, splits=(*SIZES, *OTHER_DRAWS))
