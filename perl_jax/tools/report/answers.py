"""The report's answers: those of the SFT model and of the policy side by side, with scores and differences."""

import difflib
import re

from perl_jax.tools.report.formats import esc, percent, plural, score
from perl_jax.tools.report.overview import run_name
from perl_jax.tools.report.reader import Run, is_finite

ROWS = 40  # on the whole page, shared by the runs that have samples
KNOWN = {'step', 'score', 'truth', 'tokens'}
LONGEST = 4000  # characters shown of a text: the end of a prompt, the start of an answer


def answers(runs: list[Run]) -> str:
    """Return a collapsible section for each run with samples, of its last sampled step; '' if no run has any."""
    runs = [run for run in runs if run.samples]
    runs_with_pairs = [run for run in runs if any('sft_response' in row for row in run.samples)]
    runs = runs_with_pairs or runs  # where a policy is on the page, its rows already show the SFT model's answers
    rows_per_run = max(ROWS // max(len(runs), 1), 3)
    return ''.join(_fold(run, rows_per_run, index == 0) for index, run in enumerate(runs))


def verdict(row: dict) -> str | None:
    """Compare the policy's answer with SFT's by truth, or by score without a truth: 'better', 'worse' or 'same'.

    None if the row has no SFT answer, or neither truth nor score.
    """
    if 'sft_response' not in row:
        return None
    if row['sft_response'] == row.get('response'):
        return 'same'
    for key in ('truth', 'score'):
        new, old = _number(row, key), _number(row, f'sft_{key}')
        if new is not None and old is not None:
            return 'same' if abs(new - old) < 1e-9 else 'better' if new > old else 'worse'
    return None


def changes(old: str, new: str) -> tuple[str, str]:
    """Return both texts as HTML with differing words marked; unmarked if the texts have little in common."""
    old_words, new_words = (re.findall(r'\w+|\s+|[^\w\s]', text) for text in (old, new))
    matcher = difflib.SequenceMatcher(None, old_words, new_words, autojunk=False)
    if len(old_words) * len(new_words) > 1_000_000 or not 0.3 <= matcher.ratio() < 1:
        return esc(old), esc(new)
    old_html, new_html = [], []
    for kind, i, j, m, n in matcher.get_opcodes():
        removed, added = esc(''.join(old_words[i:j])), esc(''.join(new_words[m:n]))
        old_html.append(removed if kind == 'equal' or not removed else f'<del>{removed}</del>')
        new_html.append(added if kind == 'equal' or not added else f'<ins>{added}</ins>')
    return ''.join(old_html), ''.join(new_html)


def _fold(run, limit, is_open):
    step, rows = run.last_samples()
    counts = {
        verdict_name: sum(verdict(row) == verdict_name for row in rows) for verdict_name in ('better', 'same', 'worse')
    }
    has_anchor = any('sft_response' in row for row in rows)
    shown = plural(len(rows), 'answer') if len(rows) <= limit else f'the first {limit} of {len(rows):,} answers'
    note = f'Step {step:,}; {shown}.'
    if any(counts.values()):
        criterion = 'truth' if any('truth' in row for row in rows) else 'score'
        chips = ' '.join(
            f'<span class="chip {verdict_name}">{count:,} {verdict_name}</span>'
            for verdict_name, count in counts.items()
        )
        note += f' Policy against SFT, over all {len(rows):,}, by {criterion}: <span class="chips">{chips}</span>'
    body = ''.join(_row(row, has_anchor) for row in rows[:limit])
    headings = ['Prompt', 'SFT answer', 'Policy answer'] if has_anchor else ['Prompt', 'Answer']
    header = ''.join(f'<div role="columnheader">{text}</div>' for text in headings)
    columns_class = 'three' if has_anchor else 'two'
    table = f'<div role="table" class="{columns_class}"><div class="row head" role="row">{header}</div>{body}</div>'
    top = f'<summary>{run_name(run)}</summary><p class="note">{note}</p>'
    return f'<details class="fold"{" open" if is_open else ""}>{top}{table}</details>'


def _row(row, has_anchor):
    prompt, answer = str(row.get('prompt', '')).strip(), _truncate(str(row.get('response', '')))
    prompt = esc(prompt) if len(prompt) <= LONGEST else '… ' + esc(prompt[-LONGEST:])
    if row.get('reference') is not None:
        prompt += f'<p class="reference"><span>Reference</span> {esc(_truncate(str(row["reference"])))}</p>'
    verdict_name = verdict(row)
    chip = f'<span class="chip {verdict_name}">{verdict_name}</span>' if verdict_name else ''
    cells = [('prompt', prompt, '')]
    if has_anchor:
        old, new = changes(_truncate(str(row.get('sft_response', ''))), answer)
        cells.append(('sft', _text_html(old), _scores_html(row, 'sft_')))
        cells.append(('policy', _text_html(new), _scores_html(row, '') + chip))
    else:
        cells.append(('policy', _text_html(esc(answer)), _scores_html(row, '')))
    cell_html = ''.join(
        f'<div class="{name}" role="cell"><div class="text">{text}</div>'
        + (f'<p class="judged">{scores_html}</p>' if scores_html else '')
        + '</div>'
        for name, text, scores_html in cells
    )
    return f'<div class="row" role="row">{cell_html}</div>'


def _scores_html(row, prefix):
    reward, truth = _number(row, f'{prefix}score'), _number(row, f'{prefix}truth')
    items = []
    if truth is not None:
        truth_label = {0.0: '✗ wrong', 1.0: '✓ right'}.get(truth, f'truth {percent(truth, 0)}')
        items.append(f'<span class="truth {"right" if truth >= 0.5 else "wrong"}">{truth_label}</span>')
    if reward is not None:
        items.append(f'<span>score <b>{score(reward)}</b></span>')
    for key in row:  # columns of METRIC_FNS
        value = None if key in KNOWN or key.startswith('sft_') else _number(row, prefix + key)
        if value is not None:
            items.append(f'<span>{esc(key)} <b>{score(value)}</b></span>')
    if (tokens := _number(row, f'{prefix}tokens')) is not None:
        items.append(f'<span>{plural(int(tokens), "token")}</span>')
    return ''.join(items)


def _number(row, key):
    value = row.get(key)
    return float(value) if is_finite(value) else None


def _truncate(text):
    return text if len(text) <= LONGEST else text[:LONGEST] + ' …'


def _text_html(markup):
    return markup if markup.strip() else '<span class="none">(empty)</span>'
