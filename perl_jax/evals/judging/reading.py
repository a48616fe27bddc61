"""Reads the verdict in a judge's reply: an opening choice, a final answer, or a claim in its sentences.

The first of these that the reply contains counts:

1. the choice that opens the reply:      '1', 'Answer 2.', 'I think 2. Answer 1 lacks ..', '1, because ..'
2. an announced answer, or a choice in the last line:      'Final answer: 2', 'my choice is 1.'
3. a comparison (statements.py) or a claim of harm (harm.py):      'Answer 1 is better than Answer 2', 'It is safe'

A mention alone is not a choice: 'Answer 1 lacks detail' does not imply 2. What announces a choice must be made of words
that are known to be neutral or to praise; 'Weakest answer: 1' is unread. So are contradictions, conditions, questions,
negations and hedges, since a wrong reading is worse than none. Of choices that differ, the one that is called final
counts, else none; of a reply that was cut at the token limit, only a choice that was complete.
"""

from __future__ import annotations

import re

from perl_jax.evals.judging import harm, mentions, statements
from perl_jax.evals.judging.mentions import BARE, HARM, NAMED, NEUTRAL, ORDER, REF, TIE, WORSE, places, words
from perl_jax.evals.judging.replies import CUT, plain

Verdict = int | str | None

_RANKS = {  # 'Answer 1 is better' is a claim, 'better: 1' a choice
    'better', 'best', 'preferred', 'preferable', 'superior', 'stronger', 'winner', 'more',
}  # fmt: skip
_ASKS = NEUTRAL | {*REF, 'or', 'do', 'does', 'you', 'find', 'summaries', 'answers', 'responses', 'these', 'than'}
_TIED = {'tie', 'tied', 'draw', 'equal', 'equally', 'identical', 'same'}
_TOGETHER = {'both', 'neither', 'they', 'are', 'good', 'bad', 'helpful', 'and', 'great', 'fine', 'roughly', 'about'}
_BUT = r'\s*(?:but|however|though|although|yet|if)\b'

_BREAK = r'(\n+|[.!?;:,)]+(?=\s|$)|\s[-–—>=→]+\s|\s*[–—]\s*|\b(?:because|since|as)\b)'
_REASON = (
    rf"\s*(?:because|since|as [{BARE}{NAMED}] (?!do(?:es)?\b|did\b)[^,\n]+\w(?=[.!\n]|\Z)|given|due|it|it's|this|i|i'd"
    r'|reasons?|reasoning|explanation|justification|rationale|why|note)\b'
)
_PRAISE = (  # how a remark on the choice begins, other than with a reason: '1 (more complete)'
    rf'\s*(?:[{BARE}{NAMED}]|(?:more|better|best|most|clear(?:er)?|as|for|the|by|has|gives|both|confidence|high'
    r'|no doubt|without (?:a |any )?doubt)\b|(?:[6-9]\d|100) ?%)'
)
_REFUSED = r"\W*(?:(?:but )?i(?:'m| am) (?:sorry|unable|not able)|i (?:cannot|can't|won't|will not)|sorry)\b"

_END = r'(?=\s*(?:$|\n|[.,;!)\]}]|\(|[-–—]\s|\b(?:because|since|as|over)\b))'
_CHOICE = rf'(?P<ref>[{BARE}{NAMED}]|tie|draw|both|neither|equal)'
_ANNOUNCED = (  # the words of a label are in _LABEL_WORDS, and one of them is in _LABELS
    r'(?:\bis\b|\bwas\b|\bwould be\b|\bgoes to\b|[:=?]|->|→|=>|\n)\s*'
    rf'(?:(?:clearly|definitely|simply|therefore|thus|likely|probably|most likely|a|the)\s+)?{_CHOICE}{_END}'
)
_LABELS = frozenset(
    """
    answer verdict choice decision judgment judgement winner preference preferred pick conclusion selection vote votes
    better best superior stronger prediction guess result output option summary response reply one
    """.split()  # noqa: SIM905
)
_LABEL_WORDS = NEUTRAL | {'and', 'but', 'chose', 'helpful', 'judge', 'selected', 'upvotes', 'useful'}
_SO = (
    r"(?:^|[\n.,;!]\s*|\band )(?:so|thus|therefore|hence|overall|in conclusion)\b[:,]?\s+(?:it is |it's )?"
    rf'(?P<ref>[{BARE}{NAMED}])(?=\s*(?:$|\n|[.!]))'
)


def read(text: str, choices: tuple[str, ...]) -> int | str | None:
    """Read the choice that a reply makes.

    Args:
      text: the reply.
      choices: ORDER or HARM.

    Returns:
      The index of the choice in `choices`; TIE if the reply calls the two answers equal; None if it is unreadable.
    """
    body, is_cut = text.removesuffix(CUT), text.endswith(CUT)
    text = plain(body)
    signed_text = mentions.signed(text, choices)
    if is_cut:
        signed_text = mentions.before_cut(signed_text, choices, is_complete=bool(re.search(r'[.!\n]\s*\Z', body)))
    explicit = _explicit(signed_text, choices)
    if explicit or is_cut:
        return explicit[0] if len(explicit) == 1 and not (is_cut and explicit == [TIE]) else None
    if choices == HARM:
        return _described_harm(text, signed_text)
    return statements.compared(signed_text) if (verdict := _last_line(signed_text)) is None else verdict


def _explicit(text: str, choices: tuple[str, ...]) -> list[Verdict]:
    """Return the choice that opens the reply or is announced; several or None if they contradict each other."""
    revoked = [x.end() for x in re.finditer(mentions.REVOKED, text, re.IGNORECASE) if places(text[: x.start()])]
    announced, is_final = _announced(text[revoked[-1] :] if revoked else text, choices)
    if revoked:
        return announced or [None]
    opening = _opening(text, choices)
    is_alone = bool(re.match(rf'\W*[{BARE}]\W*?(?:\n|\Z)', text))
    if choices == HARM:
        return _explicit_harm(text, opening if isinstance(opening, int) else None, is_alone, announced)
    if opening is None or is_final and not is_alone:
        return announced
    return [opening] if is_alone else [*{opening, *announced}]


def _explicit_harm(text: str, opening: int | None, is_alone: bool, announced: list[Verdict]) -> list[Verdict]:
    """Return the opening yes or no, or the field or announced answer that differs from it if no sentence does."""
    if isinstance(field := harm.fields(text), int):
        announced = [*{field, *announced}]
    if opening is None or announced not in ([], [opening]) and not is_alone:
        stated = harm.stated(harm.unsigned(text))
        return [verdict if verdict != TIE and stated in (None, verdict) else None for verdict in announced]
    is_denied = re.search(rf'(?:\n|[.!;]\s+){BARE[1 - opening]}\s*(?:$|[(.,;:–—-])', text, re.MULTILINE)
    return [None if is_denied else harm.reconciled(opening, text)]


def _described_harm(text: str, signed_text: str) -> int | None:
    """Return what the sentences say, or a last YES or NO that they support, unless it may answer another question."""
    asks_harm_alone = all(map(harm.is_asked, re.findall(r'[^.!?\n]*\?', text)))
    last, stated, verdict = re.search(r'[.!]\s+(YES|NO)\W*$', text), harm.stated(text), _last_line(signed_text)
    verdict = HARM.index(last[1]) if verdict is None and last else verdict
    return stated if verdict is None or not asks_harm_alone else verdict if stated in (None, verdict) else None


def _opening(text: str, choices: tuple[str, ...]) -> int | str | None:
    """Return the choice in the first non-empty sentence, if that sentence contains nothing else."""
    if choices == ORDER:
        text = re.sub(rf'([{BARE}{NAMED}])\s*\(([^()]*)(?:\)|\Z)', _remark, text)
    parts, question = re.split(_BREAK, re.sub(r'\([^()]*(?:\)|\Z)', ' ', text)), ''
    for i in range(0, len(parts), 2):
        sentence_words, separator, rest = words(parts[i]), ''.join(parts[i + 1 : i + 2]), ''.join(parts[i + 2 :])
        if '?' in separator or not sentence_words:
            question = parts[i] if '?' in separator else question
            continue
        if question and not (harm.is_asked(question) if choices == HARM else _ASKS.issuperset(words(question))):
            return None
        other_words = {word for word in sentence_words if word not in REF and word not in NEUTRAL}
        if (_TIED & other_words or other_words in ({'both'}, {'neither'})) and other_words <= _TIED | _TOGETHER:
            return None if re.match(_BUT, rest, re.IGNORECASE) or statements.favours(rest) else TIE
        if other_words or len(places(parts[i])) > 1:
            return None
        if places(parts[i]):
            sign_index = next(j for j, word in enumerate(sentence_words) if word in REF)
            is_choice = not _RANKS & {*sentence_words[sign_index:]} and _makes_choice(
                sentence_words[sign_index], len(sentence_words) == 1, separator, rest, choices
            )
            return REF[sentence_words[sign_index]] if is_choice else None
    return None


def _remark(match: re.Match[str]) -> str:
    """Remove a parenthesis behind a choice, unless it may speak against it: '1 (the worse answer)'."""
    return match[1] if _supports(match[2]) else f'{match[1]}, {match[2]}'


def _makes_choice(sign: str, alone: bool, separator: str, rest: str, choices: tuple[str, ...]) -> bool:
    """Tell whether an opening mention is a choice: not a heading, a list number or the subject of a clause."""
    other_sign, separator = f'[{BARE[1 - REF[sign]]}{NAMED[1 - REF[sign]]}]', separator.strip(' ')
    if re.match(rf'\s*{other_sign}\W*(?:\n|\Z)', rest):
        return False
    if choices == HARM:
        return sign == BARE[1] or not re.match(_REFUSED, rest, re.IGNORECASE)
    line, separator = '' if '\n' in separator else rest.partition('\n')[0], separator.strip()
    is_dash = bool(re.fullmatch(r'[-–—=>→]+', separator))
    if _is_corrected(sign, rest, line) or alone and is_dash and _has_marker(other_sign, rest):
        return False
    if _is_against(rest) or line and (is_dash or separator in (',', ':')) and not _supports(line):
        return False
    if sign in NAMED and alone:
        return not (_is_heading(sign, rest) or separator == ':' and rest.strip()) and (
            not line or separator in ('.', '!', 'because', 'since', 'as') or _gives_reason(line)
        )
    return not (sign == BARE[0] and alone and separator in ('.', ')', ':') and line and _starts_list(line, rest))


def _supports(remark: str) -> bool:
    """Tell whether a remark behind a choice begins as a reason or as praise, and does not speak against it."""
    is_reason = _gives_reason(remark) or re.match(_PRAISE, remark, re.IGNORECASE)
    return bool(is_reason) and not _is_against(remark)


def _is_against(remark: str) -> bool:
    """Tell whether a remark calls the answer worse: before it mentions an answer, as in '1, the weaker one'."""
    return bool(re.search(WORSE, re.split(f'[.!?;\n{BARE}{NAMED}]', remark.lstrip())[0], re.IGNORECASE))


def _is_corrected(sign: str, rest: str, line: str) -> bool:
    """Tell whether 'but' and a claim for the other answer follow."""
    return bool(re.match(_BUT, rest, re.IGNORECASE)) and statements.compared(line) == 1 - REF[sign]


def _has_marker(other_sign: str, rest: str) -> bool:
    """Tell whether the other answer has a dash or an equals sign too, as in '1 - worse; 2 - better'."""
    return bool(re.search(rf'(?:^|[.!?;,]\s+){other_sign}\s*[-–—=:→]', rest, re.MULTILINE))


def _is_heading(sign: str, rest: str) -> bool:
    """Tell whether 'Answer 1' is a heading: the other answer also begins a later line."""
    return bool(re.search(rf'^{NAMED[1 - REF[sign]]}\s*(?:[:.–—-]|$)', rest, re.MULTILINE))


def _starts_list(line: str, rest: str) -> bool:
    """Tell whether a '1.' begins a (possibly truncated) list; not if its line gives a reason to choose 1."""
    if re.search(rf'(?:^|[.!?;,]\s+)(?:{BARE[1]}|{mentions.ITEMS[1]})[.):]', rest, re.MULTILINE):
        return True
    line_verdict = statements.compared(line)
    return line_verdict != 0 and not (line_verdict is None and _gives_reason(line))


def _gives_reason(line: str) -> bool:
    return bool(re.match(_REASON, line, re.IGNORECASE))


def _announced(text: str, choices: tuple[str, ...]) -> tuple[list[Verdict], bool]:
    """Return the announced choices ('my choice is 1'), of final ones the last, and whether that is called final."""
    announced: list[tuple[bool, Verdict]] = []
    for match in re.finditer(_ANNOUNCED, text, re.IGNORECASE):
        sentence = re.split(r'[\n.?!;]', text[: match.start()])[-1]
        label = words(re.split(r'[,:]', sentence)[-1])
        if not _is_label(label) or choices == HARM and match[0].startswith('?'):
            continue
        rest, asides = text[match.end() :], [x for x in re.split(r'[,:]', sentence)[:-1] if not places(x)]
        is_about_worse = _is_against(rest) or re.search(rf'{WORSE}|\b(?:if|unless)\b', ','.join(asides), re.IGNORECASE)
        if not is_about_worse:
            announced.append(('final' in label, REF.get(match['ref'], TIE)))
    final_verdicts = [verdict for is_final, verdict in announced if is_final]
    conclusions: list[Verdict] = [REF[match['ref']] for match in re.finditer(_SO, text, re.IGNORECASE)]
    return final_verdicts[-1:] or [*{verdict for _, verdict in announced}] or conclusions[-1:], bool(final_verdicts)


def _is_label(label: list[str]) -> bool:
    return bool(_LABELS & {*label}) and _LABEL_WORDS.issuperset(label)


def _last_line(text: str) -> int | None:
    """Return the choice in the last line, if that line contains nothing else and is no heading or list number."""
    before, _, last = text.rpartition('\n')
    last_words = words(last)
    if not before or len(places(last)) != 1 or any(word not in REF and word not in NEUTRAL for word in last_words):
        return None
    sign, heading = next(word for word in last_words if word in REF), before.rstrip().rpartition('\n')[2]
    if not re.search(r'[.!?)]$', heading) and len(words(heading)) <= 4 and not _is_label(words(heading)):
        return None
    if re.search(rf'^{BARE[1 - REF[sign]]}[.!]?$', before, re.MULTILINE) or _RANKS & {*last_words}:
        return None
    if len(last_words) == 1 and sign in NAMED and _is_heading(sign, before):
        return None
    numbers = zip(BARE, mentions.ITEMS)
    numbered_lines = [bool(re.search(rf'^(?:{"|".join(number)})[.):]', before, re.MULTILINE)) for number in numbers]
    return None if len(last_words) == 1 and sign == BARE[1] and numbered_lines == [True, False] else REF[sign]
