r"""BOLT English SMS/Chat (LDC2018T19): conversations to summarise. There are no summaries: the reward is TL;DR's.

Registers bolt_prompts. A conversation is one line a message, `A: ..`, and ends `\n\nTL;DR:` as the posts of tldr.py do.
Participants are A, B, .. in the order in which they speak, and what looks like a phone number is `[number]`: the paper
removed names and redacted numbers, but says no more of the format. Names inside messages stay.

    BOLT_SOURCE     a folder of the corpus' XML files, or JSON lines: id, messages [{participant, text}]

The XML is read as <conversation id> with <message participant> and <body> anywhere below it. This format is from
memory, because the corpus needs a licence that we do not have: check the texts first with `perl_jax inspect
--task=bolt_prompts`. The paper's split is not published; ours is by a hash of the conversation's id (sources.py).
`group` is that id.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from xml.etree import ElementTree

from perl_jax.tasks import registration, sources

_NUMBER = re.compile(r'\+?\(?\d(?:[\s().-]{0,2}\d){6,14}')  # 7 digits or more, together or in the usual groups


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One conversation as a prompt."""

    group: str
    inputs: str


def read(row: Mapping) -> Conversation:
    """The prompt of a conversation. Raises ValueError where nobody says anything."""
    names, lines = {}, []
    for message in row['messages']:
        text = ' '.join(message['text'].split())
        if text:
            speaker = names.setdefault(message['participant'], _name(len(names)))
            lines.append(f'{speaker}: {_NUMBER.sub("[number]", text)}')
    if not lines:
        raise ValueError('no message has a text')
    return Conversation(str(row['id']), '\n'.join(lines) + '\n\nTL;DR:')


def prompts(split: str) -> Iterator[dict]:
    """Every conversation."""
    for row in SOURCE.rows(split):
        yield {'inputs': row.inputs, 'group': row.group}


def _name(number: int) -> str:
    return chr(ord('A') + number) if number < 26 else f'P{number + 1}'


def _xml(file: pathlib.Path) -> Iterator[Mapping | str]:
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        yield f'not XML: {error}'  # an odd row: one file of 18,429 is no reason to stop
        return
    for conversation in root.iter('conversation'):
        messages = [
            {'participant': message.get('participant', ''), 'text': ''.join(body.itertext())}
            for message in conversation.iter('message')
            if (body := message.find('body')) is not None
        ]
        yield {'id': conversation.get('id', file.stem), 'messages': messages}


SOURCE = sources.Source(
    'BOLT_SOURCE',
    None,
    'get catalog.ldc.upenn.edu/LDC2018T19 (it needs a licence) and set it to the folder of its XML files',
    read,
    files=(('*.xml', _xml),),
)
registration.add('bolt_prompts', 'prompts', prompts)
