"""The report's curves: every metric over the steps, and reward and truth over the KL to the anchor."""

import numpy as np

from perl_jax.tools.report import plots
from perl_jax.tools.report.formats import esc, plural
from perl_jax.tools.report.metrics import KL, REWARD, TRUTH, Metric, others, present, smooth
from perl_jax.tools.report.overview import by_phase, looks, phase_name, run_name
from perl_jax.tools.report.reader import Run


def curves(runs: list[Run]) -> str:
    """The panels of each phase under one legend, and the numbers that the report does not know in a fold."""
    drawn, parts = looks(runs), []
    for phase, group in by_phase(runs).items():
        panels = ''.join(_panel(metric, group, drawn) for metric in present(group))
        rest = [_panel(metric, group, drawn) for metric in others(group)]
        many = ' many' if len(group) > 3 else ''
        key = legend(group, drawn, 'dots: evaluations; faint lines: as logged, before smoothing')
        parts.append(f'<h3>{esc(phase_name(phase, long=True))}</h3>{key}<div class="grid{many}">{panels}</div>')
        if rest:
            name = plural(len(rest), 'other logged number')
            parts.append(f'<details><summary>{name}</summary><div class="grid">{"".join(rest)}</div></details>')
    return ''.join(parts)


def reward_against_kl(runs: list[Run]) -> str:
    """Reward and truth over KL for the policy runs; '' if none logged both a reward and a KL."""
    drawn, rewards, truths = looks(runs), [], []
    group = [run for run in runs if 'train' in REWARD.curves(run) and 'train' in KL.curves(run)]
    for run in group:
        steps, kl = KL.curves(run)['train']
        score = np.interp(steps, *REWARD.curves(run)['train'])
        rewards.append(plots.Line(run.label, kl, score, kind='dots', **drawn[run.label]))
        path, start = (smooth(kl), smooth(score)), REWARD.start(run)
        if start is not None:  # at step 0 the policy is the anchor
            path = np.append(0.0, path[0]), np.append(start, path[1])
        rewards.append(plots.Line(run.label, *path, kind='path', **drawn[run.label]))
        if 'eval' in TRUTH.curves(run):
            at, truth = TRUTH.curves(run)['eval']
            reached = np.where(at > 0, np.interp(at, steps, smooth(kl)), 0.0)
            truths.append(plots.Line(run.label, reached, truth, kind='eval', **drawn[run.label]))
    if not rewards:
        return ''
    text = (
        'How much reward each step away from the anchor buys. Where the reward still climbs while the truth falls, the '
        'policy over-optimises: it has learned the flaws of the reward model.'
    )
    axis = 'KL to the anchor (nats per answer)'
    svg = plots.plot(rewards, 'Reward over KL', axis, plots.WIDE)
    note = 'A dot for each logged step; the line is smoothed, starts at the anchor and ends in the large dot.'
    made = _figure('Reward over KL', REWARD.unit, note, svg)
    if truths:
        svg = plots.plot(truths, 'Truth over KL', axis, plots.WIDE, share=True)
        made += _figure('Truth over KL', TRUTH.unit, 'A dot for each evaluation.', svg)
    return f'<p class="note">{text}</p>{legend(group, drawn)}<div class="grid wide">{made}</div>'


def legend(group: list[Run], drawn: dict[str, dict], note: str = '') -> str:
    """The line of each run with its label and tuning, and a note on the other marks."""
    items = ''.join(
        f'<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true"><path class="smooth c{drawn[run.label]["color"]}'
        f'{" dashed" if drawn[run.label]["dashed"] else ""}" d="M1 5H25"/></svg>{run_name(run)}</li>'
        for run in group
    )
    return f'<ul class="legend">{items}' + (f'<li class="soft">{esc(note)}</li>' if note else '') + '</ul>'


def _panel(metric: Metric, group, drawn):
    lines = []
    for run in group:
        found, look = metric.curves(run), drawn[run.label]
        if 'train' in found:
            steps, values = found['train']
            calm = smooth(values)
            lines.append(plots.Line(run.label, steps, calm, **look))
            if calm is not values:
                lines.append(plots.Line('', steps, values, kind='raw', **look))
        if 'eval' in found:
            lines.append(plots.Line(f'{run.label}, evaluation', *found['eval'], kind='eval', **look))
    svg = plots.plot(lines, metric.title, 'step', share=metric.share, zero=metric.zero)
    return _figure(metric.title, metric.unit, metric.note, svg)


def _figure(title, unit, note, svg):
    unit = f' <span class="soft">{esc(unit)}</span>' if unit else ''
    note = f'<p class="note">{esc(note)}</p>' if note else ''
    return f'<figure><figcaption><b>{esc(title)}</b>{unit}</figcaption>{svg}{note}</figure>'
