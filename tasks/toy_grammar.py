"""A small world to try RLHF in: people order coffee in words, and the right answer is one API call.

    user: hello, can i get two small iced mocha with soy milk? oh, and vanilla syrup
    call: add_order_item(item=mocha, quantity=2, size=small, temp=iced, milk=soy, syrup=vanilla)

Only this module knows what is right. Demonstrators, whom SFT learns from, are careless in ways of their own; raters,
whom the reward learns from, compare two answers and now and then mix them up; the truth is for measuring alone.
"""

from __future__ import annotations

import collections
import random

from perl_jax.tasks import dialog_text

Order = dict[str, str]  # what is meant: slot -> value
Answer = tuple[tuple[str, str], ...]  # what is entered: arguments in the order of the call, perhaps one of them twice

ITEMS = ('latte', 'mocha', 'americano', 'cappuccino', 'espresso', 'macchiato', 'cortado', 'ristretto')
SLOTS = {  # slot: {how it is said: what the call holds}, in the order of the call
    'quantity': {'two': '2', 'three': '3', 'four': '4'},
    'size': {
        'small': 'small',
        'little': 'small',
        'medium': 'medium',
        'regular': 'medium',
        'large': 'large',
        'big': 'large',
    },
    'temp': {'hot': 'hot', 'iced': 'iced', 'cold': 'iced'},
    'milk': {'oat': 'oat', 'soy': 'soy', 'almond': 'almond', 'skim': 'skim'},
    'syrup': {'vanilla': 'vanilla', 'caramel': 'caramel', 'hazelnut': 'hazelnut'},
}
ARGUMENTS = ('item', *SLOTS)
VALUES = {slot: tuple(dict.fromkeys(slot_words.values())) for slot, slot_words in SLOTS.items()} | {'item': ITEMS}
OPENINGS = ('', 'hello, ', 'hi, ', 'good morning, ')
ASKS = ('can i get ', 'i would like ', 'could i have ', 'please make me ')

LAST_REMARK = 0.58  # so often that even the most common demonstration is right for at most 60% of the requests
FORGETS = {'quantity': 0.4, 'size': 0.3, 'syrup': 0.35}  # how careless baristas are
NOT_LISTENING, MAKES_IT_HOT, SLIPS = 0.6, 0.3, 0.05
WRONG_ITEM = 0.08  # of the slips
MIXED_UP = 0.02  # how often a rater is


def request(rng: random.Random) -> tuple[str, Order, Order]:
    """What a user says, the order that is meant, and the order before the last remark (the same if there is none)."""
    slot_words = {slot: rng.choice(list(words)) for slot, words in SLOTS.items() if rng.random() < 0.5}
    item = rng.choice(ITEMS)
    first = {'item': item} | {slot: SLOTS[slot][word] for slot, word in slot_words.items()}
    words = [slot_words.get('quantity', 'a'), slot_words.get('size'), slot_words.get('temp'), item]
    text = rng.choice(OPENINGS) + rng.choice(ASKS) + ' '.join(filter(None, words))
    extras = [f'{slot_words[slot]} {slot}' for slot in ('milk', 'syrup') if slot in slot_words]
    text += (' with ' + ' and '.join(extras) if extras else '') + '?'
    if rng.random() < LAST_REMARK:
        slot = rng.choice(['milk', 'syrup'])
        if slot in first:
            return f'{text} no wait, no {slot}', {k: v for k, v in first.items() if k != slot}, first
        word = rng.choice(list(SLOTS[slot]))
        return f'{text} oh, and {word} {slot}', first | {slot: SLOTS[slot][word]}, first
    return text, first, first


def truth(prompt: str, response: str, example: dict[str, str]) -> float:
    """1 if the call orders exactly what was meant, which `example['reference']` holds, else 0."""
    del prompt
    return float(dialog_text.parse_call(response) == dialog_text.parse_call(example['reference']))


def demonstrate(rng: random.Random, meant: Order, first: Order) -> Answer:
    """What a careless barista enters: leaves out, does not listen to the end, adds what nobody asked for."""
    order = dict(first if rng.random() < NOT_LISTENING else meant)
    for slot, share in FORGETS.items():
        if rng.random() < share:
            order.pop(slot, None)
    if rng.random() < MAKES_IT_HOT:
        order.setdefault('temp', 'hot')
    return slip(rng, right(order)) if rng.random() < SLIPS else right(order)


def right(order: Order) -> Answer:
    """The arguments of the right call."""
    return tuple((slot, order[slot]) for slot in ARGUMENTS if slot in order)


def slip(rng: random.Random, answer: Answer) -> Answer:
    """Get one argument wrong: left out, made up or entered twice; now and then another value for it."""
    slot, order = 'item' if rng.random() < WRONG_ITEM else rng.choice(list(SLOTS)), dict(answer)
    if slot not in order:
        return right(order | {slot: rng.choice(VALUES[slot])})
    if slot == 'item' or rng.random() < 0.1:
        return right(order | {slot: rng.choice([v for v in VALUES[slot] if v != order[slot]])})
    if rng.random() < 0.25:
        return tuple(argument for argument in answer for _ in range(1 + (argument[0] == slot)))
    return tuple(argument for argument in answer if argument[0] != slot)


def mistakes(answer: Answer, meant: Order) -> int:
    """How many arguments are wrong, missing or too many."""
    answered, expected = collections.Counter(answer), collections.Counter(right(meant))
    return max((answered - expected).total(), (expected - answered).total())


def compare(rng: random.Random, meant: Order, first: Order) -> tuple[Answer, Answer]:
    """Two different answers as a rater ranks them, (chosen, rejected): fewer mistakes win, up to a mix-up."""
    while True:
        a = right(meant) if rng.random() < 0.6 else _attempt(rng, meant, first)
        b = _attempt(rng, meant, first)
        if mistakes(a, meant) != mistakes(b, meant):
            better, worse = sorted((a, b), key=lambda answer: mistakes(answer, meant))
            return (worse, better) if rng.random() < MIXED_UP else (better, worse)


def judge(rng: random.Random, meant: Order, first: Order) -> tuple[Answer, float]:
    """An answer and its thumb: up for a right one, up to a mix-up."""
    answer = _attempt(rng, meant, first)
    good = mistakes(answer, meant) == 0
    return answer, float(good != (rng.random() < MIXED_UP))


def _attempt(rng: random.Random, meant: Order, first: Order) -> Answer:
    """Answers to be rated: a demonstrator's, or the right one, each with or without a slip on top."""
    answer = demonstrate(rng, meant, first) if rng.random() < 0.5 else right(meant)
    return slip(rng, answer) if rng.random() < 0.4 else answer
