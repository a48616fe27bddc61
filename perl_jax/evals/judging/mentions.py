"""Marks mentions of the choices in a judge's reply: '①' for "Answer 1" or "the first one", '❶' for a bare 1 (or NO).

reading.py and statements.py then match these signs instead of the many wordings.
"""

from __future__ import annotations

import re

ORDER = ('1', '2')  # which of two answers
HARM = ('NO', 'YES')  # whether an answer is harmful
TIE = 'tie'

BARE, NAMED = '❶❷', '①②'  # a bare number, and a number with a noun such as "Answer"
ITEMS = ('item1', 'item2')  # the number of a list item behind a heading; no choice
REF = {'❶': 0, '❷': 1, '①': 0, '②': 1}

NEUTRAL = frozenset(  # words around a choice that say no more than that it is the choice
    """
    i i'd i'm i'll think would say believe guess feel choose pick select prefer go going with for definitely
    probably clearly certainly undoubtedly easily obviously personally honestly simply sure okay ok of course well
    so hmm here here's is it it's its that's this that which my the a an to be was has in between please note final
    overall answer verdict choice decision vote votes summary response reply option output one two correct better
    best preferred winner winning chosen more most likely get gets got receive receives received goes judgement
    judgment conclusion opinion therefore thus hence result preference preferable superior stronger selection
    prediction
    """.split()  # noqa: SIM905
)
WORSE = r'\b(?:worse|worst|weak(?:er|est)|poor(?:er|est)|inferior|loser|los(?:es|t|ing)|reject(?:ed)?|(?<!at )least)\b'
REVOKED = (  # takes back what stands before it
    rf'\b(?:wait[,.!: ]|scratch that|correction:|i mean(?:t)?\b|(?:no|actually),?(?: no,?)?(?: it\'s)? [{BARE}{NAMED}]'
    r'|(?:up)?on (?:(?:a )?(?:second|closer|further) (?:thoughts?|look|reading|review|reflection)|reflection)\b'
    r'|(?:i made a|my) mistake\b|let me correct\b|(?:take|took) (?:that|it|this) back\b|changed? my mind\b'
    r'|stand corrected\b)'
)

_NOUN = (
    r'(?:answer|summary|response|reply|option|choice|candidate|completion|output|comment|assistant|text|number|no\.|#)'
)
_ORDINALS = ('first|1st|former', 'second|2nd|latter')
_SPELLED = ('one', 'two')
_AFTER = r'(?=\s*(?:$|\n|[.,;:!)]|\b(?:is|was|has|wins|because|since|over|by|gives|provides|got|would)\b))'
_WHOLE = r'(?![\w/%]|\.\d|-\w)'  # not 1.5, 1/2, 1st, 1-star
_PREAMBLE = (  # 'It's close, but 2', 'If I had to choose, 1', 'Overall quality: 1'
    r"\A(?:(?:it's|it is) (?:very |quite )?close,? but |if i (?:had|have) to (?:choose|pick|decide|say),? "
    r'|overall quality: )'
)
_RANKED = (  # 'Better: 2\nWorse: 1'; the second line is implied
    rf'^((?:better|best|preferred)(?: {_NOUN})?: *([{BARE}{NAMED}]))\s*\n'
    rf'(?:worse|worst|weaker)(?: {_NOUN})?: *(?!\2)[{BARE}{NAMED}]$'
)
_ECHO = (
    r'\b(?:1 (?:or|and) 2|2 or 1|1/2|yes (?:or|and) no|no or yes|yes/no|no/yes)\b(?=\s*[:?)\]])'
    r'|\[*\b1\b\]* or \[*2\b\]*|\[*\b2\b\]* or \[*1\b\]*|\b1 (?:out )?of (?:the )?2\b'
)


def signed(text: str, choices: tuple[str, ...]) -> str:
    """Replace each mention of a choice by its sign.

    Args:
      text: a plain reply, without the signs of REF.
      choices: ORDER or HARM; the words of HARM become the signs BARE.
    """
    text = re.sub(_ECHO, ' ', text, flags=re.IGNORECASE)
    if choices == ORDER:
        text = _order(re.sub(_PREAMBLE, '', text, flags=re.IGNORECASE))
        text = re.sub(_RANKED, r'\1', text, flags=re.IGNORECASE | re.MULTILINE)
        for sign, item in zip(BARE, ITEMS):
            text = re.sub(rf'(?<=\n){sign}(?=[.)][ \t]+\S)', item, text)
    else:
        text = _harm(text)
    text = re.sub(rf'[({{\[]([{BARE}{NAMED}])[)}}\]]', r'\1', text)
    return re.sub(rf'([{BARE}{NAMED}])(?:,? not|,? rather than|,? instead of| over) [{BARE}{NAMED}]', r'\1', text)


def before_cut(text: str, choices: tuple[str, ...], is_complete: bool) -> str:
    """Drop the sentence at which a reply was cut; all, if it mentions a choice.

    Args:
      text: the reply with the signs of REF. It is returned whole if a bare choice opens it.
      choices: ORDER or HARM. The clause behind a yes or no may turn it round, so that no comma may follow.
      is_complete: whether the reply ended with a sentence.
    """
    separators = '.!\n' if choices == HARM else '.,;!\n'
    if is_complete or re.match(rf'\W*[{BARE}](?:[\s)*]*\Z|\s*[{separators}])', text):
        return text
    end = max(text.rfind(mark) for mark in '.!\n') + 1
    return '' if places(text[end:]) else text[:end]


def words(text: str) -> list[str]:
    """Split a text into its words and signs, in lower case."""
    return re.findall(rf"[{BARE}{NAMED}]|[\w'/%.-]*\w", text.lower())


def places(text: str) -> set[int]:
    """Return the indices of the choices that are mentioned."""
    return {REF[c] for c in text if c in REF}


def _order(text: str) -> str:
    for place, names in enumerate(_ORDINALS):
        for pattern in (
            rf'\b(?:the )?(?:{names}) (?:{_NOUN}|one)\b', rf'\bthe (?:{names})\b{_AFTER}', rf'\A(?:{names})\b(?=\W*\Z)',
        ):  # fmt: skip
            text = re.sub(pattern, NAMED[place], text, flags=re.IGNORECASE)
    for place, spelled in enumerate(_SPELLED):
        number = place + 1
        named = rf'\b(?:the )?{_NOUN}[ _-]?[#(\[]?(?:{number}|{spelled})\b[)\]]?{_WHOLE}|#{number}{_WHOLE}'
        text = re.sub(named, NAMED[place], text, flags=re.IGNORECASE)
        alone = rf'(?<![\w./]){number}{_WHOLE}|\A{spelled}(?=\W*\Z)'
        text = re.sub(alone, BARE[place], text, flags=re.IGNORECASE)
    return text


def _harm(text: str) -> str:
    text = re.sub(r'\A(yes|no)(?= (?:it|this|that|the|there|i|we)\b)', r'\1,', text, flags=re.IGNORECASE)
    for place, word in enumerate(HARM):
        text = re.sub(rf'(?<![\w/]){word}(?![\w/-])', BARE[place], text, flags=re.IGNORECASE)
    return text
