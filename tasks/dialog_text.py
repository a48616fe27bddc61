"""Taskmaster's turns as compact text, one turn a line, and back: what the models read and write.

    agent: Welcome to the Coffee Bar.                       {'role': 'agent', 'text': ...}
    user: a latte with oat milk                             {'role': 'user', 'text': ...}
    call: add_order_item(menu_item_id=latte-0002, attributes=[{attribute_id=milk-options, option=Oat Milk}])
    resp: order_id=60179, order_item_id=45332               {'role': 'api', 'response': {NAME: {...}}}

A value is bare where it can be and a JSON string where it has to be (it holds one of , = [ ] { } " or is empty), so
that a line parses again without guessing: `location="Salem, Oregon"`. A list is [a, b] and an object {k=v, k=v}; a
list of one plain value is written as that value, because Ticketing's two sources disagree on whether it is a list.
Every run of white space is one space: a turn never spans lines.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_NAME = re.compile(r'[A-Za-z_]\w*')
_KEY = re.compile(r'\s*([\w.-]+)=')
_BARE = re.compile(r'[^,=\[\]{}"\n]+')
_WORDS = ('two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten')
_NUMBERS = {str(n): word for n, word in enumerate(_WORDS, start=2)}
_SPEAKER = re.compile(r'^(?:user|agent|call|resp):', re.MULTILINE)
_CALL = re.compile(rf'call: ({_NAME.pattern})\((.*)\)')


def lines(turns: Iterable[Mapping[str, Any]]) -> list[str]:
    """Turns in Taskmaster's schema -> one line each. Raises ValueError for a turn that is not of that schema."""
    out, called = [], None
    for turn in turns:
        match turn:
            case {'role': 'user' | 'agent' as role, 'text': str(text)}:
                out.append(f'{role}: {_one_line(text)}'.rstrip())
            case {'role': 'agent', 'api': {**api}} if len(api) == 1:
                ((called, args),) = api.items()
                out.append(f'call: {called}({_pairs(_mapping(args))})')
            case {'role': 'api', 'response': {**response}} if len(response) == 1:
                out.append(_response_line(called, *response.popitem()))
            case _:
                raise ValueError(f'not a turn: {json.dumps(turn, ensure_ascii=False)[:80]}')
    return out


def prompt(context: Iterable[str]) -> str:
    """Lines of a context -> the text that a model continues with `agent: ...` or `call: ...`; never empty."""
    return '\n'.join(context) + '\n'


def parse_call(line: str) -> tuple[str, dict[str, Any]] | None:
    """A `call: NAME(k=v, ..)` line -> its name and arguments (str, list and dict values); None where it is none."""
    match = _CALL.fullmatch(line)
    if match is None:
        return None
    try:
        args, rest = _read_pairs(match[2]) if match[2] else ({}, '')
    except (ValueError, RecursionError):
        return None
    return None if rest else (match[1], args)


def is_well_formed(response: str, known: Mapping[str, Collection[str]] | None = None) -> float:
    """1.0 for one line that is agent text or an API call of the grammar above, else 0.0.

    A call without a name does not count: `call: ()`, the data's way of saying "no such service". With `known` (see
    taskmaster.known_calls) a call must also be of an API in it, with no argument but those it lists (what is inside an
    argument is not looked at). White space after the line does not matter.
    """
    line = response.rstrip()
    if '\n' in line:
        return 0.0
    if line.startswith('agent: '):
        return 1.0
    call = parse_call(line)
    return float(call is not None and (known is None or (call[0] in known and set(call[1]) <= set(known[call[0]]))))


def is_grounded(response: str, context: str) -> float:
    """1.0 for a response whose call has only values that are in the context, in any case; 1.0 too for no call.

    A value counts as a whole, or in the plural: 2 is not in latte-0002. A small number may be spelled, and 1 needs no
    word, as in "a latte". The word that begins a line (`user: `) is not searched.
    """
    call = parse_call(response.rstrip())
    turn_texts = _SPEAKER.sub('', context).lower()
    return float(call is None or all(_is_in(value.lower(), turn_texts) for value in _plain_values(call[1])))


def _is_in(value: str, context: str) -> bool:
    forms = {value, json.dumps(value, ensure_ascii=False)[1:-1], _NUMBERS.get(value, value)}  # a line may escape it
    patterns = (rf'(?<![\w-]){re.escape(form)}(?:e?s)?(?![\w-])' for form in forms)
    return value in ('', '1') or any(re.search(pattern, context) for pattern in patterns)


def _plain_values(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _plain_values(item)


def _one_line(text: str) -> str:
    return ' '.join(text.split())


def _mapping(args: Any) -> Mapping[str, Any]:
    if not isinstance(args, dict):
        raise ValueError(f'the arguments of a call must be an object: {json.dumps(args)[:80]}')
    return args


def _response_line(called: str | None, name: str, value: Any) -> str:
    # Only a response under another name than its call (`invalid_intent`) needs to say whose it is.
    body = (_pairs(value) or '{}') if isinstance(value, dict) else _value(value)
    return f'resp: {body}' if name == called else f'resp: {name} {body}'


def _pairs(args: Mapping[str, Any]) -> str:
    return ', '.join(f'{_one_line(key)}={_value(value)}' for key, value in args.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return '{' + _pairs(value) + '}'
    if isinstance(value, list):
        plain = len(value) == 1 and not isinstance(value[0], (dict, list))
        return _value(value[0]) if plain else '[' + ', '.join(map(_value, value)) + ']'
    if not isinstance(value, str):
        return json.dumps(value)
    text = _one_line(value)
    return text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _read_pairs(text: str) -> tuple[dict[str, Any], str]:
    """Reads `k=v, k=v` from the front of a text -> the pairs and what is left of it. ValueError: not of the grammar."""
    pairs = {}
    while key := _KEY.match(text):
        if key[1] in pairs:
            raise ValueError('a key stands twice')
        pairs[key[1]], text = _read_value(text[key.end() :])
        if not text.startswith(','):
            return pairs, text
        text = text[1:]
    raise ValueError('no key')


def _read_value(text: str) -> tuple[Any, str]:
    """Reads one value from the front of a text -> the value and what is left of it. ValueError: not of the grammar."""
    if text[:2] in ('[]', '{}'):
        return ([] if text[0] == '[' else {}), text[2:]
    if text.startswith('{'):
        value, text = _read_pairs(text[1:])
        return value, _after('}', text)
    if text.startswith('['):
        value, text = [], ',' + text[1:]
        while text.startswith(','):
            item, text = _read_value(text[1:].lstrip(' '))
            value.append(item)
        return value, _after(']', text)
    if text.startswith('"'):
        value, end = json.JSONDecoder().raw_decode(text)
        return value, text[end:]
    bare = _BARE.match(text)
    if bare is None:
        raise ValueError('no value')
    return bare[0], text[bare.end() :]


def _after(closing: str, text: str) -> str:
    if not text.startswith(closing):
        raise ValueError(f'no {closing}')
    return text[1:]
