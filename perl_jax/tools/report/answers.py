"""The report's answers: the SFT model's and the policy's side by side, with their scores and what changed."""

import difflib
import re

from perl_jax.tools.report.formats import esc, percent, plural, score
from perl_jax.tools.report.overview import run_name
from perl_jax.tools.report.reader import Run

ROWS = 40  # on the whole page, shared by the runs that have samples
KNOWN = {'step', 'score', 'truth', 'tokens'}
LONGEST = 4000  # characters of a text that are shown; of a prompt the end, which the answer follows


def answers(runs: list[Run]) -> str:
    """A fold for each run with samples, its last sampled step only; '' if no run has any."""
    runs = [run for run in runs if run.samples]
    pairs = [run for run in runs if any('sft_response' in row for row in run.samples)]
    runs = pairs or runs  # where a policy is on the page, its rows already show the SFT model's answers
    share = max(ROWS // max(len(runs), 1), 3)
    return ''.join(_fold(run, share, place == 0) for place, run in enumerate(runs))


def verdict(row: dict) -> str | None:
    """'better', 'worse' or 'same' for the policy's answer against SFT's: by truth, without one by score.

    None if the row has no SFT answer, or nothing to judge the two by.
    """
    if 'sft_response' not in row:
        return None
    if row['sft_response'] == row.get('response'):
        return 'same'
    for key in ('truth', 'score'):
        new, old = _figure(row, key), _figure(row, f'sft_{key}')
        if new is not None and old is not None:
            return 'same' if abs(new - old) < 1e-9 else 'better' if new > old else 'worse'
    return None


def changes(old: str, new: str) -> tuple[str, str]:
    """Both texts as HTML, with the words that only one of them has marked; unmarked if they have little in common."""
    a, b = (re.findall(r'\w+|\s+|[^\w\s]', text) for text in (old, new))
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    if len(a) * len(b) > 1_000_000 or not 0.3 <= matcher.ratio() < 1:
        return esc(old), esc(new)
    left, right = [], []
    for kind, i, j, m, n in matcher.get_opcodes():
        gone, came = esc(''.join(a[i:j])), esc(''.join(b[m:n]))
        left.append(gone if kind == 'equal' or not gone else f'<del>{gone}</del>')
        right.append(came if kind == 'equal' or not came else f'<ins>{came}</ins>')
    return ''.join(left), ''.join(right)


def _fold(run, limit, opened):
    step, rows = run.last_samples()
    counts = {kind: sum(verdict(row) == kind for row in rows) for kind in ('better', 'same', 'worse')}
    both = any('sft_response' in row for row in rows)
    shown = plural(len(rows), 'answer') if len(rows) <= limit else f'the first {limit} of {len(rows):,} answers'
    note = f'Step {step:,}; {shown}.'
    if any(counts.values()):
        judged = 'truth' if any('truth' in row for row in rows) else 'score'
        chips = ' '.join(f'<span class="chip {kind}">{count:,} {kind}</span>' for kind, count in counts.items())
        note += f' Policy against SFT, over all {len(rows):,}, by {judged}: <span class="chips">{chips}</span>'
    body = ''.join(_row(row, both) for row in rows[:limit])
    heads = ['Prompt', 'SFT answer', 'Policy answer'] if both else ['Prompt', 'Answer']
    head = ''.join(f'<div role="columnheader">{text}</div>' for text in heads)
    kind = 'three' if both else 'two'
    table = f'<div role="table" class="{kind}"><div class="row head" role="row">{head}</div>{body}</div>'
    top = f'<summary>{run_name(run)}</summary><p class="note">{note}</p>'
    return f'<details class="fold"{" open" if opened else ""}>{top}{table}</details>'


def _row(row, both):
    prompt, answer = str(row.get('prompt', '')).strip(), _cut(str(row.get('response', '')))
    prompt = esc(prompt) if len(prompt) <= LONGEST else '… ' + esc(prompt[-LONGEST:])
    if row.get('reference') is not None:
        prompt += f'<p class="reference"><span>Reference</span> {esc(_cut(str(row["reference"])))}</p>'
    kind = verdict(row)
    chip = f'<span class="chip {kind}">{kind}</span>' if kind else ''
    cells = [('prompt', prompt, '')]
    if both:
        old, new = changes(_cut(str(row.get('sft_response', ''))), answer)
        cells.append(('sft', _text(old), _judged(row, 'sft_')))
        cells.append(('policy', _text(new), _judged(row, '') + chip))
    else:
        cells.append(('policy', _text(esc(answer)), _judged(row, '')))
    made = ''.join(
        f'<div class="{name}" role="cell"><div class="text">{text}</div>'
        + (f'<p class="judged">{judged}</p>' if judged else '')
        + '</div>'
        for name, text, judged in cells
    )
    return f'<div class="row" role="row">{made}</div>'


def _judged(row, prefix):
    reward, truth = _figure(row, f'{prefix}score'), _figure(row, f'{prefix}truth')
    told = []
    if truth is not None:
        word = {0.0: '✗ wrong', 1.0: '✓ right'}.get(truth, f'truth {percent(truth, 0)}')
        told.append(f'<span class="truth {"right" if truth >= 0.5 else "wrong"}">{word}</span>')
    if reward is not None:
        told.append(f'<span>score <b>{score(reward)}</b></span>')
    for key in row:  # what METRIC_FNS adds
        value = None if key in KNOWN or key.startswith('sft_') else _figure(row, prefix + key)
        if value is not None:
            told.append(f'<span>{esc(key)} <b>{score(value)}</b></span>')
    if (tokens := _figure(row, f'{prefix}tokens')) is not None:
        told.append(f'<span>{plural(int(tokens), "token")}</span>')
    return ''.join(told)


def _figure(row, key):
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else None


def _cut(text):
    return text if len(text) <= LONGEST else text[:LONGEST] + ' …'


def _text(markup):
    return markup if markup.strip() else '<span class="none">(empty)</span>'
