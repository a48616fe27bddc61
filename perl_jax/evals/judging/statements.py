"""Finds claims in a judge's sentences about which of two answers is better.

A clause casts a vote only if all its words are understood: those before the answer ('I think that'), those between the
answer and the claim ('is clearly'), and those that follow. A negation, a hedge or an aspect ('better in no way',
'rarely better', 'better on style') is none of these. The votes of the strongest kind present must agree, and no later
sentence may turn against them ('However, it is wrong'), else there is no verdict.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from perl_jax.evals.judging.mentions import BARE, NAMED, NEUTRAL, REF, TIE, WORSE, places, words

_ANY = f'[{BARE}{NAMED}]'
_NOUN = r'(?:answer|summary|response|reply|one|choice|option|candidate)'
_GOOD = (
    '(?:good|helpful|accurate|complete|coherent|comprehensive|informative|relevant|clear|useful|thorough|correct'
    '|faithful|concise)'
)
_CLAIMS = {  # (whether the vote is strong, whether it is for the answer): what the clause says of the answer
    (True, True): 'better|best|superior|preferable|preferred|winner|stronger|more (?:up)?votes|beats|wins|outperforms'
                  '|surpasses|edges out|comes out ahead|edge',
    (True, False): 'worse|worst|inferior|weaker|weakest|poorer|poorest|(?:fewer|less) (?:up)?votes|loses',
    (False, True): rf'clearer|fuller|more {_GOOD}|better (?:written|structured|organi[sz]ed|worded)',
    (False, False): rf'less {_GOOD}',
}  # fmt: skip
_BETWEEN = NEUTRAL | frozenset(
    """
    much far slightly somewhat also just still even significantly considerably marginally generally substantially
    notably decidedly ultimately objectively seems seem appears feels reads does do did makes make provides provide
    gives give offers have by bit little lot comes clear
    """.split()  # noqa: SIM905
)
_BEFORE = NEUTRAL | frozenset('there after reading comparing both and readers users people judges leaning'.split())  # noqa: SIM905
_AFTER = (  # what may follow a claim
    rf"\s*(?:$|{_ANY}|{_NOUN}\b|(?:overall|here|of|by|due|the|it|job|hands|easily|clearly|and|for|in|on|at)\b"
    rf'|(?:than|to|over) (?:{_ANY}|the other\b|its?\b))'
)
_BESIDE = rf'\bthan\b(?! (?:{_ANY}|the other\b|its?\b))|\bto (?:skip|avoid|ignore|reject)\b'  # 'better than most'
_NEGATED = r"\b(?:not|no|never|nothing|nobody|none|neither|nor|hardly|rarely|seldom|barely|cannot|only)\b|n't\b"
_ASPECT = (
    r'\b(?:in|at|on|for|when|regarding|about|concerning)\b'
    r'(?! (?:every|all|general|my|this|both|most|almost|nearly|each|its|being|balance)\b)'
)
_PREFERS = (
    r'\b(?:prefer|choose|chose|pick|select|favou?r|recommend|go(?:ing)? (?:with|for)|lean(?:ing)? towards?|vote for'
    r'|opt for|vote goes to)'
)
_PATTERNS = [  # (pattern, strong, whether x wins)
    *((rf"^(?P<before>.*?)(?P<x>{_ANY})(?!'s)(?P<between>(?:\s+[a-z'-]+)*?)\s+(?:{claim})\b(?={_AFTER})(?P<after>.*)",
       strong, wins) for (strong, wins), claim in _CLAIMS.items()),
    (rf"^(?P<before>.*?){_PREFERS}\s+(?P<x>{_ANY})(?!'s)(?P<after>.*)", True, True),
    (rf'^(?P<before>.*?)\b(?:better|best|superior|stronger|preferred|preferable|winning)(?:\s+(?:{_NOUN}|of the two))?'
     rf'\s+(?:is|was|would be)\s+(?P<x>{_ANY})(?P<after>)(?=\W*$)', True, True),
    (rf'^(?P<before>.*?)(?P<x>{_ANY})\s*(?:>+|≻)\s*{_ANY}(?P<after>)', True, True),
    (rf'^(?P<before>.*?)(?P<x>{_ANY})\s*(?:<+|≺)\s*{_ANY}(?P<after>)', True, False),
]  # fmt: skip
_SHORT = (  # 'is not as good as'
    rf"^(?P<before>.*?)(?P<x>{_ANY})(?:\s+[a-z']+)?\s*(?:not|n't) (?:nearly |quite |almost )?(?:as|so) {_GOOD} as\b"
)
_ASSURED = r'\bnot (?:only|just|merely)\b|\bno doubt\b|\bwithout (?:a |any )?doubt\b'  # not negations
_HEDGED = (
    r'\b(?:might|may|could|some|perhaps|possibly|were|unclear|whether|unsure|wrongly|claims?)\b'
    r'|\b(?:people|users|readers|judges)(?: \w+)? (?:say|think|believe|feel|claim)\b'
)
AT_FIRST = (
    r'\b(?:at first|first (?:glance|sight|look)|on the (?:surface|face)'
    r'|initially|previously|earlier|before|superficially|on paper)\b'
)
TURNS = (  # how a sentence begins that takes the one before it back
    r"(?:but|however|yet|still|actually|that said|then again|nevertheless|nonetheless|wait|looking (?:closer|again)"
    r'|on (?:a )?(?:closer|second|further|reflection)|i disagree'
    r"|(?:they|that|this|it)(?:'s|'re| is| are) (?:wrong|false|mistaken))\b"
)
_CONDITION = r'\b(?:if|unless|otherwise|depending|depends)\b'
_CONCLUDES = (
    r'\b(?:overall|therefore|thus|hence|ultimately|in (?:conclusion|summary|short|total|the end)|on balance'
    r'|all things considered|to conclude|altogether)\b'
)
_CLAUSES = (
    r'([,:()]|\s[-–—]+\s|[–—]|\b(?:but|so|while|whereas|because|since|although|though|however|yet|therefore|which|as'
    rf'|without|despite)\b|\bwith(?= no\b)|\band\b(?=\s*(?:{_ANY}|not|does|it)))'
)
_RESERVED = r"\b(?:less|fewer|lacks?|fails?|wrong|incorrect|inaccurate|not|no|never)\b|n't\b"  # after 'but'
_ATTRIBUTED = r'^\s*(?:not|or so|supposedly|allegedly)\b|\b(?:user|thinks|claims|says)\b'
_EQUAL = (
    r'\b(?:are|is|as|be)\s+(?:about |roughly |essentially |both |basically |nearly )?'
    r'(?:equally \w+|the same|identical|equal|tied|a tie|a draw)(?! \w*(?:topic|length))'
    r'|\bno (?:clear |real |significant |meaningful )?(?:difference|winner)\b|\bneither\b.{0,30}\bbetter\b'
    r"|\bit's a (?:tie|draw)\b"
)
_TILTED = rf'[{BARE}{NAMED}]|\b(?:edge|slight(?:ly)?|prefer|lean(?:ing)?)\b'  # after 'it is a tie', a choice
_LEADS = (  # 'On style, Answer 1 is better' is of one aspect, 'In my opinion, ..' is not
    r'\s*(?:in|on|for|at|regarding|concerning|when|where|from|with)\b(?! (?:my|conclusion|summary|short|total|general'
    r'|the end|the whole|balance|every|all|both|these reasons|this reason)\b)'
)
_DESCRIBED = rf'[{NAMED}]\s+(?:is|was|has|gives|provides|lacks)\b'  # no choice after 'Tie.'
_FAVOURED = r'\b(?:better|best|wins|winner|beats|superior|stronger|preferable|preferred|edge)\b'
_HEADINGS = NEUTRAL | {'ranking', 'reason', 'reasoning', 'explanation', 'comparison', 'justification', 'because'}


def compared(text: str) -> int | str | None:
    """Find which of two answers the sentences prefer.

    Args:
      text: a plain reply in which the signs of REF mark mentions of the two answers.

    Returns:
      0, 1 or TIE; None if there is no claim or claims contradict each other.
    """
    concluded, strong, weak, equal, taken_back = [], [], [], False, False
    for sentence in sentences(text):
        tie = re.search(_EQUAL, sentence)
        equal |= bool(tie) and not re.search(r"\bnot\b|n't\b", sentence)
        equal &= not re.search(_TILTED, sentence[tie.end() :] if tie else sentence)
        votes = list(_votes(sentence))
        strong += [vote for is_strong, vote in votes if is_strong]
        weak += [vote for is_strong, vote in votes if not is_strong]
        concluded += [vote for is_strong, vote in votes if is_strong and re.search(_CONCLUDES, sentence)]
        taken_back = not votes and (taken_back or bool(re.match(TURNS, sentence)))
    for votes in (concluded, strong, weak):
        if votes:
            return votes[0] if len(set(votes)) == 1 and not taken_back else None
    return TIE if equal else None


def favours(rest: str) -> bool:
    """Tell whether 'Tie.' is followed by a choice, rather than by a description of the answers."""
    is_described = not places(re.sub(_DESCRIBED, '', rest)) and not re.search(_FAVOURED, rest, re.IGNORECASE)
    return bool(places(rest)) and not is_described


def sentences(text: str) -> list[str]:
    """Split a text into sentences in lower case, without questions and conditions."""
    return [
        re.sub(_ASSURED, '', sentence.rstrip('.!;\n').strip())
        for sentence in re.findall(r'[^.!?;\n]+[.!?;\n]?', text.lower())
        if '?' not in sentence and not re.search(_CONDITION, sentence)
    ]


def _votes(sentence: str) -> Iterator[tuple[bool, int]]:
    """Yields (strong, 0 or 1) for each claim of a sentence."""
    if re.search(AT_FIRST, sentence):
        return
    if (match := re.match(_SHORT, sentence)) and _is_neutral(re.split(_CLAUSES, match['before'])[-1], _BEFORE):
        yield True, 1 - REF[match['x']]
    pieces = re.split(_CLAUSES, sentence)
    for i in range(0, len(pieces), 2):
        clause = re.sub(rf'{_ANY}\s+and\s+{_ANY}', '', pieces[i]).strip()
        if re.search(_HEDGED, clause) or re.match(r'both\b', clause) or not _is_introduced(pieces[:i], clause):
            continue
        if (vote := _vote(clause)) and not _is_qualified(pieces[i + 1 :]):
            yield vote


def _vote(clause: str) -> tuple[bool, int] | None:
    for pattern, strong, wins in _PATTERNS:
        if (
            (match := re.match(pattern, clause))
            and _is_neutral(match['before'], _BEFORE)
            and _is_neutral(match.groupdict().get('between', ''), _BETWEEN)
            and not re.search(f'{_NEGATED}|{_ASPECT}|{_BESIDE}|{WORSE}', match['after'])
        ):
            return strong, REF[match['x']] if wins else 1 - REF[match['x']]
    return None


def _is_neutral(text: str, understood: frozenset[str]) -> bool:
    return understood.issuperset(words(text))


def _is_introduced(pieces: list[str], clause: str) -> bool:
    """Tell whether the clauses before this one are no heading or aspect that narrows it."""
    for lead, separator in zip(pieces[::2], pieces[1::2]):
        if re.search(_ANY, lead):
            continue
        if re.match(_LEADS, lead) or separator == ':' and not _is_neutral(lead, _HEADINGS):
            return False
    return not clause.startswith('that ') or bool(pieces) and _is_neutral(pieces[-2], _BEFORE)


def _is_qualified(pieces: list[str]) -> bool:
    """Tell whether what follows in the sentence goes on about the same answer, and against it."""
    for separator, clause in zip(pieces[::2], pieces[1::2]):
        if re.search(_ANY, clause):
            return False
        reserved = f'{WORSE}|{_ATTRIBUTED}' + (f'|{_RESERVED}' if separator in ('but', 'however', 'yet') else '')
        if re.search(reserved, clause):
            return True
    return False
