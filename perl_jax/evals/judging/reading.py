"""Which choice a judge's reply makes: a verdict that opens it, a final answer, or what its sentences say.

In turn, the first that is there counts:

1. the choice that opens the reply:      '1', 'Answer 2.', 'I think 2. Answer 1 lacks ..', '1, because ..'
2. an answer that is announced, the last one, or the reply's last line:      'Final answer: 2', 'my choice is 1.'
3. what is compared or called harmful (statements.py):      'Answer 1 is better than Answer 2', 'I prefer the second'

What is mentioned is no choice: 'Answer 1 lacks detail' says nothing of 2. Contradictions, conditions, questions,
negations and hedges are unread, for a wrong reading is worse than none.
"""

from __future__ import annotations

import re

from perl_jax.evals.judging import statements
from perl_jax.evals.judging.mentions import BARE, HARM, NAMED, ORDER, REF, TIE, places, signed, words
from perl_jax.evals.judging.replies import plain

# A sentence of these and one choice makes that choice.
_FILLER = frozenset(
    """
    i i'd i'm i'll think would say believe guess feel choose pick select prefer go going with for definitely probably
    clearly certainly undoubtedly easily obviously personally honestly simply sure okay ok of course well so hmm here
    here's is it it's its that's this that which my the a an to be was has in between please note final overall answer
    verdict choice decision vote votes summary response reply option output number one two correct better best
    preferred winner winning chosen more most likely got gets goes judgement judgment conclusion opinion therefore
    thus hence result harmful
    """.split()  # noqa: SIM905
)
_RANKS = {'better', 'best', 'preferred', 'winner', 'more'}  # 'Answer 1 is better' is a claim, 'better: 1' a choice
_TIED = {'tie', 'tied', 'draw', 'equal', 'equally', 'identical', 'same'}
_TOGETHER = {'both', 'neither', 'they', 'are', 'good', 'bad', 'helpful', 'and', 'great', 'fine', 'roughly', 'about'}
_BUT = r'\s*(?:but|however|though|although|yet|if)\b'

_BREAK = r'(\n+|[.!?;:,)]+(?=\s|$)|\s[-–—>=→]+\s|\s*[–—]\s*|\b(?:because|since|as)\b)'
_REASON = (
    r"\s*(?:because|since|given|due|it|it's|this|i|i'd"
    r'|reasons?|reasoning|explanation|justification|rationale|why|note)\b'
)
_REVOKED = rf'\b(?:wait[,.! ]|scratch that|on second thoughts?|correction:|i mean(?:t)?\b|no,? [{BARE}{NAMED}])'
_REFUSED = r"\W*(?:(?:but )?i(?:'m| am) (?:sorry|unable|not able)|i (?:cannot|can't|won't|will not)|sorry)\b"

_SAFE_ASKED = r'\b(?:safe|harmless|acceptable|appropriate|okay|fine)\b[^.!?\n]*\?'  # NO: it does harm

_END = r'(?=\s*(?:$|\n|[.,;!)\]}]|\(|[-–—]\s|\b(?:because|since|as|over)\b))'
_CHOICE = rf'(?P<ref>[{BARE}{NAMED}]|tie|draw|both|neither|equal)'
_LABEL = (
    r'\b(?P<what>answer|verdict|choice|decision|judge?ment|winner|preference|pick|conclusion|selection|votes?|better'
    r'|best|prediction|guess|result|output|option|summary|response|reply|one|harmful)\b'
    rf'(?P<gap>[^\n.:?!,;=\d{BARE}{NAMED}]{{0,40}}?)'
    r'(?:\bis\b|\bwas\b|\bwould be\b|\bgoes to\b|[:=?]|->|→|=>|\n)\s*'
    rf'(?:(?:clearly|definitely|simply|therefore|thus|likely|probably|most likely|a|the)\s+)?{_CHOICE}{_END}'
)
_SO = (
    r"\b(?:so|thus|therefore|hence|overall|in conclusion)\b[:,]?\s+(?:it is |it's )?"
    rf'(?P<ref>[{BARE}{NAMED}])(?=\s*(?:$|\n|[.!]))'
)
_REJECTED = r"\b(?:not|never|no|worse|worst|weaker|losing|loser|rejected|less|fewer|wrong|inferior|if|unless)\b|n't\b"


def read(text: str, choices: tuple[str, ...]) -> int | str | None:
    """Which choice a reply makes.

    Args:
      text: the reply.
      choices: ORDER or HARM.

    Returns:
      The place of the choice, TIE where two answers are called equal, None where it cannot be told.
    """
    text = plain(text)
    said = signed(text, choices)
    turned = choices == HARM and re.search(_SAFE_ASKED, text, re.IGNORECASE)
    bare = [None, None] if turned else [_opening(said, choices), _last_line(said)]
    for verdict in (bare[0], _announced(said), bare[1]):
        if verdict is not None:
            return verdict if choices == ORDER or verdict != TIE else None
    return statements.compared(said) if choices == ORDER else statements.harmful(text)


def _opening(text: str, choices: tuple[str, ...]) -> int | str | None:
    """The choice of the first sentence that says anything, if it says nothing else."""
    parts = re.split(_BREAK, re.sub(r'\([^()]*(?:\)|\Z)', ' ', text))
    for i in range(0, len(parts), 2):
        said, end, rest = words(parts[i]), ''.join(parts[i + 1 : i + 2]), ''.join(parts[i + 2 :])
        if '?' in end or not said:
            continue
        others = {word for word in said if word not in REF and word not in _FILLER}
        if (_TIED & others or others in ({'both'}, {'neither'})) and others <= _TIED | _TOGETHER:
            return None if re.match(_BUT, rest, re.IGNORECASE) else TIE
        if others or len(places(parts[i])) > 1:
            return None
        if places(parts[i]):
            first = next(j for j, word in enumerate(said) if word in REF)
            stands = not _RANKS & {*said[first:]} and _stands(said[first], len(said) == 1, end, rest, choices)
            return REF[said[first]] if stands else None
    return None


def _stands(sign: str, alone: bool, end: str, rest: str, choices: tuple[str, ...]) -> bool:
    """Whether a choice that was met first is made: not taken back, a heading, a list's number or a clause's subject."""
    other = f'[{BARE[1 - REF[sign]]}{NAMED[1 - REF[sign]]}]'
    if re.match(rf'\s*{other}\W*(?:\n|\Z)', rest) or re.search(_REVOKED, rest, re.IGNORECASE):
        return False
    if choices == HARM:
        return sign == BARE[1] or not re.match(_REFUSED, rest, re.IGNORECASE)
    line = '' if '\n' in end else rest.partition('\n')[0]
    if sign in NAMED and alone:
        return not (_heads(sign, rest) or end.strip() == ':' and rest.strip()) and (
            not line or end.strip() in ('.', '!', 'because', 'since', 'as') or _gives_reason(line)
        )
    if end.strip() == ',' and line and sign in BARE:
        return _gives_reason(line) or bool(re.match(r'\s*(?:as|for|the)\b', line))
    return not (sign == BARE[0] and alone and end.strip() in ('.', ')', ':') and line and _numbers(line, rest))


def _heads(sign: str, rest: str) -> bool:
    """Whether 'Answer 1' is a heading, as the other one is further down."""
    return bool(re.search(rf'^{NAMED[1 - REF[sign]]}\s*(?:[:.–—-]|$)', rest, re.MULTILINE))


def _numbers(line: str, rest: str) -> bool:
    """Whether a '1.' begins a list, which may have been cut: unless its line gives a reason to choose 1."""
    if re.search(rf'(?:^|[.!?;]\s+){BARE[1]}[.):]', rest, re.MULTILINE):
        return True
    said = statements.compared(line)
    return said != 0 and not (said is None and _gives_reason(line))


def _gives_reason(line: str) -> bool:
    return bool(re.match(_REASON, line, re.IGNORECASE))


def _announced(text: str) -> int | str | None:
    """The last answer that is called one; the last final one, if any is called final."""
    found = []
    for match in re.finditer(_LABEL, text, re.IGNORECASE):
        before = re.split(r'[\n.?!,;]', text[: match.start()])[-1]
        about_one = len(places(before)) == 1  # 'Answer 1, rating: 2' is no answer
        if not about_one and not re.search(_REJECTED, f'{before} {match["what"]}{match["gap"]}', re.IGNORECASE):
            found.append((bool(re.search(r'\bfinal\W*$', before, re.IGNORECASE)), REF.get(match['ref'], TIE)))
    final = [verdict for called, verdict in found if called]
    follows = [REF[match['ref']] for match in re.finditer(_SO, text, re.IGNORECASE)]
    return (final or [verdict for _, verdict in found] or follows or [None])[-1]


def _last_line(text: str) -> int | None:
    """The choice of a last line that says nothing else, where it is no heading or list's number that was cut."""
    before, _, last = text.rpartition('\n')
    said = words(last)
    if not before or len(places(last)) != 1 or any(word not in REF and word not in _FILLER for word in said):
        return None
    sign = next(word for word in said if word in REF)
    if re.search(rf'^{BARE[1 - REF[sign]]}[.!]?$', before, re.MULTILINE) or _RANKS & {*said}:
        return None
    if len(said) == 1 and sign in NAMED and _heads(sign, before):
        return None
    listed = [bool(re.search(rf'^{number}[.):]', before, re.MULTILINE)) for number in BARE]
    return None if len(said) == 1 and sign == BARE[1] and listed == [True, False] else REF[sign]
