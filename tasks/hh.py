r"""Anthropic's helpful and harmless dialogs: two answers of an assistant, of which people chose one.

Registers hh_{harmless,helpful}_{sft,pairs,prompts}. A row is two transcripts, `\n\nHuman: ..\n\nAssistant: ..`, equal
up to the last answer: what they share, up to and with `Assistant:`, is the prompt, and an answer begins with a space.
The sft target is the chosen answer. `group` is the first thing that the human says.

    HH_HARMLESS_SOURCE, HH_HELPFUL_SOURCE     rows of chosen, rejected: a folder of the clone (harmless-base, ..)

The source has train and test; validation is a share of train, by group, whose case, spaces and punctuation do not
count. An odd row is one whose transcripts do not open alike, part before the last answer, or have an empty answer; up
to 1% are let pass. Two equal transcripts prefer nothing and are passed over. An answer that itself begins with
`Human:`, as some of the real ones do, is that answer.

Source: Bai et al., Training a Helpful and Harmless Assistant with RLHF, arXiv 2204.05862; Anthropic/hh-rlhf.
"""

import dataclasses
import functools
import os.path
from collections.abc import Iterator, Mapping

from perl_jax.tasks import registration, sources, splits

HUMAN, ASSISTANT = '\n\nHuman:', '\n\nAssistant:'


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A dialog up to `Assistant:`, and two answers to it."""

    group: str
    inputs: str
    chosen: str
    rejected: str


def read(row: Mapping[str, str]) -> Comparison | None:
    """The prompt and the two answers of a row. Raises ValueError where there are none."""
    chosen, rejected = row['chosen'], row['rejected']
    if chosen == rejected:
        return None
    shared = os.path.commonprefix([chosen, rejected])
    end = shared.rfind(ASSISTANT)
    if end < 0 or not shared.startswith(HUMAN):
        raise ValueError('the transcripts do not open alike')
    inputs = shared[: end + len(ASSISTANT)]
    answers = [text[len(inputs) :].strip() for text in (chosen, rejected)]
    if not all(answers):
        raise ValueError('an answer is empty')
    if any(turn in answer for turn in (HUMAN, ASSISTANT) for answer in answers):
        raise ValueError('the transcripts part before the last answer')
    opening = splits.normalised(inputs.removeprefix(HUMAN).partition(ASSISTANT)[0])
    return Comparison(opening, inputs, *(f' {answer}' for answer in answers))


def sft(kind: str, split: str) -> Iterator[dict]:
    """Every dialog with the answer that was chosen."""
    for row in SOURCES[kind].rows(split):
        yield {'inputs': row.inputs, 'targets': row.chosen, 'group': row.group}


def pairs(kind: str, split: str) -> Iterator[dict]:
    """Every comparison."""
    for row in SOURCES[kind].rows(split):
        yield {'inputs': row.inputs, 'chosen': row.chosen, 'rejected': row.rejected, 'group': row.group}


def prompts(kind: str, split: str) -> Iterator[dict]:
    """Every dialog once."""
    for inputs, group in dict.fromkeys((row.inputs, row.group) for row in SOURCES[kind].rows(split)):
        yield {'inputs': inputs, 'group': group}


SOURCES = {
    kind: sources.Source(
        f'HH_{kind.upper()}_SOURCE',
        f'hf:Anthropic/hh-rlhf/{kind}-base',
        f'set it to the folder {kind}-base of a clone of huggingface.co/datasets/Anthropic/hh-rlhf',
        read,
    )
    for kind in ('harmless', 'helpful')
}
for _name in SOURCES:
    for _kind in (sft, pairs, prompts):
        registration.add(f'hh_{_name}_{_kind.__name__}', _kind.__name__, functools.partial(_kind, _name))
