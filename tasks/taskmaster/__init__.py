"""Taskmaster Coffee and Ticketing: the PERL paper's thumbs on an agent's next turn, and dialogs to learn it from.

Registers taskmaster_{coffee,ticketing}_{sft,pairs,thumbs,prompts}. The files are read from TASKMASTER_DIR when a task's
data is first asked for (files.py); dialog_text.py shows the text. `group` (not in sft) says which examples come from
one session, for intervals that are bootstrapped by it; outside of train `nearness` says whether a rated session of
train opens almost alike (splits.py).
"""

import functools
from collections.abc import Iterator

from perl_jax.tasks import dialog_text, registration, splits
from perl_jax.tasks.taskmaster import files

DOMAINS = ('coffee', 'ticketing')


def sft(domain: str, split: str) -> Iterator[dict]:
    """Every line of an agent in the dialogs, text or API call, after all that came before it."""
    for dialog in files.dialogs(domain):
        for i, line in enumerate(dialog.lines):
            if dialog.split == split and line.startswith(('agent: ', 'call: ')):
                yield {'inputs': dialog_text.prompt(dialog.lines[:i]), 'targets': line}


def thumbs(domain: str, split: str) -> Iterator[dict]:
    """Every rated answer, duplicates and contradictions too: they say how sure the raters were."""
    session = _sessions(domain, split)
    for row in files.rated(domain):
        if row.split == split:
            inputs = dialog_text.prompt(row.context)
            yield {'inputs': inputs, 'targets': row.answer, 'label': row.label} | session[row.opening]


def pairs(domain: str, split: str) -> Iterator[dict]:
    """Answers to one context, a thumb up against a thumb down, each pair once and never an answer against itself.

    They are the product of both, and the raters judged each answer once: their weights make contexts count alike.
    """
    session = _sessions(domain, split)
    for rows in _by_context(domain, split):
        ups, downs = _answers(rows, 1.0), _answers(rows, 0.0)
        contrasts = [(up, down) for up in ups for down in downs if up != down]
        for chosen, rejected in contrasts:
            inputs = dialog_text.prompt(rows[0].context)
            pair = {'inputs': inputs, 'chosen': chosen, 'rejected': rejected, 'weight': 1 / len(contrasts)}
            yield pair | session[rows[0].opening]


def prompts(domain: str, split: str) -> Iterator[dict]:
    """Every context once; `reference` is the first answer to it with a thumb up, or empty."""
    session = _sessions(domain, split)
    for rows in _by_context(domain, split):
        reference = next(iter(_answers(rows, 1.0)), '')
        inputs = dialog_text.prompt(rows[0].context)
        yield {'inputs': inputs, 'reference': reference} | session[rows[0].opening]


def well_formed(prompt: str, response: str, example: dict) -> float:
    """A text reward or metric: dialog_text.is_well_formed of the response alone."""
    del prompt, example
    return dialog_text.is_well_formed(response)


def valid_coffee_call(prompt: str, response: str, example: dict) -> float:
    """`well_formed`, and a call is a known one whose ids, items and other values all stand in the context.

    Of thumbs this says more than chance: AUC 0.63 of train's and 0.68 of validation's, where known calls alone have
    0.50 (docs/reference/tasks.md).
    """
    del example
    is_known = dialog_text.is_well_formed(response, known_calls('coffee'))
    return is_known * dialog_text.is_grounded(response, prompt)


def valid_ticketing_call(prompt: str, response: str, example: dict) -> float:
    """`well_formed`, and a call is a known one; values are other than the context's there (dates, names of places)."""
    del prompt, example
    return dialog_text.is_well_formed(response, known_calls('ticketing'))


@functools.cache
def known_calls(domain: str) -> dict[str, frozenset[str]]:
    """The APIs called in train by its dialogs and its liked answers, and the names of the arguments each was given."""
    known: dict[str, frozenset[str]] = {}
    liked = (row.answer for row in files.rated(domain) if row.split == 'train' and row.label == 1.0)
    for line in (*(example['targets'] for example in sft(domain, 'train')), *liked):
        if call := dialog_text.parse_call(line):
            known[call[0]] = known.get(call[0], frozenset()).union(call[1])
    return known


def _sessions(domain: str, split: str) -> dict[str, dict[str, str]]:
    """What the examples of each opening say of it."""
    rated = files.rated(domain)
    train, mine = ({row.opening for row in rated if row.split == name} for name in ('train', split))
    if split == 'train':
        return {opening: {'group': opening} for opening in train}
    return {opening: {'group': opening, 'nearness': splits.nearness(opening, train)} for opening in mine}


def _by_context(domain: str, split: str) -> list[list[files.Rated]]:
    groups = {}
    for row in files.rated(domain):
        if row.split == split:
            groups.setdefault(row.context, []).append(row)
    return list(groups.values())


def _answers(rows: list[files.Rated], label: float) -> list[str]:
    return list(dict.fromkeys(row.answer for row in rows if row.label == label))


for _domain in DOMAINS:
    for _kind in (sft, pairs, thumbs, prompts):
        registration.add(f'taskmaster_{_domain}_{_kind.__name__}', _kind.__name__, functools.partial(_kind, _domain))
